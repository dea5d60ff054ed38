"""Properties of every model: its parts see what they may see, and its ways of running agree.

Models and mechanisms from outside of the package are tested as well: `python -m pytest -p my_model tests/nn`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import LENGTH, SIZES, SOURCE, TARGET, VOCABULARY, extend, make, run, settings_of, start

from attn.mechanisms.registry import MECHANISMS
from attn.mechanisms.rows import LengthUnknown
from attn.nn.model import Model
from attn.nn.models import MODELS, register
from attn.nn.recurrent import DECODERS
from attn.nn.style import STYLES
from attn.nn.transformer import Mechanisms

# How each mechanism is written that has settings without a default, or whose default is too large here.
WRITTEN = {
    "softcap": "softcap(2.0)",
    "window": "window(2, 1)",
    "scaled": "scaled(0.7)",
    "learned": "learned(13)",
    "learned_grid": "learned_grid(3, 4)",
    "randomized": "randomized(rotary)",
}
EVERY = [WRITTEN.get(name, name) for name in MECHANISMS if name != "sinusoidal"]
MIXED = [Mechanisms(*(EVERY * 2)[at : at + 3]) for at in range(0, len(EVERY), 3)]
ONE_LAYER = dict(num_encoder_layers=1, num_decoder_layers=1)  # of each kind of attention, which compiles faster
T5 = Mechanisms("unscaled + t5(per_stack=True)", "unscaled + t5(per_stack=True, bidirectional=False)", "unscaled")
CASES = [
    ("transformer", dict(mechanism="sinusoidal", norm="pre", **ONE_LAYER)),
    ("transformer", dict(mechanism="sinusoidal + unscaled", norm="post", tied_embeddings=True)),
    ("transformer", dict(mechanism="learned(11)", norm="pre", tied_embeddings=True)),
    ("transformer", dict(mechanism="rotary + softcap(3)", norm="post", implementation="reference")),
    *[("transformer", dict(mechanism=mixed, **ONE_LAYER)) for mixed in MIXED],
    ("transformer", dict(mechanism=Mechanisms("shaw", "anchored", "randomized(learned(9), 9)"), **ONE_LAYER)),
    ("decoder_only", dict(mechanism="sinusoidal", prefix="causal")),
    ("decoder_only", dict(mechanism="rotary + window(2, 0)", prefix="visible", norm="post", tied_embeddings=True)),
    ("decoder_only", dict(mechanism="randomized(t5) + learned(13)", prefix="causal")),
    # In the padded prompt of a decoder-only model the row of a token is not its position.
    *[("decoder_only", dict(mechanism=" + ".join(EVERY[at : at + 3]))) for at in range(0, len(EVERY), 3)],
    ("decoder_only", dict(mechanism="log_length")),  # whose gradients were once NaN where a prompt is padded
    ("encoder_only", dict(mechanism="sinusoidal", tied_embeddings=True)),
    ("encoder_only", dict(mechanism="transformer_xl + qk_norm", norm="post")),
    ("lstm", dict(attention="none")),
    ("lstm", dict(attention="additive")),
    ("lstm", dict(attention="multiplicative", tied_embeddings=True)),
    ("gru", dict(attention="none", tied_embeddings=True)),
    ("gru", dict(attention="additive")),
    ("gru", dict(attention="multiplicative")),
    ("tape", dict(mechanism="learned(12)")),
    ("tape", dict(mechanism="randomized(transformer_xl) + unscaled", norm="post")),
    ("tape", dict(mechanism="anchored", head_width=4)),
]
STYLED = [
    ("transformer", dict(style="t5", mechanism=T5, num_groups=1, num_decoder_heads=3, tied_embeddings=True)),
    ("transformer", dict(style="t5_gated", mechanism=T5, decoder_feed_forward_width=14, **ONE_LAYER)),
    ("transformer", dict(style="bart", mechanism="learned(13, 2, per_stack=True)", tied_embeddings=True)),
    ("transformer", dict(style="marian", mechanism="sinusoidal(halves=True)", tied_embeddings=True, **ONE_LAYER)),
    ("decoder_only", dict(style="gpt2", mechanism="learned(13)", tied_embeddings=True)),
    ("decoder_only", dict(style="llama", mechanism="rotary", num_heads=6, num_groups=2)),
    ("encoder_only", dict(style="bert", mechanism="learned(13)", distinct_layers=1, embedding_width=7)),
    ("encoder_only", dict(style="bert(activation=relu)", embedding_width=7, tied_embeddings=True, num_groups=1)),
    ("vision_transformer", dict(style="vit", mechanism="learned_grid(2, 2)", num_groups=1)),
]
CASES += STYLED
CASES += [(name, {}) for name in MODELS if name not in {name for name, _ in CASES}]  # from outside
IDS = [f"{name}-{number}" for number, (name, _) in enumerate(CASES)]
every_case = pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
# What does not depend on mechanisms and gates is tested by day with the first case of each model, at night with all.
FIRST = {next(number for number, (name, _) in enumerate(CASES) if name == kind) for kind in MODELS}
MARKED = [
    pytest.param(*case, id=IDS[number], marks=() if number in FIRST else pytest.mark.nightly)
    for number, case in enumerate(CASES)
]
typical_case = pytest.mark.parametrize(("name", "settings"), MARKED)
every_model = pytest.mark.parametrize("name", MODELS)


def written(mechanism) -> str:
    """All that is written of mechanisms in a setting."""
    return mechanism if isinstance(mechanism, str) else " ".join(vars(mechanism).values())


def test_the_cases_cover_every_model_and_every_choice():
    assert {name for name, _ in CASES} == set(MODELS) == set(SIZES)
    tried = " ".join(written(more["mechanism"]) for _, more in CASES if "mechanism" in more)
    assert [name for name in MECHANISMS if name not in tried] == []
    for setting, choices in [("attention", DECODERS), ("prefix", ("causal", "visible")), ("norm", ("pre", "post"))]:
        cases = {(name, more[setting]) for name, more in CASES if setting in more}
        assert {choice for _, choice in cases} == set(choices)
        assert {name for name, _ in cases} <= {name for name in MODELS if setting in settings_of(name)}
    assert {more.get("style", "plain").partition("(")[0] for _, more in CASES} == set(STYLES)
    sizes = {"num_groups", "num_decoder_heads", "decoder_feed_forward_width", "distinct_layers", "embedding_width"}
    assert sizes <= {name for _, more in STYLED for name in more}


@pytest.mark.some(8)
@every_case
def test_cached_decoding_equals_full_decoding_token_for_token(name, settings):
    model = make(name, **settings)
    full = run(model)
    cache, logits = start(model), []
    for token in TARGET:
        row, cache = extend(model, token[None], cache)
        logits.append(row[0])
    np.testing.assert_allclose(np.stack(logits), full, atol=2e-5)
    np.testing.assert_array_equal(np.stack(logits).argmax(-1), full.argmax(-1))
    # Some at once and then the rest, in a cache with capacity left over: no case is special.
    cache = start(model, capacity=len(TARGET) + 3)
    first, cache = extend(model, TARGET[:3], cache)
    rest, _ = extend(model, TARGET[3:], cache)
    np.testing.assert_allclose(np.concatenate([first, rest]), full, atol=2e-5)


@pytest.mark.parametrize(("name", "settings"), [case for case in MARKED if MODELS[case.values[0]].reads_answer])
def test_the_answer_is_read_causally_by_its_gradient(name, settings):
    model = make(name, **(settings | {"tied_embeddings": False}))
    if model.output is None:  # its logits depend on the table in two ways
        changed = [np.abs(run(model, inputs=TARGET.at[t].set(6)) - run(model)).max(axis=1) for t in range(len(TARGET))]
        np.testing.assert_array_equal(np.stack(changed, axis=1) > 0, np.tri(len(TARGET), dtype=bool))
        return
    graphdef, table, rest = nnx.split(model, nnx.PathContains("answer_embed"), ...)
    if not jax.tree.leaves(table):  # source and answer have one table
        graphdef, table, rest = nnx.split(model, nnx.PathContains("source_embed"), ...)

    def logits(table):
        return nnx.merge(graphdef, table, rest)(jnp.array([3, 4, 5, 9, 0]), TARGET, answer_length=LENGTH)

    # The tokens of the answer differ, and are not in the source, so each one's row of the table tells its reach.
    [jacobian] = jax.tree.leaves(jax.jit(jax.jacrev(logits))(table))  # [T V V D]
    reach = np.abs(jacobian).max(axis=(1, 3))[:, TARGET]
    assert (reach[np.triu_indices(len(TARGET), 1)] == 0).all()
    assert (np.diag(reach) > 0).all()
    if "window" not in written(settings.get("mechanism", "")):
        assert (reach[np.tril_indices(len(TARGET))] > 0).all()


@pytest.mark.some(5)
@every_case
def test_padding_of_the_source_changes_nothing(name, settings):
    model = make(name, **settings)
    longer = jnp.concatenate([SOURCE, jnp.zeros(4, SOURCE.dtype)])
    np.testing.assert_allclose(run(model, longer), run(model), atol=2e-5)


@every_model
def test_dropout_comes_from_its_key_alone(name):
    model = make(name, dropout=0.3)
    one, same, other = (run(model, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(run(model), run(make(name)))


@every_model
def test_bfloat16_computes_in_bfloat16_with_float32_parameters(name):
    half = make(name, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half, nnx.Param))} == {jnp.dtype("float32")}
    cache = start(half)
    kept = {leaf.dtype for leaf in jax.tree.leaves((cache.own, cache.memory))} - {jnp.dtype("int32")}
    assert kept == {jnp.dtype("bfloat16" if half.reads_answer else "float32")}  # keys and values or states; logits
    np.testing.assert_allclose(run(half), run(make(name)), atol=0.15)


def test_a_class_that_is_not_a_model_is_refused():
    with pytest.raises(TypeError, match=r"model 'half': .* must be a Model with settings, start and extend"):
        register("half")(type("Half", (Model,), {}))
    for maps in ("abc", (("cross", "answer"),), (("cross", "answer", "sources"),)):
        with pytest.raises(TypeError, match=r"model 'half': maps: got .* must be \(name, rows, columns\)"):
            register("half")(type("Half", (MODELS["gru"],), {"maps": maps}))
    assert "half" not in MODELS


@pytest.mark.parametrize("name", ["transformer", "decoder_only", "encoder_only", "lstm", "gru"])
def test_tied_embeddings_share_one_matrix(name):
    count = lambda model: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))  # noqa: E731
    matrices = 1 if name.endswith("only") else 2  # that tying saves: the output's, and the answer's
    saved = count(make(name)) - count(make(name, tied_embeddings=True))
    assert saved == matrices * VOCABULARY * SIZES[name]["width"]


@pytest.mark.some(5)
@every_case
def test_every_parameter_gets_a_gradient(name, settings):
    graphdef, params = nnx.split(make(name, **settings), nnx.Param)

    def loss(params):
        logits = nnx.merge(graphdef, params)(SOURCE, TARGET, answer_length=LENGTH)
        return jnp.sum(jax.nn.log_softmax(logits)[:, 3])

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
    sizes = {"source": len(SOURCE), "answer": len(TARGET), "both": len(SOURCE) + len(TARGET)}
    expected = {kind: axes for kind, *axes in model.maps} if settings.get("attention") != "none" else {}
    assert weights.keys() == expected.keys()
    for kind, (rows, columns) in expected.items():
        assert weights[kind].shape[2:] == (sizes[rows], sizes[columns])
        np.testing.assert_allclose(weights[kind].sum(-1), 1, atol=1e-5)
        padding = slice(0, 2) if columns == "both" else slice(5, None) if columns == "source" else slice(0)
        assert (weights[kind][..., padding] == 0).all()  # of a decoder-only model it comes before the source


@typical_case
def test_a_shift_is_added_to_the_embeddings_of_the_source(name, settings):
    """Shifting the embeddings by the difference of two tokens' rows is reading the other token."""
    model = make(name, **settings)
    other = SOURCE.at[2].set(7)
    shift = model.source_vectors(other) - model.source_vectors(SOURCE)
    assert np.flatnonzero(np.abs(shift).max(axis=1)).tolist() == [2]
    np.testing.assert_allclose(run(model, shift=shift), run(model, other), atol=2e-5)
    assert np.abs(run(model, other) - run(model)).max() > 1e-3


READS_LENGTH = {  # where each mechanism reads the length of the answer, of what the package and the studies have
    "anchored": {"decoder", "cross"},
    "anchored_t5": {"decoder", "cross"},
    "anchored_rotary": {"decoder", "cross"},
    "line": {"decoder"},
    "randomized": {"encoder", "decoder", "cross"},
}


@pytest.mark.some(6)
@pytest.mark.parametrize("kind", ["encoder", "decoder", "cross"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_a_mechanism_that_reads_an_unknown_length_says_so(name, kind):
    mechanism = Mechanisms(**{"encoder": "none", "decoder": "none", "cross": "none"} | {kind: WRITTEN.get(name, name)})

    def logits():
        return make(mechanism=mechanism)(SOURCE, TARGET)

    if kind in READS_LENGTH.get(name, ()):
        with pytest.raises(LengthUnknown, match="the length of the answer"):
            nnx.eval_shape(logits)
    else:
        assert nnx.eval_shape(logits).shape == (len(TARGET), VOCABULARY)


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="'lstm': is known already"):
        register("lstm")(MODELS["gru"])


@pytest.mark.parametrize("style", STYLES)
def test_models_with_the_same_settings_have_the_same_structure(style):
    """So that a program that was compiled for one serves the other."""
    for name in ("transformer", "decoder_only"):
        one, other = (nnx.split(make(name, style=style))[0] for _ in range(2))
        assert one == other and hash(one) == hash(other)
