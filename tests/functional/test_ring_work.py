"""What ring attention computes, sends and keeps; and all tests of it again on more devices."""

import collections
import functools
import os
import pathlib
import subprocess
import sys

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ring_cases
from jax.sharding import PartitionSpec as P
from ring_cases import AXIS, DEVICES, SHARDED, H, everything, gradient, on_devices, packed, ring, setting
from traces import equations, is_matrix_product

from attn import masks
from attn.functional import ring_heads
from attn.functional.ring import ring_attention

pytestmark = pytest.mark.skipif(DEVICES < 2, reason="one device")
small_blocks = ring_cases.small_blocks  # a fixture


class Tiles:
    """Counts tiles by the device of their queries at run time, with a score that calls back."""

    def __init__(self, device_of_row):
        self.device_of_row, self.counts = device_of_row, collections.Counter()

    def score(self, s, i, j):
        return s + jax.pure_callback(self._note, jax.ShapeDtypeStruct((), s.dtype), i, j)

    def _note(self, i, j):
        self.counts[self.device_of_row(int(np.min(i)))] += 1
        return np.zeros((), np.float32)

    def taken(self, results) -> list[int]:
        """Return the tiles that each device has computed since the last call, once `results` are there."""
        jax.block_until_ready(results)
        taken, self.counts = self.counts, collections.Counter()
        return [taken[device] for device in range(DEVICES)]


@pytest.mark.parametrize("order", ["zigzag", "consecutive"])
def test_hidden_parts_are_skipped_and_causal_work_is_balanced(order):
    """With a tile per chunk, a causal mask takes 2 U + 1 tiles per device in zig-zag order, and d + 1 in the other."""
    chunk, chunks = cases.BLOCK_SIZE, (2 if order == "zigzag" else 1) * DEVICES
    tiles = Tiles(lambda i: min(i // chunk, chunks - 1 - i // chunk) if order == "zigzag" else i // chunk)
    arrays = cases.normal(*[(chunk * chunks, 1, H)] * 3)
    expected = [chunks + 1] * DEVICES if order == "zigzag" else list(range(1, DEVICES + 1))

    def call(offset, *arrays):
        return ring_attention(*arrays, axis_name=AXIS, order=order, mask=masks.causal(offset), score=tiles.score)

    local = on_devices(call, (P(), *[P(AXIS)] * 3), check_vma=False)  # callbacks have no type of varying axes
    with_gradient = jax.jit(lambda *a: jax.value_and_grad(lambda *a: jnp.sum(local(*a) ** 2), (1, 2, 3))(*a))
    assert tiles.taken(jax.jit(local)(jnp.int32(0), *arrays)) == expected
    assert tiles.taken(with_gradient(jnp.int32(0), *arrays)) == [2 * n for n in expected]
    assert tiles.taken(jax.jit(local)(jnp.int32(-chunk * chunks), *arrays)) == [0] * DEVICES


def test_no_message_waits_in_a_conditional_and_the_next_keys_leave_first(monkeypatch):
    monkeypatch.setattr(ring_heads, "TURN", 2**18)  # no loop over turns, so that those over devices are the rings
    x = setting("float32")
    local = on_devices(lambda x: everything(ring, x), (SHARDED,))
    found = equations(gradient(local), x)
    is_message = lambda equation: equation.primitive.name.startswith(("ppermute", "psum", "pmax", "all_"))  # noqa: E731
    assert not [e for e, around in found if is_message(e) and any(a.primitive.name == "cond" for a in around)]
    rings = collections.defaultdict(list)
    for equation, around in found:
        for loop in around:
            if loop.primitive.name == "scan" and loop.params["length"] == DEVICES:
                rings[id(loop)].append(equation.primitive.name)
    rings = [names for names in rings.values() if "ppermute" in names]
    assert len(rings) == 2
    for names in rings:
        last = max(n for n, name in enumerate(names) if name == "ppermute")
        assert last < names.index("dot_general")


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_kernels_compute_every_part_forward_and_backward(implementation):
    x = setting("float32")
    attend = functools.partial(ring, implementation=implementation)
    local = on_devices(lambda x: packed(attend, x), (SHARDED,), check_vma=False)
    found = equations(gradient(local), x)
    kernels = [around for e, around in found if e.primitive.name == "pallas_call"]
    assert len(kernels) == 3  # of each pair: forward; backward by rows, and by columns
    assert all(sum(a.primitive.name == "scan" for a in around) >= 3 for around in kernels)  # turns, devices, chunks
    assert not [
        e for e, around in found if is_matrix_product(e) and not any("pallas" in a.primitive.name for a in around)
    ]


@pytest.mark.parametrize("order", ["balanced", "consecutive"])
def test_memory_beside_inputs_and_results_is_that_of_the_heads_of_a_turn(monkeypatch, order):
    array = jax.ShapeDtypeStruct((256 * DEVICES, 8, 32), jnp.bfloat16)
    local = on_devices(lambda *a: ring(*a, mask=masks.causal(), order=order), (P(AXIS),) * 3)

    def temporary(turn):
        monkeypatch.setattr(ring_heads, "TURN", turn)
        gradient = jax.jit(jax.grad(lambda *a: jnp.sum(local(*a).astype(jnp.float32)), (0, 1, 2)))
        return gradient.lower(array, array, array).compile().memory_analysis().temp_size_in_bytes

    one, all_at_once = temporary(1), temporary(2**18)
    assert one < all_at_once / 2, (one, all_at_once)


@pytest.mark.skipif(DEVICES < 8, reason="needs different numbers of devices")
def test_memory_per_device_does_not_grow_with_the_devices_at_the_same_rows_per_device():
    def temporary(devices):
        array = jax.ShapeDtypeStruct((64 * devices, 2, 32), jnp.float32)
        call = lambda *a: ring(*a, mask=masks.causal())  # noqa: E731
        local = on_devices(call, (P(AXIS),) * 3, devices=devices)
        gradient = jax.jit(jax.grad(lambda *a: jnp.sum(local(*a) ** 2), (0, 1, 2)))
        return gradient.lower(array, array, array).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary(2), temporary(8)
    assert many <= 1.05 * few, (few, many)


# More devices


@pytest.mark.skipif(DEVICES != 2, reason="starts the tests on more devices, once")
@pytest.mark.some(1)
@pytest.mark.parametrize("devices, chosen", [(8, ["-k", "numpy or packed or skipped or memory"]), (4, ["-m", ""])])
def test_on_more_devices(devices, chosen):
    files = [str(file) for file in pathlib.Path(__file__).parent.glob("test_ring*.py")]
    words = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *files, *chosen]
    done = subprocess.run(words, env=os.environ | {"ATTN_TEST_DEVICES": str(devices)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
