"""`attn.tasks.load` and its results: the same calls whatever the data, and one line for a call that is not allowed."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import tasks
from attn.tasks.examples import PAD
from attn.tasks.vocabulary import InputError, Pieces

PATH = "PATH"  # stands for a file of pairs


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("load") / "p.tsv"
    path.write_text("".join(f"{k}\t{k + 1}\n" for k in range(200)))
    return str(path)


@pytest.fixture(params=["generated", "pairs"])
def data(request, path):
    return tasks.load("pairs", path=path) if request.param == "pairs" else tasks.load("reverse", max_length=5)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("shuffle", {}, "name: got 'shuffle', must be one of copy, reverse, .*, palindrome, fill, digit, pairs"),
        ("revers", {}, r"name: got 'revers', .* \(did you mean 'reverse'\?\)"),
        (["copy"], {}, r"name: got \['copy'\], must be one of copy"),
        ("copy", {"source": "file"}, "source: got 'file', must be one of generated, tfds"),
        ("copy", {"folder": "/tmp"}, "folder: got '/tmp', but only source='tfds' reads it"),
        ("copy", {"min_length": 5, "max_length": 4}, "min_length: got 5, must be at most max_length = 4"),
        ("copy", {"symbol": 5}, r"symbol: unknown \(did you mean 'symbols'\?\); known are name, symbols, min_length"),
        ("copy", {"path": PATH}, "path: unknown"),
        ("copy", {"symbols": "8"}, "symbols: got '8', must be a whole number at least 2 and at most 1,000,000"),
        ("copy", {"symbols": 2.5}, "symbols: got 2.5, must be a whole number"),
        ("copy", {"symbols": True}, "symbols: got True, must be a whole number"),
        ("copy", {"max_length": 10**9}, "max_length: got 1000000000, must be a whole number .* at most 65,536"),
        ("pairs", {}, "path: none given, must be a path"),
        ("pairs", {"path": None}, "path: got None, must be a path"),
        ("pairs", {"path": 5}, "path: got 5, must be a path"),
        ("pairs", {"path": b"p.tsv"}, "path: got b'p.tsv', must be a path"),
        ("pairs", {"path": ""}, "path: got '', must be a path"),
        ("pairs", {"path": "a\0b"}, r"path: got 'a\\x00b', must be a path"),
        ("pairs", {"path": PATH, "test": ""}, "test: got '', must be a path or None"),
        ("pairs", {"path": PATH, "validation": 5}, "validation: got 5, must be a path or None"),
        ("pairs", {"path": PATH, "tokens": None}, "tokens: got None, must be one of characters, words, bytes"),
        ("pairs", {"path": PATH, "tokens": ["words"]}, r"tokens: got \['words'\], must be one of characters"),
        ("pairs", {"path": PATH, "tokens": "letters"}, "tokens: got 'letters', must be one of characters"),
        ("pairs", {"path": PATH, "longest": "5"}, "longest: got '5', must be a whole number at least 1"),
        ("pairs", {"path": PATH, "longest": 2.5}, "longest: got 2.5, must be a whole number"),
        ("pairs", {"path": PATH, "longest": 0}, "longest: got 0, must be a whole number at least 1"),
        ("pairs", {"path": PATH, "vocabulary": "x"}, "vocabulary: got 'x', must be Pieces or None"),
        ("pairs", {"path": "~no such user/p.tsv"}, "path: got '~no such user/p.tsv', must be a path"),
        (
            "pairs",
            {"path": PATH, "tokens": "words", "vocabulary": Pieces(("a",), "bytes", "bytes", ((1, 1),))},
            "vocab",
        ),
        ("pairs", {"path": PATH, "symbols": 5}, "symbols: unknown; known are path, tokens, validation, test, longest"),
    ],
)
def test_settings_that_are_not_allowed_are_named(path, untyped, name, settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        tasks.load(name, **{key: path if value == PATH else value for key, value in settings.items()})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data: data.batches(0, 0), "batch_size: got 0, must be a whole number at least 1"),
        (lambda data: data.batches(-1, 0), "batch_size: got -1"),
        (lambda data: data.batches(4), "seed: none given, must be a whole number at least 0"),
        (lambda data: data.batches(4, -1), "seed: got -1"),
        (lambda data: data.batches(4, 0).batch(-1), "step: got -1, must be a whole number at least 0"),
        (lambda data: data.questions("test", 0, 0), "total: got 0"),
        (lambda data: data.questions("test", -1, 0), "total: got -1"),
        (lambda data: data.questions("test", "5", 0), "total: got '5'"),
        (lambda data: data.questions_of_each_length("test", [], 5, 0), r"lengths: got \[\], must be one or more whole"),
        (lambda data: data.questions_of_each_length("test", [2, 0], 5, 0), r"lengths: got \[2, 0\]"),
        (lambda data: data.questions_of_each_length("test", 2, 5, 0), "lengths: got 2"),
        (lambda data: data.questions_of_each_length("test", [10**9], 5, 0), r"lengths: .* from 1 to 100,000"),
        (lambda data: data.questions_of_each_length("test", np.ones((2, 2), int), 5, 0), r"lengths: got array.*, must"),
        (lambda data: data.questions_of_each_length("test", (n for n in [2]), 5, 0), "lengths: got <generator"),
        (lambda data: data.questions(["test"], 5, 0), r"part: got \['test'\], must be text"),
        (lambda data: data.questions_of_each_length("test", [2], 0, 0), "each: got 0"),
    ],
)
def test_calls_that_are_not_allowed_are_named(data, untyped, call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(data)


@pytest.mark.parametrize("part", ["train", "training", "Test", ""])
def test_the_training_part_has_no_questions(data, part):
    for questions in (data.questions, lambda *rest: data.questions_of_each_length(part, [2], 5, 0)):
        with pytest.raises(InputError, match=f"part '{part}' does not exist; the parts are"):
            questions(part, 5, 0)


def test_a_path_may_begin_at_home(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.tsv").write_bytes(pathlib.Path(path).read_bytes())
    assert tasks.load("pairs", path="~/p.tsv").describe()[0].startswith(f"{tmp_path}/p.tsv: 181 pairs")
    tasks.load("copy", symbols=2, max_length=4, source="tfds", folder="~/data")
    assert [*tmp_path.rglob("1.0.0")] == [tmp_path / "data/attn_copy/symbols2_lengths1to4/1.0.0"]


def test_numbers_of_numpy_are_numbers(data, untyped):
    batches = data.batches(np.int64(4), np.int32(0))
    for a, b in zip(batches.batch(np.int64(3))[1], data.batches(4, 0).batch(3)[1]):
        np.testing.assert_array_equal(a, b)


def test_batches_are_a_function_of_seed_and_step(data):
    batches = data.batches(4, 1)
    steps = [batches.batch(step) for step in range(6)]
    backward = [data.batches(4, 1).batch(step) for step in reversed(range(6))][::-1]
    for a, b in zip(jax.tree.leaves(steps), jax.tree.leaves(backward)):
        np.testing.assert_array_equal(a, b)
    sources = [set(map(tuple, np.asarray(example.source))) for _, example in steps]
    assert len(set.union(*sources)) > 12  # 24 rows, few of them alike
    for _, example in steps:
        assert len(example.source) == len(example.target) <= 4
        assert ((np.asarray(example.source) == data.vocabulary.end).sum(1) == 1).all()
        assert (np.asarray(example.target)[:, 0] != PAD).all()


def test_drawn_batches_are_of_the_sampler_that_trains():
    class Ones(tasks.Generated):
        def sample(self, key):
            return jax.tree.map(jnp.ones_like, super().sample(key))

    _, batch = Ones(tasks.Task()).batches(4, 0).batch(0)
    assert (batch.source == 1).all() and (batch.target == 1).all()


def test_data_and_batches_describe_themselves_in_a_few_lines(data):
    for thing in (data, data.batches(4, 0)):
        assert 0 < len(repr(thing)) < 400 and "array" not in repr(thing)
