"""The instruction bundles of our kernels on TPUs, counted beside those of JAX's kernels in the same run."""

import json

import bundles
import devices
import pytest

OURS = "causal", "causal, separate", "ALiBi", "T5's buckets"
DEVICES = pytest.mark.parametrize("device", ["v5e-1", pytest.param("v6e-1", marks=pytest.mark.nightly)])


@pytest.fixture(scope="module")
def counted():
    """`counted(device)`: the kernels of each program."""
    found = {}

    def count(device):
        if (reason := devices.missing(device)) is not None:
            pytest.skip(reason)
        if device not in found:
            programs = [*OURS, "splash", "splash, fused"]
            found[device] = {name: each["kernels"] for name, each in bundles.count(device, programs).items()}
        return found[device]

    return count


@DEVICES
def test_tiles_take_about_as_many_bundles_as_those_of_splash_attention(counted, device):
    kernels = counted(device)
    ours, separate, splash, fused = (
        kernels[name] for name in ("causal", "causal, separate", "splash", "splash, fused")
    )
    for kernel in ("forward", "dq", "dk, dv"):
        assert separate[kernel]["whole"] <= 1.05 * splash[kernel]["whole"], kernel
    assert ours["backward"]["whole"] <= 1.10 * fused["backward"]["whole"]
    assert ours["forward"]["call"] <= 1.15 * splash["forward"]["call"]
    assert ours["backward"]["call"] <= 1.15 * fused["backward"]["call"]


@DEVICES
def test_a_function_of_distances_costs_little(counted, device):
    kernels = counted(device)
    # On a v6e, products take so few cycles that all operations on a tile show.
    limit = {"v5e-1": 1.05, "v6e-1": 1.12}[device]
    assert kernels["ALiBi"]["forward"]["whole"] <= limit * kernels["causal"]["forward"]["whole"]


@DEVICES
def test_a_table_by_distance_with_its_gradient_costs_less_than_half_more(counted, device):
    kernels = counted(device)
    whole = {name: sum(each["whole"] for each in kernels[name].values()) for name in ("causal", "T5's buckets")}
    assert whole["T5's buckets"] <= 1.4 * whole["causal"]


@DEVICES
def test_bundles_are_those_that_were_recorded_or_fewer(counted, device):
    kernels_of = counted(device)
    recorded = json.loads(bundles.RESULTS.read_text())[device]
    for name, kernels in kernels_of.items():
        for kernel, each in kernels.items():
            for measure in ("whole", "partial", *(["vmem"] if name in OURS else [])):
                assert each[measure] <= 1.02 * recorded[name]["kernels"][kernel][measure], (name, kernel, measure)


def test_the_memory_of_kernels_is_read_where_the_compiler_says_it():
    text = """
  %attn_forward.1 = (bf16[8], f32[2]) custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={},
    backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"1818624"}]}
  %splash_mha.1 = bf16[8] custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={}
  %fusion.1 = bf16[8] fusion(%x), backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0",
  %attn_backward_both = bf16[8] custom-call(%x), custom_call_target="tpu_custom_call",
    backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4636672"}]}
"""
    assert bundles.vmem(text) == {"attn_forward": 1818624, "attn_backward_both": 4636672}


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
