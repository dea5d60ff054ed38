"""Both drop-ins computed by the fused kernels of TPUs and GPUs, in the interpreter, with gradients of the bias."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from interop_cases import normal, quick_jit
from interpreted import KERNELS, register_kernels
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax_nn_cases import CASES, CLOSE, B, N, S, T, bools, compare, inputs
from traces import equations, is_matrix_product

from attn.functional.implementations import IMPLEMENTATIONS
from attn.interop import dot_product_attention, flax_attention_fn


@pytest.fixture
def registry():
    """The registry, which is restored."""
    before = dict(IMPLEMENTATIONS)
    yield IMPLEMENTATIONS
    IMPLEMENTATIONS.clear()
    IMPLEMENTATIONS.update(before)


@pytest.fixture
def interpreted(registry):
    """The kernels run here."""
    register_kernels(block_size=4)


def kernels_and_products(call, *arguments) -> tuple[list[str], int]:
    """Return the names of the kernels that a function calls, and how many matrix products it has outside of them."""
    found, products = [], 0
    for equation, around in equations(call, *arguments):
        if equation.primitive.name == "pallas_call":
            found.append(str(equation.params["name"]))
        elif is_matrix_product(equation):
            products += all(outer.primitive.name != "pallas_call" for outer in around)
    return found, products


@pytest.mark.usefixtures("interpreted")
@pytest.mark.some(4)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", [name for name in CASES if name != "fewer still"])
def test_agrees_with_jax_nn(case, kernel):
    """Output, residual, and gradients of query, key, value and bias."""
    compare(CASES[case], implementation=kernel)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_bias_that_all_pairs_share_has_no_gradient(kernel):
    """It cancels: what is left of a sum over 420 pairs, each at most 8 here, are roundings."""
    query, key, value, cotangent = inputs()

    def total(bias):
        return jnp.vdot(dot_product_attention(query, key, value, bias, implementation=kernel), cotangent)

    assert abs(quick_jit(jax.grad(total))(jnp.float32(0.7))) < B * N * T * S * 8 * np.finfo(np.float32).eps


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kernel", KERNELS)
def test_agrees_with_flax(kernel):
    """Output, and gradients of query, key, value and bias, which all examples share; grouped heads and a mask."""
    query, key, value, cotangent = inputs()
    bias, mask = normal(1, N, T, S), bools(B, 1, T, S) | (np.arange(S) == 0)

    def call(function, *arrays):
        out, pullback = jax.vjp(functools.partial(function, mask=mask), *arrays)
        return out, pullback(cotangent)

    ours = functools.partial(flax_attention_fn, implementation=kernel)
    found, expected = (
        quick_jit(functools.partial(call, each))(query, key, value, bias) for each in (ours, nnx.dot_product_attention)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), found, expected)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_of_the_hook_is_the_same_in_a_kernel(kernel):
    arrays = inputs()[:3]

    def run_by(name, broadcast):
        options = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0), "broadcast_dropout": broadcast}
        return quick_jit(functools.partial(flax_attention_fn, implementation=name, **options))(*arrays)

    for broadcast in (False, True):
        np.testing.assert_allclose(run_by(kernel, broadcast), run_by("reference", broadcast), rtol=1e-5, atol=1e-5)


PLATFORMS = {"pallas_tpu": ("tpu", "TPU v5 lite", 1), "pallas_gpu": ("gpu", "NVIDIA H100 80GB HBM3", 132)}


@pytest.mark.parametrize("is_checked", [True, False])
@pytest.mark.parametrize("function", [dot_product_attention, flax_attention_fn])
@pytest.mark.parametrize("kernel", KERNELS)
def test_without_a_name_they_use_the_kernel_where_it_was_checked(kernel, function, is_checked, registry):
    """Gradients with a bias are kernels alone: no product of matrices is outside of them."""
    platform, kind, cores = PLATFORMS[kernel]
    changes = {"backends": {platform}, "is_checked": lambda kind: is_checked}
    entries = {kernel: dataclasses.replace(registry[kernel], **changes), "blockwise": registry["blockwise"]}
    registry.clear()
    registry.update(entries)
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)
    shapes = [(2, 64, 4, 16), (2, 64, 2, 16), (2, 64, 2, 16), (2, 4, 64, 64)]
    arrays = [jnp.zeros(shape, jnp.bfloat16) for shape in shapes]
    jax.clear_caches()  # of traces in which another implementation was chosen
    with jax.sharding.use_abstract_mesh(mesh):
        gradient = jax.grad(lambda *xs: jnp.sum(function(*xs)), argnums=(0, 1, 2, 3))
        names, products = kernels_and_products(gradient, *arrays)
    if is_checked:
        assert len(names) >= 2 and names[0].startswith("attn_forward") and products == 0, names
    else:
        assert not names and products
