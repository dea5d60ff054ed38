"""Claim: a recurrent network takes one step after another; attention takes all of them at once."""

import dataclasses
import math
import time

import jax
import numpy as np
from jax.extend import core
from matplotlib.figure import Figure

from attn.tasks.generated import Generated
from attn.training import meshes
from attn.training.state import initial_state
from attn.training.steps import build_dispatch
from attn.walkthrough.bench import Bench, configured, matched, parameters
from attn.walkthrough.claims import Check, Claim, Numbers, Table


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Lengths T of source and target; how many tokens a batch has at every length; rounds of timing."""

    lengths: tuple[int, ...]
    tokens: int
    rounds: int


def measure(sizes: Sizes, bench: Bench) -> Numbers:
    """Time a training step of either model at each length, in turns, and count what has to wait for what."""
    transformer = {"model": {"name": "transformer", "max_length": max(sizes.lengths) + 1}}
    lstm = matched({"model": {"name": "lstm"}}, parameters(transformer))
    numbers = {"parameters": {"Transformer": parameters(transformer), "LSTM": parameters(lstm)}, "rows": []}
    for length in sizes.lengths:
        bench.say(f"timing length {length:,}")
        batch = max(1, sizes.tokens // length)
        steps = {"Transformer": Step(transformer, length, batch), "LSTM": Step(lstm, length, batch)}
        times = {name: [] for name in steps}
        for _ in range(sizes.rounds):
            for name, step in steps.items():
                times[name].append(step.seconds())
        numbers["rows"].append(
            {
                "length": length,
                "batch": batch,
                "seconds": {name: float(np.median(some)) for name, some in times.items()},
                "in_series": {name: step.in_series for name, step in steps.items()},
                "share_in_loops": {name: step.share_in_loops for name, step in steps.items()},
            }
        )
    return numbers


class Step:
    """A training step, compiled: that of `train.py`, from drawing examples to the new parameters.

    Args:
      settings: of the model.
      length: T, of all sources.
      batch: B.
    """

    def __init__(self, settings: dict[str, dict], length: int, batch: int):
        task = {"name": "reverse", "min_length": length, "max_length": length}
        training = {"batch_size": batch, "steps_per_dispatch": 1}
        config = configured({**settings, "task": task, "training": training})
        mesh = meshes.data_mesh(batch)
        programs = build_dispatch(config, Generated(config.task), mesh)
        dispatch = jax.jit(lambda state, until, stored: programs(state, until, stored))
        state = jax.jit(lambda: initial_state(config, config.task.vocabulary))()
        self._state, self._until = meshes.replicate((state, np.int32(config.training.steps)), mesh)
        jaxpr = jax.make_jaxpr(dispatch)(self._state, self._until, None).jaxpr
        self.in_series = products_in_series(jaxpr)
        inside, everywhere = multiplications(jaxpr)
        self.share_in_loops = inside / everywhere
        self._run = dispatch.lower(self._state, self._until, None).compile()
        self.seconds()  # the first time is slower

    def seconds(self) -> float:
        """Of one step, from where the last one has led."""
        began = time.perf_counter()
        self._state, _ = jax.block_until_ready(self._run(self._state, self._until, None))
        return time.perf_counter() - began


def products_in_series(jaxpr: core.Jaxpr) -> int:
    """The longest chain of matrix products of which each needs the one before: what no machine can do side by side.

    A loop counts its body's chain as often as it turns, as if each turn needed the one before.

    Raises:
      ValueError: a loop with products of which the program does not say how often it turns.
    """
    depth = {}

    def of(variable) -> int:
        return depth.get(variable, 0) if isinstance(variable, core.Var) else 0

    for equation in jaxpr.eqns:
        inner = max(map(products_in_series, _inside(equation)), default=0)
        if inner and equation.primitive.name == "while":
            raise ValueError("a loop with matrix products and an unknown number of turns")
        own = inner * _turns(equation) + (equation.primitive.name == "dot_general")
        before = max(map(of, equation.invars), default=0)
        depth.update((variable, before + own) for variable in equation.outvars)
    return max(map(of, jaxpr.outvars), default=0)


def multiplications(jaxpr: core.Jaxpr) -> tuple[int, int]:
    """How many multiplications its matrix products take: those inside loops, and all."""
    inside = everywhere = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), _), (left, _) = equation.params["dimension_numbers"], equation.invars
            terms = math.prod(left.aval.shape[axis] for axis in contracted)
            everywhere += terms * equation.outvars[0].aval.size
        loop = _turns(equation) > 1
        for inner in _inside(equation):
            looped, total = multiplications(inner)
            inside += _turns(equation) * (total if loop else looped)
            everywhere += _turns(equation) * total
    return inside, everywhere


def _turns(equation: core.JaxprEqn) -> int:
    return equation.params["length"] if equation.primitive.name == "scan" else 1


def _inside(equation: core.JaxprEqn) -> list[core.Jaxpr]:
    """The programs that an operation runs: a loop's body, the branches of a choice."""
    is_program = lambda value: isinstance(value, (core.Jaxpr, core.ClosedJaxpr))  # noqa: E731
    values = jax.tree.leaves(list(equation.params.values()), is_leaf=is_program)
    return [getattr(value, "jaxpr", value) for value in values if is_program(value)]


def check(numbers: Numbers) -> list[Check]:
    """The LSTM's chain grows with the length, the Transformer's does not; and what that is worth on this machine."""
    first, last = numbers["rows"][0], numbers["rows"][-1]

    def grown(name: str) -> float:
        """How many times as long the chain is at the greatest length, over how many times as long the sequence is."""
        return last["in_series"][name] / first["in_series"][name] / (last["length"] / first["length"])

    counts = numbers["parameters"].values()
    seconds = last["seconds"]
    return [
        Check("parameters: fewer over more", min(counts) / max(counts), least=0.95, premise=True),
        Check("products in series: growth over the growth of T, LSTM", grown("LSTM"), least=0.8),
        Check("products in series: growth over the growth of T, Transformer", grown("Transformer"), most=0.2),
        Check("multiplications of the LSTM that stand inside its loops, share",
              last["share_in_loops"]["LSTM"], least=0.3),
        Check(f"time of a training step at T = {last['length']}, LSTM over Transformer, on this machine",
              seconds["LSTM"] / seconds["Transformer"], least=1.5),
    ]  # fmt: skip


def draw(numbers: Numbers) -> Figure:
    """Time and products in series against the length."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = [row["length"] for row in numbers["rows"]]
    for name, color in (("LSTM", "tab:red"), ("Transformer", "tab:blue")):
        left.plot(lengths, [row["seconds"][name] * 1e3 for row in numbers["rows"]], ".-", color=color, label=name)
        right.plot(lengths, [row["in_series"][name] for row in numbers["rows"]], ".-", color=color, label=name)
    left.set(xscale="log", yscale="log", xlabel="length T", ylabel="ms", title="a training step of as many tokens")
    right.set(xscale="log", yscale="log", xlabel="length T", title="matrix products in series")
    for ax in (left, right):
        ax.set_xticks(lengths, lengths)
        ax.minorticks_off()
    left.legend(fontsize=8)
    return figure


def tables(numbers: Numbers) -> list[Table]:
    """All that was timed and counted."""
    rows = [
        [
            row["length"], row["batch"], *(row["seconds"][name] * 1e3 for name in ("LSTM", "Transformer")),
            *(row["in_series"][name] for name in ("LSTM", "Transformer")),
            *(row["share_in_loops"][name] for name in ("LSTM", "Transformer")),
        ]
        for row in numbers["rows"]
    ]  # fmt: skip
    header = [
        "T",
        "batch",
        "LSTM, ms",
        "Transformer, ms",
        "in series, LSTM",
        "Transformer",
        "in loops, LSTM",
        "Transformer",
    ]
    return [Table("A step: median time, matrix products in series, share of multiplications in loops", header, rows)]


CLAIM = Claim(
    title="Parallel",
    sentence="A recurrent network must take its steps one after another; attention computes all positions at once, in "
    "a number of steps that does not depend on the length.",
    source="Vaswani et al. 2017, section 4 and table 1",
    link="https://arxiv.org/abs/1706.03762",
    equation=r"\mathrm{sequential\ operations}:\quad O(T)\ \mathrm{recurrent},\quad O(1)\ \mathrm{attention}",
    method=[
        "A training step of an LSTM and of a Transformer with as many parameters, on batches of as many tokens, "
        "against the length T of source and target; in turns, the median of some rounds, on the machine at hand.",
        "How much is sequential: the longest chain of matrix products in the step's program of which each needs the "
        "one before, and the share of all multiplications that stand inside loops of more than one turn. Attention's "
        "own products grow with T squared, so that on a machine with few cores long sequences may cost it more than it "
        "saves. All lengths are below 600: from there on attn's attention goes block by block, in a loop, which saves "
        "memory and is a choice, not a need.",
    ],
    full=Sizes((16, 32, 64, 128, 256, 512), 2_048, 9),
    quick=Sizes((16, 64, 256), 1_024, 5),
    measure=measure,
    check=check,
    draw=draw,
    tables=tables,
)  # fmt: skip
