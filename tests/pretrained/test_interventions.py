"""Interventions on pretrained models of every kind, beside changed parameters, `edit=` and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import pretrained
from attn.inspection.interventions import (
    ablate,
    edit,
    head_effects,
    loss_effects,
    patch,
    patch_effects,
    replace,
    weight_gradients,
)
from attn.pretrained.loading import filled
from attn.pretrained.rules import by_path
from attn.studies.recordings import recording

load = functools.cache(lambda case: pretrained.load(recording(case).path))
IDS, OTHER, ANSWER = [5, 7, 9, 11], [5, 8, 9, 2], [3, 4, 6]
KINDS = {
    "bert_masked": "encoder",
    "gpt2": "decoder",
    "t5": "cross",
    "albert_masked": "encoder",
    "vit_classes": "encoder",
}


BY_DAY = ["gpt2", "t5", "albert_masked"]
BY_NIGHT = [pytest.param(case, marks=pytest.mark.nightly) for case in KINDS if case not in BY_DAY]


def inputs_of(case):
    """Two inputs, and the answer that both read, of an encoder-decoder."""
    if case.startswith("vit"):
        return (*recording(case).inputs()["pixel_values"][:2], None)
    return IDS, OTHER, ANSWER if KINDS[case] == "cross" else None


def arguments(case, given, model):
    if case.startswith("vit"):
        return {"pixel_values": given[None]}
    decoder = {"decoder_input_ids": [[model.origin.greedy.start, *ANSWER[:-1]]]} if KINDS[case] == "cross" else {}
    return {"input_ids": [given], **decoder}


@pytest.mark.parametrize("case", KINDS)
def test_an_ablated_head_is_one_without_its_part_of_the_output_matrix(case):
    model, kind = load(case), KINDS[case]
    stack = {"encoder": "stack", "decoder": "stack", "cross": "decoder"}[kind]
    place = f"model.{stack}.blocks.0.{'cross' if kind == 'cross' else 'attention'}.W_O"
    flat = by_path(model.params)
    changed = filled(model.params, flat | {place: flat[place].at[1].set(0)})
    blocks = getattr(model.model.model, stack).blocks
    shared = [layer for layer in range(len(blocks)) if blocks[layer] is blocks[0]]  # all of ALBERT's have this matrix
    call = arguments(case, inputs_of(case)[0], model)
    found = ablate(model, [(kind, layer, 1) for layer in shared])(**call)
    np.testing.assert_allclose(found.logits, pretrained.Pretrained(changed, model.origin)(**call).logits, atol=1e-5)
    assert np.abs(found.logits - model(**call).logits).max() > 1e-3


def test_a_layer_with_shared_parameters_is_ablated_alone():
    model = load("albert_masked")
    usual = model([IDS])
    found = ablate(model, [("encoder", 1, head) for head in range(4)])([IDS])
    for layer in range(2):  # of the embeddings and of layer 0
        np.testing.assert_allclose(found.hidden_states[layer], usual.hidden_states[layer], atol=1e-6)
    assert np.abs(found.hidden_states[2] - usual.hidden_states[2]).max() > 1e-2
    assert (found.attentions[1] == 0).all() and (found.attentions[2].sum(-1) > 0.99).all()


@pytest.mark.parametrize("to", ["zero", "mean"])
@pytest.mark.parametrize("case", ["gpt2", "t5"])
def test_greedy_decoding_writes_what_the_full_pass_finds_most_probable(case, to):
    kinds = ("decoder",) if case == "gpt2" else ("decoder", "cross", "encoder")
    model = ablate(load(case), [(kind, 0, head) for kind in kinds for head in (0, 2)], to=to)
    written = np.asarray(model.generate([IDS], max_new_tokens=6))[0]
    if case == "gpt2":
        logits, first = model([written[:-1].tolist()]).logits[0], len(IDS) - 1
    else:
        logits, first = model([IDS], decoder_input_ids=[written[:-1].tolist()]).logits[0], 0
    np.testing.assert_array_equal(np.argmax(logits, -1)[first:], written[first + 1 :])


def test_an_edit_of_the_structure_comes_before_that_of_a_call():
    model = load("gpt2")
    doubled = edit(model, lambda kind, layer, weights: 2 * weights)
    found = doubled([IDS], edit=lambda kind, layer, weights: weights + 1).attentions[0]
    np.testing.assert_allclose(found, 2 * model([IDS]).attentions[0] + 1, atol=1e-5)


def test_the_model_stays_as_it_is_and_its_program_is_found_again():
    model = load("gpt2")
    before, usual = model.origin, model([IDS]).logits
    one, same = (ablate(model, [("decoder", 0, 1)]) for _ in range(2))
    assert model.origin is before and one.params is model.params and one.origin == same.origin != model.origin
    np.testing.assert_array_equal(model([IDS]).logits, usual)


@pytest.mark.parametrize("case", ["bert_masked", "gpt2", "t5"])
def test_replaced_maps_are_shown_and_used(case):
    model, kind = load(case), KINDS[case]
    _, _, answer = inputs_of(case)
    other = model.look(OTHER, answer=answer).weights[kind]
    changed = replace(model, {(kind, 0, head): other[0, head] for head in range(4)})
    maps = changed.look(IDS, answer=answer).weights[kind]
    np.testing.assert_allclose(maps[0], other[0], atol=1e-6)
    expected = model(
        **arguments(case, IDS, model), edit=lambda name, l, w: jnp.asarray(other[0]) if (name, l) == (kind, 0) else w
    )
    np.testing.assert_allclose(changed(**arguments(case, IDS, model)).logits, expected.logits, atol=1e-6)


@pytest.mark.parametrize("case", [*BY_DAY, *BY_NIGHT])
def test_gradients_are_those_of_finite_differences(case):
    with jax.enable_x64(True):
        model = pretrained.load(recording(case).path, dtype="float64")
        given, _, answer = inputs_of(case)
        call, step, rng = arguments(case, given, model), 1e-6, np.random.default_rng(0)
        slopes = weight_gradients(model, given, answer=answer)
        labels = {"gpt2": IDS[1:], "t5": ANSWER}.get(case)
        if labels is None:
            labels = np.atleast_1d(np.argmax(model(**call).logits[0], axis=-1)).tolist()

        @jax.jit
        def loss(change):
            logits = model(**call, edit=lambda kind, layer, weights: weights + change[kind][layer]).logits[0]
            log_probs = jax.nn.log_softmax(jnp.atleast_2d(logits))
            return -sum(log_probs[t, label] for t, label in enumerate(labels))

        zeros = {kind: np.zeros(x.shape) for kind, x in slopes.items()}
        for kind, found in slopes.items():
            some = zeros[kind].copy()
            some[tuple(rng.integers(size) for size in found.shape)] = 1
            for d in (rng.normal(size=found.shape), some):
                plus, minus = (loss(zeros | {kind: sign * step * d}) for sign in (1, -1))
                np.testing.assert_allclose((found * d).sum(), (plus - minus) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", KINDS)
def test_a_patch_of_all_states_gives_the_logits_of_the_source(case):
    model = load(case)
    source, target, answer = inputs_of(case)
    stacks = {"cross": ("encoder", "decoder")}.get(KINDS[case], (KINDS[case],))
    last = 2 if case == "albert_masked" else 1
    out = patch(model, source, target, states=[(stack, last) for stack in stacks], answer=answer)
    for found, given in ((out.source, source), (out.before, target)):
        logits = np.atleast_2d(model(**arguments(case, given, model)).logits[0])
        np.testing.assert_allclose(found, logits, atol=1e-5)
    np.testing.assert_allclose(out.patched, out.source, atol=1e-5)
    assert np.abs(out.before - out.source).max() > 1e-3


def test_a_trace_is_one_patch_after_another():
    model = load("gpt2")
    effects = patch_effects(model, IDS, OTHER)["decoder"]
    assert effects.shape == (2, 4)
    for layer, position in [(0, 1), (1, 2)]:
        out = patch(model, IDS, OTHER, states=[("decoder", layer)], positions=[position])
        log_probs = (np.asarray(jax.nn.log_softmax(x))[range(3), IDS[1:]].sum() for x in (out.patched, out.before))
        np.testing.assert_allclose(effects[layer, position], np.subtract(*log_probs), atol=1e-4)
    np.testing.assert_allclose(effects[:, 0], 0, atol=1e-5)  # the first tokens are equal


def test_effects_on_the_loss_are_losses_without_each_head():
    model = load("bert_masked")
    effects = loss_effects(model, IDS, to="mean")["encoder"]
    labels = np.argmax(model([IDS]).logits[0], -1)

    def loss(model):
        return -np.asarray(jax.nn.log_softmax(model([IDS]).logits[0]))[range(4), labels].sum()

    for layer, head in [(0, 1), (1, 3)]:
        found = loss(ablate(model, [("encoder", layer, head)], to="mean")) - loss(model)
        np.testing.assert_allclose(effects[layer, head], found, atol=1e-4)


def test_a_model_without_logits_needs_a_loss():
    model = load("bert_plain")
    with pytest.raises(ValueError, match="loss: none given, must be a function of the last hidden state"):
        weight_gradients(model, IDS)
    with pytest.raises(ValueError, match="measure: none given"):
        patch_effects(model, IDS, OTHER)
    slopes = weight_gradients(model, IDS, loss=lambda x: jnp.sum(x[0] ** 2))["encoder"]
    assert (slopes[1, :, 1:] == 0).all() and (slopes[1, :, 0] != 0).any()  # the last layer's other rows do not reach it


@pytest.mark.parametrize(
    ("case", "call", "message"),
    [
        ("gpt2", lambda m: ablate(m, [("cross", 0, 0)]), "heads: got kind 'cross', must be of 'decoder'"),
        ("gpt2", lambda m: ablate(m, [("decoder", 2, 0)]), "heads: got layer 2 of 'decoder', must lie in 0..1"),
        ("gpt2", lambda m: head_effects(m), "run: got Pretrained, must be a run"),
        (
            "gpt2",
            lambda m: weight_gradients(m, [[1, 2]]),
            "text: got list, must be text, or its tokens as whole numbers",
        ),
        ("gpt2", lambda m: weight_gradients(m, [1, 61]), "input_ids: got 61, must lie in 0..60"),
        ("gpt2", lambda m: weight_gradients(m, IDS, answer=IDS), "answer: got [5, 7, 9, 11], means nothing"),
        ("gpt2", lambda m: patch(m, IDS, [1, 2], states=[("decoder", 0)]), "input_ids: got shapes [4] for the source"),
        ("vit_classes", lambda m: weight_gradients(m, "text"), "a picture is needed, got the text 'text'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(case, untyped, call, message):
    with pytest.raises(ValueError) as error:
        call(load(case))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_maps_of_tokens_without_a_tokenizer_are_named_by_their_numbers():
    maps = load("t5").look(IDS, answer=ANSWER)
    assert maps.source == ["5", "7", "9", "11"] and maps.written == ["3", "4", "6"]
