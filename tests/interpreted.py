"""The kernels of TPUs and GPUs as implementations that run here, in the interpreter of Pallas, with small tiles."""

import dataclasses
import functools

from attn.functional import pallas_gpu, pallas_tpu
from attn.functional.implementations import IMPLEMENTATIONS

KERNELS = ("pallas_tpu", "pallas_gpu")
DTYPES = ("float16", "bfloat16", "float32", "float64")
_MODULES = {"pallas_tpu": (pallas_tpu, ("block_size", "lanes")), "pallas_gpu": (pallas_gpu, ("block_size",))}


def register_kernels(block_size: int):
    """Let the registry's kernels run in the interpreter; they come last, so that messages name the others first."""
    for name, (module, sizes) in _MODULES.items():
        IMPLEMENTATIONS[name] = dataclasses.replace(
            IMPLEMENTATIONS.pop(name),
            attend=functools.partial(module.attend, interpret=True, **dict.fromkeys(sizes, block_size)),
            unsupported_reason=functools.partial(module.unsupported_reason, supported=DTYPES),
            backends=None,
            is_checked=lambda device_kind: False,
        )
