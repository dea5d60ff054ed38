"""Text to symbols and back."""

import pytest

from attn.tasks.sequences import Task
from attn.tasks.vocabulary import InputError, answer_text, names, parse

TASK = Task(symbols=12)


def test_parsing_and_printing_are_inverse():
    assert parse(TASK, " 3 1  12\t1 ").tolist() == [3, 1, 12, 1]
    assert answer_text(TASK, [3, 1, 12, TASK.end, 0, 0]) == "3 1 12"
    assert answer_text(TASK, [TASK.end, 0]) == ""
    assert names(TASK, [0, TASK.begin, 5, TASK.end]) == ["pad", "begin", "5", "end"]


@pytest.mark.parametrize("text", ["", "   ", "0", "13", "-1", "1.5", "a", "1_0", "٣", "1 2 x", "9" * 5000])
def test_bad_input_is_named_in_one_short_line(text):
    with pytest.raises(InputError) as error:
        parse(TASK, text)
    assert len(str(error.value)) < 120
    assert "1..12" in str(error.value)
