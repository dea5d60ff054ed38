"""The call: transformations of JAX, edits of attention weights, and inputs that are refused in one line."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import pretrained
from attn.pretrained.loading import filled
from attn.pretrained.rules import by_path
from attn.studies.recordings import recording

load = functools.cache(lambda case: pretrained.load(recording(case).path))


@pytest.mark.parametrize("case", ["bert_masked", "llama_grouped", "t5", "vit_classes"])
def test_jit_and_vmap_change_nothing(case):
    model, inputs = load(case), recording(case).inputs()
    expected = model(**inputs).logits
    np.testing.assert_allclose(jax.jit(lambda inputs: model(**inputs).logits)(inputs), expected, atol=1e-5)
    twice = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 2), inputs)
    out = jax.vmap(lambda inputs: model(**inputs).logits)(twice)
    np.testing.assert_allclose(out, jnp.stack([expected] * 2), atol=1e-5)


@pytest.mark.parametrize("case", ["gpt2", "bart"])
def test_the_gradient_of_the_parameters_is_that_of_finite_differences(case):
    with jax.enable_x64(True):
        model, inputs = pretrained.load(recording(case).path, dtype="float64"), recording(case).inputs()

        @jax.jit
        def loss(model):
            return jnp.sum(jax.nn.log_softmax(model(**inputs).logits)[..., 3])

        slopes = jax.grad(loss)(model)
        keys = iter(jax.random.split(jax.random.key(0), 1_000))
        direction = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape, x.dtype), model)
        expected = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(direction)))
        step = 1e-6
        plus, minus = (jax.tree.map(lambda x, d, s=s: x + s * d, model, direction) for s in (step, -step))
        np.testing.assert_allclose((loss(plus) - loss(minus)) / (2 * step), expected, rtol=1e-6)


def test_pixels_have_gradients():
    model, pixels = load("vit_classes"), recording("vit_classes").inputs()["pixel_values"]
    slopes = jax.grad(lambda pixels: model(pixel_values=pixels).logits[0, 1])(jnp.asarray(pixels))
    assert (np.abs(slopes[0]).max(axis=0) > 0).all() and (slopes[1:] == 0).all()


@pytest.mark.parametrize(("case", "name"), [("bert_masked", "encoder"), ("gpt2", "decoder"), ("t5", "cross")])
def test_a_head_without_weights_is_a_head_without_output(case, name):
    model, inputs = load(case), recording(case).inputs()

    def edit(kind, layer, weights):
        return weights.at[1].set(0) if (kind, layer) == (name, 0) else weights

    removed = model(**inputs, edit=edit)
    stack = {"encoder": "stack", "decoder": "stack", "cross": "decoder"}[name]
    part = "cross" if name == "cross" else "attention"
    place = f"model.{stack}.blocks.0.{part}.W_O"
    flat = by_path(model.params)
    changed = filled(model.params, flat | {place: flat[place].at[1].set(0)})
    expected = pretrained.Pretrained(changed, model.origin)(**inputs)
    np.testing.assert_allclose(removed.logits, expected.logits, atol=1e-5)
    assert np.abs(removed.logits - model(**inputs).logits).max() > 1e-2
    attentions = removed.cross_attentions if name == "cross" else removed.attentions
    assert (attentions[0][:, 1] == 0).all() and (attentions[0][:, 0].sum(-1) > 0.99).any()


def test_an_edit_that_changes_nothing_changes_nothing():
    model, inputs = load("llama_grouped"), recording("llama_grouped").inputs()
    out = model(**inputs, edit=lambda name, layer, weights: weights)
    np.testing.assert_allclose(out.logits, model(**inputs, output_attentions=False).logits, atol=1e-5)


def test_attention_weights_have_gradients():
    model = load("gpt2")
    ids = jnp.array([[5, 0, 7, 9]])

    def logit(shift):
        return model(ids, edit=lambda name, layer, weights: weights + shift[layer]).logits[0, -1, 3]

    zeros = jnp.zeros((2, 4, 4, 4))  # [L N T T]
    slopes, step = jax.grad(logit)(zeros), 1e-2
    for at in [(0, 1, 2, 1), (1, 3, 3, 0)]:
        difference = (logit(zeros.at[at].set(step)) - logit(zeros.at[at].set(-step))) / (2 * step)
        np.testing.assert_allclose(slopes[at], difference, rtol=2e-2, atol=1e-4)
    assert slopes[1, 0, 3, 0] != 0 and slopes[1, 0, 2, 0] == 0  # the last layer's earlier rows do not reach this logit


def test_what_is_not_asked_for_is_not_returned():
    out = load("bert_masked")([[1, 2]], output_attentions=False, output_hidden_states=False)
    assert out.attentions is None and out.hidden_states is None and out["logits"].shape == (1, 2, 61)
    assert repr(out) == "Output(logits: (1, 2, 61), last_hidden_state: (1, 2, 24))"


@pytest.mark.parametrize(
    ("case", "inputs", "message"),
    [
        ("gpt2", {}, "input_ids: none given, must be an array [B T] of tokens"),
        ("gpt2", dict(input_ids=[1, 2]), "input_ids: got shape [2], must be [B T]"),
        ("gpt2", dict(input_ids=[[]]), "input_ids: got shape [1, 0], must be [B T]"),
        ("gpt2", dict(input_ids=[[1.5]]), "input_ids: got float32, must be integers"),
        ("gpt2", dict(input_ids=[[61]]), "input_ids: got 61, must lie in 0..60"),
        ("gpt2", dict(input_ids=[[-1]]), "input_ids: got -1, must lie in 0..60"),
        ("gpt2", dict(input_ids=[[1] * 21]), "input_ids: got 21 tokens, must be at most 20"),
        ("gpt2", dict(input_ids=[[1]], position_ids=[[20]]), "position_ids: got 20, must lie in 0..19"),
        ("gpt2", dict(input_ids=[[1]], attention_mask=[[1, 1]]), "attention_mask: got shape [1, 2], must be [1, 1]"),
        ("gpt2", dict(input_ids=[[1]], attention_mask=[[2]]), "attention_mask: got 2, must lie in 0..1"),
        ("gpt2", dict(input_ids=[[1]], token_type_ids=[[0]]), "token_type_ids: means nothing for this model"),
        ("bert_masked", dict(input_ids=[[1]], token_type_ids=[[2]]), "token_type_ids: got 2, must lie in 0..1"),
        ("t5", dict(input_ids=[[1]]), "decoder_input_ids: none given, must be an array [B T]"),
        ("t5", dict(input_ids=[[1], [2]], decoder_input_ids=[[0]]), "rows, must have equally many"),
        ("vit_classes", dict(pixel_values=np.zeros((1, 3, 8, 9))), "got shape [1, 3, 8, 9], must be [B 3 8 12]"),
    ],
)
def test_wrong_inputs_are_one_line(case, inputs, message):
    with pytest.raises(ValueError) as error:
        load(case)(**inputs)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("case", "arguments", "message"),
    [
        ("bert_masked", dict(input_ids=[[1]]), "generate: this model does not write text"),
        ("gpt2", dict(input_ids=[[1]], max_new_tokens=0), "max_new_tokens: got 0, must be a whole number"),
        (
            "gpt2",
            dict(input_ids=[[1]], max_new_tokens=21),
            "max_new_tokens: got 21, which needs 21 positions; there are 20",
        ),
        ("gpt2", dict(input_ids=None), "input_ids: none given"),
    ],
)
def test_wrong_prompts_are_one_line(case, arguments, message):
    with pytest.raises(ValueError) as error:
        load(case).generate(**arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_decoding_inside_of_jit_fills_the_room():
    model = load("gpt2_wide")
    recorded = recording("gpt2_wide").group("generate")
    prompt = recorded["input_ids"], recorded["attention_mask"]
    inside = jax.jit(lambda ids, mask: model.generate(ids, mask, max_new_tokens=9))(*prompt)
    np.testing.assert_array_equal(inside[:, : recorded["tokens"].shape[1]], recorded["tokens"])
    one = model.generate(prompt[0][:1], prompt[1][:1], max_new_tokens=9)
    assert one.shape[1] < inside.shape[1] and inside.shape[1] == prompt[0].shape[1] + 9  # its first row ends early


def test_the_parameters_of_two_loads_can_be_combined():
    one, other = load("gpt2"), pretrained.load(recording("gpt2").path)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, one, other)
    ids = [[5, 0, 7]]
    np.testing.assert_allclose(mean(ids).logits, one(ids).logits, atol=1e-6)
    assert one.origin == other.origin and one.origin != load("bart").origin and one.origin != 3


def test_an_output_has_its_values_by_name_and_by_number():
    out = load("gpt2")([[5, 0]])
    assert out[0] is out["logits"] is out.logits and len(out.to_tuple()) == 4


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda name, layer, weights: None,
            "edit: returned NoneType for 'decoder', layer 0; must be weights (4, 2, 2)",
        ),
        (lambda name, layer, weights: weights[0], "edit: returned (2, 2) for 'decoder', layer 0"),
    ],
)
def test_a_wrong_edit_is_one_line(edit, message):
    with pytest.raises(ValueError) as error:
        load("gpt2")([[5, 0]], edit=edit)
    assert message in str(error.value).splitlines()[0]


def test_a_prompt_that_ends_with_padding_is_refused():
    with pytest.raises(
        ValueError, match="attention_mask: row 1 ends with padding; prompts must be padded at the front"
    ):
        load("gpt2").generate([[5, 6], [5, 6]], [[1, 1], [1, 0]])


def test_numbers_that_jax_would_wrap_are_refused():
    with pytest.raises(ValueError, match=r"input_ids: got array.*must be an array of numbers of 32 bits"):
        load("gpt2")(np.array([[2**32 + 5]]))
