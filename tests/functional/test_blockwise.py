"""Blockwise attention: nothing grows with T x S, every relation of lengths to blocks, and calls outside of jit."""

import contextlib
import itertools
import re

import attention_cases as cases
import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from traces import equations

import attn
from attn import masks, per_head, scores
from attn.functional.contract import Call
from attn.functional.implementations import IMPLEMENTATIONS, choose

H, HV = 2, 3
BOUND = 4  # in units of eps (1 + max|s|) max(oracle on absolute values)


def head(T, S, width=HV, dtype="float32", seed=0):
    return cases.normal((T, H), (S, H), (S, width), dtype=dtype, seed=seed)


def blocked(query, key, value, **options):
    return attn.attention(query, key, value, **options, implementation="blockwise")


def with_pullback(call):
    """`call` and its gradients for its own output as the cotangent."""

    def both(*arrays):
        out, pullback = jax.vjp(call, *arrays)
        return out, pullback(out)

    return both


# Nothing of T x S

LONG, LONGER = 61, 67  # primes, which blocks of four fill up to 64 and 68


def sizes_in_trace(call, *arguments) -> list[int]:
    variables = [v for equation, _ in equations(call, *arguments) for v in (*equation.invars, *equation.outvars)]
    return [np.prod(v.aval.shape, dtype=int) for v in variables if hasattr(v.aval, "shape")]


def sizes_in_program(call, *arguments) -> list[int]:
    text = jax.jit(call).lower(*arguments).compile().as_text()
    shapes = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]", text)
    assert shapes
    return [np.prod([int(n) for n in shape.split(",")], dtype=int) for shape in shapes]


def user_call(implementation):
    """A user's own mask and score, with a table as argument that the score captures."""

    def call(query, key, value, table, shift):
        mask = masks.causal(LONGER - LONG) & (lambda i, j: (i + j + shift) % 7 != 0)
        score = lambda s, i, j: s * 0.9 + table[j - i + LONG - 1]  # noqa: E731
        options = {"mask": mask, "score": score, "return_logsumexp": True}
        return attn.attention(query, key, value, **options, implementation=implementation)

    return call


def in_mode(call, mode):
    """`call(*floats, shift)`, or a derivative of it in all of its floats."""

    def derived(*arguments):
        *floats, shift = arguments
        of_floats = lambda *floats: call(*floats, shift)  # noqa: E731
        objective = lambda *floats: sum(jnp.sum(jnp.sin(x)) for x in of_floats(*floats))  # noqa: E731
        every = tuple(range(len(floats)))
        gradient = jax.grad(objective, every)
        if mode == "forward":
            return of_floats(*floats)
        if mode == "reverse":
            return gradient(*floats)
        if mode == "reverse over reverse":
            return jax.grad(lambda *floats: sum(jnp.sum(x * x) for x in gradient(*floats)), every)(*floats)
        return jax.jvp(of_floats if mode == "forward mode" else gradient, floats, floats)

    return derived


@pytest.mark.some(2)
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("mode", ["forward", "reverse", "forward mode", "forward over reverse", "reverse over reverse"])
def test_no_array_is_as_large_as_all_pairs(mode):
    arguments = *head(LONG, LONGER), *cases.normal((LONG + LONGER - 1,)), jnp.int32(3)
    call = in_mode(user_call("blockwise"), mode)
    assert max(sizes_in_trace(call, *arguments)) < LONG * LONGER / 4
    assert max(sizes_in_program(call, *arguments)) < LONG * LONGER / 4


def test_arrays_as_large_as_all_pairs_would_be_found():
    arguments = *head(LONG, LONGER), *cases.normal((LONG + LONGER - 1,)), jnp.int32(3)
    call = in_mode(user_call("reference"), "forward")
    assert max(sizes_in_trace(call, *arguments)) >= LONG * LONGER
    assert max(sizes_in_program(call, *arguments)) >= LONG * LONGER


def memory(call, T) -> int:
    """Bytes that the compiled program needs beside its arguments and results. It is never run."""
    arrays = [jax.ShapeDtypeStruct((T, 64), jnp.float32)] * 3
    return jax.jit(call).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def causal_in_mode(mode, implementation="blockwise"):
    call = lambda q, k, v: attn.attention(q, k, v, mask=masks.causal(), implementation=implementation)  # noqa: E731
    gradient = jax.grad(lambda *a: jnp.sum(jnp.sin(call(*a))), argnums=(0, 1, 2))
    return {
        "forward and backward": with_pullback(call),
        "forward mode": lambda *a: jax.jvp(call, a, a),
        "forward over reverse": lambda *a: jax.jvp(gradient, a, a),
        "reverse over forward": jax.grad(lambda *a: jnp.sum(jax.jvp(call, a, a)[1]), argnums=(0, 1, 2)),
        "reverse over reverse": jax.grad(lambda *a: sum(jnp.sum(x * x) for x in gradient(*a)), argnums=(0, 1, 2)),
    }[mode]


def is_linear(found: list[int]) -> bool:
    """Return whether memory grows at most fourfold where lengths do, not sixteenfold."""
    return max(large / small for small, large in itertools.pairwise(found)) <= 4.2


SECOND_ORDER = ["forward over reverse", "reverse over forward", "reverse over reverse"]


@pytest.mark.some(1)
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("mode", ["forward and backward", "forward mode", *SECOND_ORDER])
def test_memory_grows_with_the_length_and_not_with_its_square(monkeypatch, mode):
    cases.use_real_blocks(monkeypatch)
    found = {T: memory(causal_in_mode(mode), T) for T in (4096, 16384, 65536)}
    assert is_linear(list(found.values())), found
    if mode == "forward and backward":
        assert found[16384] < 64 * 2**20, "the scores alone would be 1024 MiB"


def test_memory_that_grows_with_the_square_would_be_found():
    found = [memory(causal_in_mode("forward and backward", "reference"), T) for T in (512, 2048, 8192)]
    assert not is_linear(found)


# Lengths


def oracle_errors(arrays, mask_values, score_values, got, gradients, cotangents, scale) -> list[float]:
    """C of out, logsumexp and the three gradients, for the mask "prefix" and the score "lambda"."""
    i, j = cases.positions(len(arrays[0]), len(arrays[1]))
    score = lambda s, i, j: cases.SCORES["lambda"].numpy(score_values, s, i, j)  # noqa: E731
    exact = oracle.Head(*arrays, cases.MASKS["prefix"].numpy(mask_values, i, j), score, scale)
    g, gl = (np.asarray(x).astype(oracle.WIDE) for x in cotangents)
    expected = *oracle.forward(exact), *oracle.backward(exact, g, gl)
    sizes = *oracle.forward(exact, absolute=True), *oracle.backward(exact, g, gl, absolute=True)
    sizes = [max(1, size.max()) if n == 1 else size.max() for n, size in enumerate(sizes)]
    results = zip((*got, *gradients), expected, sizes)
    return [oracle.error(ours, exactly, size, exact, "float32") for ours, exactly, size in results]


@pytest.mark.parametrize(
    "T, S, H, width",
    [(1, 1, 3, 2), (8, 12, 1, 1), (10, 23, 2, 7)],
)
def test_every_relation_of_lengths_to_blocks_agrees_with_the_oracle(T, S, H, width):
    arrays = cases.normal((T, H), (S, H), (S, width))
    g, gl, bias = cases.normal((T, width), (T,), (S,), seed=1)
    mask_values = [np.int32(S - 3), np.int32(min(2, S))]
    score_values = [np.float32(0.75), np.asarray(bias), np.int32(2)]
    call = cases.value_and_gradient("blockwise", "prefix", "lambda")
    got, gradients = call(*arrays, mask_values, score_values, np.float32(0.5), (g, gl))
    found = oracle_errors(arrays, mask_values, score_values, got, gradients, (g, gl), 0.5)
    assert max(found) <= BOUND, found


def in_float64(query, key, value, visible, bias, cotangent) -> tuple[tuple, tuple]:
    """(out, dq, dk, dv) of softmax(q k^T / sqrt(H) + bias) v in NumPy, and the sizes that their rounding goes by."""
    query, key, value, g = (np.asarray(x, np.float64) for x in (query, key, value, cotangent))
    scale = query.shape[1] ** -0.5
    s = np.where(visible, query @ key.T * scale + bias, -np.inf)
    p = np.exp(s - s.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    dp = g @ value.T
    ds = p * (dp - (p * dp).sum(axis=1, keepdims=True)) * scale
    absolute = p * (abs(g) @ abs(value).T + (p * abs(dp)).sum(axis=1, keepdims=True)) * scale
    sizes = p @ abs(value), absolute @ abs(key), absolute.T @ abs(query), p.T @ abs(g)
    largest = np.abs(s[visible]).max()
    return (p @ value, ds @ key, ds.T @ query, p.T @ g), [(1 + largest) * size.max() for size in sizes]


def test_blocks_of_the_real_size_agree_with_float64(monkeypatch, optimized):
    cases.use_real_blocks(monkeypatch)
    T, S = 600, 1100  # two blocks by three, the last ones filled up
    query, key, value, g = cases.normal((T, 8), (S, 8), (S, 5), (T, 5))
    call = lambda *a: blocked(*a, mask=masks.causal(500), score=scores.alibi(0.01, 500))  # noqa: E731
    out, pullback = jax.vjp(jax.jit(call), query, key, value)
    i, j = cases.positions(T, S)
    expected, sizes = in_float64(query, key, value, j <= i + 500, -0.01 * abs(i + 500 - j), g)
    for ours, exactly, size in zip((out, *pullback(g)), expected, sizes):
        assert ours.shape == exactly.shape
        assert np.abs(ours - exactly).max() <= BOUND * 2.0**-24 * size


def test_long_inputs_go_by_blocks_and_short_ones_all_at_once():
    def chosen(T, S):
        return choose("auto", Call(*cases.normal((T, 1), (S, 1), (S, 1)), None, None, 1.0))

    assert chosen(640, 640) is chosen(200, 2048) is IMPLEMENTATIONS["blockwise"]
    assert chosen(576, 576) is chosen(4, 2048) is IMPLEMENTATIONS["reference"]


# Calls outside of jit


@contextlib.contextmanager
def compilations():
    """A list that grows with each program that is compiled."""
    found = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_new_values_outside_of_jit_compile_nothing_new():
    T, S = 6, 10

    def objective(query, key, value, offset, length, table):
        mask = masks.causal(offset) & masks.padding(length) | masks.segments(offset + jnp.zeros(T, int), jnp.arange(S))
        score = scores.relative_bias(table, 0) >> scores.alibi(0.1, 0)
        return jnp.sum(blocked(query, key, value, mask=mask, score=score) ** 2)

    def arguments(n):
        return *head(T, S, seed=n), jnp.int32(n), jnp.uint8(n + 3), *cases.normal((T + S - 1,), seed=n)

    gradient = jax.value_and_grad(objective, argnums=(0, 1, 2, 5))
    with compilations() as found:
        first = objective(*arguments(0)), gradient(*arguments(0))
    assert found  # the count would notice
    given = [arguments(n) for n in (1, 2)]
    with compilations() as found:
        for a in given:
            results = objective(*a), gradient(*a)
            jax.block_until_ready(results)
    assert not found
    np.testing.assert_allclose(results[0], results[1][0], rtol=1e-5)
    assert not np.allclose(results[0], first[0])


# Under everything at once


@pytest.mark.nightly
def test_a_stack_of_models_under_checkpoint_and_strict_settings(strict):
    models, examples, T, N, D = 3, 2, 7, 2, 4
    shapes = [(models, D, N, H)] * 2 + [(models, D, N, HV), (models, 2 * T - 1), (examples, T, D)]
    *params, x = cases.normal(*shapes, dtype="float64")
    lengths = jnp.array([5, 7])

    def gradients(implementation):
        def loss(params, x, length):
            *projections, table = params
            heads = (jnp.einsum("td,dnh->tnh", x, w) for w in projections)
            mask = masks.causal() & masks.padding(length) & per_head(masks.padding(jnp.array([6, 4])))
            dropout = attn.Dropout(0.2, jax.random.key(0))
            options = {"mask": mask, "score": lambda s, i, j: s + table[j - i + T - 1], "dropout": dropout}
            return jnp.sum(jnp.sin(attn.multi_head_attention(*heads, **options, implementation=implementation)))

        def of_batch(params, x):
            return jnp.sum(jax.vmap(jax.checkpoint(loss), in_axes=(None, 0, 0))(params, x, lengths))

        return jax.jit(jax.vmap(jax.grad(of_batch), in_axes=(0, None)))(params, x)

    with cases.heads_at_once(1):  # those at once are vmap, of which the batch is another
        found = gradients("blockwise")
    for ours, expected in zip(found, gradients("reference"), strict=True):
        assert ours.dtype == np.float64 and np.all(np.any(ours != 0, axis=tuple(range(1, ours.ndim))))
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-14)
