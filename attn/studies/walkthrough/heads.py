"""Claim: heads attend to different things, and several at once do what one wide head cannot do as well."""

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from attn.studies.jobs import Settings, Trainer, losses, settings_of
from attn.studies.probes import count_parameters, cross_weights, exact_match, held_out, teacher_forced, without
from attn.studies.report import Table, panels
from attn.studies.walkthrough.claims import Check, Claim, Numbers, Sizes

_STRINGS = 100
_MUCH, _FAVORED = 0.25, 2.0  # thresholds: mass on an offset, and multiple of a symbol's frequency


def measure(sizes: Sizes, trainer: Trainer) -> Numbers:
    """Compare one head with many on a task of two relations; measure what each of the many does and is worth."""
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
    """The loss of one head and of many; of the first seed each head's mean map and their divergences."""
    first = numbers["runs"][0]
    figure, axes = panels(3 + numbers["num_heads"], 13, 2.7)
    for run in numbers["runs"]:
        for which, color in (("many", "tab:blue"), ("one", "tab:red")):
            axes[0].plot(*zip(*run[which]["losses"]), ".-", color=color, label=which if run is first else None)
    axes[0].set(yscale="log", xlabel="step", title="training loss")
    axes[0].legend(fontsize=7)
    for ax, weights, head in zip(axes[1:], first["maps"], first["attends_to"]):
        ax.imshow(weights, cmap="Blues", vmin=0, vmax=1)
        ax.set_title(head["nature"])
    axes[-2].imshow(first["divergence"], cmap="Greys", vmin=0, vmax=1)
    axes[-2].set_title("divergence, bits")
    axes[-1].bar(range(1, numbers["num_heads"] + 1), first["without_head"], color="tab:orange")
    axes[-1].set(title="exact match without", ylim=(0, 1), xlabel="head")
    for ax in axes:
        ax.title.set_fontsize(8)
        ax.tick_params(labelsize=7)
    return figure


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
    sentence="Several heads attend to different things at once; with as many parameters one wide head, whose weights "
    "must serve all relations together, does less well.",
    source="Vaswani et al. 2017, section 3.2.2",
    link="https://arxiv.org/abs/1706.03762",
    equation=r"\mathrm{MultiHead}=\mathrm{Concat}(\mathrm{head}_1,\ldots,\mathrm{head}_N)W^{O},\quad "
    r"\mathrm{head}_n=\mathrm{Attention}(QW^{Q}_n,KW^{K}_n,VW^{V}_n)",
    method=[
        "A task of two relations at once: each output is the mirror image of its position, x(n−1−t), if that symbol is "
        "odd, and otherwise the symbol after its position, x(t+1), wrapping around. A Transformer with several heads "
        "learns it, and one with a single head as wide as all of them, with as many parameters.",
        "Of the several: the Jensen-Shannon divergence of the weights of each pair, the mass of each on its best "
        "offset from the start and from the end (up to two positions off) and on one kind of symbol over chance; and "
        "exact match with each head removed, its part of W_O at zero.",
    ],
    full=Sizes(max_length=16, length=12, steps=2_500, num_heads=4, seeds=(0, 1, 2), each=50),
    quick=Sizes(max_length=8, length=8, steps=1_000, num_heads=4, seeds=(0,), each=30),
)  # fmt: skip
