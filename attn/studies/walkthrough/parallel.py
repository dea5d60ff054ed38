"""Claim: a recurrent network takes one step after another; attention takes all of them at once."""

import math
import time

import jax
import numpy as np
from jax.extend import core
from matplotlib.figure import Figure

from attn.studies.jobs import Settings, Trainer, configured
from attn.studies.probes import count_parameters, match_width
from attn.studies.report import Table, panels, tick_lengths
from attn.studies.walkthrough.claims import Check, Claim, Numbers, Sizes
from attn.tasks.generated import Generated
from attn.training import meshes
from attn.training.state import initial_state
from attn.training.steps import build_step_programs

_MODELS = ("LSTM", "Transformer")


def measure(sizes: Sizes, trainer: Trainer) -> Numbers:
    """Time a training step of each model at each length, in turns, and count its matrix products in series."""
    transformer = {"model": {"name": "transformer"}}
    settings = {
        "Transformer": transformer,
        "LSTM": match_width({"model": {"name": "lstm"}}, count_parameters(transformer)),
    }
    numbers = {"parameters": {name: count_parameters(each) for name, each in settings.items()}, "rows": []}
    for length in sizes.lengths:
        trainer.say(f"timing length {length:,}")
        batch = max(1, sizes.tokens // length)
        steps = {name: Step(each, length, batch) for name, each in settings.items()}
        # In turns, so that other load of the machine affects both models.
        times = [{name: step.seconds() for name, step in steps.items()} for _ in range(sizes.rounds)]
        numbers["rows"].append(
            {
                "length": length,
                "batch": batch,
                "seconds": {name: float(np.median([each[name] for each in times])) for name in steps},
                "in_series": {name: step.in_series for name, step in steps.items()},
                "share_in_loops": {name: step.share_in_loops for name, step in steps.items()},
            }
        )
    return numbers


class Step:
    """A compiled training step, as `train.py` takes it: from drawing examples to the new parameters.

    Args:
      settings: of the model.
      length: T, of all sources.
      batch: B.
    """

    def __init__(self, settings: Settings, length: int, batch: int):
        task = {"name": "reverse", "min_length": length, "max_length": length}
        training = {"batch_size": batch, "steps_per_call": 1}
        config = configured({**settings, "task": task, "training": training})
        mesh = meshes.data_mesh(batch)
        programs = build_step_programs(config, Generated(config.task), mesh)
        # A lambda, since jit needs a weak reference, which tuples do not have.
        steps = jax.jit(lambda *arguments: programs(*arguments))
        state = jax.jit(lambda: initial_state(config, config.task.vocabulary))()
        self._state, self._until = meshes.replicate((state, np.int32(config.training.steps)), mesh)
        jaxpr = jax.make_jaxpr(steps)(self._state, self._until, None).jaxpr
        self.in_series = products_in_series(jaxpr)
        inside, everywhere = multiplications(jaxpr)
        self.share_in_loops = inside / everywhere
        self._run = steps.lower(self._state, self._until, None).compile()
        self.seconds()  # the first call is slower

    def seconds(self) -> float:
        """Take one more step and return its time."""
        start = time.perf_counter()
        self._state, _ = jax.block_until_ready(self._run(self._state, self._until, None))
        return time.perf_counter() - start


def products_in_series(jaxpr: core.Jaxpr) -> int:
    """Return the length of the longest chain of matrix products of which each needs the previous one.

    A loop counts the chain of its body once per iteration, as if each iteration needed the previous one.

    Raises:
      ValueError: a loop with matrix products has an unknown number of iterations.
    """
    depth = {}

    def depth_of(variable) -> int:
        return depth.get(variable, 0) if isinstance(variable, core.Var) else 0

    for equation in jaxpr.eqns:
        inner = max(map(products_in_series, _inside(equation)), default=0)
        if inner and equation.primitive.name == "while":
            raise ValueError("a loop with matrix products and an unknown number of iterations")
        products = inner * _iterations(equation) + (equation.primitive.name == "dot_general")
        before = max(map(depth_of, equation.invars), default=0)
        depth.update((variable, before + products) for variable in equation.outvars)
    return max(map(depth_of, jaxpr.outvars), default=0)


def multiplications(jaxpr: core.Jaxpr) -> tuple[int, int]:
    """Return the number of multiplications of matrix products: those inside loops, and all."""
    inside = everywhere = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), _), (left, _) = equation.params["dimension_numbers"], equation.invars
            terms = math.prod(left.aval.shape[axis] for axis in contracted)
            everywhere += terms * equation.outvars[0].aval.size
        for inner in _inside(equation):
            looped, total = multiplications(inner)
            inside += _iterations(equation) * (total if _iterations(equation) > 1 else looped)
            everywhere += _iterations(equation) * total
    return inside, everywhere


def _iterations(equation: core.JaxprEqn) -> int:
    return equation.params["length"] if equation.primitive.name == "scan" else 1


def _inside(equation: core.JaxprEqn) -> list[core.Jaxpr]:
    """Return the inner programs of an operation, such as the body of a loop or the branches of a `cond`."""
    is_program = lambda value: isinstance(value, (core.Jaxpr, core.ClosedJaxpr))  # noqa: E731
    values = jax.tree.leaves(list(equation.params.values()), is_leaf=is_program)
    return [getattr(value, "jaxpr", value) for value in values if is_program(value)]


def check(numbers: Numbers) -> list[Check]:
    """Check that the LSTM's chain grows with the length, that the Transformer's does not, and the times here."""
    first, last = numbers["rows"][0], numbers["rows"][-1]

    def growth(name: str) -> float:
        """Return the growth of the chain from the first length to the last, over that of the length itself."""
        return last["in_series"][name] / first["in_series"][name] / (last["length"] / first["length"])

    counts, seconds = numbers["parameters"].values(), last["seconds"]
    return [
        Check("parameters: fewer over more", min(counts) / max(counts), least=0.95, premise=True),
        Check("products in series: growth over the growth of T, LSTM", growth("LSTM"), least=0.8),
        Check("products in series: growth over the growth of T, Transformer", growth("Transformer"), most=0.2),
        Check("multiplications of the LSTM that stand inside its loops, share",
              last["share_in_loops"]["LSTM"], least=0.3),
        Check(f"time of a training step at T = {last['length']}, LSTM over Transformer, on this machine",
              seconds["LSTM"] / seconds["Transformer"], least=1.5),
    ]  # fmt: skip


def draw(numbers: Numbers) -> Figure:
    """Time and products in series against the length."""
    figure, axes = panels(2, 8, 3.2)
    lengths = [row["length"] for row in numbers["rows"]]
    for name, color in zip(_MODELS, ("tab:red", "tab:blue")):
        milliseconds = [row["seconds"][name] * 1e3 for row in numbers["rows"]]
        for ax, values in zip(axes, (milliseconds, [row["in_series"][name] for row in numbers["rows"]])):
            ax.plot(lengths, values, ".-", color=color, label=name)
    axes[0].set(yscale="log", xlabel="length T", ylabel="ms", title="a training step of as many tokens")
    axes[1].set(yscale="log", xlabel="length T", title="matrix products in series")
    for ax in axes:
        tick_lengths(ax, lengths)
    axes[0].legend(fontsize=8)
    return figure


def tables(numbers: Numbers) -> list[Table]:
    """Return all times and counts."""
    rows = [
        [
            row["length"], row["batch"], *(row["seconds"][name] * 1e3 for name in _MODELS),
            *(row[what][name] for what in ("in_series", "share_in_loops") for name in _MODELS),
        ]
        for row in numbers["rows"]
    ]  # fmt: skip
    header = ["T", "batch", "LSTM, ms", "Transformer, ms", "in series, LSTM", "Transformer", "in loops, LSTM"]
    header += ["Transformer"]
    return [Table("A step: median time, matrix products in series, share of multiplications in loops", header, rows)]


CLAIM = Claim(
    measure, check, draw, tables,
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
    full=Sizes(lengths=(16, 32, 64, 128, 256, 512), tokens=2_048, rounds=9),
    quick=Sizes(lengths=(16, 64, 256), tokens=1_024, rounds=5),
)  # fmt: skip
