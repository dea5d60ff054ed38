"""Claim: a recurrent network takes one step after another; attention takes all of them at once."""

import json
import math
import pathlib
import time

import jax
import numpy as np
from jax.extend import core
from matplotlib.figure import Figure

from attn.studies.jobs import Settings, Trainer, configured
from attn.studies.probes import count_parameters, match_width
from attn.studies.report import BLUE, VERMILION, Table, panels, tick_lengths
from attn.studies.walkthrough.claims import Check, Claim, Numbers, Sizes
from attn.tasks.generated import Generated
from attn.training import meshes
from attn.training.config import Config, to_mapping
from attn.training.state import initial_state
from attn.training.steps import build_step_programs

COUNTS = pathlib.Path(__file__).with_name("parallel_counts.json")  # benchmarks/cycles.py writes it
DEVICES = {"v5e-1": "TPU v5e", "h100-1": "H100"}  # that steps were compiled for, as benchmarks/devices.py names them
TOKENS = 2_048  # per batch, of the counts that decide and of the times
_MODELS = ("LSTM", "Transformer")


def models() -> dict[str, Settings]:
    """Return the settings of both models, which have about as many parameters.

    The Transformer's attention is the equation as it stands, all pairs at once: that is what the claim is about.
    """
    transformer = {"model": {"name": "transformer", "implementation": "reference"}}
    return {
        "Transformer": transformer,
        "LSTM": match_width({"model": {"name": "lstm"}}, count_parameters(transformer)),
    }


def described(settings: Settings) -> dict:
    """Return the number of parameters of a model, and all of its settings, as in JSON."""
    model = to_mapping(configured(settings))["model"]
    return json.loads(json.dumps({"parameters": count_parameters(settings), **model}))


def step_config(settings: Settings, length: int, batch: int) -> Config:
    """Return the config of one training step on strings of one length."""
    task = {"name": "reverse", "min_length": length, "max_length": length}
    return configured({**settings, "task": task, "training": {"batch_size": batch, "steps_per_call": 1}})


def measure(sizes: Sizes, trainer: Trainer) -> Numbers:
    """Time a training step of each model at each length, in turns, and count its matrix products in series.

    The estimates of the compilers are copied from the package.
    """
    settings = models()
    numbers = {
        "parameters": {name: count_parameters(each) for name, each in settings.items()},
        "models": {name: described(each) for name, each in settings.items()},
        "backend": jax.default_backend(),
        "counts": json.loads(COUNTS.read_text()),
        "rows": [],
    }
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
        config = step_config(settings, length, batch)
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


def counted(numbers: Numbers, device: str, model: str, length: int, tokens: int = TOKENS) -> dict:
    """Return what the compiler for a device said of a model's training step.

    `operations` run one after another, `cycles` are its estimate, `inside` the cycles without those that it adds for
    starting each operation, and `without` the number of operations that it gives no estimate for.
    """
    wanted = {"device": device, "model": model, "length": length, "tokens": tokens}
    return next(row for row in numbers["counts"]["rows"] if wanted.items() <= row.items())


def check(numbers: Numbers) -> list[Check]:
    """Check that the LSTM's chains grow with the length and that the Transformer's do not, and the cycles.

    Times are a check only on an accelerator: two cores do not compute many positions at once.
    """
    first, last = numbers["rows"][0], numbers["rows"][-1]

    def growth(name: str) -> float:
        """Return the growth of the chain from the first length to the last, over that of the length itself."""
        return last["in_series"][name] / first["in_series"][name] / (last["length"] / first["length"])

    parameters, seconds, recorded = numbers["parameters"].values(), last["seconds"], numbers["counts"]["models"]
    same = [recorded.get(name) == model for name, model in numbers["models"].items()]
    checks = [
        Check("parameters: fewer over more", min(parameters) / max(parameters), least=0.95, premise=True),
        Check("models of the counts that are those measured here, share", sum(same) / len(same), least=1, premise=True),
        Check("products in series: growth over the growth of T, LSTM", growth("LSTM"), least=0.8),
        Check("products in series: growth over the growth of T, Transformer", growth("Transformer"), most=0.2),
        Check("multiplications of the LSTM that stand inside its loops, share",
              last["share_in_loops"]["LSTM"], least=0.3),
    ]  # fmt: skip
    for device, words in DEVICES.items():
        checks += _checks_of_counts(numbers, device, words)
    if numbers["backend"] != "cpu":
        checks.append(
            Check(f"time of a training step at T = {last['length']}, LSTM over Transformer, on this machine",
                  seconds["LSTM"] / seconds["Transformer"], least=1.5)
        )  # fmt: skip
    return checks


def _checks_of_counts(numbers: Numbers, device: str, words: str) -> list[Check]:
    """Return the checks of what the compiler for a device said."""
    (shortest, *_, longest), middle = _counted_lengths(numbers), 512

    def growth(name: str) -> float:
        """Return the growth of the number of operations over that of the length."""
        few, many = (counted(numbers, device, name, length)["operations"] for length in (shortest, longest))
        return many / few / (longest / shortest)

    inside = {name: counted(numbers, device, name, middle)["inside"] for name in _MODELS}
    return [
        Check(f"{words}: operations one after another, T = {shortest} to {longest}: growth over that of T, LSTM",
              growth("LSTM"), least=0.8),
        Check(f"{words}: operations one after another: growth over that of T, Transformer",
              growth("Transformer"), most=0.2),
        Check(f"{words}: estimated cycles inside of a step's operations at T = {middle}, LSTM over Transformer",
              inside["LSTM"] / inside["Transformer"], least=1.5),
    ]  # fmt: skip


def draw(numbers: Numbers) -> Figure:
    """Products and operations in series, the cycles that compilers estimate for two devices, and the time of a step."""
    figure, axes = panels(2, 9, 6, rows=2)
    here, there = _lengths(numbers["rows"]), _counted_lengths(numbers)
    for name, color in zip(_MODELS, (VERMILION, BLUE)):
        for ax, values in (
            (axes[0], [row["in_series"][name] for row in numbers["rows"]]),
            (axes[3], [row["seconds"][name] * 1e3 for row in numbers["rows"]]),
        ):
            ax.plot(here, values, ".-", color=color, label=name)
        for (device, words), style in zip(DEVICES.items(), ("-", "--")):
            rows = [counted(numbers, device, name, length) for length in there]
            for ax, values in (
                (axes[1], [row["operations"] for row in rows]),
                (axes[2], [row["inside"] / 1e6 for row in rows]),
            ):
                ax.plot(there, values, style, marker=".", color=color, label=f"{name}, {words}")
    titles = ["products that need the one before", "compiled: a count", "compiled: a count of estimates", "timed here"]
    units = ["matrix products in series", "operations in series", "estimated cycles, millions", "time of a step, ms"]
    for ax, lengths, title, unit in zip(axes, (here, there, there, here), titles, units):
        ax.set(yscale="log", xlabel="length T, symbols", ylabel=unit, title=title)
        tick_lengths(ax, lengths)
        ax.legend()
    return figure


def _lengths(rows: list[dict]) -> list[int]:
    """Return the lengths of some rows, each once, in ascending order."""
    return sorted({row["length"] for row in rows})


def _counted_lengths(numbers: Numbers) -> list[int]:
    """Return the lengths at which the counts that decide were taken."""
    return _lengths([row for row in numbers["counts"]["rows"] if row["tokens"] == TOKENS])


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
    here = Table("A step: median time, matrix products in series, share of multiplications in loops", header, rows)
    return [here, *(_table_of_counts(numbers, device, words) for device, words in DEVICES.items())]


def _table_of_counts(numbers: Numbers, device: str, words: str) -> Table:
    """Return the counts of all models on a device."""
    names = ["length", "batch", "model", "operations", "inside", "cycles"]
    rows = [[row[name] for name in names] for row in numbers["counts"]["rows"] if row["device"] == device]
    versions = ", ".join(f"{name} {version}" for name, version in numbers["counts"]["versions"].items())
    caption = f"A step compiled for a {words}, counted and not timed ({versions})"
    return Table(caption, ["T", *names[1:3], "operations one after another", "cycles inside of them", "estimate"], rows)


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
        "against the length T of source and target. How much is sequential: the longest chain of matrix products in "
        "the step's program of which each needs the one before, and the share of all multiplications that stand inside "
        "loops of more than one turn. The claim is about these, and not about the amount of work: attention's products "
        "grow with T squared. Attention is the equation as it stands: where T is long, attn goes block by block, in a "
        "loop, which saves memory and is a choice, not a need.",
        "What it means on devices that do much at once: the same steps compiled for a TPU v5e and an H100, which need "
        "not be there (benchmarks/cycles.py). Counted are the operations that run one after another, on a GPU its "
        "kernels, and the cycles that the compiler estimates for them, loops as often as they turn. Where the compiler "
        "adds cycles for starting each operation, they are taken off, as if that were free: so the number of "
        "operations does not decide about the cycles. These are counts of compiled programs, not times: no memory "
        "waits, stalls or launches of kernels are in them. And they are of batches that do not fill the device; with "
        "eight times as many tokens, which are counted too, the amount of work decides, and the LSTM has less of it.",
        "Seconds on this machine, in turns, the median of some rounds. Two cores cannot decide the claim, because they "
        "do not compute many positions at once; so the seconds are a check only where there is an accelerator.",
    ],
    full=Sizes(lengths=(16, 32, 64, 128, 256, 512), tokens=TOKENS, rounds=9),
    quick=Sizes(lengths=(16, 64, 256), tokens=1_024, rounds=5),
)  # fmt: skip
