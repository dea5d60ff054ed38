"""Claim: the answer is made from the source symbol that cross-attention points at, so that weights can be read."""

import numpy as np
from matplotlib.figure import Figure

from attn.runs import Run
from attn.studies.jobs import Trainer, settings_of
from attn.studies.probes import answers_without, held_out, teacher_forced
from attn.studies.report import panels
from attn.studies.walkthrough.claims import Check, Claim, Numbers, Sizes


def measure(sizes: Sizes, trainer: Trainer) -> Numbers:
    """Measure for both tasks the symbol that the argmax points at, and the effect of hiding it."""
    runs = []
    for task in ("reverse", "copy"):
        for seed in sizes.seeds:
            run = trainer.train(settings_of(task, sizes.max_length, sizes.steps, seed))
            runs.append({"task": task, "seed": seed, **pointing(run, sizes.length, sizes.strings)})
    return {"length": sizes.length, "runs": runs}


def pointing(run: Run, length: int, strings: int) -> dict:
    """Return the fractions of symbols whose weights point at the true source, and whose answers change."""
    n, questions = length, held_out(run, length, strings)
    true_source = run.config.task.true_sources(questions.sources[0, :n])  # the same for every string
    weights, answers, hidden = teacher_forced(answers_without, run, questions)
    weights = weights[:, -1, :, :n]  # the last layer's, over the symbols and the end token: [B N n n+1]
    pointed = weights.mean(1).argmax(-1)  # [B n]
    # A source position other than the one pointed at, uniformly at random.
    elsewhere = (pointed + np.random.default_rng(0).integers(1, n + 1, pointed.shape)) % (n + 1)
    changed = hidden[:, :, :n] != answers[:, None, :n]  # [B S t]: whether hiding S changes the answer at t

    def share_changed(index) -> float:
        return float(np.take_along_axis(changed.swapaxes(1, 2), index[..., None], axis=-1).mean())

    return {
        "right": float((answers == questions.targets).mean()),
        "argmax_is_true_source": float((pointed == true_source).mean()),
        "argmax_by_head": (weights.argmax(-1) == true_source).mean((0, 2)).tolist(),
        "changed_without_argmax": share_changed(pointed),
        "changed_without_random": share_changed(elsewhere),
        "changed_by_distance": [[d, _at_distance(changed, true_source, d)] for d in range(-n // 2, n // 2 + 1)],
    }


def _at_distance(changed, true_source, distance: int) -> float:
    """Return how often an answer changes when the symbol at a distance from its true source is hidden."""
    n = len(true_source)
    steps = [t for t in range(n) if 0 <= true_source[t] + distance < n]
    return float(changed[:, true_source[steps] + distance, steps].mean())


def check(numbers: Numbers) -> list[Check]:
    """Check that weights point at the true source, and that hiding it changes the answer but hiding others does not."""

    def of_runs(name: str) -> list[float]:
        return [run[name] for run in numbers["runs"]]

    return [
        Check("symbols for which the argmax of the mean head is the true source, worst run",
              min(of_runs("argmax_is_true_source")), least=0.9),
        Check("answers that change when the symbol it points at is hidden, worst run",
              min(of_runs("changed_without_argmax")), least=0.9),
        Check("answers that change when another one is hidden, at random, worst run",
              max(of_runs("changed_without_random")), most=0.1),
    ]  # fmt: skip


def draw(numbers: Numbers) -> Figure:
    """The three shares of each run, and how often the answer changes by the distance of what is hidden."""
    figure, (left, right) = panels(2, 9, 3.2)
    names = {
        "argmax_is_true_source": "argmax is the\ntrue source",
        "changed_without_argmax": "changes without\nthe argmax",
        "changed_without_random": "changes without\na random symbol",
    }
    colors = {"reverse": "tab:blue", "copy": "tab:orange"}
    for number, run in enumerate(numbers["runs"]):
        aside = np.arange(3) + 0.08 * (number - (len(numbers["runs"]) - 1) / 2)  # so that equal runs can all be seen
        style = {"color": colors[run["task"]], "alpha": 0.7, "label": f"{run['task']}, seed {run['seed']}"}
        left.plot(aside, [run[name] for name in names], "o", **style)
        right.plot(*zip(*run["changed_by_distance"]), ".-", **style)
    left.set_xticks(range(3), names.values(), fontsize=8)
    left.set(ylim=(-0.03, 1.05), xlim=(-0.5, 2.5), ylabel="share of symbols")
    right.set(xlabel="hidden symbol, from the true source", ylabel="answers that change", ylim=(-0.03, 1.05))
    left.legend(fontsize=8)
    return figure


CLAIM = Claim(
    measure, check, draw, lambda numbers: [],
    title="Reading it",
    sentence="The weights can be read: the source symbol that cross-attention points at is the one that the answer is "
    "made from.",
    source="Bahdanau et al. 2015, section 5.2.1; doubted by Jain and Wallace 2019",
    link="https://arxiv.org/abs/1902.10186",
    equation=r"\hat{\jmath}(t)=\mathrm{argmax}_j\ \frac{1}{N}\sum_n p^{(n)}_{tj}",
    method=[
        "Of held-out strings, the cross-attention of the last layer, the mean of its heads: how often its argmax is "
        "the source symbol that the task asks for, among all symbols and the end token.",
        "Faithfulness: the keys and values of one source position are hidden from all cross-attention of all steps, "
        "and the answer at a step is decoded again; hidden is the position that the argmax of that step points at, or "
        "another one at random. The correct tokens are the decoder's input throughout.",
    ],
    full=Sizes(max_length=32, steps=2_000, seeds=(0, 1, 2), length=20, strings=200),
    quick=Sizes(max_length=12, steps=800, seeds=(0,), length=10, strings=100),
)  # fmt: skip
