"""An implementation in a file outside of the package: a Pallas kernel, registered, under the shared tests.

It takes all heads at once, in blocks of its own, and has masks and reverse mode alone: no score, no dropout, no
logsumexp, no forward mode, no second order.
"""

import os
import pathlib
import re
import runpy
import subprocess
import sys

import attention_cases as cases
import implementation_suite as suite
import jax
import numpy as np
import pytest
from implementation_suite import (  # noqa: F401  run here for the kernel
    test_declared_derivatives_are_right_and_others_are_right_or_refused,
    test_many_heads_equal_one_at_a_time,
    test_what_is_not_declared_is_refused_and_what_is_declared_is_served,
)
from test_hidden import test_nan_or_infinity_in_a_value_or_key_reaches_the_rows_that_see_it  # noqa: F401
from test_semantics import (  # noqa: F401
    test_a_value_may_have_another_width,
    test_causal_with_an_offset_places_the_queries,
    test_the_scale_is_one_over_the_root_of_the_width_unless_given,
)
from test_structure import (  # noqa: F401
    test_causal_attention_never_depends_on_the_future,
    test_large_values_do_not_overflow,
    test_output_depends_on_its_own_query_alone,
    test_padded_attention_never_depends_on_the_padding,
)

import attn
from attn import masks
from attn.functional.implementations import IMPLEMENTATIONS, Implementation, register


@pytest.fixture(scope="module")
def registered():
    """Run the file, which registers the implementation, and forget it afterwards."""
    runpy.run_path(str(pathlib.Path(__file__).parent / "mine" / "tiled.py"))
    yield "tiled"
    del IMPLEMENTATIONS["tiled"]


@pytest.fixture
def implementation(registered):
    """The name under which the shared tests run."""
    return registered


SERVED = [
    cases.Case((13, 17, 3, 2), mask, "none", dtype)
    for mask, dtype in (("none", "float32"), ("causal", "bfloat16"), ("padding", "float64"), ("causal", "float16"))
]


@pytest.mark.parametrize("case", SERVED, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_agree_with_the_oracle(implementation, case, seed):
    suite.check_value_and_gradient(implementation, case, seed)


@pytest.mark.parametrize("mask", [masks.sliding_window(2, 0), masks.causal() | masks.prefix(2), lambda i, j: j <= i])
def test_masks_that_it_does_not_know_are_refused_in_its_own_words(implementation, mask):
    with pytest.raises(attn.Unsupported, match=r"'tiled' does not support mask .*joined by &\); these do: blockwise"):
        attn.attention(*cases.normal((5, 2), (5, 2), (5, 2)), mask=mask, implementation=implementation)


def test_examples_and_heads_with_masks_of_their_own_equal_the_reference(implementation):
    query, key, value = cases.normal((3, 9, 4, 2), (3, 9, 2, 2), (3, 9, 2, 5))
    lengths = np.array([[9, 2, 0, 7], [1, 9, 5, 6], [0, 0, 3, 9]])

    def run(name):
        def loss(query, key, value, lengths):
            mask = masks.causal() & attn.per_head(masks.padding(lengths))
            return (attn.multi_head_attention(query, key, value, mask=mask, implementation=name) ** 2).sum()

        return jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1, 2))))(query, key, value, lengths)

    for ours, expected in zip(jax.tree.leaves(run(implementation)), jax.tree.leaves(run("reference")), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.nightly
def test_the_whole_shared_suite_picks_it_up_from_outside():
    tests = pathlib.Path(__file__).parents[1]
    words = [sys.executable, "-m", "pytest", "-p", "tiled", str(tests / "functional"), "-k", "tiled", "-m", ""]
    environment = os.environ | {"PYTHONPATH": str(tests / "extending/mine"), "PYTEST_ADDOPTS": "-p no:xdist"}
    done = subprocess.run(words, cwd=tests.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50


def test_a_taken_name_is_refused_in_one_line(registered):
    for name in (registered, "reference", "auto"):
        with pytest.raises(ValueError, match=f"^an implementation '{name}' exists already: choose another name$"):
            register(name, Implementation(print))


def test_unknown_features_and_derivatives_are_refused():
    with pytest.raises(ValueError, match=r"features must be among mask, score, dropout, logsumexp, got .'bias'"):
        Implementation(print, features={"bias"})
    with pytest.raises(ValueError, match=r"derivatives must be among reverse, forward, second, got .'third'"):
        Implementation(print, derivatives={"third"})


def test_it_is_chosen_by_name_alone(registered):
    assert list(IMPLEMENTATIONS)[-1] == registered
    arrays = cases.normal((5, 2), (5, 2), (5, 2))
    for name in ("auto", "fastest"):
        trace = str(jax.make_jaxpr(lambda *a, name=name: attn.attention(*a, implementation=name))(*arrays))
        assert "pallas" not in trace
    trace = str(jax.make_jaxpr(lambda *a: attn.attention(*a, implementation=registered))(*arrays))
    assert "pallas" in trace
