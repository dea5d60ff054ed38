"""What holds for every model: what its parts may see, and that its ways of running agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import LENGTH, SIZES, SOURCE, TARGET, VOCABULARY, encode, make, run, start

from attn.nn.encodings import ENCODINGS, Positions
from attn.nn.models import MODELS, settings_of
from attn.nn.recurrent import DECODERS
from attn.nn.variants import VARIANTS

OTHERS = [name for name in ENCODINGS if name not in ("sinusoidal", "learned", "rotary", "none")]
MIXED = [Positions(*(OTHERS * 2)[at : at + 3]) for at in range(0, len(OTHERS), 3)]
ONE_LAYER = dict(num_encoder_layers=1, num_decoder_layers=1)  # of each kind of attention, which compiles faster
CASES = [
    ("transformer", dict(positions="sinusoidal", norm="pre", variant="plain", **ONE_LAYER)),
    ("transformer", dict(positions="sinusoidal", norm="post", tied_embeddings=True, variant="unscaled")),
    ("transformer", dict(positions="learned", norm="pre", tied_embeddings=True, max_length=11)),
    ("transformer", dict(positions="rotary", norm="post")),
    ("transformer", dict(positions="none", norm="pre")),
    *[("transformer", dict(positions=mixed, max_length=2_048, **ONE_LAYER)) for mixed in MIXED],
    (
        "transformer",
        dict(positions=Positions("shaw", "anchored", "randomized_learned", range=9), max_length=9, **ONE_LAYER),
    ),
    ("lstm", dict(attention="none")),
    ("lstm", dict(attention="additive")),
    ("lstm", dict(attention="multiplicative", tied_embeddings=True)),
    ("gru", dict(attention="none", tied_embeddings=True)),
    ("gru", dict(attention="additive")),
    ("gru", dict(attention="multiplicative")),
    ("tape", dict(positions="learned", variant="plain")),
    ("tape", dict(positions="randomized_transformer_xl", norm="pre", variant="unscaled")),
    ("tape", dict(positions="anchored", head_width=4)),
]
IDS = [f"{name}-{number}" for number, (name, _) in enumerate(CASES)]
every_case = pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
# Of what encodings and gates have no part in, one case of each kind; the others at night.
TYPICAL = ("transformer-0", "lstm-15", "gru-17", "tape-22")
assert set(TYPICAL) <= set(IDS)
MARKED = [
    pytest.param(*case, id=name, marks=() if name in TYPICAL else pytest.mark.nightly) for name, case in zip(IDS, CASES)
]
typical_case = pytest.mark.parametrize(("name", "settings"), MARKED)


def choices(value: str | Positions) -> list[str]:
    return [*value.by_kind().values()] if isinstance(value, Positions) else [value]


def test_the_cases_cover_every_model_and_every_choice():
    assert {name for name, _ in CASES} == set(MODELS)
    for setting, registry in [("positions", ENCODINGS), ("variant", VARIANTS), ("attention", DECODERS)]:
        tried = {(name, choice) for name, more in CASES if setting in more for choice in choices(more[setting])}
        assert {choice for _, choice in tried} == set(registry)
        assert {name for name, _ in tried} == {name for name in MODELS if setting in settings_of(name)}


@pytest.mark.some(4)
@every_case
def test_cached_decoding_equals_full_decoding_token_for_token(name, settings):
    model = make(name, **settings)
    full = run(model)
    cache = start(model)
    step = jax.jit(lambda token, cache: model.decode(token, cache)[:2])
    cache = cache._replace(position=jnp.asarray(0))
    logits = []
    for token in TARGET:
        row, cache = step(token[None], cache)
        logits.append(row[0])
    np.testing.assert_allclose(np.stack(logits), full, atol=2e-5)
    np.testing.assert_array_equal(np.stack(logits).argmax(-1), full.argmax(-1))


@pytest.mark.parametrize(("name", "settings"), [case for case in MARKED if case.values[0] != "tape"])
def test_decoder_is_causal_by_its_gradient(name, settings):
    model = make(name, **(settings | {"tied_embeddings": False}))
    graphdef, table, rest = nnx.split(model, nnx.PathContains("target_embed"), ...)

    def logits(table):
        return nnx.merge(graphdef, table, rest)(SOURCE, TARGET, target_length=LENGTH)

    # The tokens of the target differ, so each one's row of the table is felt at its own place and after.
    [jacobian] = jax.tree.leaves(jax.jit(jax.jacrev(logits))(table))  # [T V V D]
    reach = np.abs(jacobian).max(axis=(1, 3))[:, TARGET]
    assert (reach[np.triu_indices(len(TARGET), 1)] == 0).all()
    assert (reach[np.tril_indices(len(TARGET))] > 0).all()


@typical_case
def test_padding_of_the_source_changes_nothing(name, settings):
    model = make(name, **settings)
    longer = jnp.concatenate([SOURCE, jnp.zeros(4, SOURCE.dtype)])
    np.testing.assert_allclose(run(model, longer), run(model), atol=2e-5)


@pytest.mark.some(2)
@pytest.mark.parametrize("name", MODELS)
def test_dropout_comes_from_its_key_alone(name):
    model = make(name, dropout=0.3)
    one, same, other = (run(model, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(run(model), run(make(name)))


@pytest.mark.some(2)
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_computes_in_bfloat16_with_float32_parameters(name):
    half = make(name, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half, nnx.Param))} == {jnp.dtype("float32")}
    encoded = {leaf.dtype for leaf in jax.tree.leaves(encode(half, SOURCE))} - {jnp.dtype("int32")}  # of tokens
    assert encoded == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(run(half), run(make(name)), atol=0.15)


@pytest.mark.parametrize("name", [name for name in MODELS if "tied_embeddings" in settings_of(name)])
def test_tied_embeddings_share_one_matrix(name):
    count = lambda model: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))  # noqa: E731
    assert count(make(name)) - count(make(name, tied_embeddings=True)) == 2 * VOCABULARY * SIZES[name]["width"]


@pytest.mark.some(4)
@every_case
def test_every_parameter_gets_a_gradient(name, settings):
    graphdef, params = nnx.split(make(name, **settings), nnx.Param)

    def loss(params):
        return jnp.sum(jax.nn.log_softmax(nnx.merge(graphdef, params)(SOURCE, TARGET, target_length=LENGTH))[:, 3])

    zero = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params))
        if not np.abs(leaf).max() > 1e-8
    ]
    assert zero == []


@typical_case
def test_weights_are_those_of_the_answer(name, settings):
    model = make(name, **settings)
    logits, weights = run(model, return_weights=True)
    np.testing.assert_array_equal(logits, run(model))
    layers, heads, *_ = weights.cross.shape
    assert weights.cross.shape == (layers, heads, 5, 7) or layers == 0
    assert (layers > 0) == (settings.get("attention") != "none" and name != "tape")
    assert weights.decoder.shape[-2:] == (5, 5)
    assert weights.encoder.shape[-2:] == (7, 7)
    for some in weights:
        np.testing.assert_allclose(some.sum(-1), 1, atol=1e-5)
    assert (weights.cross[..., 5:] == 0).all()


@typical_case
def test_a_shift_is_added_to_the_embeddings_of_the_source(name, settings):
    """Shifting the embeddings by the difference of two tokens' rows is reading the other token."""
    model = make(name, **settings)
    rows = model.source_embed.embedding[...]
    other = SOURCE.at[2].set(7)
    shift = jnp.zeros((len(SOURCE), rows.shape[1])).at[2].set(rows[7] - rows[SOURCE[2]])
    np.testing.assert_allclose(run(model, shift=shift), run(model, other), atol=2e-5)
    assert np.abs(run(model, other) - run(model)).max() > 1e-3


@pytest.mark.some(6)
@pytest.mark.parametrize("kind", ["decoder", "cross"])
@pytest.mark.parametrize("name", ENCODINGS)
def test_an_encoding_asks_for_the_answer_s_length_if_and_only_if_it_says_so(name, kind):
    positions = Positions(**{"encoder": "none", "decoder": "none", "cross": "none"} | {kind: name})

    def logits():
        return make(positions=positions, max_length=positions.range)(SOURCE, TARGET)

    if kind in positions.needing_length():
        with pytest.raises(ValueError, match=f"{name}.*target_length must be given"):
            nnx.eval_shape(logits)
    else:
        assert nnx.eval_shape(logits).shape == (len(TARGET), VOCABULARY)
