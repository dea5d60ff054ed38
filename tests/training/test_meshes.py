"""Meshes that divide a model: the same losses, the same answers, and checkpoints that do not depend on the mesh."""

import json
import os
import subprocess
import sys

import jax
import mesh_runs
import numpy as np
import pytest

import attn
from attn.tasks.generated import Generated
from attn.training import meshes
from attn.training.config import ConfigError, from_mapping
from attn.training.evaluation import Evaluator, build_programs
from attn.training.groups import MeshShape
from attn.training.identity import digest_of, may_change
from attn.training.placement import placement_of
from attn.training.state import State

SHAPES = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2), (1, 1, 4), (8, 1, 1)]
OTHERS = {
    "muon": {"optimizer": {"name": "muon", "averaging": 0.2}},
    "decoder_only": {
        "model": {
            **{"name": "decoder_only", "num_groups": 2, "style": "llama", "mechanism": "rotary", "dropout": 0.1},
            **{"width": 16, "num_heads": 4, "feed_forward_width": 32, "implementation": "blockwise"},
        }
    },
}


def eight_devices(precision: str, steps: int, settings: dict, shapes, folder=None) -> list[tuple[tuple, np.ndarray]]:
    """The losses on meshes of up to eight devices, with their shapes."""
    arguments = map(json.dumps, (settings, shapes, folder))
    command = [sys.executable, mesh_runs.__file__, precision, str(steps), *arguments]
    lines = subprocess.run(command, env=os.environ, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()
    return [(tuple(line["shape"]), np.array(line["losses"])) for line in map(json.loads, lines)]


def check_same(losses: list[tuple[tuple, np.ndarray]], *, within: float):
    (_, alone), *others = losses
    assert alone[-1] < alone[0] - 0.1
    for shape, found in others:
        np.testing.assert_allclose(found, alone, rtol=0, atol=within, err_msg=str(shape))


@pytest.fixture(scope="module")
def alone(config):
    """Losses, and the state before and after the first 20 steps, of one device."""
    with jax.enable_x64(True):
        start = mesh_runs.start(config)
        losses, _, whole = mesh_runs.run(config, (1, 1, 1), start, 20)
    return losses, start, whole


@pytest.fixture(scope="module")
def config():
    return mesh_runs.tiny(optimizer={"learning_rate": 0.02, "warmup_fraction": 0.0})


@pytest.mark.parametrize("shape", [(1, 2, 1), pytest.param((1, 1, 2), marks=pytest.mark.nightly)])
def test_two_devices_have_the_losses_of_one_and_continue_from_its_checkpoint(shape, config, alone, tmp_path):
    """In float64, where other orders of summation differ by 1e-15: what is more is a mistake."""
    with jax.enable_x64(True):
        losses, start, whole = alone
        found, state, ours = mesh_runs.run(config, shape, start, 20)
        np.testing.assert_allclose(found, losses, rtol=0, atol=1e-12)
        assert losses[-1] < losses[0] - 0.1
        assert jax.tree.structure(ours) == jax.tree.structure(whole)
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(whole)):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)
        if shape == (1, 2, 1):
            check_divided(state)
        # From one device to two, and from two to one.
        ends = [mesh_runs.run(config, (1, 1, 1), whole, 5)[0]]
        ends.append(mesh_runs.run(config, shape, mesh_runs.moved(config, tmp_path / "one", whole), 5)[0])
        ends.append(mesh_runs.run(config, (1, 1, 1), mesh_runs.moved(config, tmp_path / "two", ours), 5)[0])
    np.testing.assert_allclose(ends[1:], [ends[0]] * 2, rtol=0, atol=1e-12)


def check_divided(state):
    """Each device has half of the heads and of the hidden units, and of what AdamW keeps of them."""
    _, (adam, *_) = state.optimizer
    for tree in (state.params, adam.mu, adam.nu):
        block = tree["encoder"]["blocks"][0]
        shapes = [x.data.shape for x in block["attention"]["W_Q"][...].addressable_shards]
        shapes += [x.data.shape for x in block["feed_forward"]["contract"]["kernel"][...].addressable_shards]
        assert shapes == [(16, 2, 4)] * 2 + [(16, 16)] * 2
        assert tree["source_embed"]["embedding"][...].is_fully_replicated


@pytest.mark.nightly
def test_meshes_of_up_to_eight_devices_have_the_losses_of_one_over_200_steps():
    check_same(eight_devices("float64", 200, {}, [(1, 1, 1), *SHAPES]), within=1e-12)


@pytest.mark.nightly
def test_the_losses_are_the_same_to_a_millionth_in_float32():
    check_same(eight_devices("float32", 200, {}, [(1, 1, 1), *SHAPES]), within=1e-6)


@pytest.mark.nightly
def test_a_model_in_bfloat16_is_divided_too():
    """XLA's CPU compiler crashes on some sums of bfloat16 over devices, so it is not enough that they are correct."""
    model = mesh_runs.TINY["model"] | {"dtype": "bfloat16"}
    (_, alone), *others = eight_devices("float32", 2, {"model": model}, [(1, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)])
    for shape, found in others:
        np.testing.assert_allclose(found, alone, rtol=2e-3, err_msg=str(shape))  # a bit of bfloat16 is 4e-3


@pytest.mark.nightly
@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_and_models_have_the_losses_of_one(name):
    check_same(eight_devices("float64", 200, OTHERS[name], [(1, 1, 1), (2, 2, 2), (1, 1, 2)]), within=1e-12)


@pytest.mark.nightly
@pytest.mark.parametrize("settings", [{}, OTHERS["muon"]], ids=["adamw", "muon"])
def test_a_run_moves_from_one_device_to_eight_to_two(settings, tmp_path):
    [(_, alone)] = eight_devices("float64", 60, settings, [(1, 1, 1)])
    moves = eight_devices("float64", 20, settings, [(1, 1, 1), (2, 2, 2), (1, 2, 1)], str(tmp_path / "checkpoints"))
    np.testing.assert_allclose(np.concatenate([losses for _, losses in moves]), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 2, 1), pytest.param((1, 1, 2), marks=pytest.mark.nightly)])
def test_answers_do_not_depend_on_the_mesh(shape, copy_run):
    run = attn.load(copy_run)
    # Longer than it was trained on, so that some answers are wrong; 7 rows, which no mesh divides.
    questions = Generated(run.config.task).questions_of_each_length("test", [3, 6, 9], 7, seed=0)
    answers = []
    for each in ((1, 1, 1), shape):
        mesh = mesh_runs.mesh_of(each)
        params = placement_of(run.config, run.vocabulary, mesh).place(_state_of(run.params)).params
        programs = build_programs(run.vocabulary, run.graphdef, mesh, 2)
        answers.append(Evaluator(run.vocabulary, mesh, {10: 8}, *programs).evaluate(params, questions).answers)
    np.testing.assert_array_equal(*answers)


def _state_of(params) -> State:
    return State(params, (), np.int32(0))


def test_the_default_mesh_leaves_all_devices_to_the_data():
    mesh = meshes.data_mesh(8)
    assert dict(mesh.shape) == {"data": 2, "model": 1, "sequence": 1}
    assert not meshes.is_divided(mesh)
    mesh = meshes.model_mesh(7, MeshShape(sequence=2))
    assert dict(mesh.shape) == {"data": 1, "model": 1, "sequence": 2}
    assert meshes.is_divided(mesh)


def test_too_few_devices_are_one_line():
    message = "^config.mesh: got model = 2 and sequence = 3, whose product 6 must be at most the number of devices, 2$"
    with pytest.raises(meshes.DistributedError, match=message):
        meshes.model_mesh(8, MeshShape(2, 3))


@pytest.mark.parametrize(
    ("model", "mesh", "message"),
    [
        (
            {"num_heads": 4},
            {"model": 3},
            r"mesh.model: got 3, must divide config.model.num_heads = 4 \(1, 2, 4\)",
        ),
        ({"num_groups": 1}, {"model": 2}, r"config.mesh.model: got 2, must divide config.model.num_groups = 1 \(1\)"),
        ({"feed_forward_width": 130}, {"model": 4}, "must divide config.model.feed_forward_width = 130"),
        ({"num_decoder_heads": 1}, {"model": 2}, "must divide config.model.num_decoder_heads = 1"),
        ({"name": "lstm"}, {"sequence": 2}, "config.mesh.sequence: got 2, must be 1 for config.model.name = 'lstm'"),
        ({}, {"model": 0}, "config.mesh.model: got 0, must be a whole number at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_the_model_is_one_line(model, mesh, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping({"model": model, "mesh": mesh})


def test_the_mesh_may_change_when_a_run_resumes():
    assert may_change("mesh.model")
    assert may_change("mesh.sequence")
    assert digest_of(from_mapping({"mesh": {"model": 2}})) == digest_of(from_mapping({}))


@pytest.mark.parametrize("per_model, made", [(1, 4), (2, 4), (6, 6), (10**6, 64)])
def test_no_more_cpu_devices_are_made_than_a_model_may_be_divided_among(per_model, made, monkeypatch):
    """On four cores; more than are made is then an error that names their number."""
    settings = {}
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(meshes, "cores", lambda: 4)
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    meshes.use_cores(batch_size=8, per_model=per_model)
    assert settings == {"jax_num_cpu_devices": made}
