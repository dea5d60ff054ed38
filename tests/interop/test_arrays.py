"""The arrays of the drop-ins: nothing that broadcasts is materialised."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.interop import arrays

B, T, S, N = 3, 5, 7, 2


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


class TestOverBatch:
    def test_is_a_loop_over_every_axis(self):
        x, y, z = normal(B, 5, 2), normal(1, 5, 2), normal(B, 1, 2)
        out = arrays.over_batch(lambda x, y, none, z: jnp.outer(x + y, z), (B, 5), x, y, None, z)
        np.testing.assert_array_equal(out, (x + y)[..., :, None] * z[..., None, :])

    def test_without_axes(self):
        x, y = normal(2), normal(3)
        np.testing.assert_array_equal(arrays.over_batch(jnp.outer, (), x, y), jnp.outer(x, y))

    def test_an_axis_of_length_one_is_kept(self):
        out = arrays.over_batch(lambda x: {"double": 2 * x}, (1, B), normal(1, B, 2))
        np.testing.assert_array_equal(out["double"], 2 * normal(1, B, 2))

    def test_what_examples_share_is_not_repeated_for_each(self):
        def call(x, shared):
            return arrays.over_batch(lambda x, shared: x + jnp.cos(shared), (B,), x, shared)

        program = jax.make_jaxpr(call)(normal(B, S), normal(1, S)).jaxpr
        (cosine,) = (equation for equation in program.eqns if equation.primitive.name == "cos")
        assert cosine.outvars[0].aval.shape == (S,)


TILES = {(1, 1, S): (1, 4), (1, T, 1): (3, 1), (1, 1, 1): (), (1, T, S): (3, 4)}


@pytest.mark.parametrize("shape", TILES, ids=str)
def test_a_tile_of_a_mask_or_bias_is_as_small_as_its_array(shape):
    i, j = jnp.arange(2, 5)[:, None], jnp.arange(3, 7)[None, :]
    array = normal(*shape)
    expected = np.broadcast_to(array, (1, T, S))[0, 2:5, 3:7]
    mask, score = arrays.mask_from(array > 0, T, S), arrays.score_from(array, T, S)
    assert mask(i, j).shape == TILES[shape]
    np.testing.assert_array_equal(np.broadcast_to(mask(i, j), (3, 4)), expected > 0)
    np.testing.assert_array_equal(score(jnp.zeros((3, 4)), i, j), expected)


# Blocks of queries and of keys, the last ones filled up by repetition.
ROWS, COLUMNS = np.array([[0, 1, 2], [3, 4, 4]]), np.array([[0, 1], [2, 3], [4, 5], [6, 6]])


@pytest.mark.parametrize("shape", TILES, ids=str)
@pytest.mark.parametrize("chance", [-1.5, 0.0, 1.5])
def test_bounds_of_blocks_are_exact(shape, chance):
    array = normal(*shape) > chance
    full = np.broadcast_to(array, (1, T, S))[0]
    blocks = full[ROWS[:, None, :, None], COLUMNS[None, :, None, :]]
    some, every = arrays.spread_mask(array[0]).bounds(ROWS, COLUMNS)
    np.testing.assert_array_equal(np.broadcast_to(some, (2, 4)), blocks.any((2, 3)))
    np.testing.assert_array_equal(np.broadcast_to(every, (2, 4)), blocks.all((2, 3)))


@pytest.mark.parametrize("length", range(T + 2))
def test_query_padding(length):
    mask, rows = arrays.query_padding(length), np.arange(T) < length
    np.testing.assert_array_equal(mask(np.arange(T)[:, None], np.arange(S)[None, :])[:, 0], rows)
    some, every = mask.bounds(ROWS, COLUMNS)
    np.testing.assert_array_equal(some[:, 0], rows[ROWS].any(1))
    np.testing.assert_array_equal(every[:, 0], rows[ROWS].all(1))


def test_one_array_for_all_heads_is_not_marked():
    assert [leaf.shape for leaf in jax.tree.leaves(arrays.mask_from(normal(1, 1, S) > 0, T, S))] == [(1, S)]
    assert "per_head" in repr(arrays.mask_from(normal(N, 1, S) > 0, T, S))
    assert "per_head" in repr(arrays.score_from(normal(N, T, S), T, S))


def test_the_import_brings_no_framework(repository):
    script = "import sys, attn.interop; print(*(name for name in sys.modules if name.partition('.')[0] == 'flax'))"
    done = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
