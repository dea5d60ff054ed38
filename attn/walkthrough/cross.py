"""Claim: cross-attention learns the alignment of a task: the diagonal to copy, the anti-diagonal to reverse."""

import dataclasses

import numpy as np
from matplotlib.figure import Figure

from attn.runs import Run
from attn.walkthrough.bench import Bench, cross_weights, untrained
from attn.walkthrough.claims import Check, Claim, Numbers, Table

_STRINGS = 50


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Layers of each stack; strings of up to `max_length` to train on, of `length` to look at; steps; seeds."""

    layers: int
    max_length: int
    length: int
    steps: int
    seeds: tuple[int, ...]


def measure(sizes: Sizes, bench: Bench) -> Numbers:
    """The mass on the true source, by layer and head, at ten points of each training, and before it."""
    numbers = {"length": sizes.length, "runs": []}
    for task in ("copy", "reverse"):
        for seed in sizes.seeds:
            settings = {
                "task": {"name": task, "max_length": sizes.max_length},
                "model": {"num_encoder_layers": sizes.layers, "num_decoder_layers": sizes.layers},
                "training": {"steps": sizes.steps, "seed": seed},
            }
            run = bench.trained(settings, watch=lambda run: look(run, sizes.length)["mass"])
            first = {"step": 0, "seen": look(untrained(settings), sizes.length)["mass"]}
            numbers["runs"].append(
                {
                    "task": task,
                    "seed": seed,
                    "mass": [[row["step"], row["seen"]] for row in [first, *bench.watched(run)]],
                    "map": look(run, sizes.length)["map"],
                }
            )
    return numbers


def look(run: Run, length: int) -> dict:
    """The mass of cross-attention on the true source by layer and head, `[L N]`, and the mean map `[n n]`."""
    weights = cross_weights(run, length, _STRINGS)[0].mean(0)
    weights, t = weights[..., :length, :length], np.arange(length)
    true = run.config.task.kind.index(t, length)
    return {"mass": weights[:, :, t, true].mean(-1).tolist(), "map": weights.mean((0, 1)).tolist()}


def check(numbers: Numbers) -> list[Check]:
    """Much mass on the true source at the end, chance before the start."""
    chance = 1 / (numbers["length"] + 1)

    def best(task: str) -> list[float]:
        """Of the heads at the end of each run."""
        return [np.max(run["mass"][-1][1]) for run in numbers["runs"] if run["task"] == task]

    before = max(np.max(run["mass"][0][1]) for run in numbers["runs"])
    return [
        Check("mass on the diagonal, copying, best head, worst seed", min(best("copy")), least=0.5),
        Check("mass on the anti-diagonal, reversing, best head, worst seed", min(best("reverse")), least=0.5),
        Check("before training, best head of all, over chance 1/S", before / chance, most=2.0),
    ]


def draw(numbers: Numbers) -> Figure:
    """The mass through training, and the mean map at its end, of the first run of each task."""
    figure = Figure(figsize=(10.5, 2.8), layout="constrained")
    axes = figure.subplots(1, 4)
    for ax, map_ax, task in ((axes[0], axes[1], "copy"), (axes[2], axes[3], "reverse")):
        of_task = [run for run in numbers["runs"] if run["task"] == task]
        for run in of_task:
            steps, masses = zip(*run["mass"])
            for layer, by_head in enumerate(np.moveaxis(np.array(masses), 0, -1)):
                for values in by_head:
                    ax.plot(steps, values, color=f"C{layer}", linewidth=1, alpha=0.7)
        ax.axhline(1 / (numbers["length"] + 1), color="0.5", linestyle=":", linewidth=0.8)
        ax.set(xlabel="step", ylim=(0, 1), title=f"{task}: mass on the true source\n(a line a head, a color a layer)")
        map_ax.imshow(of_task[0]["map"], cmap="Blues", vmin=0)
        map_ax.set(xlabel="source", ylabel="written", title=f"{task}: mean of all heads")
    for ax in axes:
        ax.title.set_fontsize(9)
    return figure


def tables(numbers: Numbers) -> list[Table]:
    """The mass on the true source at the end of each run, by layer and head."""
    rows = [
        [run["task"], run["seed"], layer, head, mass]
        for run in numbers["runs"]
        for layer, by_head in enumerate(run["mass"][-1][1], start=1)
        for head, mass in enumerate(by_head, start=1)
    ]
    return [Table("Mass on the true source after training", ["task", "seed", "layer", "head", "mass"], rows)]


CLAIM = Claim(
    title="Self and cross",
    sentence="Between encoder and decoder, cross-attention finds where each output comes from: the diagonal for "
    "copying, the anti-diagonal for reversing.",
    source="Vaswani et al. 2017, section 3.2.3; the alignment: Bahdanau et al. 2015, section 5.2.1",
    link="https://arxiv.org/abs/1706.03762",
    equation=r"\mathrm{mass}^{(l,n)}=\frac{1}{T}\sum_t p^{(l,n)}_{t,\,j^*(t)},\quad "
    r"j^*(t)=t\ \mathrm{or}\ T-1-t",
    method=[
        "A Transformer learns to copy, another one to reverse. Before training and ten times on the way, held-out "
        "strings of one length are read with the right tokens, and the weights that each layer's and head's "
        "cross-attention gives to the true source symbol are averaged over symbols and strings.",
    ],
    full=Sizes(2, 32, 16, 2_000, (0, 1, 2)),
    quick=Sizes(1, 12, 10, 800, (0,)),
    measure=measure,
    check=check,
    draw=draw,
    tables=tables,
)
