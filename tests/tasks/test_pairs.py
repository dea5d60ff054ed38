"""Files of pairs: read as they stand, split honestly, and refused in one line that names what is wrong."""

import hashlib
import os
import random

import numpy as np
import pytest

from attn import tasks
from attn.tasks import pairs
from attn.tasks.examples import PAD, DataError

LETTERS = "abcdefghij"


def some_pairs(number: int, seed: int = 0) -> list[tuple[str, str]]:
    """Distinct words, each with itself in capitals."""
    rng = random.Random(seed)
    words = {}
    while len(words) < number:
        words["".join(rng.choices(LETTERS, k=max(1, round(rng.gauss(8, 3)))))] = None
    return [(word, word.upper()) for word in words]


def written(path, rows) -> str:
    path.write_text("".join(f"{source}\t{target}\n" for source, target in rows))
    return str(path)


def texts_of(data, part) -> set[str]:
    """The sources of a part as text."""
    buckets = data.training if part == "training" else [data.parts[part]]
    rows = [row for bucket in buckets for row in bucket[0]]
    return {data.vocabulary.write(row, side="source") for row in rows}


@pytest.fixture
def data(tmp_path):
    return tasks.load("pairs", path=written(tmp_path / "words.tsv", some_pairs(2_000)))


def test_a_source_stays_in_its_part_in_every_version(tmp_path):
    """So that results stay comparable: `printf 29 | b2sum -l 64` says 08ae..., which is below 0.05 of 2^64."""
    data = tasks.load("pairs", path=written(tmp_path / "numbers.tsv", [(str(k), "x") for k in range(200)]))
    assert texts_of(data, "test") == {"29", "72", "90", "99", "115", "143", "195"}
    validation = {"18", "47", "55", "66", "71", "101", "133", "144", "168", "176", "190", "193"}
    assert texts_of(data, "validation") == validation


def test_every_pair_is_in_one_part_and_reads_as_it_was_written(data):
    right = dict(some_pairs(2_000))
    vocabulary, seen = data.vocabulary, {}
    for bucket in data.training:
        for source, target in zip(*bucket):
            seen[vocabulary.write(source, side="source")] = vocabulary.write(target)
    for part in ("validation", "test"):
        questions = data.parts[part]
        for row, target in zip(questions.source_rows, questions.targets):
            source = vocabulary.write(questions.sources[row], side="source")
            assert source not in seen
            seen[source] = vocabulary.write(target)
    assert seen == right


def test_a_twentieth_each_is_held_out(data):
    for part in ("validation", "test"):
        assert 60 < len(data.parts[part].lengths) < 140  # 100 expected of 2,000, of standard deviation 9.7
        questions = data.parts[part]
        np.testing.assert_array_equal(questions.lengths, (questions.sources != PAD).sum(1) - 1)


def test_the_split_is_stable_when_lines_are_added_and_shuffled(data, tmp_path):
    rows = some_pairs(2_000) + [(word + "x", word) for word, _ in some_pairs(500, seed=1)]
    random.Random(3).shuffle(rows)
    more = tasks.load("pairs", path=written(tmp_path / "more.tsv", rows))
    for part in ("training", "validation", "test"):
        assert texts_of(data, part) <= texts_of(more, part)


def test_no_source_is_in_two_parts_even_with_separate_files(tmp_path):
    rows = some_pairs(600)
    separate = {
        "validation": written(tmp_path / "v.tsv", [*rows[:50], ("j" * 30, "J")]),
        "test": written(tmp_path / "t.tsv", [*rows[40:90], ("i" * 30, "I")]),
    }
    data = tasks.load("pairs", path=written(tmp_path / "all.tsv", rows), **separate)
    parts = {part: texts_of(data, part) for part in ("training", "validation", "test")}
    assert parts["test"] == {source for source, _ in rows[40:90]} | {"i" * 30}
    assert parts["validation"] == {source for source, _ in rows[:40]} | {"j" * 30}
    assert parts["training"] == {source for source, _ in rows[90:]}
    assert any("100 pairs are left out" in line for line in data.describe())  # 90 of training, 10 of validation


def test_with_a_separate_test_file_validation_stays_what_it_is(data, tmp_path):
    rows = some_pairs(2_000)
    test = written(tmp_path / "t.tsv", rows[:500])
    separate = tasks.load("pairs", path=written(tmp_path / "all.tsv", rows), test=test)
    tested = {source for source, _ in rows[:500]}
    assert texts_of(separate, "test") == tested
    assert texts_of(separate, "validation") == texts_of(data, "validation") - tested
    assert texts_of(separate, "training") == (texts_of(data, "training") | texts_of(data, "test")) - tested


def test_a_part_that_separate_files_leave_empty_is_named_with_them(tmp_path):
    path = written(tmp_path / "all.tsv", some_pairs(100))
    with pytest.raises(
        DataError, match=r"nothing is left for the training part .* sources of .*all\.tsv and .*v\.tsv are"
    ):
        tasks.load("pairs", path=path, test=path, validation=written(tmp_path / "v.tsv", [("ijij", "x")]))


def test_the_vocabulary_is_of_the_training_part_alone(tmp_path):
    rows = some_pairs(400)
    test = written(tmp_path / "t.tsv", [("aq", "AQ"), ("ab", "AB")])
    data = tasks.load("pairs", path=written(tmp_path / "all.tsv", rows), test=test)
    assert set(data.vocabulary.pieces) == set(LETTERS + LETTERS.upper())
    questions = data.parts["test"]
    assert data.vocabulary.write(questions.sources[0], side="source") == "a\ufffd"
    assert questions.targets[0].tolist()[1] == -1  # nothing that a model writes is right there
    lines = "\n".join(data.describe())
    assert "test: 1 sources have tokens that no training pair has" in lines
    assert "test: 1 targets have tokens that no training pair has" in lines


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        ("characters", {"a", "é", " ", "A", "B"}),
        ("words", {"a", "é", "A", "B"}),
        ("bytes", set(map(chr, range(256)))),
        ("characters:words", {"a", "é", " ", "A", "B"}),
    ],
)
def test_tokens_are_characters_words_or_bytes(tmp_path, tokens, pieces):
    # Sources of one kind of letter only, so that any split has the whole vocabulary.
    rows = [("é a" + " a" * k, "A B") for k in range(300)]
    data = tasks.load("pairs", path=written(tmp_path / "p.tsv", rows), tokens=tokens)
    assert set(data.vocabulary.pieces) == pieces
    everything = set().union(*(texts_of(data, part) for part in ("training", "validation", "test")))
    assert everything == {source for source, _ in rows}
    target_length = {"characters": 4, "words": 3, "bytes": 4, "characters:words": 3}[tokens]
    assert {bucket.target.shape[1] for bucket in data.training} == {target_length}


def test_words_are_the_same_source_however_they_are_spaced(tmp_path):
    rows = [(gap.join(f"{k:03d}"), "x") for k in range(300) for gap in (" ", "  ")]
    data = tasks.load("pairs", path=written(tmp_path / "p.tsv", rows), tokens="words")
    parts = [texts_of(data, part) for part in ("training", "validation", "test")]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 300
    assert sum(len(bucket.source) for bucket in data.training) == len(parts[0])
    assert any("300 duplicate pairs" in line for line in data.describe())


def test_several_targets_of_a_source_are_one_question(tmp_path):
    rows = [(source, target + extra) for source, target in some_pairs(400) for extra in ("", "A")]
    data = tasks.load("pairs", path=written(tmp_path / "p.tsv", rows))
    questions = data.parts["test"]
    assert len(questions.targets) == 2 * len(questions.sources)
    assert (np.bincount(questions.source_rows) == 2).all() and (np.diff(questions.source_rows) >= 0).all()
    some = questions.chosen([1, 4])
    assert some.source_rows.tolist() == [0, 0, 1, 1]
    assert data.vocabulary.write(some.targets[2]) == data.vocabulary.write(some.sources[1], side="source").upper()


def test_line_ends_of_windows_and_a_byte_order_mark_do_not_matter(data, tmp_path):
    text = "".join(f"{source}\t{target}\r\n" for source, target in some_pairs(2_000))
    (tmp_path / "windows.tsv").write_bytes(b"\xef\xbb\xbf" + text.encode().removesuffix(b"\r\n"))
    other = tasks.load("pairs", path=tmp_path / "windows.tsv")
    assert other.vocabulary == data.vocabulary
    for part in ("training", "validation", "test"):
        assert texts_of(other, part) == texts_of(data, part)


def test_the_digest_is_that_of_the_files(tmp_path):
    """Of all their bytes: other line ends are another file."""
    path, separate = tmp_path / "p.tsv", tmp_path / "t.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(b"%d\tx\r\n" % k for k in range(200)))
    separate.write_bytes(b"y\tz")
    origins = tasks.load("pairs", path=path, test=separate).origins
    right = {"training": hashlib.sha256(path.read_bytes()).hexdigest(), "test": hashlib.sha256(b"y\tz").hexdigest()}
    assert {part: origin.digest for part, origin in origins.items()} == right


def test_the_longest_targets_of_short_sources_are_known(tmp_path):
    """Of the sources that are no longer, in any order in the file."""
    lengths = ((4, 20), (2, 3), (1, 9), (7, 5), (2, 11))
    rows = [(chr(97 + k) * s, "y" * t) for s, t in lengths for k in range(20)]
    separate = {part: written(tmp_path / part, [(part * 9, "long" * 9)]) for part in ("validation", "test")}
    data = tasks.load("pairs", path=written(tmp_path / "p.tsv", rows), **separate)
    assert data.vocabulary.longest_targets == ((1, 9), (2, 11), (4, 20), (7, 20))


def test_duplicates_are_reported_and_count_once(data, tmp_path):
    rows = some_pairs(2_000)
    twice = tasks.load("pairs", path=written(tmp_path / "twice.tsv", rows + rows[:7]))
    assert any("7 duplicate pairs" in line for line in twice.describe())
    assert sum(len(b.source) for b in twice.training) == sum(len(b.source) for b in data.training)


BAD_FILES = {
    "empty": (b"", ["an empty file"]),
    "only a byte-order mark": (b"\xef\xbb\xbf", ["an empty file"]),
    "no TAB": (b"a\tb\nc d\n", ["line 2", "no TAB"]),
    "an empty line": (b"a\tb\n\nc\td\n", ["line 2 is empty"]),
    "an empty line at the end": (b"a\tb\n \n", ["line 2 is empty"]),
    "line ends of old": (b"a\tb\rc\td\r", ["line 1", "2 TABs", "a CR inside"]),
    "two TABs": (b"a\tb\tc\n", ["line 1", "2 TABs"]),
    "a TAB alone": (b"\t\n", ["line 1", "empty source"]),
    "more tokens than may be allowed": (b"a\t" + b"b" * 100_001, ["line 1 has a target of 100,001 characters, more"]),
    "no source": (b"a\tb\n\tc\n", ["line 2", "empty source"]),
    "no target": (b"a\t \n", ["line 1", "empty target"]),
    "UTF-16 without a mark": ("a\tb\nc\td\n".encode("utf-16-le"), ["line 1 has a NUL character", "UTF-8, not UTF-16"]),
    "UTF-16 of other letters": ("ж\tб\n".encode("utf-16-be"), ["line 1"]),
    "UTF-32 without a mark": ("a\tb\n".encode("utf-32-le"), ["line 1 has a NUL character"]),
    "NUL in a line": (b"a\tb\nc\0\td\n", ["line 2 has a NUL character"]),
    "invalid UTF-8": (b"a\tb\nc\t\xe9\n", ["invalid UTF-8", "byte 6", "line 2"]),
    "invalid UTF-8 after a byte-order mark": (b"\xef\xbb\xbfa\tb\nc\t\xe9\n", ["byte 9", "line 2"]),
    "a long target": (
        b"a\tb\nc\t" + b"d" * 1_025 + b"\n",
        ["line 2 has a target of 1,025 characters, more than 1,024", "`longest` (config.data.longest) of 1025"],
    ),
    "a long line": (b"a\tb\nc\t" + b"d" * (1 << 21) + b"\n", ["line 2", "longer than 1,048,576 bytes"]),
    "an empty part": (b"a\tb\n", ["nothing is left for the test part", "1 sources"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_in_one_line(tmp_path, name):
    content, expected = BAD_FILES[name]
    path = tmp_path / "bad.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        pairs.load_pairs(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert ("would allow it" in message) == (name == "a long target")
    for words in expected:
        assert words in message


def test_what_is_not_a_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("", "a folder"), ("missing.tsv", "No such file"), ("pipe", "not a regular file")):
        with pytest.raises(DataError, match=message):
            pairs.load_pairs(tmp_path / name)


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    path = tmp_path / "secret.tsv"
    written(path, some_pairs(10))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.open", refuse)  # a mode would not stop the administrator
    with pytest.raises(DataError, match=r"secret\.tsv: cannot be read \(Permission denied\)"):
        pairs.load_pairs(path)


def test_longer_sources_and_targets_may_be_allowed(tmp_path):
    rows = [*some_pairs(300), ("a" * 1_500, "b" * 1_200)]
    path = written(tmp_path / "p.tsv", rows)
    data = tasks.load("pairs", path=path, longest=1_500)
    assert sum(len(texts_of(data, part)) for part in ("training", "validation", "test")) == 301
    with pytest.raises(DataError, match=r"line 301 has a source of 1,500 characters, more than 1,499"):
        tasks.load("pairs", path=path, longest=1_499)


def log_normal(rng, mean, sigma, count):
    return np.exp(rng.normal(np.log(mean), sigma, count))


def follows(rng, lengths):
    """Targets about as long as their sources."""
    return lengths, lengths * rng.normal(1.1, 0.15, len(lengths))


LENGTHS = {
    "words": lambda rng, n: follows(rng, rng.normal(8, 2.5, n)),
    "sentences": lambda rng, n: follows(rng, log_normal(rng, 20, 0.6, n)),
    "texts": lambda rng, n: follows(rng, log_normal(rng, 30, 1.0, n)),
    "long tails": lambda rng, n: follows(rng, 3 * rng.pareto(1.2, n) + 2),
    "sentences unrelated to each other": lambda rng, n: (log_normal(rng, 20, 0.6, n), log_normal(rng, 20, 0.6, n)),
    "questions and their answers": lambda rng, n: (rng.geometric(1 / 12, n), log_normal(rng, 60, 0.8, n)),
    "words and one long line": lambda rng, n: follows(rng, np.append(rng.normal(8, 2.5, n - 1), 900)),
}


@pytest.mark.some(1)
@pytest.mark.parametrize("count", [300, 5_000])
@pytest.mark.parametrize("kind", LENGTHS)
def test_padding_stays_under_a_quarter_for_natural_lengths(tmp_path, kind, count):
    rng = np.random.default_rng(0)
    sides = [np.clip(side, 1, 900).astype(int) for side in LENGTHS[kind](rng, count)]
    rows = [(f"{number:04d}{'s' * s}", "t" * t) for number, (s, t) in enumerate(zip(*sides))]
    data = tasks.load("pairs", path=written(tmp_path / "p.tsv", rows))
    one_bucket = [len(source) + len(target) + 2 for source, target in rows]
    longest = max(len(s) for s, _ in rows) + max(len(t) for _, t in rows) + 2
    assert 1 - np.mean(one_bucket) / longest > 0.3  # what a single width would cost
    target_of, places = dict(rows), sum(tokens.size for bucket in data.training for tokens in bucket)
    tokens = sum(len(source) + len(target_of[source]) + 2 for source in texts_of(data, "training"))
    assert data.padding == pytest.approx(1 - tokens / places) and data.padding < 0.25
    assert f"{data.padding:.1%} padding" in data.describe()[-1]
