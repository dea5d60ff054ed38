"""Skipping: which tiles blockwise attention computes, for masks known or traced, alone, in a batch, by heads."""

import collections

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from traces import equations

import attn
from attn import masks, per_head
from attn.functional import blockwise, cpu
from attn.functional.blocks import positions_in_blocks
from attn.functional.survey import banded, needed_blocks

H, HV = 2, 3


def head(T, S):
    return cases.normal((T, H), (S, H), (S, HV))


def blocked(query, key, value, **options):
    return attn.attention(query, key, value, **options, implementation="blockwise")


def with_pullback(call):
    """`call` and its gradients for its own output as the cotangent."""

    def both(*arrays):
        out, pullback = jax.vjp(call, *arrays)
        return out, pullback(out)

    return both


class Tiles:
    """Counts tiles at run time, by a score that calls back: the compiler drops it where nobody uses the result."""

    def __init__(self, T, S):
        self.sizes = [positions_in_blocks(length, cases.BLOCK_SIZE).shape[1] for length in (T, S)]
        self.counts = collections.Counter()

    def score(self, s, i, j):
        return s + jax.pure_callback(self._note, jax.ShapeDtypeStruct((), s.dtype), i, j)

    def _note(self, i, j):
        self.counts[tuple(int(np.min(x)) // size for x, size in zip((i, j), self.sizes))] += 1
        return np.zeros((), np.float32)

    def taken(self, results) -> collections.Counter:
        """Return the tiles computed since the last call, once `results` are there."""
        jax.block_until_ready(results)
        taken, self.counts = self.counts, collections.Counter()
        return taken

    def holding(self, visible) -> list[tuple[int, int]]:
        """Return the blocks with a visible pair, by checking every pair."""
        i, j = np.nonzero(visible)
        return sorted(set(zip((i // self.sizes[0]).tolist(), (j // self.sizes[1]).tolist())))


def each(blocks, times=1) -> dict:
    return dict.fromkeys(blocks, times)


IDS = np.repeat([0, 1, 2, 5, 6], [3, 7, 2, 6, 3])
# T, S, a mask, and what it shows; more blocks than one always.
TILES = {
    "nothing masked": (5, 6, lambda: None, lambda i, j: (i >= 0) & (j >= 0)),
    "causal": (21, 21, masks.causal, lambda i, j: j <= i),
    "narrow window": (45, 45, lambda: masks.sliding_window(2, 0), lambda i, j: (i - 2 <= j) & (j <= i)),
    "wide window": (21, 21, lambda: masks.sliding_window(6, 3), lambda i, j: (i - 6 <= j) & (j <= i + 3)),
    "traced length": (9, 21, lambda: masks.padding(jnp.int32(9)), lambda i, j: (j < 9) & (i >= 0)),
    "nothing visible": (9, 21, lambda: masks.padding(0), lambda i, j: (j < 0) & (i >= 0)),
    "prefix-LM": (21, 21, lambda: masks.causal() | masks.prefix(6), lambda i, j: (j <= i) | (j < 6)),
    "segments": (21, 21, lambda: masks.segments(jnp.array(IDS), jnp.array(IDS)), lambda i, j: IDS[i] == IDS[j]),
    "a plain function": (21, 14, lambda: lambda i, j: (i // 8) == (j // 5), lambda i, j: (i // 8) == (j // 5)),
    "composed": (
        21,
        21,
        lambda: masks.causal() & masks.padding(jnp.uint8(9)) | ~masks.causal(11) | (lambda i, j: i == j),
        lambda i, j: (j <= i) & (j < 9) | (j > i + 11) | (i == j),
    ),
}  # fmt: skip


@pytest.mark.some(3)
@pytest.mark.parametrize("name", TILES)
def test_only_tiles_with_a_visible_pair_are_computed_once_forward_and_once_backward(name):
    T, S, mask, visible = TILES[name]
    tiles = Tiles(T, S)
    expected = tiles.holding(np.broadcast_to(visible(*cases.positions(T, S)), (T, S)))
    call = with_pullback(lambda *arrays: blocked(*arrays, mask=mask(), score=tiles.score))
    assert tiles.taken(jax.jit(call)(*head(T, S))) == each(expected, 2)
    all_tiles = -(-T // cases.BLOCK_SIZE) * -(-S // cases.BLOCK_SIZE)
    assert name == "nothing masked" or len(expected) < all_tiles


def test_a_narrow_window_skips_nothing():
    rows = positions_in_blocks(45, cases.BLOCK_SIZE)
    band = lambda left: banded(needed_blocks(masks.sliding_window(left, 0, 0), rows, rows), ())[0]  # noqa: E731
    assert band(2).shape == (12, 2) and band(30).shape == (12, 12)
    assert band(2).sum() == 12 + 11


@pytest.mark.parametrize(
    "mode, nested",
    [("forward", False), ("gradient of each", False), ("gradient of all", True)],
)
def test_examples_of_a_batch_skip_what_none_of_them_needs(mode, nested):
    T, lengths = 21, jnp.array([2, 9, 6])
    tiles = Tiles(T, T)
    i, j = cases.positions(T, T)
    arrays = [jnp.stack([x, 2 * x, -x]) for x in head(T, T)]

    def call(length, *arrays):
        return blocked(*arrays, mask=masks.causal() & masks.padding(length), score=tiles.score)

    def batch(call):
        once = jax.vmap(call)
        return jax.vmap(once) if nested else once

    if nested:  # the shortest apart from the others
        lengths, *arrays = (jnp.stack([x[:2], x[1:]]) for x in (lengths, *arrays))
    of_all = lambda f: lambda *a: jnp.sum(batch(f)(*a) ** 2)  # noqa: E731
    gradient = jax.grad(lambda length, *a: jnp.sum(call(length, *a) ** 2), argnums=1)
    run = {
        "forward": batch(call),
        "gradient of each": batch(gradient),
        "gradient of all": jax.grad(of_all(call), argnums=1),
    }[mode]
    expected = tiles.holding((j <= i) & (j < 9))
    assert tiles.taken(jax.jit(run)(lengths, *arrays)) == each(expected, 1 if mode == "forward" else 2)


def test_a_batch_of_plain_functions_skips_what_none_of_them_needs():
    T, tiles = 21, Tiles(21, 21)
    arrays = head(T, T)
    call = lambda n: blocked(*arrays, mask=lambda i, j: (i // n) == (j // n), score=tiles.score)  # noqa: E731
    out = jax.jit(jax.vmap(call))(jnp.array([4, 7]))
    i, j = cases.positions(T, T)
    assert tiles.taken(out) == each(tiles.holding(((i // 4) == (j // 4)) | ((i // 7) == (j // 7))))


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_heads_that_run_together_skip_what_none_of_them_needs(at_once):
    T, tiles, lengths = 21, Tiles(21, 21), [3, 14, 2, 9]
    arrays = cases.normal((T, 4, H), (T, 2, H), (T, 2, HV))
    mask = masks.causal() & per_head(masks.padding(jnp.array(lengths)))
    call = lambda *a: attn.multi_head_attention(*a, mask=mask, score=tiles.score, implementation="blockwise")  # noqa: E731
    i, j = cases.positions(T, T)
    with cases.heads_at_once(at_once):
        taken = tiles.taken(jax.jit(call)(*arrays))
    together = [max(lengths[n : n + at_once]) for n in range(0, 4, at_once)]
    assert taken == sum((collections.Counter(tiles.holding((j <= i) & (j < n))) for n in together), start=taken - taken)


@pytest.mark.parametrize("cores, heads, expected", [(1, 8, 1), (2, 8, 2), (3, 8, 2), (4, 6, 3), (2, 7, 1), (64, 8, 8)])
def test_one_head_a_core_runs_at_once_on_one_device(monkeypatch, cores, heads, expected):
    monkeypatch.setattr(cpu, "cores", lambda: cores)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    assert blockwise.heads_at_once(heads) == expected


def conditionals(call, *arguments) -> int:
    return sum(equation.primitive.name == "cond" for equation, _ in equations(call, *arguments))


def test_a_batch_keeps_every_conditional():
    T, lengths = 21, jnp.array([2, 9, 6])
    arrays = head(T, T)
    call = lambda n, *a: blocked(*a, mask=masks.causal() & masks.padding(n))  # noqa: E731
    gradient = jax.grad(lambda *a: jnp.sum(call(*a) ** 2), argnums=(1, 2, 3))
    for one in (call, gradient):
        batched = [jnp.stack([x] * 3) for x in arrays]
        assert conditionals(one, lengths[0], *arrays) > 0
        assert conditionals(jax.vmap(one), lengths, *batched) == conditionals(one, lengths[0], *arrays)
    # The count would notice: a conditional whose predicate has a batch axis is none any more.
    plain = lambda n: jax.lax.cond(n > 3, jnp.sin, jnp.cos, 1.0)  # noqa: E731
    assert (conditionals(plain, lengths[0]), conditionals(jax.vmap(plain), lengths)) == (1, 0)
