"""Training and decoding of every config compile for TPUs and GPUs, and a step of training sends one message."""

import functools

import jax
import programs
import pytest
from devices import collectives, compiled

from attn.training.state import initial_state

# By day one config for all devices and each config for four chips; at night each config for all devices.
_BY_DAY = ("reverse", "v5e-4")


def cases() -> list:
    """Return every config with every device; most of them are for the night."""
    pairs = [(config, device) for config in programs.CONFIGS for device in programs.TARGETS]
    return [pytest.param(*pair, marks=() if set(pair) & set(_BY_DAY) else pytest.mark.nightly) for pair in pairs]


load = functools.cache(programs.load)


def bytes_of_message(config: str) -> int:
    """Return the bytes of the gradient of every parameter, the loss, its count and the number of tokens."""
    settings, data = load(config)
    state = jax.eval_shape(lambda: initial_state(settings, data.vocabulary))
    return 4 * (sum(leaf.size for leaf in jax.tree.leaves(state.params)) + 3)


@pytest.mark.parametrize("config, device", cases())
def test_training_and_decoding_compile_and_a_step_sends_one_message(mesh_of, config, device):
    mesh, sent = mesh_of(device), {}
    for name, (function, shapes) in programs.programs_of(*load(config), mesh).items():
        sent[name] = collectives(compiled(function, *shapes, mesh=mesh).as_text())
    assert set(sent) >= {"pack", "draw", "advance", "unpack", "decode"}
    if mesh.size == 1:
        assert not any(sent.values())
        return
    assert not (sent["pack"] or sent["draw"] or sent["unpack"])
    assert set(sent["advance"]) == {"all-reduce"}
    assert vars(sent["advance"]["all-reduce"]) == {"count": 1, "bytes": bytes_of_message(config)}
    # Each device decodes its own questions; the answers are gathered at the end.
    assert all(set(sent[name]) == {"all-gather"} for name in sent if name.startswith("decode"))


# For a TPU7x the compiler splits the message.
_MESSAGES = {"v5e-64": 1, "v5e-256": 1, "v4-4": 1, "tpu7x-4": 2, "a100-8": 1, "b200-8": 1}


@pytest.mark.nightly
@pytest.mark.parametrize("device", _MESSAGES)
def test_a_step_sends_the_same_bytes_on_every_generation_and_however_many_devices(mesh_of, device):
    mesh = mesh_of(device)
    advance, shapes = programs.programs_of(*load("reverse"), mesh)["advance"]
    sent = collectives(compiled(advance, *shapes, mesh=mesh).as_text())
    assert {kind: vars(each) for kind, each in sent.items()} == {
        "all-reduce": {"count": _MESSAGES[device], "bytes": bytes_of_message("reverse")}
    }
