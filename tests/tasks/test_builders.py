"""The TFDS data sets: right, distinct, without a string in two splits, the same wherever they are prepared."""

import hashlib
import os
import pathlib
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from right_answers import RIGHT, restored

from attn import tasks
from attn.tasks.builders import SequenceConfig, builder_class
from attn.tasks.examples import PAD, DataError
from attn.tasks.held_out import is_held_out
from attn.tasks.rules import RULES
from attn.tasks.sequences import Task
from attn.tasks.vocabulary import before

SMALL = Task("duplicate", symbols=3, min_length=2, max_length=6)


@pytest.fixture(scope="module")
def folder(once) -> pathlib.Path:
    """TFDS's folder, with small data sets of every task."""

    def prepare(folder):
        folder.mkdir()
        for name in RULES:
            tasks.load(name, symbols=3, min_length=2, max_length=6, source="tfds", folder=folder)

    return once("tfds-of-every-task", prepare)


def strings(source) -> list[tuple[int, ...]]:
    return [tuple(row["source"].tolist()) for row in source.__getitems__(range(len(source)))]


def opened(folder, name="duplicate") -> dict:
    config = SequenceConfig(symbols=3, min_length=2, max_length=6)
    return builder_class(name)(config=config, data_dir=folder).as_data_source()


@pytest.mark.parametrize("name", RIGHT)
def test_examples_are_right(folder, name):
    for split, source in opened(folder, name).items():
        assert len(source) > 30, split
        for row in source.__getitems__(range(0, len(source), 7)):
            assert set(row["source"].tolist()) <= {1, 2, 3}
            assert row["target"].tolist() == RIGHT[name](row["source"].tolist(), 3)


def test_masked_strings_are_stored_with_their_masks(folder):
    splits = opened(folder, "fill")
    rows = {split: source.__getitems__(range(len(source))) for split, source in splits.items()}
    for row in (row for each in rows.values() for row in each):
        assert row["target"].tolist() == restored(row["source"].tolist(), 3)
    sources = {split: {tuple(row["source"].tolist()) for row in each} for split, each in rows.items()}
    assert sum(map(len, sources.values())) == len(set().union(*sources.values()))
    assert sum(len(sources[split]) for split in sources if split != "test_long") == 3**2 + 3**2 + 3**3 + 3**3 + 3**4
    data = tasks.load("fill", symbols=3, min_length=2, max_length=6, source="tfds", folder=folder)
    assert data.vocabulary == Task("fill", symbols=3).vocabulary
    for source, length, target in list(zip(*data.parts["test"][:3]))[::3]:
        assert target[:length].tolist() == restored(source[:length].tolist(), 3)
        assert source[length] == target[length] == data.vocabulary.end


def test_pictures_are_stored_as_patches(folder):
    for source in opened(folder, "digit").values():
        for row in source.__getitems__(range(0, len(source), 7)):
            assert set(row["source"].tolist()) <= set(range(1, 513)) and len(row["target"]) == 1


def test_splits_share_no_string_and_have_none_twice(folder):
    splits = {split: strings(source) for split, source in opened(folder).items()}
    assert set(splits) == {"train", "validation", "test", "test_long"}
    everything = [string for rows in splits.values() for string in rows]
    assert len(everything) == len(set(everything))
    lengths = {split: {len(string) for string in rows} for split, rows in splits.items()}
    assert lengths["train"] == lengths["validation"] | lengths["test"] == set(range(2, 7))
    assert lengths["test_long"] == set(range(7, 25))
    # All 3^2 + ... + 3^6 short strings are there, so that nothing is lost between the splits.
    assert len(everything) - len(splits["test_long"]) == sum(3**n for n in range(2, 7))


def test_what_is_trained_on_is_what_generated_examples_train_on(folder):
    for split, rows in ((split, strings(source)) for split, source in opened(folder).items()):
        assert {bool(is_held_out(np.array([string]), 3)[0]) for string in rows} == {split != "train"}


def test_another_preparation_gives_the_same_in_the_same_order(folder, tmp_path):
    tasks.load("reverse", symbols=3, min_length=2, max_length=6, source="tfds", folder=tmp_path)
    for split, source in opened(folder, "reverse").items():
        assert strings(source) == strings(opened(tmp_path, "reverse")[split])


# Of version 1.0.0 of `SMALL`: if one of these changes, results are no longer those of version 1.0.0.
DIGESTS = {
    "train": "093c997db2399beba32c6ff50bcd18d852ffbee1fdb6edeba2877c7984321e76",
    "validation": "efbceeb959ef6cab9f6a01ea0bcba83150c6fdb6adf0bd62ab5c3cd4142f8dad",
    "test": "78edc89dd7f383072a293e1c9561262203d70780dc73b4cc8f54562a27a47eb6",
    "test_long": "ac35596280e81c1ab289c4fb1db274e047bcfe6e0b1734a850c83430bd0b7d03",
}


def test_a_version_always_holds_the_same(folder):
    for split, source in opened(folder).items():
        lines = "".join(f"{' '.join(map(str, string))}\n" for string in strings(source))
        assert hashlib.sha256(lines.encode()).hexdigest() == DIGESTS[split], split


@pytest.mark.nightly  # by day the README's lines load one
def test_anyone_can_load_it_by_name_without_tensorflow(tmp_path):
    script = (
        "import sys; import attn.tasks; import tensorflow_datasets as tfds;"
        f"source = tfds.data_source('attn_copy/symbols2_lengths1to40', data_dir={str(tmp_path)!r}, split='test');"
        "row = source[0]; assert row['source'].tolist() == row['target'].tolist();"
        "assert 'tensorflow' not in sys.modules;"
        "print(len(source))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "10000"
    [record] = tmp_path.glob("attn_copy/symbols2_lengths1to40/1.0.0/*test.array_record*")
    assert record.stat().st_size > 100_000


def test_a_source_may_be_handed_to_other_processes(folder):
    for split, source in opened(folder, "reverse").items():
        assert strings(pickle.loads(pickle.dumps(source))) == strings(source), split


def test_the_default_of_a_builder_is_the_default_of_the_task():
    builder = tfds.builder("attn_reverse", data_dir="/nonexistent")
    assert builder.task == Task()
    assert "symbols16_lengths1to32" in builder.builder_configs
    assert builder.info.file_format.value == "array_record"


def test_in_memory_it_is_what_was_prepared(folder):
    data = tasks.load("duplicate", symbols=3, min_length=2, max_length=6, source="tfds", folder=folder)
    assert data.vocabulary == SMALL.vocabulary
    trained = {
        data.vocabulary.write(source): data.vocabulary.write(target)
        for bucket in data.training
        for source, target in zip(*bucket)
    }
    stored = strings(opened(folder)["train"])
    assert trained == {" ".join(map(str, s)): " ".join(map(str, s + s)) for s in stored}
    questions = data.parts["test_long"]
    np.testing.assert_array_equal(questions.lengths, (questions.sources != PAD).sum(1) - 1)
    assert (2 * questions.lengths == (questions.targets != PAD).sum(1) - 1).all()
    assert data.longest_source == 7  # the long part is evaluated separately


def test_in_memory_an_answer_that_continues_its_source_is_one_string_with_it(folder):
    data = tasks.load("palindrome", symbols=3, min_length=2, max_length=6, source="tfds", folder=folder)
    begin, end = data.vocabulary.begin, data.vocabulary.end
    stored = [list(string) for string in strings(opened(folder, "palindrome")["train"])]
    trained = [before(PAD, target) for bucket in data.training for target in bucket.target]
    assert sorted(trained) == sorted([*string, begin, *string[::-1], end] for string in stored)
    assert all(bucket.source.shape[1] == 1 and not bucket.source.any() for bucket in data.training)
    for source, target in zip(data.parts["test"].sources.tolist(), data.parts["test"].targets.tolist()):
        assert before(end, target) == before(begin, source)[::-1]


@pytest.mark.nightly
def test_a_killed_preparation_leaves_nothing_that_is_taken_for_whole(tmp_path):
    settings = {"symbols": 3, "min_length": 2, "max_length": 6}
    script = (
        "import itertools, os, signal; from attn import tasks; from attn.tasks import builders;"
        "calls, before = itertools.count(), builders.before;"
        "builders.before = lambda *a: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == 3_000 else before(*a);"
        f"tasks.load('reverse', source='tfds', folder={str(tmp_path)!r}, **{settings})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(tmp_path.rglob("*incomplete*/*")), "it was not in the middle"
    config = SequenceConfig(**settings)
    assert not builder_class("reverse")(config=config, data_dir=tmp_path).is_prepared()
    data = tasks.load("reverse", source="tfds", folder=tmp_path, **settings)
    held_out = sum(len(data.parts[part].lengths) for part in ("validation", "test"))
    assert sum(len(bucket.source) for bucket in data.training) + held_out == sum(3**n for n in range(2, 7))


@pytest.mark.nightly
def test_two_processes_may_prepare_it_at_once(tmp_path):
    # 29,523 short strings: long enough for both to be at it.
    load = f"tasks.load('reverse', symbols=3, max_length=9, source='tfds', folder={str(tmp_path)!r})"
    script = f"from attn import tasks; print({load}.describe())"
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1] and "examples to train on" in outputs[0]
    assert not list(tmp_path.rglob("*incomplete*"))


def test_a_task_with_too_few_strings_is_named(tmp_path):
    with pytest.raises(DataError, match=r"^attn_copy: no string for the split validation; it needs more symbols"):
        tasks.load("copy", symbols=2, max_length=1, source="tfds", folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_or_impossible_folder_is_named_in_one_line(tmp_path):
    tasks.load("copy", symbols=2, max_length=4, source="tfds", folder=tmp_path)
    for record in tmp_path.rglob("*train.array_record*"):
        record.write_bytes(record.read_bytes()[:100])
    (tmp_path / "file").write_text("")
    damaged = {
        tmp_path: "attn_copy cannot be prepared or read",
        tmp_path / "file" / "in": rf"cannot be written \({tmp_path}/file is a file",
    }
    for folder, message in damaged.items():
        with pytest.raises(DataError, match=f"^{folder}: {message}") as error:
            tasks.load("copy", symbols=2, max_length=4, source="tfds", folder=folder)
        assert "\n" not in str(error.value)


def test_a_folder_that_may_not_be_written_is_named_before_anything_is_made(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a mode would not stop the administrator
    folder = tmp_path / "to" / "come"
    with pytest.raises(DataError, match=rf"^{folder}: cannot be written \(no permission to write into {tmp_path}\)"):
        tasks.load("copy", symbols=2, max_length=4, source="tfds", folder=folder)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")
