"""Text to tokens and back."""

import pytest

from attn.tasks.rules import RULES
from attn.tasks.vocabulary import InputError, Pieces, Symbols

SYMBOLS = Symbols(12)
LETTERS = Pieces((" ", "\n", "a", "b", "é"), "characters", "characters", ((1, 3), (4, 6)))


def test_symbols_are_read_and_written():
    assert SYMBOLS.read(" 3 1  12\t1 ") == [3, 1, 12, 1]
    assert SYMBOLS.write([3, 1, 12, SYMBOLS.end, 0, 0]) == "3 1 12"
    assert SYMBOLS.write([SYMBOLS.end, 0]) == ""
    assert SYMBOLS.names([0, SYMBOLS.begin, 5, SYMBOLS.end]) == ["pad", "begin", "5", "end"]
    assert sorted({0, SYMBOLS.begin, SYMBOLS.end, *range(1, 13)}) == list(range(SYMBOLS.size))


@pytest.mark.parametrize("text", ["", "   ", "0", "13", "-1", "1.5", "a", "1_0", "٣", "1 2 x", "9" * 5000])
def test_bad_input_is_named_in_one_short_line(text):
    with pytest.raises(InputError) as error:
        SYMBOLS.read(text)
    assert len(str(error.value)) < 120
    assert "1..12" in str(error.value)


def test_characters_are_read_and_written():
    assert LETTERS.read("ab éz") == [3, 4, 1, 5, LETTERS.unknown]
    assert LETTERS.unknown_pieces("zabzy") == ["z", "y"]
    assert LETTERS.write([3, 1, 5, LETTERS.end, 4, 0]) == "a é"
    assert LETTERS.write([LETTERS.unknown, LETTERS.begin, 0]) == "\ufffd\ufffd"
    assert LETTERS.names([0, 1, 2, 5, LETTERS.unknown, LETTERS.begin, LETTERS.end]) == [
        "pad",
        "␣",
        "\\n",
        "é",
        "unknown",
        "begin",
        "end",
    ]
    assert {LETTERS.begin, LETTERS.end, LETTERS.unknown} | set(range(6)) == set(range(LETTERS.size))
    with pytest.raises(InputError, match="empty"):
        LETTERS.read("")


def test_words_and_bytes_are_read_and_written():
    words = Pieces(("one", "two"), "words", "words", ((2, 2),))
    assert words.read(" two  one three") == [2, 1, words.unknown]
    assert words.write([1, 2, words.end]) == "one two"
    octets = Pieces(tuple(map(chr, range(256))), "bytes", "bytes", ((2, 2),))
    assert octets.read("é") == [0xC3 + 1, 0xA9 + 1]
    assert octets.write(octets.read("naïve €")) == "naïve €"
    assert octets.write([0xC3 + 1]) == "\ufffd"  # half a character
    assert octets.write([octets.unknown, ord("a") + 1]) == "\ufffda"
    assert octets.read("\udcff")  # half a surrogate pair, which UTF-8 lacks


def test_each_side_is_written_in_its_own_way():
    mixed = Pieces(("K", "AE", "T", "c", "a", "t"), "characters", "words", ((3, 3),))
    assert mixed.write(mixed.read("cat"), side="source") == "cat"
    assert mixed.write([1, 2, 3, mixed.end]) == "K AE T"


def test_bytes_and_characters_share_a_vocabulary():
    mixed = Pieces(("ж", *map(chr, range(256))), "characters", "bytes", ((1, 2),))
    assert mixed.read("жa") == [1, ord("a") + 2]
    assert mixed.write([0xC3 + 2, 0xA9 + 2, 1, mixed.end]) == "éж"


def test_an_answer_without_an_end_is_written_without_its_padding():
    assert LETTERS.write([1, 2, 0, 0]) == LETTERS.write([1, 2, LETTERS.end, 0]) == LETTERS.write([1, 2])
    assert Symbols(5).write([3, 1, 0, 0]) == "3 1"


def test_an_unknown_tokenizer_is_named():
    with pytest.raises(ValueError, match="'letters' and 'words', must be of characters, words, bytes"):
        Pieces(("a",), "letters", "words", ((1, 1),))


def test_capacity_grows_for_sources_longer_than_any_of_training():
    assert [LETTERS.capacity(n) for n in (1, 4, 8, 9)] == [7, 7, 13, 15]
    assert Symbols(5, RULES["duplicate"]).capacity(7) == 15


def test_capacity_for_short_sources_is_not_that_of_the_longest():
    pieces = Pieces(("a",), "characters", "characters", ((3, 5), (20, 30), (1_000, 900)))
    # Of training sources of up to 2 n + 8 pieces: those of 3 at first, from n = 6 on those of 20, at last all.
    assert [pieces.capacity(n) for n in (1, 5, 6, 495, 496, 1_000, 2_000)] == [6, 6, 31, 31, 901, 901, 1_801]
    capacities = [pieces.capacity(n) for n in range(1, 1_200)]
    assert capacities == sorted(capacities)
    late = Pieces(("a",), "characters", "characters", ((50, 9), (60, 9)))
    assert late.capacity(1) == 10  # no source is as short: as for the shortest


def test_the_length_of_an_answer_is_known_or_it_is_not():
    """A model may be told it where all sources of a length have the same."""
    assert [Symbols(5, RULES["duplicate"]).answer_length(n) for n in (1, 7)] == [3, 15]
    assert Symbols(5, RULES["add"]).answer_length(7) is None
    assert Symbols(5, RULES["palindrome"]).answer_length(7) is None
    assert LETTERS.answer_length(3) is None


def test_a_source_ends_as_its_answer_begins():
    assert not LETTERS.continues and LETTERS.source_end == LETTERS.end
    assert not SYMBOLS.continues and SYMBOLS.source_end == SYMBOLS.end
    palindromes = Symbols(5, RULES["palindrome"])
    assert palindromes.continues and palindromes.source_end == palindromes.begin
    assert palindromes.write([3, 1, palindromes.begin, 0], side="source") == "3 1"
