"""The measurements of the claims, compared with independent truths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn.functional.positions import sinusoidal
from attn.nn.model import PAD
from attn.studies import jobs
from attn.studies.probes import count_parameters, encode, exact_match, hide, match_width, restored, untrained, without
from attn.studies.walkthrough import access, bottleneck, cross, heads, parallel, positions, reading, scaling
from attn.studies.walkthrough.claims import Check, verdict
from attn.training.folders import RunError


@pytest.mark.parametrize(
    ("measured", "least", "most", "holds"),
    [(1.0, 1.0, None, True), (0.9, 1.0, None, False), (1.0, None, 1.0, True), (1.1, None, 1.0, False),
     (0.5, 0.4, 0.6, True), (0.7, 0.4, 0.6, False), (float("nan"), None, 1.0, False), (float("nan"), 0.0, None, False)],
)  # fmt: skip
def test_a_check_is_decided_by_its_thresholds(measured, least, most, holds):
    assert Check("", measured, least, most).holds() == holds


def test_the_verdict_is_that_of_the_checks():
    yes, no = Check("", 1.0, least=0.0), Check("", 1.0, most=0.0)
    assert verdict([yes, yes]) == "holds"
    assert verdict([yes, no]) == "holds in part"
    assert verdict([no, no]) == "does not hold"
    fair, unfair = yes._replace(premise=True), no._replace(premise=True)
    assert verdict([fair, yes]) == "holds"
    assert verdict([fair, no]) == "does not hold"
    assert verdict([unfair, yes]) == "undecided"


def test_the_jacobian_of_the_softmax_is_that_of_jax():
    scores = jax.random.normal(jax.random.key(0), (9,))
    result = scaling._jacobian_norm(jax.nn.softmax(scores))
    np.testing.assert_allclose(result, jnp.linalg.norm(jax.jacobian(jax.nn.softmax)(scores)), rtol=1e-5)


@pytest.mark.parametrize("shift", [1, 7, 100])
def test_a_shift_of_the_sinusoids_is_the_rotation(shift):
    t, width = np.arange(50), 12
    frequencies = 10_000.0 ** (-np.arange(0, width, 2) / width)

    def wave(t):
        angles = t[:, None] * frequencies
        return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(len(t), width)

    R = positions.rotation(shift, width)
    np.testing.assert_allclose(wave(t) @ R.T, wave(t + shift), atol=1e-12)
    np.testing.assert_allclose(R @ R.T, np.eye(width), atol=1e-12)
    np.testing.assert_allclose(sinusoidal(jnp.asarray(t), width), wave(t), atol=1e-5)


@pytest.mark.parametrize(("mechanism", "commutes"), [("none", True), ("sinusoidal", False)])
def test_encoding_commutes_with_permutations_only_without_positions(mechanism, commutes):
    run = untrained(jobs.settings_of("copy", 8, 10, 0, width=16, mechanism=mechanism))
    moved = positions._permuted(run, 8)  # in units of the last place
    assert moved < 64 if commutes else moved > 10_000


def test_padding_does_not_change_an_encoding():
    run, tokens = untrained(jobs.settings_of("copy", 8, 10, 0, width=16)), jnp.asarray([3, 1, 2])
    padded = encode(run, jnp.concatenate([tokens, jnp.full(4, PAD)]))
    np.testing.assert_allclose(padded[:3], encode(run, tokens), atol=1e-6)


def test_a_linear_map_is_found_where_there_is_one():
    rng = np.random.default_rng(0)
    R, rows = np.linalg.qr(rng.normal(size=(6, 6)))[0], [rng.normal(size=6)]
    for _ in range(40):
        rows.append(R @ rows[-1])
    assert positions._residual(np.array(rows), 3) < 1e-8
    assert positions._residual(rng.normal(size=(40, 6)), 3) > 0.8


def test_the_example_by_hand_is_attention():
    worked = access.by_hand()
    steps = {name: np.array(matrix) for name, matrix in worked["steps"].items()}
    query, key, value = (steps[f"{name} = x W_{name}"] for name in "QKV")
    np.testing.assert_array_equal(query, [[1, 0], [1, 2], [2, 2]])
    weights = np.asarray(jax.nn.softmax(query @ key.T / 2**0.5))
    np.testing.assert_allclose(steps["p = exp(s) / Σ exp(s)"], weights, atol=1e-6)
    np.testing.assert_allclose(steps["p V"], weights @ value, atol=1e-6)
    assert worked["error"] < 1e-6


def test_heads_alike_do_not_diverge_and_disjoint_ones_by_one_bit():
    diagonal, mirrored = np.eye(4), np.eye(4)[::-1]
    even = np.full((4, 4), 0.25)
    result = heads.divergence(np.stack([diagonal, diagonal, mirrored, even])[:, None])
    np.testing.assert_allclose(result[:2, :2], 0, atol=1e-12)
    np.testing.assert_allclose(result[0, 2], 1)
    # (1, 0, 0, 0) beside (1, 1, 1, 1) / 4: H(5/8, 1/8, 1/8, 1/8) - 2 bits / 2.
    np.testing.assert_allclose(result[0, 3], -(5 / 8 * np.log2(5 / 8) + 3 / 8 * np.log2(1 / 8)) - 1)
    np.testing.assert_allclose(result, result.T)


def test_a_head_is_described_by_its_offset_or_its_symbol():
    rng = np.random.default_rng(0)
    sources = rng.integers(1, 4, (200, 6))
    after = np.broadcast_to(np.eye(6, k=1), (200, 6, 6))
    description = heads.attends_to(after, sources, 3)
    assert description["nature"] == "start, t+1" and description["from_start"] == 1.0
    description = heads.attends_to(np.broadcast_to(np.eye(6)[::-1], (200, 6, 6)), sources, 3)
    assert description["nature"] == "end, n−1−t+0" and description["from_end"] == 1.0
    assert description["content"] == pytest.approx(1, abs=0.15)
    twos = (sources == 2) / np.maximum((sources == 2).sum(1, keepdims=True), 1)
    description = heads.attends_to(np.broadcast_to(twos[:, None], (200, 6, 6)), sources, 3)
    assert description["content"] == pytest.approx(3, abs=0.3) and description["nature"] == "symbol 2"


def test_products_in_series_are_counted():
    a = jnp.ones((3, 3))
    assert parallel.products_in_series(jax.make_jaxpr(lambda a: a @ a @ a + a @ a)(a).jaxpr) == 2

    def looped(a):
        return jax.lax.scan(lambda carry, _: (carry @ a, None), a, length=5)[0] @ a

    jaxpr = jax.make_jaxpr(looped)(a).jaxpr
    assert parallel.products_in_series(jaxpr) == 6
    assert parallel.multiplications(jaxpr) == (5 * 27, 6 * 27)
    assert parallel.products_in_series(jax.make_jaxpr(jax.jit(looped))(a).jaxpr) == 6
    once = jax.make_jaxpr(lambda a: jax.lax.scan(lambda carry, _: (carry @ a, None), a, length=1)[0])(a).jaxpr
    assert parallel.multiplications(once) == (0, 27)  # one turn is not a loop


def test_widths_are_matched_by_their_parameters():
    count = count_parameters({"model": {"width": 48, "num_heads": 4}})
    result = match_width({"model": {"name": "gru"}}, count)
    width = result["model"]["width"]
    assert count_parameters(result) <= count < count_parameters({"model": {"name": "gru", "width": width + 1}})


@pytest.fixture(scope="module")
def run(copy_run) -> attn.runs.Run:
    return attn.load(copy_run)


def test_a_matrix_is_removed_whole_or_by_head(run):
    weights = without(run, inside="cross", matrix="W_Q").look("1 2 3").weights
    np.testing.assert_allclose(weights["cross"], 1 / 4, atol=1e-6)  # even over three symbols and the end
    assert np.abs(weights["decoder"] - weights["decoder"][..., :1, :1]).max() > 0.1
    one = without(run, inside="cross", matrix="W_O", head=2).params["decoder"]["blocks"][0]["cross"]["W_O"][...]
    whole = run.params["decoder"]["blocks"][0]["cross"]["W_O"][...]
    assert (one[2] == 0).all()
    np.testing.assert_array_equal(np.delete(one, 2, 0), np.delete(whole, 2, 0))


def test_exact_match_is_that_of_evaluation(run):
    assert exact_match(run, [5, 3], 20) == [1.0, 1.0]
    assert max(exact_match(without(run, inside="cross", matrix="W_O"), [5, 6], 20)) < 0.1


@pytest.mark.some(1)
@pytest.mark.parametrize("j", [0, 2, 4])
def test_a_hidden_token_is_a_masked_one(run, j):
    source = jnp.array([3, 1, 4, 1, run.vocabulary.end, 0, 0])
    read = jnp.array([run.vocabulary.begin, 3, 1])
    cache, _ = run.model.start(source, 3)
    result, _, hidden = run.model.extend(read, hide(cache, j), return_weights=True)
    _, _, whole = run.model.extend(read, cache, return_weights=True)
    kept, cross = np.delete(np.asarray(whole["cross"]), j, axis=-1), hidden["cross"]
    np.testing.assert_allclose(cross[..., :4], (kept / kept.sum(-1, keepdims=True))[..., :4], atol=1e-5)
    assert (cross[..., 4:] == 0).all()
    assert np.abs(result - run.model.extend(read, cache)[0]).max() > 1e-4


def test_a_run_that_copies_attends_along_the_diagonal(run):
    n = run.config.task.max_length
    seen = cross.alignment(run, n)
    on_diagonal = np.diagonal(np.array(seen["map"]))
    assert on_diagonal.mean() > 2 * np.array(seen["map"])[::-1].diagonal().mean()
    assert np.mean(seen["mass"]) == pytest.approx(on_diagonal.mean(), abs=1e-6)


def test_the_gradient_is_by_distance_from_the_last_symbol(run):
    """A run that copies makes the last symbol from the nearest source symbol."""
    norms = bottleneck.gradient_by_distance(run, run.config.task.max_length)
    assert len(norms) == run.config.task.max_length and np.argmax(norms) == 0


def test_a_run_that_copies_loses_the_symbol_that_is_hidden(run):
    n = run.config.task.max_length
    result = reading.pointing(run, n, 20)
    assert result["right"] > 0.9 and result["argmax_is_true_source"] > 0.8
    assert result["changed_without_argmax"] > 0.5 > 0.2 > result["changed_without_random"]
    by_distance = dict(result["changed_by_distance"])
    assert max(by_distance, key=by_distance.get) == 0


def test_restored_matrices_are_the_original_ones(run):
    gone = without(run, inside="cross", matrix="W_Q")
    back = restored(gone, run, inside="cross", matrix="W_Q")
    for one, other in zip(jax.tree.leaves(back.params), jax.tree.leaves(run.params), strict=True):
        np.testing.assert_array_equal(one, other)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(gone.params), jax.tree.leaves(run.params)))


@pytest.mark.nightly
def test_an_interrupted_training_resumes_and_all_of_it_is_watched(tmp_path, monkeypatch):
    settings = {"task": {"max_length": 4}, "model": {"width": 8, "num_heads": 2, "feed_forward_width": 8},
                "training": {"steps": 20, "batch_size": 4, "checkpoint_every": 5}}  # fmt: skip
    whole = jobs.Trainer(tmp_path / "whole", lambda line: None)
    expected = whole.watched(whole.train(settings, watch=lambda run: float(run.params["output"]["kernel"][...].sum())))

    class Interruption(Exception):
        pass

    def watch(run):
        if run.step == 10 and not (tmp_path / "once").exists():
            (tmp_path / "once").touch()
            raise Interruption
        return float(run.params["output"]["kernel"][...].sum())

    parts = jobs.Trainer(tmp_path / "parts", lambda line: None)
    with pytest.raises(Interruption):
        parts.train(settings, watch=watch)
    run = parts.train(settings, watch=watch)
    assert run.step == 20 and parts.watched(run) == expected and [row["step"] for row in expected] == [5, 10, 15, 20]
    monkeypatch.setattr(jobs, "train", None)  # nothing is left to train
    assert parts.train(settings, watch=watch).step == 20
    # Damage is reported with the folder of the run to train again.
    damaged = {
        "watched/00000005.json": lambda: parts.watched(run),
        "metrics.jsonl": lambda: jobs.losses(run),
        "config.json": lambda: parts.train(settings, watch=watch),
    }
    for name, read in damaged.items():
        (run.folder / name).write_text("{")
        with pytest.raises(RunError, match=f"{run.folder}: damaged .*delete it"):
            read()
