"""Claim: the answer is made from the source symbol that cross-attention points at, so that weights can be read.

Beside the raw weights, the same is measured of two maps that are computed from them, and why the raw ones may fail.
"""

import numpy as np
from matplotlib.figure import Figure

from attn.runs import Run
from attn.studies.jobs import Settings, Trainer, settings_of
from attn.studies.probes import answers_after_another, answers_without, held_out, source_maps, teacher_forced
from attn.studies.report import BLUE, GREEN, VERMILION, Table, panels
from attn.studies.walkthrough.claims import Check, Claim, Numbers, Sizes

_MAPS = {"argmax": "mean head", "rollout": "rollout", "gradients": "gradient-\nweighted"}  # names of them in the figure
_NEAR = 3  # greatest distance in the figure


def measure(sizes: Sizes, trainer: Trainer) -> Numbers:
    """Measure for both tasks the symbol that each map names, and the effect of hiding it."""
    kinds = [("reverse", 0.0), ("copy", 0.0), ("reverse", sizes.replaced_tokens)]
    runs = []
    for task, replaced in kinds:
        for seed in sizes.seeds:
            run = trainer.train(_settings(sizes, task, replaced, seed))
            runs.append(
                {"task": task, "replaced": replaced, "seed": seed, **pointing(run, sizes.length, sizes.strings)}
            )
    return {"length": sizes.length, "symbols": run.config.task.symbols, "runs": runs}


def _settings(sizes: Sizes, task: str, replaced: float, seed: int) -> Settings:
    settings = settings_of(task, sizes.max_length, sizes.steps, seed)
    return {**settings, "training": {**settings["training"], "replaced_tokens": replaced}}


def pointing(run: Run, length: int, strings: int) -> dict:
    """Return the fractions of symbols whose maps point at the true source, and whose answers change."""
    n, questions = length, held_out(run, length, strings)
    true_source = run.config.task.true_sources(questions.sources[0, :n])  # the same for every string
    weights, answers, hidden = teacher_forced(answers_without, run, questions)
    weights = weights[:, -1, :, :n]  # the last layer's, over the symbols and the end token: [B N n n+1]
    maps = teacher_forced(source_maps, run, questions)
    pointed = {name: each[:, :n].argmax(-1) for name, each in maps.items()}  # [B n]
    # A source position other than the one pointed at, uniformly at random.
    shift = np.random.default_rng(0).integers(1, n + 1, pointed["argmax"].shape)
    pointed["random"] = (pointed["argmax"] + shift) % (n + 1)
    changed = hidden[:, :, :n] != answers[:, None, :n]  # [B S t]: whether hiding S changes the answer at t
    another = teacher_forced(answers_after_another, run, questions)
    before = pointed["argmax"][:, 1:] == true_source[:-1]  # the source of the symbol that was just answered

    def share_changed(index) -> float:
        return float(np.take_along_axis(changed.swapaxes(1, 2), index[..., None], axis=-1).mean())

    return {
        "right": float((answers == questions.targets).mean()),
        **{f"{name}_is_true_source": float((pointed[name] == true_source).mean()) for name in maps},
        "argmax_by_head": (weights.argmax(-1) == true_source).mean((0, 2)).tolist(),
        "argmax_is_symbol_before": float(before.sum() / pointed["argmax"].size),
        **{f"changed_without_{name}": share_changed(pointed[name]) for name in (*_MAPS, "random")},
        "changed_by_symbol_read": float((another != answers)[:, 1:n].mean()),
        "changed_by_distance": _by_distance(changed.swapaxes(1, 2), true_source),
        "weight_by_distance": _by_distance(weights.mean(1), true_source),
    }


def _by_distance(values, true_source) -> list[list]:
    """Return the mean of values `[B t j]` by the distance d of j from the true source of t: pairs [d, mean]."""
    n = len(true_source)

    def mean(distance: int) -> float:
        steps = [t for t in range(n) if 0 <= true_source[t] + distance < n]
        return float(values[:, steps, true_source[steps] + distance].mean())

    return [[d, mean(d)] for d in range(-n // 2, n // 2 + 1)]


def check(numbers: Numbers) -> list[Check]:
    """Check that maps name the true source, that hiding it alone changes the answer, and why the weights may fail."""
    usual = [run for run in numbers["runs"] if not run["replaced"]]
    replaced = [run for run in numbers["runs"] if run["replaced"]]

    def of_runs(name: str, runs=usual) -> list[float]:
        return [run[name] for run in runs]

    neither = [1 - run["argmax_is_true_source"] - run["argmax_is_symbol_before"] for run in usual]
    reversing = [run for run in usual if run["task"] == "reverse"]
    return [
        Check("symbols for which the argmax of the mean head is the true source, worst run",
              min(of_runs("argmax_is_true_source")), least=0.9),
        Check("answers that change when the symbol it points at is hidden, worst run",
              min(of_runs("changed_without_argmax")), least=0.9),
        Check("answers that change when another one is hidden, at random, worst run",
              max(of_runs("changed_without_random")), most=0.1),
        Check("symbols for which rollout names the true source, worst run",
              min(of_runs("rollout_is_true_source")), least=0.9),
        Check("answers that change when the symbol that rollout names is hidden, worst run",
              min(of_runs("changed_without_rollout")), least=0.9),
        Check("symbols for which the gradient-weighted map names the true source, worst run",
              min(of_runs("gradients_is_true_source")), least=0.9),
        Check("answers that change when the symbol that the gradient-weighted map names is hidden, worst run",
              min(of_runs("changed_without_gradients")), least=0.9),
        Check("symbols for which the argmax is neither the true source nor the symbol answered just before, worst run",
              max(neither), most=0.01),
        Check("reversing: answers that change when another symbol is read in place of the one answered just before, "
              "smallest run", min(of_runs("changed_by_symbol_read", reversing)), least=0.1),
        Check("the same, trained with replaced symbols, which cannot be relied on, largest run",
              max(of_runs("changed_by_symbol_read", replaced)), most=0.01),
        Check("trained so, symbols for which the argmax of the mean head is the true source, worst run",
              min(of_runs("argmax_is_true_source", replaced)), least=0.9),
    ]  # fmt: skip


def draw(numbers: Numbers) -> Figure:
    """Symbols whose true source each map names, answers that change if it is hidden, and the weight by distance."""
    figure, (named, hidden, near) = panels(3, 12.5, 4)
    for number, run in enumerate(numbers["runs"]):
        aside = 0.07 * (number - (len(numbers["runs"]) - 1) / 2)  # so that equal runs can all be seen
        style = {"markersize": 5, **_looks(run)}
        if run["seed"] != numbers["runs"][0]["seed"]:
            style["label"] = None  # one entry in the legend per kind of run
        for ax, values in (
            (named, [run[f"{name}_is_true_source"] for name in _MAPS]),
            (hidden, [run[f"changed_without_{name}"] for name in (*_MAPS, "random")]),
        ):
            ax.plot(np.arange(len(values)) + aside, values, linestyle="", **style)
        near.plot(*zip(*_nearest(run["weight_by_distance"])), linewidth=1, **style)
    effect = np.mean([_nearest(run["changed_by_distance"]) for run in numbers["runs"]], axis=0)
    near.plot(*effect.T, "--", color="0.4", label="answers that change\nif it is hidden, mean")
    limit = 1 - 1 / numbers["symbols"]
    hidden.axhline(limit, color="0.4", linestyle=":", linewidth=1)
    hidden.text(2.65, limit - 0.2, "dotted: true source\nhidden, then a guess", ha="center", fontsize=8)
    for ax, words in ((named, [*_MAPS.values()]), (hidden, [*_MAPS.values(), "a random\nposition"])):
        ax.set_xticks(range(len(words)), words)
        ax.axhline(0.9, color="0.2", linewidth=0.8)
        ax.set(ylim=(-0.03, 1.07), xlim=(-0.5, len(words) - 0.5))
    named.set(title="Is the named symbol the true source?", ylabel="share of symbols (line: threshold)")
    hidden.set(title="Does hiding it change the answer?", ylabel="share of answers that change")
    near.set(title="What lies beside the true source", xlabel="source position − true source", ylim=(-0.03, 1.07))
    near.set_ylabel("weight of the mean head")
    near.legend(fontsize=8, loc="upper left")
    return figure


def _looks(run: dict) -> dict[str, str]:
    """Return color, marker and label of a run."""
    if run["replaced"]:
        return {"color": VERMILION, "marker": "^", "label": "reverse, trained with\nreplaced symbols"}
    color, marker = {"reverse": (BLUE, "o"), "copy": (GREEN, "s")}[run["task"]]
    return {"color": color, "marker": marker, "label": run["task"]}


def _nearest(by_distance: list[list]) -> list[list]:
    return [[distance, value] for distance, value in by_distance if abs(distance) <= _NEAR]


def tables(numbers: Numbers) -> list[Table]:
    """Return how often each way to read the weights names the true source, and what lies beside it, by run."""
    header = ["task", "replaced", "seed", "mean head", "largest of all heads", "best head", "rollout", "gradients",
              "mean head: symbol before", "other symbol read: changes"]  # fmt: skip
    names = ["argmax_is_true_source", "largest_is_true_source", None, "rollout_is_true_source",
             "gradients_is_true_source", "argmax_is_symbol_before", "changed_by_symbol_read"]  # fmt: skip
    rows = []
    for run in numbers["runs"]:
        values = [max(run["argmax_by_head"]) if name is None else run[name] for name in names]
        rows.append([run["task"], run["replaced"], run["seed"], *values])
    return [Table("Symbols for which the largest entry is the true source, and answers that change", header, rows)]


CLAIM = Claim(
    measure, check, draw, tables,
    title="Reading it",
    sentence="The weights can be read: the source symbol that cross-attention points at is the one that the answer is "
    "made from.",
    source="Bahdanau et al. 2015, section 5.2.1; doubted by Jain and Wallace 2019; rollout: Abnar and Zuidema 2020; "
    "gradients: Chefer et al. 2021",
    link="https://arxiv.org/abs/1902.10186",
    equation=r"\hat{\jmath}(t)=\mathrm{argmax}_j\ \frac{1}{N}\sum_n p^{(n)}_{tj}\quad\mathrm{or}\quad"
    r"\mathrm{argmax}_j\ \frac{1}{N}\sum_n \max\left(0,\ p^{(n)}_{tj}\,\partial y_t/\partial p^{(n)}_{tj}\right)",
    method=[
        "Of held-out strings, the cross-attention of the last layer, the mean of its heads: how often its argmax is "
        "the source symbol that the task asks for, among all symbols and the end token. The same of attention rollout, "
        "through the self-attention of encoder and decoder and the cross-attention, and of the weights times the "
        "gradients of the answer's logit y by them, where positive.",
        "Faithfulness: the keys and values of one source position are hidden from all cross-attention of all steps, "
        "and the answer at a step is decoded again; hidden is the position that a map of that step names, or "
        "another one at random. The correct tokens are the decoder's input throughout. A guess is right once in 16, so "
        "that hiding the true source cannot change more than 15/16 of the answers on average.",
        "At each step the decoder also reads the symbol that was answered just before. Whether the answer depends on "
        "it is measured by putting another symbol in its place; other models are trained with a part of these symbols "
        "replaced by random tokens, so that they cannot be relied on.",
    ],
    full=Sizes(max_length=32, steps=2_000, seeds=(0, 1, 2), length=20, strings=200, replaced_tokens=0.2),
    quick=Sizes(max_length=12, steps=800, seeds=(0,), length=10, strings=100, replaced_tokens=0.2),
)  # fmt: skip
