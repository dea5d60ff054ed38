"""Functions taken apart: what is found to depend on what, and that the parts put together give the function again."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from traces import equations

import attn
from attn import masks, positions, scores
from attn.functional.blocks import spread
from attn.functional.taken_apart import Kind, take_apart

T, S, TILE = 11, 13, (3, 5)
TABLE = jnp.asarray(np.random.default_rng(0).normal(size=32), jnp.float32)
BY_KEY, BY_QUERY, BIAS = TABLE[:S], TABLE[:T], jnp.outer(TABLE[:T], TABLE[:S])
AT = {  # how a part is read at the positions of a tile
    Kind.CONSTANT: lambda x, i, j: x,
    Kind.QUERY: lambda x, i, j: x[i],
    Kind.KEY: lambda x, i, j: x[j],
    Kind.DISTANCE: lambda x, i, j: x[j - i + T - 1],
    Kind.PAIR: lambda x, i, j: x[i, j],
}
SHAPES = {Kind.CONSTANT: (), Kind.QUERY: (T,), Kind.KEY: (S,), Kind.DISTANCE: (T + S - 1,), Kind.PAIR: (T, S)}


@jax.jit
def jitted_distance(i, j):
    return jnp.abs(j - i)


FUNCTIONS = {
    "T5's buckets": (lambda s, i, j: s + TABLE[positions.relative_buckets(j - i)], {Kind.DISTANCE}),
    "a distance the other way round": (lambda s, i, j: s * jnp.exp((i - j) / 9), {Kind.DISTANCE}),
    "a distance with an offset": (lambda s, i, j: s + TABLE[j - (i + 2) + T + 1], {Kind.DISTANCE}),
    "a distance in floats": (lambda s, i, j: s - (j.astype(jnp.float32) - (3.0 + i)), {Kind.DISTANCE}),
    "a negated position": (lambda s, i, j: s + TABLE[(-i) + j + T], {Kind.DISTANCE}),
    "a distance in a jitted function": (lambda s, i, j: s - jitted_distance(i, j), {Kind.DISTANCE}),
    "by key and by query": (lambda s, i, j: s * BY_QUERY[i] + BY_KEY[j], {Kind.QUERY, Kind.KEY}),
    "a sum of positions": (lambda s, i, j: s + TABLE[i + j], {Kind.PAIR}),
    "a distance of twice a position": (lambda s, i, j: s + jnp.sin(2 * j - i), {Kind.PAIR}),
    "a distance of positions read from an array": (lambda s, i, j: s + TABLE[jnp.arange(S)[j] - i], {Kind.PAIR}),
    "a distance in bfloat16, which rounds": (
        lambda s, i, j: s + (j.astype("bfloat16") - i.astype("bfloat16")),
        {Kind.PAIR},
    ),
    "a distance of bools": (
        lambda s, i, j: s + TABLE[(i > 5).astype("int32") - (j > 5).astype("int32") + 1],
        {Kind.PAIR},
    ),
    "a distance of bools by conversion": (
        lambda s, i, j: s + TABLE[i.astype(bool).astype("int32") - j.astype(bool).astype("int32") + 1],
        {Kind.PAIR},
    ),
    "a distance of bytes, which wrap": (
        lambda s, i, j: s + ((i + 250).astype("uint8").astype("float32") - (j + 250).astype("uint8").astype("float32")),
        {Kind.PAIR},
    ),
    "dense": (lambda s, i, j: scores.dense(BIAS)(s, i, j), {Kind.PAIR}),
    "a constant": (lambda s, i, j: s * jnp.sqrt(TABLE[3] ** 2), {Kind.CONSTANT}),
    "softcap": (lambda s, i, j: scores.softcap(TABLE[0])(s, i, j), {Kind.CONSTANT}),
    "ALiBi": (lambda s, i, j: scores.alibi(TABLE[1], 2)(s, i, j), {Kind.DISTANCE}),
    "relative_bias": (lambda s, i, j: scores.relative_bias(TABLE, 0, T)(s, i, j), {Kind.DISTANCE}),
    "two parts of one kind": (lambda s, i, j: s * TABLE[j - i + T] + jnp.cos(i - j), {Kind.DISTANCE}),
    "the score alone": (lambda s, i, j: jnp.tanh(s), set()),
    "a mask of segments": (
        lambda i, j: masks.segments(jnp.arange(T) // 3, jnp.arange(S) // 3)(i, j),
        {Kind.QUERY, Kind.KEY},
    ),
    "a causal mask": (lambda i, j: masks.causal(1)(i, j), {Kind.DISTANCE}),
}


def apart(name, is_part=lambda value: value.kind != Kind.SCORE and len(value.shape) in (0, 2)):
    function = FUNCTIONS[name][0]
    is_score = function.__code__.co_argcount == 3
    return function, take_apart(function, *TILE, jnp.float32(0) if is_score else None, is_part)


def tile_positions(i0, j0, r, c):
    return i0 + jnp.arange(r)[:, None], j0 + jnp.arange(c)[None, :]


def arguments(function, i0=4, j0=2):
    i, j = tile_positions(i0, j0, *TILE)
    s = jnp.asarray(np.random.default_rng(1).normal(size=TILE), jnp.float32)
    return (s, i, j)[3 - function.__code__.co_argcount :]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parts_have_the_kind_of_what_they_depend_on_and_give_the_function_again(name):
    function, taken = apart(name)
    # Of a mask, the whole is one part where both positions meet; here the parts below it are asked for.
    if function.__code__.co_argcount == 2 and len(FUNCTIONS[name][1]) > 1:
        function, taken = apart(name, lambda value: value.kind in (Kind.QUERY, Kind.KEY))
    found = {part.kind for part in taken.parts} - {Kind.CONSTANT}
    assert found == FUNCTIONS[name][1] - {Kind.CONSTANT}
    values = taken.values(T, S)
    assert [x.shape for x in values] == [SHAPES[part.kind] for part in taken.parts]
    for corner in ((0, 0), (4, 2), (T - TILE[0], S - TILE[1])):
        given = arguments(function, *corner)
        tiles = [AT[part.kind](x, *given[-2:]) for part, x in zip(taken.parts, values)]
        np.testing.assert_array_equal(taken(tiles, *given), jnp.broadcast_to(function(*given), TILE))


def test_parts_are_differentiated_by_what_they_capture():
    def total(table):
        taken = take_apart(
            lambda s, i, j: s * table[j - i + T - 1], *TILE, jnp.float32(0), lambda v: v.kind == Kind.DISTANCE
        )
        return jnp.vdot(taken.values(T, S)[0], jnp.arange(T + S - 1.0))

    np.testing.assert_allclose(jax.grad(total)(TABLE[: T + S - 1]), np.arange(T + S - 1.0))


def test_a_function_that_reads_the_shape_of_its_tile_has_no_values_of_its_parts():
    def function(s, i, j):
        return s + (TABLE[j - i] if s.shape == TILE else jnp.sin(TABLE[j - i]))

    def by_number(s, i, j):
        return s * 3 / s.shape[0] + TABLE[j - i]

    for each in (function, by_number):
        assert take_apart(each, *TILE, jnp.float32(0), lambda v: v.kind == Kind.DISTANCE).values(T, S) is None


@pytest.mark.parametrize("T, S", [(1, 1), (1, 7), (7, 1), (2, 2)])
def test_short_sequences_have_their_parts_too(T, S):
    taken = take_apart(
        lambda s, i, j: s + jnp.sin(i) + jnp.exp(j) * jnp.cos(j - i),
        *TILE,
        jnp.float32(0),
        lambda v: v.kind != Kind.SCORE,
    )
    lengths = {Kind.QUERY: T, Kind.KEY: S, Kind.DISTANCE: T + S - 1}
    for part, value in zip(taken.parts, taken.values(T, S), strict=True):
        assert part.kind == Kind.PAIR or value.shape == (lengths[part.kind],)


@pytest.mark.parametrize("form", ["cpu", "default"])
@pytest.mark.parametrize("i0, j0", [(0, 0), (6, 0), (0, 8), (5, 4)])
def test_spread_reads_the_entry_of_each_distance_and_its_gradient_adds_them_up(i0, j0, form, monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda x, **forms: forms[form](x))
    vector = jnp.asarray(np.random.default_rng(2).normal(size=T + S - 1), jnp.float32)
    i, j = tile_positions(i0, j0, 5, 4)
    tile, pullback = jax.vjp(lambda vector: spread(vector, i, j, T), vector)
    np.testing.assert_array_equal(tile, np.asarray(vector)[j - i + T - 1])
    cotangent = np.arange(20.0, dtype=np.float32).reshape(5, 4)
    expected = np.zeros(T + S - 1, np.float32)
    np.add.at(expected, np.asarray(j - i) + T - 1, cotangent)
    np.testing.assert_array_equal(pullback(cotangent)[0], expected)


def test_blockwise_attention_reads_a_table_once_per_distance_and_not_once_per_pair():
    query, key, value = cases.normal((T, 4), (S, 4), (S, 4))

    def is_read_in_a_loop(score_of):
        """Return whether entries of the table are read, or added to its gradient, inside of a loop over tiles."""

        def call(table):
            score = lambda s, i, j: score_of(table, s, i, j)  # noqa: E731
            return jnp.sum(attn.attention(query, key, value, score=score, implementation="blockwise"))

        reads = [around for e, around in equations(jax.grad(call), TABLE) if is_read(e)]
        assert reads
        return any(outer.primitive.name == "scan" for around in reads for outer in around)

    def is_read(equation):
        from_table = TABLE.shape in [v.aval.shape for v in (*equation.invars, *equation.outvars)]
        return from_table and equation.primitive.name in ("gather", "scatter-add")

    assert is_read_in_a_loop(lambda table, s, i, j: s + table[i + j])
    assert not is_read_in_a_loop(lambda table, s, i, j: s + table[positions.relative_buckets(j - i)])
