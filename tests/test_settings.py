"""Error messages of settings: they say what was given and what is allowed."""

import os
import pathlib

import numpy as np
import pytest

from attn.settings import LENGTHS, PATH, Constraint, between, checked, error_message, one_of


@pytest.mark.parametrize(
    ("hint", "value", "constraint"),
    [
        (int, 3, between(1, 3)),
        (int, np.int64(3), between(1, 3)),
        (int, 10**400, None),
        (float, 3, between(0, open_low=True)),
        (float, np.float32(0.5), between(0, 1, open_high=True)),
        (bool, False, None),
        (str | None, None, one_of("ab")),
        (str | os.PathLike, pathlib.Path("x"), PATH),
        (list[int], range(1, 3), LENGTHS),
        (list[int], np.array([1, 2]), LENGTHS),
    ],
)
def test_an_allowed_value_has_no_message(hint, value, constraint):
    assert error_message(hint, value, constraint) is None


@pytest.mark.parametrize(
    ("hint", "value", "constraint", "expected"),
    [
        (int, 0, between(1, 3), "got 0, must be a whole number at least 1 and at most 3"),
        (int, 2.0, between(1), "got 2.0, must be a whole number at least 1"),
        (int, True, None, "got True, must be a whole number"),
        (float, 1, between(0, 1, open_high=True), "got 1, must be a number at least 0 and less than 1"),
        (float, 0, between(0, open_low=True), "got 0, must be a number greater than 0"),
        (float, float("nan"), None, "got nan, must be a number"),
        (float, np.float32("inf"), between(0), "got np.float32(inf), must be a number at least 0"),
        (bool, 1, None, "got 1, must be true or false"),
        (bool | None, "yes", None, "got 'yes', must be true or false or None"),
        (str, "lsat", one_of(["first", "last"]), "got 'lsat', must be one of first, last (did you mean 'last'?)"),
        (str, ["last"], one_of(["first", "last"]), "got ['last'], must be one of first, last"),
        (str | os.PathLike | None, b"x", PATH, "got b'x', must be a path or None"),
        (int, "x" * 300, None, f"got '{'x' * 199}…, must be a whole number"),
        (Constraint, 5, None, "got 5, must be Constraint"),
    ],
)
def test_the_message_names_what_was_given_and_what_is_allowed(hint, value, constraint, expected):
    assert error_message(hint, value, constraint) == expected


@checked(count=between(1))
def draw(count: int, name: str = "a", *, seed: int | None = None) -> tuple:
    return count, name, seed


def test_arguments_are_checked_however_they_are_given():
    assert draw(2) == draw(count=2) == (2, "a", None)
    assert draw(2, "b", seed=3) == (2, "b", 3)
    bad = {
        "count: none given, must be a whole number at least 1": lambda: draw(),
        "count: got 0, must be a whole number at least 1": lambda: draw(0),
        "name: got 5, must be text": lambda: draw(1, 5),
        "seed: got 'x', must be a whole number or None": lambda: draw(1, seed="x"),
        "sede: unknown (did you mean 'seed'?); known are count, name, seed": lambda: draw(1, sede=3),
    }
    for message, call in bad.items():
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message
