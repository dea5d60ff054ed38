"""The kernels compile inside `jax.shard_map`, with and without its check of varying axes, forward and backward."""

import re

import devices
import jax
import jax.numpy as jnp
import pytest
from devices import Collective
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

import attn
from attn import masks, per_head, scores
from attn.training.meshes import DATA

B, T, N, H = 8, 1024, 8, 64
IMPLEMENTATIONS = {"v5e-4": "pallas_tpu", "h100-8": "pallas_gpu"}
# Each returns a function of arrays, their sizes and specs, the spec of its result, and the bytes of the gradients that
# devices add up: those of arrays that they share.


def heads_sharded(implementation):
    """Each device has some of the heads, with their slopes."""

    def call(query, key, value, slopes):
        score = per_head(scores.alibi(slopes))
        return attn.multi_head_attention(
            query, key, value, mask=masks.causal(), score=score, implementation=implementation
        )

    heads = P(None, DATA)
    return call, [(T, N, H)] * 3 + [(N,)], (heads, heads, heads, P(DATA)), heads, 0


def t5(table, s, i, j):
    return s + table[attn.positions.relative_buckets(j - i)]


def batch_sharded(implementation):
    """Each device has some of the examples, with their lengths, and all of a table."""

    def one(query, key, value, length, table):
        mask = masks.causal() & masks.padding(length.astype(jnp.int32))
        score = Partial(t5, table)
        return attn.multi_head_attention(query, key, value, mask=mask, score=score, implementation=implementation)

    call = jax.vmap(one, in_axes=(0, 0, 0, 0, None))
    return call, [(B, T, N, H)] * 3 + [(B,), (32,)], (*[P(DATA)] * 4, P()), P(DATA), 4 * 32


def captured_score_sharded(implementation):
    """Each device has the same queries, keys and values, and a bias of the keys of its own."""

    def call(query, key, value, bias):
        score = lambda s, i, j: s + bias[0][j]  # noqa: E731
        return attn.multi_head_attention(
            query, key, value, mask=masks.causal(), score=score, implementation=implementation
        )[None]

    return call, [(T, N, H)] * 3 + [(B, T)], (P(), P(), P(), P(DATA)), P(DATA), 4 * 3 * T * N * H


def captured_mask_sharded(implementation):
    """Each device has the same queries, keys and values, and sees a number of keys of its own."""

    def call(query, key, value, length):
        mask = lambda i, j: j < length[0]  # noqa: E731
        return attn.multi_head_attention(query, key, value, mask=mask, implementation=implementation)[None]

    return call, [(T, N, H)] * 3 + [(B,)], (P(), P(), P(), P(DATA)), P(DATA), 4 * 3 * T * N * H


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("device", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "sharded",
    [heads_sharded, batch_sharded, captured_score_sharded, captured_mask_sharded],
    ids=lambda function: function.__name__,
)
def test_kernels_and_gradients_compile_inside_of_shard_map(mesh_of, device, sharded, check_vma):
    mesh = mesh_of(device)
    call, sizes, specs, out_spec, shared = sharded(IMPLEMENTATIONS[device])
    local = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=out_spec, check_vma=check_vma)
    gradient = jax.grad(lambda *floats: jnp.sum(jnp.sin(local(*floats))), argnums=tuple(range(len(sizes))))
    arrays = [
        jax.ShapeDtypeStruct(size, jnp.float32, sharding=NamedSharding(mesh, spec)) for size, spec in zip(sizes, specs)
    ]
    text = devices.compiled(jax.jit(gradient), *arrays, mesh=mesh).as_text()
    assert set(re.findall(r"\battn_(forward|backward)", text)) == {"forward", "backward"}
    assert devices.collectives(text) == ({"all-reduce": Collective(1, shared)} if shared else {})
