"""Snapshots: at the right steps, changing no bit of training; verified, and bounded on disk."""

import dataclasses
import errno
import itertools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn import experiment
from attn.inspection.capture import capture, capture_each
from attn.runs import load_history
from attn.training import checkpoints, snapshots
from attn.training.folders import Folder
from attn.training.identity import digest_of
from attn.training.state import initial_state

CONFIG = "digest of the settings"


@pytest.mark.parametrize(
    ("count", "last", "steps"),
    [
        (0, 9, ()),
        (1, 9, (9,)),
        (2, 9, (0, 9)),
        (4, 100, (0, 1, 10, 100)),
        (5, 1000, (0, 1, 10, 100, 1000)),
        (24, 5, (0, 1, 2, 3, 4, 5)),
        (24, 1, (0, 1)),
    ],
)
def test_steps_are_spaced_evenly_in_the_logarithm(count, last, steps):
    assert snapshots.schedule(count, last) == steps


@pytest.mark.parametrize(("count", "last"), [(24, 2_000), (24, 40), (100, 1_000_000), (7, 6), (7, 5)])
def test_steps_are_different_and_reach_the_end(count, last):
    steps = snapshots.schedule(count, last)
    assert len(steps) == min(count, last + 1) == len(set(steps)) and list(steps) == sorted(steps)
    assert (steps[0], steps[1], steps[-1]) == (0, 1, last)
    # Up to rounding the ratio of neighbours never grows, and it is constant where it moves by many steps.
    late = [b / a for a, b in itertools.pairwise(steps) if a >= 100]
    assert not late or max(late) / min(late) < 1.02


def params_at(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {
        "encoder": [{"W_Q": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)} for _ in range(2)],
        "scale": jnp.asarray(rng.normal(size=5), jnp.float32),
    }


def recorder(folder, steps, said=None):
    return snapshots.Recorder(folder, steps, CONFIG, print if said is None else said.append)


@pytest.fixture
def folder(tmp_path):
    """A folder with the snapshots of steps 0, 7 and 20."""
    writer = recorder(tmp_path / "snapshots", (0, 7, 20))
    for step in range(30):
        writer.record(step, params_at(step))
    return tmp_path / "snapshots"


def test_parameters_are_read_as_they_were_recorded(folder):
    assert snapshots.steps(folder) == [0, 7, 20]
    for step in (0, 7, 20):
        found = snapshots.read(folder, step, params_at(0), CONFIG)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params_at(step)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_those_of_an_abandoned_future_are_discarded(folder):
    (folder / "notes.txt").write_text("mine")
    snapshots.discard(folder, 7)
    assert snapshots.steps(folder) == [0, 7]
    snapshots.discard(folder, -1)
    assert snapshots.steps(folder) == []
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_any_changed_byte_is_found(folder):
    path = folder / "00000007.safetensors"
    data = path.read_bytes()
    for position in range(0, len(data), 7):
        changed = bytearray(data)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(snapshots.SnapshotError) as error:
            snapshots.read(folder, 7, params_at(0), CONFIG)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_truncated_file_is_damaged(folder, left):
    path = folder / "00000007.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(snapshots.SnapshotError, match="damaged"):
        snapshots.read(folder, 7, params_at(0), CONFIG)


def test_what_does_not_fit_is_named(folder):
    shutil.copy(folder / "00000007.safetensors", folder / "00000008.safetensors")
    with pytest.raises(snapshots.SnapshotError, match=r"damaged \(it was written at step 7\)"):
        snapshots.read(folder, 8, params_at(0), CONFIG)
    with pytest.raises(snapshots.SnapshotError, match="was written with other settings"):
        snapshots.read(folder, 7, params_at(0), "another")
    with pytest.raises(snapshots.SnapshotError, match=r"scale is float32\[5\], must be float32\[6\]"):
        snapshots.read(folder, 7, params_at(0) | {"scale": jnp.zeros(6)}, CONFIG)
    with pytest.raises(snapshots.SnapshotError, match=r"more is missing, must be float32\[1\]"):
        snapshots.read(folder, 7, params_at(0) | {"more": jnp.zeros(1)}, CONFIG)


def test_their_files_are_bounded(tmp_path, monkeypatch):
    big = {"W": jnp.zeros((1000, 250))}  # 1 MB
    monkeypatch.setattr(snapshots, "LIMIT", 5 << 20)
    steps, note = snapshots.plan(24, 1000, big)
    assert steps == snapshots.schedule(5, 1000)
    assert note == "snapshots take at most 5 MiB, and one has 1: 5 of 24 are recorded"
    assert snapshots.plan(5, 1000, big) == (steps, None)
    monkeypatch.setattr(snapshots, "LIMIT", 1000)
    assert snapshots.plan(24, 1000, big) == ((), "snapshots take at most 0 MiB, and one has 1: none of 24 are recorded")
    assert snapshots.plan(0, 1000, big) == ((), None)
    # Also where a run has resumed with more steps, so that the folder has those of another plan.
    monkeypatch.setattr(snapshots, "LIMIT", 5 << 20)
    said = []
    writer = recorder(tmp_path / "snapshots", range(9), said)
    for step in range(9):
        writer.record(step, big)
    assert snapshots.steps(tmp_path / "snapshots") == [0, 1, 2, 3, 4]
    assert len(said) == 1 and said[0].startswith("the snapshot of step 5 cannot be written")
    assert sum(path.stat().st_size for path in (tmp_path / "snapshots").iterdir()) <= 5 << 20


def test_a_limit_holds_for_arrays_of_any_number(tmp_path, monkeypatch):
    """The plan counts what a file has beside its values, so the last planned one fits as well."""
    many = {f"a_rather_long_name_of_a_block_number_{k}": jnp.zeros((1, 1)) for k in range(200)}
    monkeypatch.setattr(snapshots, "LIMIT", 1 << 20)
    steps, _ = snapshots.plan(1000, 10_000, many)
    said = []
    writer = recorder(tmp_path / "snapshots", steps, said)
    for step in steps:
        writer.record(step, many)
    assert said == [] and tuple(snapshots.steps(tmp_path / "snapshots")) == steps


SHORT = {
    "training.steps": "60",
    "training.checkpoint_every": "20",
    "training.steps_per_call": "10",
    "training.snapshots": "24",
}


def request(repository, tiny, folder, *, resume=False, **overrides):
    overrides = {} if resume else tiny | SHORT | overrides
    config = None if resume else str(repository / "configs/copy.py")
    return experiment.Request(config, overrides, str(folder), resume, "off")


@pytest.fixture(scope="module")
def without(repository, tiny, trained):
    """A run without snapshots, whose checkpoints are those of a run with them."""
    settings = tiny | SHORT | {"training.snapshots": "0"}
    return trained("without-snapshots", str(repository / "configs/copy.py"), settings)


def arrays_of(folder) -> list[dict]:
    paths = sorted((folder / "checkpoints").glob("*/digests.json"))
    assert len(paths) == 2
    return [json.loads(path.read_text())["arrays"] for path in paths]


def losses(folder) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def state_of(folder, step):
    config = Folder(folder).config()
    like = jax.eval_shape(lambda: initial_state(config, config.task.vocabulary))
    return checkpoints.restore(Folder(folder).checkpoints, step, like, digest_of(config))


def assert_same(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("averaging", [pytest.param("0", marks=pytest.mark.nightly), "0.2"])
def test_training_ends_with_the_same_bits_as_without(repository, tiny, without, tmp_path, averaging):
    folder = tmp_path / "run"
    alone = without
    if averaging != "0.2":  # that of the config
        alone = tmp_path / "alone"
        off = {"training.snapshots": "0", "optimizer.averaging": averaging}
        assert experiment.run(request(repository, tiny, alone, **off)) == 0
    assert experiment.run(request(repository, tiny, folder, **{"optimizer.averaging": averaging})) == 0
    assert not (alone / "snapshots").exists()
    assert arrays_of(folder) == arrays_of(alone)
    # A row is the mean of its parts, which may round differently.
    assert [step for step, _ in losses(folder)] == [step for step, _ in losses(alone)] == [10, 20, 30, 40, 50, 60]
    np.testing.assert_allclose(*([loss for _, loss in losses(run)] for run in (folder, alone)), rtol=1e-6)
    assert tuple(snapshots.steps(folder / "snapshots")) == snapshots.schedule(24, 60)
    # The last one is the checkpoint's, and one within a call is that of a run that stops there.
    history = dict(load_history(folder))
    assert_same(history[60].params, state_of(folder, 60).kept)
    saved = snapshots.read(folder / "snapshots", 60, history[60].params, digest_of(history[60].config))
    assert_same(saved, history[60].params)


def test_one_within_a_call_has_the_parameters_of_a_run_that_ends_there(repository, tiny, tmp_path):
    """Warm-up and decay depend on the number of steps, so the run is one that is stopped."""
    folder, stopped = tmp_path / "run", tmp_path / "stopped"
    constant = {"optimizer.decay": "none", "optimizer.warmup_fraction": "0.0"}
    assert experiment.run(request(repository, tiny, folder, **constant, **{"training.steps": "30"})) == 0
    [step] = [step for step in snapshots.steps(folder / "snapshots") if 12 < step < 16][:1]
    ends = constant | {"training.steps": str(step), "training.snapshots": "0"}
    assert experiment.run(request(repository, tiny, stopped, **ends)) == 0
    assert_same(dict(load_history(folder))[step].params, attn.load(stopped).params)


def test_a_resumed_run_keeps_the_earlier_ones_and_records_the_later_ones_again(
    repository, tiny, without, tmp_path, capsys
):
    """Resumed from step 40, it must not keep what another future has left."""
    folder = tmp_path / "run"
    assert experiment.run(request(repository, tiny, folder)) == 0
    whole = {path.name: path.read_bytes() for path in (folder / "snapshots").iterdir()}
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints/00000060")
    early = [path for path in (folder / "snapshots").iterdir() if int(path.stem) <= 40]
    before = {path: path.stat().st_mtime_ns for path in early}
    for path in (folder / "snapshots").iterdir():
        if int(path.stem) > 40:
            path.write_bytes(b"of an abandoned future")
    (folder / "snapshots/00000059.safetensors").write_bytes(b"of a plan for other steps")
    (folder / "snapshots/.00000041.safetensors.partial").write_bytes(b"half")
    assert experiment.run(request(repository, tiny, folder, resume=True)) == 0
    assert {path.name: path.read_bytes() for path in (folder / "snapshots").iterdir()} == whole
    assert {path: path.stat().st_mtime_ns for path in early} == before
    assert arrays_of(folder) == arrays_of(without)


def test_training_goes_on_if_one_cannot_be_written(repository, tiny, without, tmp_path, capsys, monkeypatch):
    write, folder = snapshots.write_whole, tmp_path / "run"

    def full_after_three(path, data):
        if len(snapshots.steps(path.parent)) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    monkeypatch.setattr(snapshots, "write_whole", full_after_three)
    assert experiment.run(request(repository, tiny, folder)) == 0
    out = capsys.readouterr().out
    assert out.count("the snapshot of step 3 cannot be written (No space left on device); no more follow\n") == 1
    assert out.count("snapshot") == 1 and snapshots.steps(folder / "snapshots") == [0, 1, 2]
    assert arrays_of(folder) == arrays_of(without)


@pytest.mark.parametrize("mesh", [{"mesh.model": "2"}, pytest.param({"mesh.sequence": "2"}, marks=pytest.mark.nightly)])
def test_a_divided_model_is_recorded_whole(repository, tiny, tmp_path, mesh):
    folder = tmp_path / "run"
    short = {"training.steps": "9", "training.steps_per_call": "3", "training.checkpoint_every": "4"}
    assert experiment.run(request(repository, tiny, folder, **mesh, **short)) == 0
    assert snapshots.steps(folder / "snapshots") == [*range(10)]
    history = dict(load_history(folder))
    for step in (8, 9):  # those of the checkpoints
        saved = snapshots.read(folder / "snapshots", step, history[9].params, digest_of(history[9].config))
        assert_same(saved, state_of(folder, step).kept)
    config = history[9].config
    start = jax.jit(lambda: initial_state(config, config.task.vocabulary))()
    for a, b in zip(jax.tree.leaves(history[0].params), jax.tree.leaves(start.kept), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_folder_with_the_snapshots_of_another_run_is_refused(repository, tiny, tmp_path, capsys):
    (tmp_path / "run/snapshots").mkdir(parents=True)
    assert experiment.run(request(repository, tiny, tmp_path / "run")) == 2
    assert "holds the snapshots of a run, but no config.json" in capsys.readouterr().err


@pytest.fixture
def copied(copy_run, tmp_path):
    """A finished run, to damage."""
    return shutil.copytree(copy_run, tmp_path / "run")


def test_a_history_has_every_snapshot_and_checkpoint_in_order(copied):
    last = Folder(copied).newest_step()  # of a checkpoint alone, since training stopped early
    history = load_history(copied)
    steps = sorted({*snapshots.steps(copied / "snapshots"), *checkpoints.steps(copied / "checkpoints")})
    assert [step for step, _ in history] == steps and steps[-1] == last
    assert [run.step for _, run in history] == steps
    exact = [run.predict(["3 1 4 1 5"]) == ["3 1 4 1 5"] for _, run in (history[0], history[-1])]
    assert exact == [False, True]


def test_a_damaged_one_is_left_out_with_one_line(copied):
    path = copied / "snapshots/00000001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    said = []
    steps = [step for step, _ in load_history(copied, said.append)]
    assert 0 in steps and 1 not in steps and 2 in steps
    [line] = said
    assert line.startswith(f"{path}: damaged (") and line.endswith("; it is left out") and "\n" not in line


def test_it_looks_through_training_with_the_final_answer(copy_run):
    run = attn.load(copy_run)
    frames = run.look_through_training("3 1 4 1 5")
    assert [*frames] == [step for step, _ in run.history()]
    first, last, look = frames[0], frames[run.step], run.look("3 1 4 1 5")
    for name, weights in look.weights.items():
        np.testing.assert_array_equal(last.weights[name], weights)
        assert abs(first.weights[name] - weights).max() > 0.1
    names = {(*each.source, *each.read, *each.written) for each in frames.values()}
    assert names == {(*look.source, *look.read, *look.written)}
    # The first frame is that of the initial parameters, computed anew.
    start = jax.jit(lambda: initial_state(run.config, run.vocabulary))()
    untrained = dataclasses.replace(run, params=start.kept, step=0)
    answer = [*run.vocabulary.read("3 1 4 1 5"), run.vocabulary.end]
    again = capture(untrained.model, run.vocabulary, run.read("3 1 4 1 5"), np.array(answer))
    for name, weights in again.weights.items():
        np.testing.assert_allclose(first.weights[name], weights, atol=1e-6)


def test_all_steps_are_one_program(copy_run):
    run = attn.load(copy_run)
    source, events = run.read("3 1 4"), []
    answer = np.array([*source, run.vocabulary.end])
    capture_each(run.model, [run.params], run.vocabulary, source, answer)
    counts = []
    for repeats in (1, 5):
        events.clear()
        listener = lambda event, duration, **kw: events.append(event)  # noqa: E731
        jax.monitoring.register_event_duration_secs_listener(listener)
        capture_each(run.model, [run.params] * repeats, run.vocabulary, source, answer)
        jax.monitoring.unregister_event_duration_listener(listener)
        counts.append(events.count("/jax/core/compile/backend_compile_duration"))
    assert counts[0] == counts[1] > 0
