"""Dropout of activations: which elements are dropped, and how it compiles for a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from attn.nn.dropout import dropout

TPU = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
MESH = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=TPU)


def dropped(x, key):
    return dropout(x, 0.25, key)


@pytest.fixture
def example():
    return jnp.arange(1.0, 4_001).reshape(8, 500), jax.random.key(3)


def test_a_quarter_is_dropped_and_the_rest_is_scaled(example):
    x, key = example
    out = np.asarray(dropped(x, key))
    kept = out != 0
    np.testing.assert_array_equal(out[kept], np.asarray(x / 0.75)[kept])
    assert abs(kept.mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / x.size)
    np.testing.assert_array_equal(dropout(x, 0.25, None), x)


def test_the_bits_are_drawn_once_where_that_saves_compiling_and_the_values_are_the_same(example):
    """XLA for TPUs would draw them in every product that reads them; on other platforms nothing changes."""
    plain = jax.make_jaxpr(dropped)(*example)
    with jax.sharding.use_abstract_mesh(MESH):
        on_tpu = jax.make_jaxpr(dropped)(*example)
    assert ("optimization_barrier" in str(plain), "optimization_barrier" in str(on_tpu)) == (False, True)
    values = [jax.core.eval_jaxpr(each.jaxpr, each.consts, example[0], example[1]) for each in (plain, on_tpu)]
    np.testing.assert_array_equal(*values)
