"""The Transformers: what their parts may see, and how prompts and caches are laid out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import SIZES, SOURCE, TARGET, VOCABULARY, extend, make, run, start

from attn.functional import masks
from attn.mechanisms.rows import Example, rows
from attn.nn.attention import Sides
from attn.nn.transformer import Mechanisms


def encode(model, tokens):
    """Return what the decoder gets of a source."""
    length = jnp.sum(tokens != 0)
    own = rows(len(tokens), total=length, example=Example(length))
    return model.encode(tokens, Sides(own, own, masks.padding(length)))[0]


def test_padding_is_out_of_reach_by_its_gradient():
    layer = make().encoder.blocks[0].attention
    own = rows(len(SOURCE), total=5, example=Example(5))

    def read(values):
        out, _ = layer(values, layer.keys_values(values, own), Sides(own, own, masks.padding(5)))
        return out[:5]

    values = jax.random.normal(jax.random.key(0), (len(SOURCE), SIZES["transformer"]["width"]))
    reach = np.abs(jax.jacobian(read)(values)).max(axis=(0, 1, 3))
    assert (reach[5:] == 0).all()
    assert (reach[:5] > 0).all()


def test_without_positions_the_encoder_is_permutation_equivariant():
    tokens = jnp.array([3, 1, 4, 1, 5, 9, 2])
    order = jnp.array([6, 2, 0, 5, 1, 3, 4])
    model = make(mechanism="none")
    np.testing.assert_allclose(encode(model, tokens[order]), encode(model, tokens)[order], atol=1e-5)
    ordered = make(mechanism="sinusoidal")
    assert np.abs(encode(ordered, tokens[order]) - encode(ordered, tokens)[order]).max() > 1e-2


def test_the_decoder_attends_to_no_token_to_come():
    _, weights = run(make(), return_weights=True)
    assert (np.triu(weights["decoder"], 1) == 0).all()


def test_an_explicit_head_width_need_not_divide_the_width():
    model = make(num_heads=7, head_width=4)
    assert run(model).shape == (5, VOCABULARY)
    assert model.encoder.blocks[0].attention.W_Q.shape == (30, 7, 4)


def test_one_text_stands_for_all_attention_but_rows_are_added_once():
    assert Mechanisms.named("rotary") == Mechanisms("rotary", "rotary", "rotary")
    both = "sinusoidal + softcap(20.0)"
    assert Mechanisms.named(both) == Mechanisms(both, both, "softcap(20.0)")
    assert Mechanisms.named("learned(9)").cross == "none"


def test_a_learned_table_is_one_for_all_that_name_it():
    params = lambda model: {str(path): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}  # noqa: E731
    tables = [shape for path, shape in params(make(mechanism="learned(9)")).items() if "table" in path]
    assert tables == [(9, 30)]
    two = make(mechanism=Mechanisms("learned(9)", "learned(12)", "none"))
    assert sorted(shape for path, shape in params(two).items() if "table" in path) == [(9, 30), (12, 30)]


@pytest.mark.parametrize("prefix", ["causal", "visible"])
def test_a_decoder_only_model_sees_of_the_source_what_its_prefix_says(prefix):
    deep = make("decoder_only", prefix=prefix, num_layers=2)
    graphdef, state = nnx.split(deep)
    keys = lambda shift: nnx.merge(graphdef, state).start(SOURCE, 1, shift=shift)[0].own[1].key[2:7]  # noqa: E731
    reach = np.abs(jax.jit(jax.jacrev(keys))(jnp.zeros((7, 30)))).max(axis=(1, 2, 4))[
        :, :5
    ]  # [query token, source token]
    assert (reach[np.tril_indices(5)] > 0).all()
    assert (reach[np.triu_indices(5, 1)] > 0).all() == (prefix == "visible")
    assert (reach[np.triu_indices(5, 1)] == 0).all() == (prefix == "causal")


def test_prompts_of_a_batch_keep_positions_without_gaps():
    """Sources of different lengths, padded to one, are continued as each of them by itself."""
    model = make("decoder_only", mechanism="rotary + learned(13)")
    sources = [jnp.array([3, 1, 4, 5, 9]), jnp.array([7, 9])]
    batch = jnp.stack([jnp.pad(source, (0, 5 - len(source))) for source in sources])
    alone = [run(model, source) for source in sources]
    np.testing.assert_allclose(jax.vmap(lambda source: model(source, TARGET))(batch), jnp.stack(alone), atol=2e-5)
    # Another answer position would be another answer.
    assert np.abs(run(model, jnp.array([7, 9, 1])) - alone[1]).max() > 1e-3


def test_a_text_without_a_source_is_a_source_of_padding():
    model = make("decoder_only")
    one, two = run(model, jnp.array([0])), run(model, jnp.array([0, 0, 0]))
    np.testing.assert_allclose(one, two, atol=2e-5)
    # Read as a prompt, the first tokens of a text are what they are as an answer.
    logits, _ = extend(model, TARGET[2:], start(model, TARGET[:2]))
    np.testing.assert_allclose(logits, one[2:], atol=2e-5)


def test_an_encoder_only_model_ends_where_its_source_does():
    """A cache of more tokens than the source has: the end token follows, one token at a time and all at once."""
    model = make("encoder_only")
    source, capacity = SOURCE[:3], 6
    cache = start(model, source, capacity)
    logits, _ = extend(model, jnp.zeros(capacity, int), cache)
    assert (logits[3:].argmax(-1) == VOCABULARY - 1).all() and logits.shape[0] == capacity
    one_by_one = []
    for _ in range(capacity):
        row, cache = extend(model, jnp.zeros(1, int), cache)
        one_by_one.append(row[0])
    np.testing.assert_array_equal(jnp.stack(one_by_one), logits)


def test_an_encoder_only_model_writes_all_tokens_at_once():
    model = make("encoder_only")
    np.testing.assert_array_equal(run(model), run(model, inputs=TARGET[::-1]))
    assert np.ptp(run(model), axis=0).min() > 0
