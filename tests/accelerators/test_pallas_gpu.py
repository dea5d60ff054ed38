"""The kernels for GPUs compile for each generation, keep everything in registers, and take no more than recorded."""

import json

import pytest
import registers


@pytest.mark.parametrize(
    "gpu", ["h100-1", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("a100-1", "b200-1"))]
)
@pytest.mark.parametrize("width", registers.WIDTHS)
@pytest.mark.parametrize("dtype", registers.DTYPES)
def test_kernels_and_gradients_need_no_more_of_a_processor_than_recorded(mesh_of, gpu, width, dtype):
    mesh, recorded = mesh_of(gpu), json.loads(registers.RESULTS.read_text())[gpu][dtype][str(width)]
    for case in registers.CASES:
        for kernel, each in registers.measure(case, width, dtype, mesh).items():
            limits = recorded[case][kernel]
            assert each["spills"] == limits["spills"] == 0, (case, kernel)
            assert each["threads"] == limits["threads"], (case, kernel)
            # A processor gives registers out by eight per thread.
            assert -(-each["registers"] // 8) <= -(-limits["registers"] // 8), (case, kernel)
            assert each["shared"] <= limits["shared"], (case, kernel)
