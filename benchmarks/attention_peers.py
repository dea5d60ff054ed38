"""The contestants of attention.py, and the work of its child processes, which it starts one after the other.

    python benchmarks/attention_peers.py JOB FILE

JOB is a `Job` as a JSON object. Results are added to FILE as they come, a JSON object a line; progress goes to stderr.
"""

import functools
import gc
import importlib.util
import itertools
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import attn
from attn.training import meshes

FEWEST_ROUNDS = 3
SAMPLE_SECONDS = 0.02  # a sample takes at least so long, of several calls where one is shorter
WARM_SECONDS = 0.1
PAUSE_SECONDS = 0.005  # between turns: each framework's idle threads look out for work a while before they sleep
LARGEST_DIFFERENCE = {"float32": 5e-3, "float16": 0.03, "bfloat16": 0.2}  # TF32 included

MASKS = ("causal", "full")
HEADS = PartitionSpec(None, None, "heads", None)

_COMPILED = {}  # what each text was compiled to, and the seconds

# Where the contestants differ, for whoever reads the figures.
DIFFERENCES = {
    "arrays": "each gets contiguous arrays in its own order: attn, jax.nn and flax [B T N H], torch [B N T H]",
    "batch": "attn has no batch axis: it is called plainly for a batch of one, under jax.vmap for more",
    "backward": "attn, jax.nn and flax run one compiled program that returns the output and three gradients; torch "
    "runs forward and torch.autograd.grad and records the graph in every call; forward alone is under torch.no_grad",
    "flax": "flax.nnx.dot_product_attention without dropout or a module to record into calls jax.nn; programs that are "
    "the same to the letter before XLA compiles them are compiled and timed once (same_program_as)",
    "causal": "jax.nn and flax compute all T x S scores and mask; the others leave out most of what is masked",
    "compile": "seconds to trace, lower and compile for jax; torch compiles nothing",
    "memory": "jax: temporary memory that the compiled program plans for, added up over devices, without arguments and "
    "results; torch on CUDA: the most that its allocator has handed out during a call, beyond arguments and results; "
    "torch on a CPU keeps no such count, hence null",
    "whole_machine": "attn, jax.nn and flax: one CPU device a core and an even part of the heads each, by "
    "jax.shard_map; torch: all cores as threads of one call",
    "float32 on a GPU": "jax multiplies in TF32 by default, torch does not",
}


class Job(NamedTuple):
    """What one child process does."""

    section: str  # a key of SECTIONS
    setup: str = ""  # "one_thread", "one_process", "whole_machine" or "gpu"
    contestants: tuple[str, ...] = ()
    implementation: str = "blockwise"  # ours, in the sections where nobody else takes part
    lengths: tuple[int, ...] = ()
    masks: tuple[str, ...] = MASKS
    checked_length: int = 1024
    batch: int = 1
    heads: int = 8
    width: int = 64
    dtype: str = "float32"
    rounds: int = 30
    seconds: float = 4.0
    memory_gib: float = 6.0
    seed: int = 1


class LeftOut(Exception):
    """A contestant does not take part in a case; the message says why."""


class JaxProgram:
    """A function of `[B T N H]` arrays, jitted: the output, and with a cotangent for it also the three gradients.

    Args:
      attend: function of query, key, value and the operands.
      arrays: query, key, value and, to go backward, the output's cotangent; or their shapes, to compile only.
      operands: further traced arguments.
      mesh: to share out the heads over.
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
        """Compile, unless the same was compiled before; what that took, and what the program plans for."""
        started = time.perf_counter()
        if self.text not in _COMPILED:
            _COMPILED[self.text] = self._lowered.compile(), time.perf_counter() - started
        self._compiled, seconds = _COMPILED[self.text]
        seconds += self._lower_seconds
        temporary = self._compiled.memory_analysis().temp_size_in_bytes * self._devices
        return {"compile_seconds": round(seconds, 3), "temporary_bytes": temporary, "devices": self._devices}

    def __call__(self) -> tuple:
        """Run, and wait for the results."""
        return jax.block_until_ready(self._compiled(*self._arguments))

    def results(self) -> list[np.ndarray]:
        """Run; the results in float64."""
        return [np.asarray(x).astype(np.float64) for x in self()]


class TorchProgram:
    """torch's scaled_dot_product_attention, and torch.autograd.grad if there is a cotangent.

    Args:
      job: its dtype, and its set-up, which tells the device.
      arrays: `[B T N H]`: query, key, value and, to go backward, the output's cotangent.
      mask: one of `MASKS`.
    """

    text = None

    def __init__(self, job: Job, arrays: list[np.ndarray], mask: str):
        import torch  # here, since --help should not wait for it, and since jax must do without it

        if job.setup == "gpu" and not torch.cuda.is_available():
            raise LeftOut("this torch finds no CUDA device")
        torch.set_num_threads(meshes.cores())
        self._torch, self._causal = torch, mask == "causal"
        self._cuda = torch.cuda if job.setup == "gpu" else None
        place = {"device": "cuda" if self._cuda else "cpu", "dtype": getattr(torch, job.dtype)}
        tensors = [torch.as_tensor(x).transpose(1, 2).contiguous().to(**place) for x in arrays]
        self._inputs, self._cotangent = [x.requires_grad_(len(tensors) > 3) for x in tensors[:3]], tensors[3:]

    def prepare(self) -> dict:
        """Nothing to compile; memory is counted in a call."""
        found = {"compile_seconds": 0.0, "temporary_bytes": None, "devices": 1}
        if self._cuda:
            self()
            self._cuda.reset_peak_memory_stats()
            results = self()
            found["temporary_bytes"] = self._cuda.max_memory_allocated() - self._cuda.memory_allocated()
            del results  # held until here, so as not to be counted
        return found

    def __call__(self) -> tuple:
        """Run, and wait for the results."""
        attend = functools.partial(self._torch.nn.functional.scaled_dot_product_attention, is_causal=self._causal)
        if self._cotangent:
            out = attend(*self._inputs)
            results = (out, *self._torch.autograd.grad(out, self._inputs, *self._cotangent))
        else:
            with self._torch.no_grad():
                results = (attend(*self._inputs),)
        if self._cuda:
            self._cuda.synchronize()
        return results

    def results(self) -> list[np.ndarray]:
        """Run; the results in float64, ordered as ours."""
        return [x.detach().transpose(1, 2).double().cpu().numpy() for x in self()]


def ours(implementation: str, mask=None, score=None) -> Callable:
    """attn.multi_head_attention over a batch."""

    def attend(query, key, value):
        return attn.multi_head_attention(query, key, value, mask=mask, score=score, implementation=implementation)

    def attend_all(*arrays):
        return attend(*(x[0] for x in arrays))[None] if len(arrays[0]) == 1 else jax.vmap(attend)(*arrays)

    return attend_all


def our(mask: str):
    """Our mask of that name."""
    return attn.masks.causal() if mask == "causal" else None


def _ours_plain(implementation: str) -> Callable:
    return lambda mask: ours(implementation, our(mask))


def _jax_nn(implementation: str) -> Callable:
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    return lambda mask: functools.partial(attend, is_causal=mask == "causal")


# From one of `MASKS` to a function of query, key and value.
JAX_CONTESTANTS = {
    "attn-blockwise": _ours_plain("blockwise"),
    "attn-auto": _ours_plain("auto"),
    "attn-fastest": _ours_plain("fastest"),
    "attn-reference": _ours_plain("reference"),
    "jax.nn": _jax_nn("xla"),
    "jax.nn-cudnn": _jax_nn("cudnn"),
    "flax": lambda mask: functools.partial(nnx.dot_product_attention, is_causal=mask == "causal"),
}
CONTESTANTS = (*JAX_CONTESTANTS, "torch")


def build(name: str, job: Job, arrays: list[np.ndarray], mask: str, mesh: Mesh | None):
    """A contestant's program for these arrays, not compiled yet.

    Raises:
      LeftOut: torch is asked for and missing.
    """
    if name != "torch":
        return JaxProgram(JAX_CONTESTANTS[name](mask), [jnp.asarray(x, job.dtype) for x in arrays], mesh=mesh)
    if importlib.util.find_spec("torch") is None:
        raise LeftOut("torch is not installed: pip install -e '.[bench]'")
    return TorchProgram(job, arrays, mask)


def set_up(job: Job) -> Mesh | None:
    """Settle JAX's devices, before it computes anything; the mesh for the heads, where the set-up has one.

    What the cores of this process are is up to whoever starts it.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    if job.setup == "gpu":
        return None
    whole = job.setup == "whole_machine"
    jax.config.update("jax_num_cpu_devices", meshes.largest_divisor(job.heads, meshes.cores()) if whole else 1)
    return Mesh(np.array(jax.devices()), ("heads",), axis_types=(AxisType.Auto,)) if whole else None


def draw(job: Job, T: int) -> list[np.ndarray]:
    """Query, key, value and cotangent, `[B T N H]`: float32 that the job's dtype can hold."""
    random = np.random.default_rng(job.seed)
    drawn = random.standard_normal((4, job.batch, T, job.heads, job.width), np.float32)
    return list(drawn.astype(jnp.dtype(job.dtype)).astype(np.float32))


def probe(job: Job) -> Iterator[dict]:
    """What JAX computes on when nobody tells it."""
    yield {"platform": jax.default_backend(), "device": jax.devices()[0].device_kind}


def speed(job: Job) -> Iterator[dict]:
    """Everybody at every length, causal and full, forward and forward+backward."""
    mesh = set_up(job)
    yield from checks(job, mesh)
    cases = list(itertools.product(job.lengths, job.masks, ("forward", "forward+backward")))
    for number, (T, mask, mode) in enumerate(cases):
        arrays = draw(job, T)[: 3 if mode == "forward" else 4]
        programs = {}
        for name in job.contestants:
            programs[name] = functools.partial(build, name, job, arrays, mask, mesh)
        rows = compete(programs, job)
        say(f"{job.setup} {number + 1}/{len(cases)}, T {T:,}, {mask}, {mode}: {describe(rows)}")
        for name, row in rows.items():
            yield {"setup": job.setup, "T": T, "mask": mask, "mode": mode, "contestant": name, **row}


def checks(job: Job, mesh: Mesh | None) -> Iterator[dict]:
    """How far everybody's output and gradients are from the formula, worked out in float64."""
    arrays = draw(job, job.checked_length)
    for mask in job.masks:
        expected = by_hand(arrays, mask)
        for name in job.contestants:
            row = {"section": "checks", "setup": job.setup, "contestant": name, "T": job.checked_length, "mask": mask}
            try:
                program = build(name, job, arrays, mask, mesh)
                program.prepare()
                difference = max(float(np.abs(x - y).max()) for x, y in zip(program.results(), expected, strict=True))
            except Exception as error:
                say(f"warning: {job.setup}, {mask}: {name} is left out: {in_a_line(error)}")
                yield row | {"left_out": in_a_line(error)}
                continue
            row |= {"largest_difference": difference, "agrees": difference <= LARGEST_DIFFERENCE[job.dtype]}
            if not row["agrees"]:
                say(f"warning: {job.setup}, {mask}: {name} is off by {difference:.2g}: its times do not count")
            yield row


def by_hand(arrays: list[np.ndarray], mask: str) -> list[np.ndarray]:
    """Output and gradients to query, key and value, from the formula in NumPy, head by head in float64."""
    results = [np.empty(x.shape) for x in arrays]
    _, T, _, H = arrays[0].shape
    hidden = np.triu(np.full((T, T), -np.inf), 1) if mask == "causal" else 0.0
    for b, n in np.ndindex(arrays[0].shape[0], arrays[0].shape[2]):
        query, key, value, cotangent = (x[b, :, n].astype(np.float64) for x in arrays)
        s = query @ key.T / math.sqrt(H) + hidden
        p = np.exp(s - s.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        dp = cotangent @ value.T
        ds = p * (dp - (p * dp).sum(axis=1, keepdims=True)) / math.sqrt(H)
        for result, x in zip(results, (p @ value, ds @ key, ds.T @ query, p.T @ cotangent), strict=True):
            result[b, :, n] = x
    return results


def freedom(job: Job) -> Iterator[dict]:
    """What a score function costs, forward and backward."""
    set_up(job)
    scores = {
        "no score": lambda slopes: None,
        "ALiBi, a plain function": lambda slopes: lambda s, i, j: s - slopes[job.heads // 2] * jnp.abs(i - j),
        "attn.scores.alibi": lambda slopes: attn.scores.alibi(slopes[job.heads // 2]),
        "attn.scores.alibi, a slope a head": lambda slopes: attn.per_head(attn.scores.alibi(slopes)),
    }
    slopes = jnp.asarray(attn.positions.alibi_slopes(job.heads))
    for T, mask in itertools.product(job.lengths, job.masks):
        programs = {}
        for name, score in scores.items():
            programs[name] = variant(
                job, T, lambda slopes, m=mask, s=score: {"mask": our(m), "score": s(slopes)}, slopes
            )
        for row in compare(job, f"T {T:,}, {mask}", programs, "no score"):
            yield {"T": T, "heads": job.heads, "mask": mask, **row}


def skipping(job: Job) -> Iterator[dict]:
    """What a mask saves, forward and backward."""
    set_up(job)
    masks = attn.masks
    for T in job.lengths:
        part = T // 8
        chosen = {
            "full": (lambda _: None, ()),
            "causal": (lambda _: masks.causal(), ()),
            "causal, a plain function": (lambda _: lambda i, j: j <= i, ()),
            "window of 256": (lambda _: masks.sliding_window(255, 0), ()),
            "window of 256, a plain function": (lambda _: lambda i, j: (j <= i) & (i - j < 256), ()),
            "padding to half": (masks.padding, jnp.int32(T // 2)),
            f"segments of {part:,}": (lambda ids: masks.segments(ids, ids), jnp.arange(T) // part),
            f"causal or prefix of {part:,}": (lambda length: masks.causal() | masks.prefix(length), jnp.int32(part)),
        }
        programs = {}
        for name, (mask, operand) in chosen.items():
            programs[name] = variant(job, T, lambda operand, mask=mask: {"mask": mask(operand)}, operand)
        for row in compare(job, f"T {T:,}", programs, "full"):
            mask, operand = chosen[row["variant"]]
            visible = visible_share(mask(operand), T)
            yield {"setup": job.setup, "T": T, "heads": job.heads, "visible": visible, **row}


def variant(job: Job, T: int, mods: Callable, operand) -> Callable:
    """Our program, backward too, with the mask and the score that `mods` makes of a traced operand."""

    def attend(query, key, value, operand):
        return ours(job.implementation, **mods(operand))(query, key, value)

    return lambda: JaxProgram(attend, [jnp.asarray(x, job.dtype) for x in draw(job, T)], (operand,))


def compare(job: Job, title: str, programs: dict[str, Callable], baseline: str) -> Iterator[dict]:
    """Rows of programs that compete with one of them."""
    rows = compete(programs, job)
    say(f"{job.section}, {title}: {describe(rows)}")
    for name, row in rows.items():
        times = [r.get("median_ms") for r in (row, rows[baseline])]
        yield {"variant": name, "ratio": round(times[0] / times[1], 4) if all(times) else None, **row}


def visible_share(mask, T: int) -> float:
    """The share of all pairs that the mask lets through."""
    if mask is None:
        return 1.0
    return round(float(jax.jit(lambda i: mask(i[:, None], i[None, :]).mean())(jnp.arange(T))), 6)


def memory(job: Job) -> Iterator[dict]:
    """Temporary memory of forward and backward, as compiled; nothing is run."""
    set_up(job)
    contestants = {f"attn-{name}": _ours_plain(name) for name in (job.implementation, "reference")}
    contestants["jax.nn"] = JAX_CONTESTANTS["jax.nn"]
    for T, mask, name in itertools.product(job.lengths, job.masks, contestants):
        row = {"T": T, "heads": job.heads, "mask": mask, "contestant": name}
        shape = jax.ShapeDtypeStruct((job.batch, T, job.heads, job.width), job.dtype)
        try:
            found = JaxProgram(contestants[name](mask), [shape] * 4).prepare()
        except Exception as error:
            yield row | {"left_out": in_a_line(error)}
            continue
        say(f"memory, T {T:,}, {mask}: {name} {found['temporary_bytes'] / 2**20:,.1f} MiB")
        yield row | found | {"bytes_a_token": round(found["temporary_bytes"] / (job.batch * T), 1)}


def compete(programs: dict[str, Callable], job: Job) -> dict[str, dict]:
    """Build, compile and time programs that take turns; a row for each, with `left_out` where one cannot."""
    rows, ready, texts = {}, {}, {}
    for name, make in programs.items():
        try:
            program = make()
            if program.text in texts:
                rows[name] = {"same_program_as": texts[program.text]}
                continue
            rows[name] = program.prepare()
            if program.text is not None:
                texts[program.text] = name
            gib = (rows[name]["temporary_bytes"] or 0) / 2**30
            if gib > job.memory_gib:
                raise LeftOut(f"would need {gib:.1f} GiB of temporary memory, more than {job.memory_gib:g}")
            ready[name] = program, warm_up(program)
        except Exception as error:
            rows[name] = rows.get(name, {}) | {"left_out": in_a_line(error)}
    for name, found in take_turns(ready, job).items():
        rows[name] |= found
    return {name: rows.get(row.get("same_program_as"), {}) | row for name, row in rows.items()}


def warm_up(program: Callable) -> float:
    """Call a few times, unless a call is long; seconds of the fastest call."""
    seconds = [timed(program, 1)]
    while sum(seconds) < WARM_SECONDS or (len(seconds) < 2 and seconds[0] < 1):
        seconds.append(timed(program, 1))
    return min(seconds)


def take_turns(ready: dict[str, tuple[Callable, float]], job: Job) -> dict[str, dict]:
    """Time programs in rounds, turning the order; slow ones sit out some of them, evenly.

    Args:
      ready: programs, and about how many seconds a call of each takes.
    """
    calls = {name: max(1, math.ceil(SAMPLE_SECONDS / seconds)) for name, (_, seconds) in ready.items()}
    turns, samples = {}, {name: [] for name in ready}
    for name, (_, seconds) in ready.items():
        affordable = int(job.seconds / (calls[name] * seconds))
        turns[name] = min(job.rounds, max(FEWEST_ROUNDS, affordable))
    rounds = max(turns.values(), default=0)
    gc.collect()
    for number in range(rounds):
        for name in list(ready)[:: 1 if number % 2 == 0 else -1]:
            if (number + 1) * turns[name] // rounds > number * turns[name] // rounds:
                time.sleep(PAUSE_SECONDS)
                if calls[name] > 1:
                    ready[name][0]()  # what the others did to the caches should not count
                samples[name].append(timed(ready[name][0], calls[name]) * 1e3)
    return {name: summary(values, calls[name]) for name, values in samples.items()}


def timed(program: Callable, calls: int) -> float:
    """Seconds a call."""
    started = time.perf_counter()
    for _ in range(calls):
        program()
    return (time.perf_counter() - started) / calls


def summary(samples: list[float], calls: int) -> dict:
    """Milliseconds a call."""
    found = {"median_ms": round(statistics.median(samples), 4), "fastest_ms": round(min(samples), 4)}
    return found | {"calls_a_sample": calls, "samples_ms": [round(x, 4) for x in samples]}


def describe(rows: dict[str, dict]) -> str:
    """Everybody's median in one line."""
    shown = []
    for name, row in rows.items():
        if "same_program_as" in row:
            shown.append(f"{name} as {row['same_program_as']}")
        else:
            shown.append(f"{name} {row['median_ms']:,.4g} ms" if "median_ms" in row else f"{name} -")
    return ", ".join(shown)


def in_a_line(error: Exception) -> str:
    """What went wrong, shortly."""
    words = " ".join(str(error).split())[:200]
    return words if isinstance(error, LeftOut) else f"{type(error).__name__}: {words}"


def say(line: str):
    """Progress, apart from the results."""
    print(line, file=sys.stderr, flush=True)


SECTIONS = {"probe": probe, "speed": speed, "freedom": freedom, "skipping": skipping, "memory": memory}


def main():
    """Do one job."""
    job = Job(**json.loads(sys.argv[1]))
    with pathlib.Path(sys.argv[2]).open("a") as file:
        for row in SECTIONS[job.section](job):
            file.write(json.dumps({"section": job.section} | row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
