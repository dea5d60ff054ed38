"""The contestants of attention.py: attn, jax.nn, Flax and torch, each as a program for given arrays."""

import functools
import importlib.util
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from attention_job import Job, LeftOut
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import attn
from attn.functional.cpu import cores

HEADS = PartitionSpec(None, None, "heads", None)  # of [B T N H]

_COMPILED = {}  # {text of a program: (the compiled program, seconds to compile it)}

# Differences between the contestants, written to the results for their readers.
DIFFERENCES = {
    "arrays": "each gets contiguous arrays in its own axis order: attn, jax.nn and flax [B T N H], torch [B N T H]",
    "batch": "attn has no batch axis: it is called directly for a batch of one, under jax.vmap for more",
    "backward": "attn, jax.nn and flax run one compiled program that returns the output and three gradients; torch "
    "runs forward and torch.autograd.grad and records the graph in every call; forward without backward runs under "
    "torch.no_grad",
    "flax": "flax.nnx.dot_product_attention without dropout and without a module to sow into calls jax.nn; programs "
    "whose text is identical before XLA compiles them are compiled and timed once (same_program_as)",
    "causal": "jax.nn and flax compute all T x S scores and then mask; the others skip most of the masked scores",
    "compile": "seconds to trace, lower and compile for jax; torch compiles nothing",
    "memory": "jax: temporary memory that the compiled program allocates, summed over devices, without arguments and "
    "results; torch on CUDA: the peak of its allocator during a call, without arguments and results; torch on a CPU "
    "does not count it, so it is null",
    "whole_machine": "attn, jax.nn and flax: one CPU device per core and the same number of heads per device, by "
    "jax.shard_map; torch: all cores as threads of one call",
    "float32 on a GPU": "jax multiplies in TF32 by default, torch does not",
}


class JaxProgram:
    """A jitted function of `[B T N H]` arrays: the output and, with a cotangent for it, also the three gradients.

    Args:
      attend: a function of query, key, value and the operands.
      arrays: query, key, value and, for gradients, the output's cotangent; or their shapes, to compile only.
      operands: further traced arguments.
      mesh: the devices among which the heads are divided; None for one device.
    """

    def __init__(self, attend: Callable, arrays: list, operands: tuple = (), mesh: Mesh | None = None):
        def program(arrays, operands):
            query, key, value, *cotangent = arrays
            if not cotangent:
                return (attend(query, key, value, *operands),)
            out, pull_back = jax.vjp(lambda *arrays: attend(*arrays, *operands), query, key, value)
            return out, *pull_back(*cotangent)

        if mesh is not None:
            arrays = jax.device_put(arrays, NamedSharding(mesh, HEADS))
            program = jax.shard_map(program, mesh=mesh, in_specs=(HEADS, PartitionSpec()), out_specs=HEADS)
        self._arguments = (arrays, operands)
        self._devices = 1 if mesh is None else mesh.size
        started = time.perf_counter()
        self._lowered = jax.jit(program).lower(*self._arguments)
        self._lower_seconds = time.perf_counter() - started
        self.text = self._lowered.as_text()

    def prepare(self) -> dict:
        """Compile, unless the same text was compiled before; return the seconds, temporary memory and devices."""
        started = time.perf_counter()
        if self.text not in _COMPILED:
            _COMPILED[self.text] = self._lowered.compile(), time.perf_counter() - started
        self._compiled, seconds = _COMPILED[self.text]
        seconds += self._lower_seconds
        temporary = self._compiled.memory_analysis().temp_size_in_bytes * self._devices
        return {"compile_seconds": round(seconds, 3), "temporary_bytes": temporary, "devices": self._devices}

    def __call__(self, calls: int = 1) -> tuple:
        """Run this often, and wait for the results: on a GPU of the last call alone, so that no call waits for Python.

        A CPU would run several calls at the same time.
        """
        for _ in range(calls):
            results = self._compiled(*self._arguments)
            if jax.default_backend() == "cpu":
                jax.block_until_ready(results)
        return jax.block_until_ready(results)

    def results(self, part=...) -> list[np.ndarray]:
        """Run, and return this part of each result `[B T N H]` in float64."""
        return [np.asarray(x[part]).astype(np.float64) for x in self()]


class TorchProgram:
    """A function of torch, and torch.autograd.grad if there is a cotangent.

    Args:
      job: gives the dtype and, by its set-up, the device.
      arrays: query, key, value and, for gradients, the output's cotangent, `[B T N H]`.
      attend: `(torch, device) -> function` of query, key and value, `[B N T H]`.
    """

    text = None

    def __init__(self, job: Job, arrays: list[np.ndarray], attend: Callable):
        import torch  # imported here: --help should not wait for it, and the others run without it

        if job.setup == "gpu" and not torch.cuda.is_available():
            raise LeftOut("this torch finds no CUDA device")
        torch.set_num_threads(cores())
        self._torch = torch
        self._cuda = torch.cuda if job.setup == "gpu" else None
        place = {"device": "cuda" if self._cuda else "cpu", "dtype": getattr(torch, job.dtype)}
        tensors = [torch.as_tensor(x).to(**place).transpose(1, 2).contiguous() for x in arrays]
        self._attend = attend(torch, place["device"])
        self._inputs, self._cotangent = [x.requires_grad_(len(tensors) > 3) for x in tensors[:3]], tensors[3:]

    def prepare(self) -> dict:
        """Measure memory in a call, on CUDA; torch compiles nothing."""
        found = {"compile_seconds": 0.0, "temporary_bytes": None, "devices": 1}
        if self._cuda:
            self()
            self._cuda.reset_peak_memory_stats()
            results = self()
            found["temporary_bytes"] = self._cuda.max_memory_allocated() - self._cuda.memory_allocated()
            del results  # kept until here, so that memory_allocated includes them and they are subtracted
        return found

    def __call__(self, calls: int = 1) -> tuple:
        """Run this often, and wait for the results."""
        for _ in range(calls):
            if self._cotangent:
                out = self._attend(*self._inputs)
                results = (out, *self._torch.autograd.grad(out, self._inputs, *self._cotangent))
            else:
                with self._torch.no_grad():
                    results = (self._attend(*self._inputs),)
        if self._cuda:
            self._cuda.synchronize()
        return results

    def results(self, part=...) -> list[np.ndarray]:
        """Run, and return this part of each result `[B T N H]` in float64."""
        return [x.detach().transpose(1, 2)[part].double().cpu().numpy() for x in self()]


def torch_attention(torch, device: str, *, is_causal: bool) -> Callable:
    """Return torch's scaled_dot_product_attention."""
    return functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=is_causal)


def ours(implementation: str, mask=None, score=None) -> Callable:
    """Return attn.multi_head_attention as a function of query, key and value with a batch axis."""

    def attend(query, key, value):
        return attn.multi_head_attention(query, key, value, mask=mask, score=score, implementation=implementation)

    def attend_all(*arrays):
        return attend(*(x[0] for x in arrays))[None] if len(arrays[0]) == 1 else jax.vmap(attend)(*arrays)

    return attend_all


def our_mask(mask: str):
    """Return attn's mask for one of `MASKS`."""
    return attn.masks.causal() if mask == "causal" else None


def ours_by_mask(implementation: str) -> Callable:
    """Return a function from one of `MASKS` to attn's function of query, key and value."""
    return lambda mask: ours(implementation, our_mask(mask))


def jax_nn_by_mask(implementation: str) -> Callable:
    """Return a function from one of `MASKS` to jax.nn's function of query, key and value."""
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    return lambda mask: functools.partial(attend, is_causal=mask == "causal")


# A function from one of `MASKS` to a function of query, key and value, per name.
JAX_CONTESTANTS = {
    "attn-blockwise": ours_by_mask("blockwise"),
    "attn-auto": ours_by_mask("auto"),
    "attn-fastest": ours_by_mask("fastest"),
    "attn-reference": ours_by_mask("reference"),
    "jax.nn": jax_nn_by_mask("xla"),
    "jax.nn-cudnn": jax_nn_by_mask("cudnn"),
    "flax": lambda mask: functools.partial(nnx.dot_product_attention, is_causal=mask == "causal"),
}
CONTESTANTS = (*JAX_CONTESTANTS, "torch")


def build(name: str, job: Job, arrays: list[np.ndarray], mask: str, mesh: Mesh | None):
    """Return a contestant's program for these arrays, not yet compiled.

    Raises:
      LeftOut: the contestant is torch, which is not installed or finds no CUDA device.
    """
    if name != "torch":
        return JaxProgram(JAX_CONTESTANTS[name](mask), [jnp.asarray(x, job.dtype) for x in arrays], mesh=mesh)
    if importlib.util.find_spec("torch") is None:
        raise LeftOut("torch is not installed: pip install -e '.[bench]'")
    return TorchProgram(job, arrays, functools.partial(torch_attention, is_causal=mask == "causal"))
