"""Checkpoints: what does not verify is never used; damaged in any way, an older one takes over, in one line."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from event_rows import in_float32, rows_of_events

from attn import cli, experiment
from attn.training import checkpoints
from attn.training.config import from_mapping
from attn.training.folders import Folder
from attn.training.identity import digest_of
from attn.training.rows import read
from attn.training.state import State

CONFIG = "digest of the settings"


def state_at(step: int) -> State:
    """A state as optimisers have: nested, of several dtypes, two arrays of one shape."""
    rng = np.random.default_rng(step)
    params = {name: jnp.asarray(rng.normal(size=(40, 30)), jnp.float32) for name in ("W_Q", "W_K")}
    moments = (jnp.asarray(rng.normal(size=2400), jnp.float32), jnp.asarray(step, jnp.int32), None)
    return State({"encoder": params, "scale": jnp.ones(3, jnp.bfloat16)}, moments, jnp.asarray(step, jnp.int32))


LIKE = jax.eval_shape(lambda: state_at(0))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with checkpoints of steps 200 and 400."""
    folder = tmp_path_factory.mktemp("two")
    for step in (200, 400):
        checkpoints.save(folder, state_at(step), CONFIG)
    return folder


@pytest.fixture
def folder(two, tmp_path):
    """A copy to damage."""
    return shutil.copytree(two, tmp_path / "checkpoints")


def newest(folder, *, set_aside=True, config=CONFIG):
    """The state that is found, and the lines that are said."""
    said = []
    return checkpoints.restore_newest(folder, LIKE, config, said.append, set_aside=set_aside), said


def assert_same(found: State, expected: State):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_intact_it_is_the_newest_bit_for_bit(folder):
    found, said = newest(folder)
    assert said == []
    assert_same(found, state_at(400))
    assert jax.tree.structure(found) == jax.tree.structure(state_at(400))


def files_of(folder, step=400):
    return sorted(path for path in (folder / f"{step:08d}").rglob("*") if path.is_file())


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def zero_block(path, rng):
    data = bytearray(path.read_bytes())
    start = int(rng.integers(len(data)))
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    path.write_bytes(data)


def truncate(path, rng):
    os.truncate(path, int(rng.integers(path.stat().st_size)))


def remove(path, rng):
    path.unlink()


@pytest.mark.parametrize("damage", [flip, flip, flip, zero_block, truncate, remove])
def test_any_damage_to_any_file_never_gives_a_wrong_value(two, tmp_path, damage, request, capfd):
    """Each file in turn. Digits of the digest file that do not count aside, the damaged checkpoint is not used."""
    rng = np.random.default_rng(list(request.node.name.encode()))
    for number, name in enumerate(path.relative_to(two) for path in files_of(two)):
        folder = shutil.copytree(two, tmp_path / str(number))
        before = (folder / name).read_bytes()
        damage(folder / name, rng)
        if (folder / name).is_file() and (folder / name).read_bytes() == before:  # zeros were there already
            continue
        found, said = newest(folder)
        assert_same(found, state_at(int(found.step)))
        if int(found.step) == 200:
            assert len(said) == 1 and "\n" not in said[0]
            assert "00000400: " in said[0] and "kept as damaged-00000400; using the checkpoint of step 200" in said[0]
            assert (folder / "damaged-00000400").is_dir() and checkpoints.steps(folder) == [200]
        else:
            assert name.name == "digests.json" and json.loads((folder / name).read_bytes())
    assert capfd.readouterr().err == ""  # neither orbax nor its threads say anything


def rename_to_another_step(folder):
    (folder / "00000400").rename(folder / "00000600")


def swap_arrays(folder):
    """As a program would that writes a wholly valid checkpoint with two arrays exchanged."""
    state = state_at(400)
    encoder = state.params["encoder"]
    swapped = {"W_Q": encoder["W_K"], "W_K": encoder["W_Q"]}
    digests = json.loads((folder / "00000400/digests.json").read_text())
    shutil.rmtree(folder / "00000400")
    checkpoints.save(folder, state._replace(params=state.params | {"encoder": swapped}), CONFIG)
    path = folder / "00000400/digests.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"arrays": digests["arrays"]}))


def change_digests(folder):
    path = folder / "00000400/digests.json"
    digests = json.loads(path.read_text())
    digests["arrays"]["params.scale"] = digests["arrays"]["step"]
    path.write_text(json.dumps(digests))


def change_step_of_digests(folder):
    path = folder / "00000400/digests.json"
    path.write_text(path.read_text().replace('"step": 400', '"step": 401'))


def leave_out_digests(folder):
    (folder / "00000400/digests.json").unlink()


def of_another_step_inside(folder):
    shutil.rmtree(folder / "00000400")
    shutil.copytree(folder / "00000200", folder / "00000400")


SAID = {
    rename_to_another_step: "00000600: damaged (it was written at step 400)",
    swap_arrays: "00000400: damaged (params.encoder.W_K differs from its SHA-256)",
    change_digests: "00000400: damaged (params.scale differs from its SHA-256)",
    change_step_of_digests: "00000400: damaged (it was written at step 401)",
    leave_out_digests: "00000400: has no digests.json to verify it by",
    of_another_step_inside: "00000400: damaged (it was written at step 200)",
}


@pytest.mark.parametrize("damage", SAID)
def test_what_is_whole_but_not_what_it_says_is_set_aside(folder, damage):
    damage(folder)
    assert checkpoints.newest_step(folder) == (400 if damage in (swap_arrays, change_digests) else 200)
    found, said = newest(folder)
    assert_same(found, state_at(200))
    assert len(said) == 1 and SAID[damage] in said[0]
    assert checkpoints.steps(folder) == [200]
    assert [path.name.startswith("damaged-") for path in folder.iterdir() if path.name != "00000200"] == [True]


def test_an_empty_folder_and_leftovers_are_no_obstacle(folder):
    (folder / "00000600").mkdir()
    for left in (".writing-00000600/d", "00000100.retired/d", ".writing-00000800.orbax-checkpoint-tmp-1/d"):
        (folder / left).mkdir(parents=True)
    found, said = newest(folder)
    assert (int(found.step), said) == (400, [])
    checkpoints.sweep(folder)
    checkpoints.save(folder, state_at(600), CONFIG)
    assert sorted(path.name for path in folder.iterdir()) == ["00000400", "00000600"]
    assert_same(newest(folder)[0], state_at(600))


def test_damaged_twice_both_are_kept(folder):
    for _ in range(2):
        remove(files_of(folder)[0], None)
        newest(folder)
        checkpoints.save(folder, state_at(400), CONFIG)
    assert {path.name for path in folder.glob("damaged-*")} == {"damaged-00000400", "damaged-00000400-2"}
    assert_same(newest(folder)[0], state_at(400))


def test_where_none_verifies_nothing_is_moved(folder):
    for step in (200, 400):
        remove(files_of(folder, step)[-1], None)
    before = sorted(folder.rglob("*"))
    with pytest.raises(checkpoints.CheckpointError, match=r"^no checkpoint can be used: .*400: .*200: ") as raised:
        newest(folder)
    assert "\n" not in str(raised.value)
    assert sorted(folder.rglob("*")) == before
    assert newest(folder.parent / "nowhere") == (None, [])


def test_a_reader_moves_nothing(folder):
    remove(files_of(folder)[0], None)
    before = sorted(folder.rglob("*"))
    found, said = newest(folder, set_aside=False)
    assert int(found.step) == 200 and len(said) == 1 and "kept as" not in said[0]
    assert sorted(folder.rglob("*")) == before


def test_a_checkpoint_of_other_settings_is_not_used(folder):
    with pytest.raises(checkpoints.CheckpointError, match="written with other settings"):
        newest(folder, config="another digest")


def test_settings_that_decide_the_arrays_are_in_the_digest():
    usual = digest_of(from_mapping({}))
    free = {"training": {"steps": 5_000, "checkpoint_every": 7}, "evaluation": {"examples": 3}}
    assert digest_of(from_mapping(free)) == usual
    for section, name, value in (
        ("training", "seed", 1),
        ("model", "width", 32),
        ("optimizer", "beta1", 0.5),
        ("task", "symbols", 4),
    ):
        assert digest_of(from_mapping({section: {name: value}})) != usual
    assert digest_of(from_mapping({"model": {"name": "lstm"}})) != digest_of(from_mapping({"model": {"name": "gru"}}))


@pytest.mark.parametrize("name", ["transformer", "lstm"])
def test_a_setting_that_is_added_with_a_default_leaves_old_runs_as_they_are(name):
    config = from_mapping({"model": {"name": name, "width": 32}})
    later = dataclasses.make_dataclass("Later", [("extra", int, 4)], bases=(type(config.model),), frozen=True)
    values = {field.name: getattr(config.model, field.name) for field in dataclasses.fields(config.model)}
    assert digest_of(dataclasses.replace(config, model=later(**values))) == digest_of(config)
    assert digest_of(dataclasses.replace(config, model=later(**values, extra=5))) != digest_of(config)


@pytest.mark.parametrize("failing", ["posix_fallocate", "rename"])
def test_a_full_disk_is_one_error_and_leaves_the_others(folder, monkeypatch, failing):
    def full(*_):
        raise OSError(28, "No space left on device")

    if failing == "rename":
        monkeypatch.setattr(checkpoints.pathlib.Path, "rename", full)
    else:
        monkeypatch.setattr(checkpoints.os, failing, full)
    with pytest.raises(OSError, match=r"No space left on device\); the newest checkpoint is of step 400"):
        checkpoints.save(folder, state_at(600), CONFIG)
    assert sorted(path.name for path in folder.iterdir()) == ["00000200", "00000400"]


@pytest.fixture(scope="module")
def full_run(repository, tiny, trained):
    """The folder of a run that made all of its 400 steps, with checkpoints of two of them; no test may change it."""
    return trained("full", str(repository / "configs/copy.py"), tiny | {"training.stop_when_exact": "0"})


def damage_newest(run):
    flip(max(files_of(run / "checkpoints"), key=lambda path: path.stat().st_size), np.random.default_rng(0))


def test_the_command_line_falls_back_in_one_line(full_run, tmp_path, capfd):
    run = shutil.copytree(full_run, tmp_path / "run")
    damage_newest(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for words in (["predict", str(run), "3 1"], ["inspect", str(run)]):
        capfd.readouterr()
        assert cli.main(words) == 0
        out, err = capfd.readouterr()
        assert err.count("\n") == 1 and "using the checkpoint of step 200 instead" in err
    assert "step 200 of 400" in out and "(of step 400, not this one)" in out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    shutil.rmtree(run / "checkpoints/00000200")
    assert cli.main(["predict", str(run), "3 1"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: no checkpoint can be used: ")


def test_a_run_resumes_from_the_one_before_to_the_same_bits(full_run, tmp_path, capfd):
    run = shutil.copytree(full_run, tmp_path / "run")
    damage_newest(run)
    (run / "summary.json").unlink()
    (run / "checkpoints/.writing-00000300").mkdir()
    (run / ".config.json.partial").write_text("{")
    assert experiment.run(experiment.Request(None, {}, str(run), True, "off")) == 0
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "kept as damaged-00000400; using the checkpoint of step 200 instead" in err
    names = {"00000200", "00000400", "damaged-00000400"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == names
    assert not (run / ".config.json.partial").exists() and not (run / "lock.json").exists()
    one, other = (json.loads((each / "checkpoints/00000400/digests.json").read_text()) for each in (full_run, run))
    assert one["arrays"] == other["arrays"] and one["config"] == other["config"]
    rows = read(Folder(run).metrics)
    assert [row["step"] for row in rows] == [100, 200, 300, 400]
    assert rows_of_events(run) == in_float32(rows)
