"""Structured strings have the structure that their kind names."""

import numpy as np
import pytest

from attn.studies.lengths.strings import structured


@pytest.mark.parametrize("length", [2, 9, 10])
@pytest.mark.parametrize("symbols", [2, 16])
def test_every_kind_is_what_it_is_called(length, symbols):
    kinds = structured(length, symbols)
    for strings in kinds.values():
        assert strings.shape[1] == length and strings.min() >= 1 and strings.max() <= symbols
    assert (np.ptp(kinds["constant"], axis=1) == 0).all() and len(np.unique(kinds["constant"])) == 2
    odd = kinds["one odd"]
    assert ((odd == symbols).sum(axis=1) == 1).all() and set(odd.argmax(axis=1)) == set(range(length))
    alternating = kinds["alternating"]
    assert (alternating[:, 1:] != alternating[:, :-1]).all() and (alternating[0] != alternating[1]).all()
    for number, period in enumerate(np.repeat([3, 5, 7], 4)):
        row = kinds["periodic"][number]
        assert (row[period:] == row[:-period]).all()
    assert (kinds["palindromes"] == kinds["palindromes"][:, ::-1]).all()
    ends = kinds["equal but the ends"]
    assert (ends[:, 1:-1] == 1).all()
    assert {tuple(row) for row in ends[:, [0, -1]] == symbols} == {(True, False), (False, True), (True, True)}
