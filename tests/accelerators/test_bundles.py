"""The instruction bundles of our kernels on TPUs, counted beside those of JAX's kernels in the same run."""

import json

import bundles
import devices
import pytest


@pytest.fixture(scope="module")
def counted():
    """`counted(device)`: the kernels of each program."""
    found = {}

    def count(device):
        if (reason := devices.missing(device)) is not None:
            pytest.skip(reason)
        if device not in found:
            programs = ["causal", "causal, separate", "ALiBi", "T5's buckets", "splash", "splash, fused"]
            found[device] = {name: each["kernels"] for name, each in bundles.count(device, programs).items()}
        return found[device]

    return count


def test_tiles_take_about_as_many_bundles_as_those_of_splash_attention(counted):
    kernels = counted("v5e-1")
    ours, separate, splash, fused = (
        kernels[name] for name in ("causal", "causal, separate", "splash", "splash, fused")
    )
    for kernel in ("forward", "dq", "dk, dv"):
        assert separate[kernel]["whole"] <= 1.05 * splash[kernel]["whole"], kernel
    assert ours["backward"]["whole"] <= 1.10 * fused["backward"]["whole"]
    assert ours["forward"]["call"] <= 1.15 * splash["forward"]["call"]
    assert ours["backward"]["call"] <= 1.15 * fused["backward"]["call"]


def test_a_table_by_distance_with_its_gradient_costs_less_than_half_more(counted):
    kernels = counted("v5e-1")
    whole = {name: sum(each["whole"] for each in kernels[name].values()) for name in ("causal", "T5's buckets")}
    assert whole["T5's buckets"] <= 1.4 * whole["causal"]


@pytest.mark.parametrize("device", ["v5e-1", pytest.param("v6e-1", marks=pytest.mark.nightly)])
def test_bundles_are_those_that_were_recorded_or_fewer(counted, device):
    kernels_of = counted(device)
    recorded = json.loads(bundles.RESULTS.read_text())[device]
    for name, kernels in kernels_of.items():
        for kernel, each in kernels.items():
            assert each["whole"] <= 1.02 * recorded[name]["kernels"][kernel]["whole"], (name, kernel)
            assert each["partial"] <= 1.02 * recorded[name]["kernels"][kernel]["partial"], (name, kernel)


def test_regions_are_counted_without_those_inside():
    text = """
     0   :  { %1 = a } /* Start region 1 */
   0x1   :  { %2 = b } /* Start region 2 */
   0x2   :  { %3 = c }
   0x3   :  { %4 = d } /* End region 2 */
   0x4   :  { %5 = e } /* End region 1 */
   0x5   :  { %6 = f }
"""
    assert bundles.regions(text) == [2, 3, 1]


def test_a_call_is_its_tiles_and_what_is_around_them():
    # A step, the first of a row, a tile that the mask crosses, a whole one, the last of a row.
    found = bundles.summary([10, 300, 1400, 1200, 350])
    tiles = bundles.WHOLE * 1200 + bundles.PARTIAL * 1400
    around = bundles.ROWS * (300 + 350) + (bundles.WHOLE + bundles.PARTIAL) * 10
    assert found == {"whole": 1200, "partial": 1400, "call": bundles.HEADS * (tiles + around)}
