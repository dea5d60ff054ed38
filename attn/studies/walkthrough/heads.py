"""Claim: heads attend to different things, and several at once do what one wide head cannot do as well."""

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attn.studies.jobs import Settings, Trainer, losses, settings_of
from attn.studies.probes import count_parameters, cross_weights, exact_match, held_out, teacher_forced, without
from attn.studies.report import BLUE, GRAY, VERMILION, Table, panels
from attn.studies.walkthrough.claims import Check, Claim, Numbers, Sizes

_STRINGS = 100
_MUCH, _FAVORED = 0.25, 2.0  # thresholds: mass on an offset, and multiple of a symbol's frequency


def measure(sizes: Sizes, trainer: Trainer) -> Numbers:
    """Train many heads, and one, on a task of two relations; measure where each attends, and exact match without it."""
    runs = [_measure_seed(sizes, trainer, seed) for seed in sizes.seeds]
    counts = {name: count_parameters(_settings(sizes, n, 0)) for name, n in (("many", sizes.num_heads), ("one", 1))}
    return {"num_heads": sizes.num_heads, "length": sizes.length, "parameters": counts, "runs": runs}


def _measure_seed(sizes: Sizes, trainer: Trainer, seed: int) -> dict:
    many, one = (trainer.train(_settings(sizes, num_heads, seed)) for num_heads in (sizes.num_heads, 1))
    questions = held_out(many, sizes.length, _STRINGS)
    weights = teacher_forced(cross_weights, many, questions)[:, -1, :, : sizes.length]  # the last layer's, [B N n S]
    weights = np.moveaxis(weights, 1, 0)
    sources, symbols = questions.sources[:, : sizes.length], many.config.task.symbols

    def exact(run) -> float:
        return float(np.mean(exact_match(run, range(min(4, sizes.max_length), sizes.max_length + 1), sizes.each)))

    heads = [without(many, inside="cross", matrix="W_O", head=n) for n in range(sizes.num_heads)]
    return {
        "seed": seed,
        "many": {"exact_match": exact(many), "losses": losses(many)},
        "one": {"exact_match": exact(one), "losses": losses(one)},
        "divergence": divergence(weights).tolist(),
        "attends_to": [attends_to(head[..., : sizes.length], sources, symbols) for head in weights],
        "without_head": [exact(run) for run in heads],
        "maps": weights.mean(1).tolist(),
    }


def _settings(sizes: Sizes, num_heads: int, seed: int) -> Settings:
    """Return settings whose number of parameters does not depend on the number of heads, which share the width."""
    return settings_of("mirror_or_next", sizes.max_length, sizes.steps, seed, num_heads=num_heads)


def divergence(p: Float[np.ndarray, "N B T S"]) -> Float[np.ndarray, "N N"]:
    """Return the Jensen-Shannon divergence of each pair of heads, in bits, the mean over rows: 0 equal, 1 disjoint."""

    def entropy(q):
        return -np.sum(np.where(q > 0, q * np.log2(np.maximum(q, 1e-30)), 0), axis=-1)

    of_each = entropy(p)
    pairs = [[np.mean(entropy((a + b) / 2) - (x + y) / 2) for b, y in zip(p, of_each)] for a, x in zip(p, of_each)]
    return np.maximum(np.array(pairs), 0)


def attends_to(
    weights: Float[np.ndarray, "B T S"], sources: Int[np.ndarray, "B n"], symbols: int
) -> dict[str, float | str]:
    """Return the target of a head: an offset from the start, j = t + d, from the end, j = n - 1 - t + d, or a symbol.

    Both masses are those of the best d. `content` is the fraction of the weights on the symbol that the head favors
    most, divided by that symbol's frequency.
    """
    n = weights.shape[-1]
    t, mean = np.arange(n), weights.mean(0)

    def best(center: np.ndarray) -> tuple[float, int]:
        masses = {}
        for d in range(-2, 3):
            inside = (center + d >= 0) & (center + d < n)
            masses[d] = float(mean[t[inside], (center + d)[inside]].mean())
        return max((mass, d) for d, mass in masses.items())

    (from_start, start), (from_end, end) = best(t), best(n - 1 - t)
    is_symbol = [sources == v for v in range(1, symbols + 1)]
    total = max(weights.sum(), 1e-30)  # all of a head's weight may be on the end token
    favors = [(weights * each[:, None]).sum() / total / max(each.mean(), 1e-30) for each in is_symbol]
    if max(from_start, from_end) < _MUCH:
        nature = f"symbol {1 + int(np.argmax(favors))}" if max(favors) >= _FAVORED else "nothing"
    else:
        nature = f"start, t{start:+d}" if from_start >= from_end else f"end, n−1−t{end:+d}"
    return {"from_start": from_start, "from_end": from_end, "content": float(max(favors)), "nature": nature}


def check(numbers: Numbers) -> list[Check]:
    """Check that heads differ and divide the two relations among them, and that many heads learn better than one."""
    runs, counts = numbers["runs"], numbers["parameters"].values()
    off_diagonal = [np.array(run["divergence"])[np.triu_indices(numbers["num_heads"], 1)] for run in runs]
    both = [min(max(head[name] for head in run["attends_to"]) for name in ("from_start", "from_end")) for run in runs]
    many, one = ([run[which]["exact_match"] for run in runs] for which in ("many", "one"))
    losses = {which: [np.mean([loss for _, loss in run[which]["losses"]]) for run in runs] for which in ("many", "one")}
    return [
        Check("parameters: fewer over more", min(counts) / max(counts), least=1.0, premise=True),
        Check("divergence of the two heads that differ most, bits, least seed", min(map(max, off_diagonal)), least=0.5),
        Check("mass on one offset from the start and, by another head, from the end: the lesser, least seed",
              min(both), least=0.3),
        Check("exact match lost with the head that matters most, least seed",
              min(exact - min(run["without_head"]) for exact, run in zip(many, runs)), least=0.5),
        Check("exact match of many heads, worst seed", min(many), least=0.9),
        Check("exact match of many heads minus that of one wide head, mean over seeds",
              np.mean(np.subtract(many, one)), least=0.05),
        Check("mean training loss of one wide head over that of many, mean over seeds",
              np.mean(np.divide(losses["one"], losses["many"])), least=1.1),
    ]  # fmt: skip


def draw(numbers: Numbers) -> Figure:
    """Training of many heads and of one; of the first seed, how heads differ, what each is worth, and their maps."""
    first, n = numbers["runs"][0], numbers["num_heads"]
    columns = max(4, n)
    figure, axes = panels(columns, 2.5 * columns, 5.2, rows=2)
    above, below = axes[:columns], axes[columns:]
    _draw_training(above[0], above[1], numbers)
    heads = range(1, n + 1)
    above[2].imshow(first["divergence"], vmin=0, vmax=1, cmap="Blues")
    for (row, column), bits in np.ndenumerate(first["divergence"]):
        above[2].text(column, row, f"{bits:.2f}", ha="center", va="center", color="w" if bits > 0.5 else "k")
    above[2].set(title="divergence, bits", xlabel="head", ylabel="head")
    above[2].set_xticks(range(n), heads)
    above[2].set_yticks(range(n), heads)
    above[3].bar(heads, first["without_head"], color=BLUE, width=0.6)
    above[3].axhline(first["many"]["exact_match"], color=GRAY, linewidth=1, linestyle=":", label="with all heads")
    above[3].set(title="exact match without", xlabel="head removed", ylim=(0, 1.2), xticks=heads)
    above[3].legend(loc="upper right")
    for head, ax, weights, target in zip(heads, below, first["maps"], first["attends_to"]):
        ax.imshow(weights, cmap="Blues", vmin=0, vmax=1)
        ax.set(title=f"head {head}: {target['nature'].removesuffix('+0')}", xlabel="source j", ylabel="answer t")
    for ax in (*above[4:], *below[n:]):
        ax.remove()
    return figure


def _draw_training(left: Axes, right: Axes, numbers: Numbers):
    """Draw the loss and the exact match of many heads and of one, by seed."""
    names = {"many": f"{numbers['num_heads']} heads", "one": "one wide head"}
    seeds = np.arange(len(numbers["runs"]))
    for which, color, marker, aside in (("many", BLUE, "o", -0.2), ("one", VERMILION, "s", 0.2)):
        for seed, run in enumerate(numbers["runs"]):
            style = {"color": color, "marker": marker, "label": None if seed else names[which]}
            left.plot(*zip(*run[which]["losses"]), "-" if which == "many" else "--", **style)
        exact = [run[which]["exact_match"] for run in numbers["runs"]]
        right.bar(seeds + aside, exact, width=0.38, color=color, label=names[which])
    left.set(yscale="log", xlabel="step", title="training loss")
    left.legend()
    right.set(title="exact match", xlabel="seed", ylim=(0, 1.45), yticks=(0, 0.5, 1))
    right.set_xticks(seeds, [run["seed"] for run in numbers["runs"]])
    right.legend(loc="upper right")


def tables(numbers: Numbers) -> list[Table]:
    """Return the target of each head of each seed, exact match without it, and exact match of many heads and of one."""
    rows = [
        [run["seed"], n, head["nature"], head["from_start"], head["from_end"], head["content"], left]
        for run in numbers["runs"]
        for n, (head, left) in enumerate(zip(run["attends_to"], run["without_head"]), start=1)
    ]
    header = ["seed", "head", "most mass from", "from start", "from end"]
    header += ["symbol it favors most, over its frequency", "exact match without it"]
    versus = [[run["seed"], run["many"]["exact_match"], run["one"]["exact_match"]] for run in numbers["runs"]]
    return [
        Table("Heads of the cross-attention", header, rows),
        Table("Exact match", ["seed", f"{numbers['num_heads']} heads", "one wide head"], versus),
    ]


CLAIM = Claim(
    measure, check, draw, tables,
    title="Heads",
    sentence="Several heads attend to different things at the same time. One wide head with as many parameters must "
    "serve all relations with the same weights, and does worse.",
    source="Vaswani et al. 2017, section 3.2.2",
    link="https://arxiv.org/abs/1706.03762",
    equation=r"\mathrm{MultiHead}=\mathrm{Concat}(\mathrm{head}_1,\ldots,\mathrm{head}_N)W^{O},\quad "
    r"\mathrm{head}_n=\mathrm{Attention}(QW^{Q}_n,KW^{K}_n,VW^{V}_n)",
    method=[
        "A task of two relations at once: each output is the mirror image of its position, x(n−1−t), if that symbol is "
        "odd, and otherwise the symbol after its position, x(t+1), wrapping around. Two Transformers with as many "
        "parameters learn it: one has several heads, the other one head that is as wide as all of them.",
        "Of the several heads: the Jensen-Shannon divergence of the weights of each pair; the mass of each head on its "
        "best offset from the start and from the end (up to two positions off), and on one kind of symbol over chance; "
        "and exact match with each head removed, its part of W_O set to zero.",
    ],
    full=Sizes(max_length=16, length=12, steps=2_500, num_heads=4, seeds=(0, 1, 2), each=50),
    quick=Sizes(max_length=8, length=8, steps=1_000, num_heads=4, seeds=(0,), each=30),
)  # fmt: skip
