"""Claim: cross-attention learns the alignment of a task: the diagonal to copy, the anti-diagonal to reverse."""

import numpy as np
from matplotlib.figure import Figure

from attn.runs import Run
from attn.studies.jobs import Trainer, settings_of
from attn.studies.probes import cross_weights, held_out, teacher_forced, untrained
from attn.studies.report import BLUE, GRAY, GREEN, Table, panels
from attn.studies.walkthrough.claims import Check, Claim, Numbers, Sizes

_STRINGS = 50
_COLORS = (GREEN, BLUE)  # of odd and even layers


def measure(sizes: Sizes, trainer: Trainer) -> Numbers:
    """Measure the weight on the true source, by layer and head, before and at ten points of each training."""
    runs = [_measure_run(sizes, trainer, task, seed) for task in ("copy", "reverse") for seed in sizes.seeds]
    return {"length": sizes.length, "runs": runs}


def _measure_run(sizes: Sizes, trainer: Trainer, task: str, seed: int) -> dict:
    layers = {"num_encoder_layers": sizes.layers, "num_decoder_layers": sizes.layers}
    settings = settings_of(task, sizes.max_length, sizes.steps, seed, **layers)
    run = trainer.train(settings, watch=lambda run: alignment(run, sizes.length)["mass"])
    masses = [[0, alignment(untrained(settings), sizes.length)["mass"]]]
    masses += [[row["step"], row["seen"]] for row in trainer.watched(run)]
    return {"task": task, "seed": seed, "mass": masses, "map": alignment(run, sizes.length)["map"]}


def alignment(run: Run, length: int) -> dict:
    """Return the weight of cross-attention on the true source by layer and head, `[L N]`, and the mean map `[n n]`."""
    questions = held_out(run, length, _STRINGS)
    weights = teacher_forced(cross_weights, run, questions).mean(0)
    weights, t = weights[..., :length, :length], np.arange(length)  # without the end tokens: [L N n n]
    true = run.config.task.true_sources(questions.sources[0, :length])  # the same for every string
    return {"mass": weights[:, :, t, true].mean(-1).tolist(), "map": weights.mean((0, 1)).tolist()}


def check(numbers: Numbers) -> list[Check]:
    """Check that much weight is on the true source after training, and only chance before it."""
    chance = 1 / (numbers["length"] + 1)  # the end token can be attended to as well
    best = {
        task: [np.max(run["mass"][-1][1]) for run in numbers["runs"] if run["task"] == task]
        for task in ("copy", "reverse")
    }
    before = max(np.max(run["mass"][0][1]) for run in numbers["runs"])
    return [
        Check("mass on the diagonal, copying, best head, worst seed", min(best["copy"]), least=0.5),
        Check("mass on the anti-diagonal, reversing, best head, worst seed", min(best["reverse"]), least=0.5),
        Check("before training, best head of all, over chance 1/S", before / chance, most=2.0),
    ]


def draw(numbers: Numbers) -> Figure:
    """The mass of each head on the true source, through training; and the mean map at the end, of the first seed."""
    figure, axes = panels(4, 10, 2.7)
    for ax, map_ax, task in ((axes[0], axes[1], "copy"), (axes[2], axes[3], "reverse")):
        of_task = [run for run in numbers["runs"] if run["task"] == task]
        for number, run in enumerate(of_task):
            steps, masses = zip(*run["mass"])
            for layer, by_head in enumerate(np.moveaxis(np.array(masses), 0, -1)):  # [L N step]
                labels = [f"layer {layer + 1}, one line per head"] + [None] * (len(by_head) - 1)
                style = {"color": _COLORS[layer % 2], "linestyle": ("--", "-")[layer % 2], "alpha": 0.75}
                ax.plot(steps, by_head.T, linewidth=1.2, label=None if number else labels, **style)
        ax.axhline(1 / (numbers["length"] + 1), color=GRAY, linestyle=":", linewidth=1, label="chance")
        ax.set(xlabel="step", ylabel="mass", ylim=(0, 1.4), yticks=(0, 0.5, 1), title=f"{task}: on the true source")
        ax.legend(loc="upper left", fontsize=7, handlelength=1.6, labelspacing=0.2)
        map_ax.imshow(of_task[0]["map"], cmap="Blues", vmin=0)
        map_ax.set(xlabel="source", ylabel="answer", title=f"{task}: mean map")
    return figure


def tables(numbers: Numbers) -> list[Table]:
    """Return the mass on the true source at the end of each run, by layer and head."""
    rows = [
        [run["task"], run["seed"], layer, *by_head]
        for run in numbers["runs"]
        for layer, by_head in enumerate(run["mass"][-1][1], start=1)
    ]
    heads = [f"head {n}" for n in range(1, len(rows[0]) - 2)]
    return [Table("Mass on the true source after training", ["task", "seed", "layer", *heads], rows)]


CLAIM = Claim(
    measure, check, draw, tables,
    title="Self and cross",
    sentence="Between encoder and decoder, cross-attention finds where each output comes from: the diagonal for "
    "copying, the anti-diagonal for reversing.",
    source="Vaswani et al. 2017, section 3.2.3; the alignment: Bahdanau et al. 2015, section 5.2.1",
    link="https://arxiv.org/abs/1706.03762",
    equation=r"\mathrm{mass}^{(l,n)}=\frac{1}{T}\sum_t p^{(l,n)}_{t,\,j^*(t)},\quad "
    r"j^*(t)=t\ \mathrm{or}\ T-1-t",
    method=[
        "One Transformer learns to copy, another one to reverse. Before training and at ten checkpoints, they read "
        "held-out strings of one length, with the correct tokens as decoder input. The mass of a head is the weight "
        "that its cross-attention gives to the true source symbol, the mean over symbols and strings.",
    ],
    full=Sizes(layers=2, max_length=32, length=16, steps=2_000, seeds=(0, 1, 2)),
    quick=Sizes(layers=1, max_length=12, length=10, steps=800, seeds=(0,)),
)  # fmt: skip
