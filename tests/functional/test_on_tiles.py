"""Functions of positions evaluated in a kernel, on tiles that are transposed or not: the same numbers as anywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import masks, positions, scores
from attn.functional import on_tiles
from attn.functional.taken_apart import Kind, take_apart

TILE, SIDE, T, S = (6, 4), 2, 12, 12
NUMBER = jnp.float32(0.7)
TABLE = jnp.asarray(np.random.default_rng(0).normal(size=32), jnp.float32)
FUNCTIONS = {
    "the score alone": lambda s, i, j: jnp.tanh(s) * 2,
    "ALiBi": lambda s, i, j: s - NUMBER * jnp.abs(i - j),
    "ALiBi with an offset": scores.alibi(NUMBER, 3),
    "T5's buckets": lambda s, i, j: s + TABLE[positions.relative_buckets(j - i)],
    "distances and nothing else": lambda s, i, j: jnp.where(j - i < 2, 1.0, jnp.exp((i - j) / 9)),
    "a distance in two ways": lambda s, i, j: s * jnp.maximum(j - i, -2) + (i - j + 5) // 2,
    "distances with positions": lambda s, i, j: s + (j - i) * jnp.cos(j / 3) - (i - j) * i,
    "one position": lambda s, i, j: s * i - j,
    "pairs": lambda s, i, j: s + i * j % 5,
    "a part by key and one by query": lambda s, i, j: s * TABLE[i] + TABLE[j + 2],
    "a constant tile": lambda s, i, j: s + jnp.exp(jnp.full_like(s, NUMBER)),
    "a derivative of its own": lambda s, i, j: jax.nn.softplus(s) + jax.nn.relu(j - 3.0) + jax.nn.relu(i - j + 0.5),
    "a derivative of its own, of a pair": lambda s, i, j: jnp.logaddexp(s, i - 3.0) + jnp.logaddexp(j, j - i + 0.5),
    "a causal mask": lambda i, j: masks.causal(1)(i, j),
    "a window": lambda i, j: masks.sliding_window(3, 1)(i, j),
    "one of the positions": lambda i, j: j < 5,
    "a prefix, or what is near": lambda i, j: (j < 5) | (jnp.abs(i - j) < 2) & (i > 3),
}


def evaluate(function, is_transposed, side, corner):
    """Return (evaluation of parts and scores, the parts, the scores, what to expect) on the tile with this corner."""
    is_score = function is FUNCTIONS["ALiBi with an offset"] or function.__code__.co_argcount == 3

    def is_part(value):
        return "gather" in value.primitives or (value.kind == Kind.CONSTANT and value.shape == ())

    apart = take_apart(function, *TILE, jnp.float32(0) if is_score else None, is_part)
    i, j = corner[0] + jnp.arange(TILE[0])[:, None], corner[1] + jnp.arange(TILE[1])[None, :]
    s = [jnp.asarray(np.random.default_rng(1).normal(size=TILE), jnp.float32)] if is_score else []
    rows, columns = (j.T, i.T) if is_transposed else (i, j)

    def read(part, x):
        if part.kind == Kind.DISTANCE and side is not None:
            squares = on_tiles.diagonals(rows, columns, side)
            return tuple(x[(a - b if is_transposed else b - a) + T - 1] for a, b in squares)
        index = {Kind.CONSTANT: (), Kind.QUERY: (i,), Kind.KEY: (j,), Kind.DISTANCE: (j - i + T - 1,)}[part.kind]
        return x[index].T if is_transposed and index else x[index]

    tiles = [read(part, x) for part, x in zip(apart.parts, apart.values(T, S), strict=True)]
    of_kernel = apart.transposed() if is_transposed else apart
    corner = tuple(map(jnp.int32, corner[:: -1 if is_transposed else 1]))

    def run(tiles, *s):
        given = [x.T if is_transposed else x for x in s]
        found = on_tiles.evaluate(of_kernel, tiles, *given, rows, columns, corner=corner, side=side)
        found = jnp.broadcast_to(found, TILE[:: -1 if is_transposed else 1])
        return found.T if is_transposed else found

    return run, tiles, s, jnp.broadcast_to(function(*s, i, j), TILE)


WAYS = [(False, None), (True, None), (False, SIDE), (True, SIDE)]


@pytest.mark.parametrize("corner", [(0, 0), (6, 4), (0, 8)])
@pytest.mark.parametrize("is_transposed, side", WAYS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_the_same_values_on_every_kind_of_tile(name, is_transposed, side, corner):
    run, tiles, s, expected = evaluate(FUNCTIONS[name], is_transposed, side, corner)
    found = run(tiles, *s)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(np.float64(found), np.float64(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("is_transposed, side", WAYS)
@pytest.mark.parametrize("name", ["ALiBi", "T5's buckets", "a derivative of its own, of a pair"])
def test_a_function_has_the_same_derivatives_on_every_kind_of_tile(name, is_transposed, side):
    run, tiles, s, expected = evaluate(FUNCTIONS[name], is_transposed, side, (6, 4))
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=TILE), jnp.float32)
    of_parts, of_s = jax.vjp(run, tiles, *s)[1](cotangent)
    i, j = 6 + np.arange(TILE[0])[:, None], 4 + np.arange(TILE[1])[None, :]
    if name == "ALiBi":
        np.testing.assert_allclose(of_s, cotangent)
        np.testing.assert_allclose(of_parts[0], -np.vdot(cotangent, np.abs(i - j)), rtol=1e-6)
    elif name == "T5's buckets":
        np.testing.assert_allclose(of_s, cotangent)
        (gradient,) = of_parts
        total = sum(map(np.sum, gradient)) if side else np.sum(gradient)
        np.testing.assert_allclose(total, np.sum(cotangent), rtol=1e-5)
        if side:  # one square per diagonal, the upper right one first
            x = np.asarray(cotangent).reshape(3, 2, 2, 2).transpose(0, 2, 1, 3)
            x = x.swapaxes(0, 1).swapaxes(2, 3) if is_transposed else x
            height, width = x.shape[:2]
            for n, square in zip(range(width - 1, -height, -1), gradient, strict=True):
                expected = sum(x[m, m + n] for m in range(height) if 0 <= m + n < width)
                np.testing.assert_allclose(square, expected, rtol=1e-6)
    else:
        sigmoid = 1 / (1 + np.exp(-(np.asarray(s[0]) - (i - 3.0))))
        np.testing.assert_allclose(of_s, cotangent * sigmoid, rtol=1e-5, atol=1e-6)


def count_of_operations(function, name, side):
    run, tiles, s, _ = evaluate(function, False, side, (0, 0))
    shapes = [v.aval.shape for e in jax.make_jaxpr(run)(tiles, *s).eqns if e.primitive.name == name for v in e.outvars]
    return sum(map(np.prod, shapes))


def test_operations_on_distances_are_done_once_per_diagonal_of_squares():
    # A tile of 6 x 4 has 3 + 2 - 1 diagonals of squares of 2 x 2.
    assert count_of_operations(FUNCTIONS["ALiBi"], "abs", None) == 2 * 6 * 4  # of integers, which nobody reads, as well
    assert count_of_operations(FUNCTIONS["ALiBi"], "abs", SIDE) == 2 * 4 * 2 * 2


@pytest.mark.parametrize("is_transposed, side", WAYS)
def test_distances_are_exact_where_positions_are_not_numbers_of_float32(is_transposed, side):
    corner = 2**24 + 1, 2**24 + 5
    run, tiles, s, _ = evaluate(lambda s, i, j: s * 0 + jnp.float32(i - j), is_transposed, side, corner)
    expected = np.arange(TILE[0])[:, None] - np.arange(TILE[1])[None, :] - 4
    np.testing.assert_array_equal(run(tiles, *s), expected)
