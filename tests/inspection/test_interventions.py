"""Interventions on runs, beside other ways to the same: changed parameters, loops, finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attn
from attn.inspection import interventions
from attn.inspection.interventions import (
    Head,
    ablate,
    edit,
    head_effects,
    loss_effects,
    patch,
    patch_effects,
    replace,
)
from attn.studies.probes import exact_match

TEXT, OTHER = "3 1 4 1 5", "2 6 4 5 3"
BY_NIGHT = [pytest.param(name, marks=pytest.mark.nightly) for name in ("decoder_only", "encoder_only")]
ATTENDING = ["transformer", "causal_model", *BY_NIGHT]  # the second is from outside of the package
ENCODER_DECODER = [Head("cross", 0, 1), Head("cross", 0, 2), Head("decoder", 0, 0), Head("encoder", 0, 3)]


def logits_of(run, text=TEXT, answer=None) -> np.ndarray:
    each = run.full_pass(text, answer)
    return np.array(jax.jit(lambda params: each.call(nnx.merge(run.graphdef, params), each.inputs))(run.params))


def with_zero_matrix(run, head, matrix):
    """The run with one head's part of a matrix at zero."""
    stack, part = ("decoder", "cross") if head.kind == "cross" else (head.kind, "attention")
    stack = stack if hasattr(run.model, stack) else "stack"
    path, index = (stack, "blocks", head.layer, part, matrix), (head.head,)
    flat = dict(nnx.to_flat_state(run.params))
    index = index if matrix == "W_O" else (slice(None), *index)
    flat[path] = flat[path].replace(flat[path][...].at[index].set(0.0))
    return dataclasses.replace(run, params=nnx.from_flat_state(list(flat.items())))


@pytest.mark.parametrize(("to", "matrix"), [("zero", "W_O"), ("mean", "W_Q")])
@pytest.mark.parametrize("head", ENCODER_DECODER)
def test_an_ablated_head_is_one_whose_matrix_is_zero(run, head, to, matrix):
    """Without its part of W_O a head adds nothing; without that of W_Q all scores are 0, all weights equal."""
    ablated, expected = ablate(run, [head], to=to), with_zero_matrix(run, head, matrix)
    answer = "3 1 4 1 5"
    np.testing.assert_allclose(logits_of(ablated, answer=answer), logits_of(expected, answer=answer), atol=1e-4)
    assert exact_match(ablated, [4, 5, 6], 20) == exact_match(expected, [4, 5, 6], 20)


@pytest.mark.parametrize("name", ATTENDING)
def test_decoding_equals_the_full_pass(new_run, name):
    """Each token that the changed model writes with a cache is the most probable one of one pass over the answer."""
    run = new_run(name)
    kind = "encoder" if name == "encoder_only" else "decoder"
    for changed in (
        ablate(run, [(kind, 0, 1), (kind, 1, 3)]),
        ablate(run, [(kind, 0, 1)], to="mean"),
        edit(run, lambda kind, layer, weights: weights**2),
    ):
        for text in (TEXT, OTHER):
            each = changed.full_pass(text)
            logits = logits_of(changed, text)
            logits[:, 0] = -np.inf  # padding is never written
            np.testing.assert_array_equal(logits.argmax(-1), each.labels)


def test_maps_show_the_changed_weights(run):
    maps = ablate(run, [("cross", 0, 2)]).look(TEXT)
    assert (maps.weights["cross"][0, 2] == 0).all() and maps.weights["cross"][0, 1].sum() > 5.9


def test_a_beam_decodes_the_changed_model(run):
    all_heads = [("cross", 0, head) for head in range(4)]
    removed = ablate(run, all_heads)
    assert run.predict([TEXT], beam_width=2) == [TEXT] != removed.predict([TEXT], beam_width=2)


def test_the_run_stays_as_it_is_and_is_not_compiled_again(run):
    before, program = run.graphdef, run._evaluator(8, 1, 1)[0].decode
    assert run.predict([TEXT]) == [TEXT]
    compiled = program._cache_size()
    ablated = ablate(run, [("cross", 0, 0), ("cross", 0, 1), ("cross", 0, 2), ("cross", 0, 3)])
    assert ablated.predict([TEXT]) != [TEXT] == run.predict([TEXT])
    assert program._cache_size() == compiled and run._evaluator(8, 1, 1)[0].decode is program
    assert type(ablated) is type(run) and run.graphdef is before
    assert ablated.params is run.params and ablated.folder == run.folder


def test_replaced_weights_are_used_and_others_stay(run):
    everywhere = np.full((6, 6), 1 / 6)
    heads = [("cross", 0, head) for head in range(4)]
    changed = replace(run, dict.fromkeys(heads, everywhere))
    np.testing.assert_allclose(
        logits_of(changed, answer=TEXT), logits_of(ablate(run, heads, to="mean"), answer=TEXT), atol=1e-4
    )
    maps, usual = changed.look(TEXT), run.look(TEXT)
    np.testing.assert_allclose(maps.weights["cross"][0], 1 / 6, atol=1e-6)
    np.testing.assert_allclose(maps.weights["encoder"], usual.weights["encoder"], atol=1e-6)


@pytest.mark.parametrize("name", ATTENDING)
def test_a_model_with_its_own_maps_answers_the_same(new_run, name):
    """Arrays have the rows and columns of `look`, also in decoding with a cache, one row at a time."""
    run = new_run(name)
    maps = run.look(TEXT).weights
    own = {(kind, l, n): w[l, n] for kind, w in maps.items() for l in range(len(w)) for n in range(w.shape[1])}
    changed = replace(run, own)
    assert changed.predict([TEXT]) == run.predict([TEXT])
    np.testing.assert_allclose(logits_of(changed), logits_of(run), atol=1e-4)
    if name != "encoder_only":  # with the maps of another text the answer is another one
        other = run.look(OTHER).weights
        both = replace(run, {head: other[head[0]][head[1], head[2]] for head in own})
        each = both.full_pass(TEXT)
        logits = logits_of(both)
        logits[:, 0] = -np.inf
        np.testing.assert_array_equal(logits.argmax(-1), each.labels)


def test_a_function_replaces_the_weights_of_one_head(run):
    changed = replace(run, {Head("cross", 0, 1): lambda weights: weights[:, ::-1]})
    maps, usual = (each.look(TEXT).weights["cross"] for each in (changed, run))
    if changed.predict([TEXT]) == run.predict([TEXT]):
        np.testing.assert_allclose(maps[0, 0], usual[0, 0], atol=1e-5)
    again = edit(run, lambda kind, l, w: w.at[1].set(w[1, :, ::-1]) if kind == "cross" else w)
    np.testing.assert_allclose(again.look(TEXT).weights["cross"], maps, atol=1e-6)


@pytest.mark.parametrize("loss", [None, lambda logits: jnp.sum(jnp.sin(logits))], ids=["own answer", "own function"])
@pytest.mark.parametrize("name", ATTENDING)
def test_gradients_are_those_of_finite_differences(new_run, name, loss):
    with jax.enable_x64(True):
        run, answer, step = new_run(name, float64=True), "5 1 4", 1e-6
        each = run.full_pass(TEXT, answer)
        slopes = interventions.weight_gradients(run, TEXT, loss=loss, answer=answer)

        @jax.jit
        def value(change):
            def moved(kind, layer, weights):
                # A model of one text also has rows for the source, which are not in its maps.
                is_in_maps = weights.shape[1:] == change[kind].shape[2:]
                return weights + change[kind][layer] if is_in_maps else weights

            logits = each.call(nnx.merge(edit(run, moved).graphdef, run.params), each.inputs)
            if loss is not None:
                return loss(logits)
            log_probs = logits - jnp.log(jnp.sum(jnp.exp(logits), axis=-1, keepdims=True))
            return -sum(log_probs[t, label] for t, label in enumerate([5, 1, 4, 8]))

        _, maps = jax.eval_shape(lambda: run.model(each.inputs["source"], each.inputs["read"], return_weights=True))
        assert {kind: x.shape for kind, x in slopes.items()} == {kind: x.shape for kind, x in maps.items()}
        rng, zeros = np.random.default_rng(1), {kind: np.zeros(x.shape) for kind, x in slopes.items()}
        for kind, found in slopes.items():
            some = zeros[kind].copy()
            some[tuple(rng.integers(size) for size in found.shape)] = 1  # one weight alone
            for d in (rng.normal(size=found.shape), some):
                plus, minus = (value(zeros | {kind: sign * step * d}) for sign in (1, -1))
                np.testing.assert_allclose((found * d).sum(), (plus - minus) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ATTENDING)
def test_a_patch_of_everything_gives_the_logits_of_the_source(new_run, name):
    run = new_run(name)
    kinds = ["decoder", "encoder"] if name == "transformer" else ["encoder" if name == "encoder_only" else "decoder"]
    out = patch(run, TEXT, OTHER, states=[(kind, 1) for kind in kinds], answer="5 1 4")
    np.testing.assert_allclose(out.source, logits_of(run, TEXT, "5 1 4"), atol=1e-5)
    np.testing.assert_allclose(out.before, logits_of(run, OTHER, "5 1 4"), atol=1e-5)
    np.testing.assert_allclose(out.patched, out.source, atol=1e-5)
    assert np.abs(out.before - out.source).max() > 0.1


def test_a_patch_of_weights_is_a_replacement_by_the_weights_of_the_source(new_run):
    run = new_run("transformer")
    heads = [("cross", 1, 0), ("encoder", 0, 2)]
    out = patch(run, TEXT, OTHER, weights=heads, answer="5 1 4")
    of_source = run.full_pass(TEXT, "5 1 4")
    _, maps = jax.jit(
        lambda: run.model(of_source.inputs["source"], of_source.inputs["read"], answer_length=6, return_weights=True)
    )()
    expected = replace(run, {(kind, l, n): maps[kind][l, n] for kind, l, n in heads})
    np.testing.assert_allclose(out.patched, logits_of(expected, OTHER, "5 1 4"), atol=1e-5)


def test_a_patch_of_a_head_moves_its_output(new_run):
    """All heads of the cross-attention together are all that the decoder knows of the source."""
    run, answer = new_run("transformer"), "5 1 4"
    heads = [("cross", l, n) for l in range(2) for n in range(4)]
    out = patch(run, TEXT, OTHER, heads=heads, answer=answer)
    np.testing.assert_allclose(out.patched, out.source, atol=1e-5)
    one_row = patch(run, TEXT, OTHER, heads=heads, positions=[2], answer=answer)
    np.testing.assert_allclose(one_row.patched[:2], out.before[:2], atol=1e-5)  # later rows see it, earlier ones do not
    assert np.abs(one_row.patched[2] - out.before[2]).max() > 1e-2


@pytest.mark.parametrize("name", ["transformer", "decoder_only"])
def test_a_trace_is_one_patch_after_another(new_run, name):
    run = new_run(name)
    effects = patch_effects(run, TEXT, OTHER, answer="5 1 4")
    labels = np.asarray(run.full_pass(TEXT, "5 1 4").labels)

    def log_probability(logits):
        return float(np.sum(np.asarray(jax.nn.log_softmax(logits))[np.arange(len(labels)), labels]))

    sizes = {"encoder": (2, 6), "decoder": (2, 4)} if name == "transformer" else {"decoder": (2, 10)}
    assert {kind: effect.shape for kind, effect in effects.items()} == sizes
    for kind, (num_layers, length) in sizes.items():
        for layer, position in [(0, 0), (num_layers - 1, length - 1), (0, length // 2)]:
            out = patch(run, TEXT, OTHER, states=[(kind, layer)], positions=[position], answer="5 1 4")
            expected = log_probability(out.patched) - log_probability(out.before)
            np.testing.assert_allclose(effects[kind][layer, position], expected, atol=1e-4)


def test_a_measure_of_ones_own_is_traced(new_run):
    run = new_run("encoder_only")
    effects = patch_effects(run, TEXT, OTHER, measure=lambda logits: logits[0, 3])["encoder"]
    out = patch(run, TEXT, OTHER, states=[("encoder", 1)], positions=[0])
    np.testing.assert_allclose(effects[1, 0], out.patched[0, 3] - out.before[0, 3], atol=1e-5)
    np.testing.assert_allclose(effects[1, 1:], 0, atol=1e-5)  # the last block's other rows do not reach row 0


@pytest.mark.parametrize("to", ["zero", "mean"])
def test_effects_of_heads_are_evaluations_of_runs_without_each(run, to):
    lengths, examples = [3, 5, 6], 15
    effects = head_effects(run, lengths, examples=examples, to=to)
    assert {kind: effect.shape for kind, effect in effects.items()} == dict.fromkeys(effects, (1, 4))
    usual = run.evaluate(lengths, examples).overall().exact_match.value()
    for kind, effect in effects.items():
        for head in range(4):
            without = ablate(run, [(kind, 0, head)], to=to).evaluate(lengths, examples).overall()
            np.testing.assert_allclose(effect[0, head], without.exact_match.value() - usual, atol=1e-9)
    assert min(effect.min() for effect in effects.values()) < -0.1


def test_effects_on_the_loss_are_losses_without_each_head(new_run):
    run = new_run("decoder_only")
    effects = loss_effects(run, TEXT, loss=lambda logits: jnp.mean(logits**2))["decoder"]
    both = run, ablate(run, [("decoder", 1, 2)])
    usual, without = (np.mean(logits_of(each, answer="5 1 4 1 3") ** 2) for each in both)
    found = loss_effects(run, TEXT, loss=lambda logits: jnp.mean(logits**2), answer="5 1 4 1 3")["decoder"]
    np.testing.assert_allclose(found[1, 2], without - usual, rtol=1e-4, atol=1e-5)
    assert effects.shape == found.shape == (2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda run: ablate(run, [("crass", 0, 0)]),
            "heads: got kind 'crass', must be of 'decoder', 'cross', 'encoder'",
        ),
        (lambda run: ablate(run, [("cross", 1, 0)]), "heads: got layer 1 of 'cross', must lie in 0..0"),
        (lambda run: ablate(run, [("cross", 0, 4)]), "heads: got head 4 of 'cross', must lie in 0..3"),
        (lambda run: ablate(run, [("cross", 0, True)]), "heads: got head True of 'cross', must lie in 0..3"),
        (
            lambda run: ablate(run, Head("cross", 0, 1)),
            "heads: got Head(kind='cross', layer=0, head=1), must be a list",
        ),
        (lambda run: ablate(run, ["cross"]), "heads: got 'cross', must be (kind, layer, head)"),
        (lambda run: ablate(run, [("cross", 0, 1)], to="half"), "to: got 'half', must be 'zero' or 'mean'"),
        (lambda run: edit(run, 3), "function: got 3, must be a function (kind, layer, weights [N T S]) -> weights"),
        (lambda run: replace(run, [("cross", 0, 1)]), "weights: got list, must be a mapping from heads"),
        (lambda run: replace(run, {("cross", 0, 1): [1.0, 2.0]}), "weights: got shape [2] for Head(kind='cross'"),
        (lambda run: replace(run, {("cross", 0, 1): [[np.nan]]}), "weights: got NaN or infinity for Head"),
        (lambda run: replace(run, {("cross", 0, 1): "x"}), "weights: got 'x' for Head(kind='cross'"),
        (
            lambda run: replace(run, {("cross", 0, 1): np.ones((6, 60))}).look(TEXT),
            "weights: got [6, 60] for Head(kind='cross', layer=0, head=1), must have at most",
        ),
        (
            lambda run: replace(run, {("cross", 0, 1): lambda w: w[0]}).look(TEXT),
            "weights: the function of Head(kind='cross', layer=0, head=1) returned",
        ),
        (lambda run: edit(run, lambda *_: None).look(TEXT), "edit: returned NoneType for 'encoder', layer 0"),
        (lambda run: patch(run, TEXT, OTHER), "patch: got nothing to exchange; give states=, heads= or weights="),
        (lambda run: patch(run, TEXT, "1 2", states=[("encoder", 0)]), "source: got shapes [6] for the source and [3]"),
        (lambda run: patch(run, TEXT, OTHER, states=[("cross", 0)]), "states: got stack 'cross', must be of 'decoder'"),
        (lambda run: patch(run, TEXT, OTHER, states=[("encoder", 2)]), "states: got layer 2 of 'encoder', must lie in"),
        (lambda run: patch(run, TEXT, OTHER, states=["encoder"]), "states: got 'encoder', must be (stack, layer)"),
        (
            lambda run: patch(run, TEXT, OTHER, states=[("encoder", 0)], positions=[6]),
            "positions: got 6, must lie in 0..5 for 'encoder'",
        ),
        (
            lambda run: interventions.weight_gradients(run, TEXT, loss=lambda logits: logits),
            "loss: returned float32[6, 9], must be one real number of logits [T V]",
        ),
        (
            lambda run: interventions.weight_gradients(run, TEXT, loss=3),
            "loss: got 3, must be a function of the logits",
        ),
        (lambda run: head_effects(run, [0]), "lengths: got [0], must be"),
        (lambda run: head_effects(run, examples=0), "examples: got 0, must be"),
        (lambda run: ablate("run", [("cross", 0, 1)]), "model: got str, must be a run (attn.load)"),
        (lambda run: interventions.weight_gradients(run, "9 9"), "unknown symbol '9'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, untyped, call, message):
    with pytest.raises(ValueError) as error:
        call(run)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_model_without_attention_layers_is_refused(new_run):
    with pytest.raises(ValueError, match="model: has no attention layers"):
        ablate(new_run("lstm"), [("cross", 0, 0)])


@pytest.mark.parametrize("name", ATTENDING)
def test_an_edit_that_divides_by_the_sum_of_a_row_answers_as_one_that_spares_empty_rows(new_run, name):
    """In decoding there are rows of padding, which see no key: 0 / 0 there must not reach the answer."""
    run = new_run(name)

    def divided(kind, layer, w):
        return w**2 / (w**2).sum(axis=-1, keepdims=True)

    def guarded(kind, layer, w):
        total = (w**2).sum(axis=-1, keepdims=True)
        return jnp.where(total == 0, 0, w**2 / jnp.where(total == 0, 1, total))

    assert edit(run, divided).predict([TEXT, "2"]) == edit(run, guarded).predict([TEXT, "2"])
    assert np.isfinite(logits_of(edit(run, divided))).all()


def test_answers_of_different_lengths_are_refused_with_a_hint(run, monkeypatch):
    monkeypatch.setattr(type(run), "answers", lambda run, sources: [np.array([*range(1, 1 + sources[0][0]), 8])])
    with pytest.raises(ValueError, match=r"read: got shapes \[4\] for the source and \[3\] .* give answer="):
        patch(run, TEXT, OTHER, states=[("encoder", 0)])


def test_they_are_an_attribute_of_the_package():
    assert attn.interventions is interventions and "interventions" in dir(attn)
