"""Claim: heads attend to different things, and several at once do what one wide head cannot do as well."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from attn.runs import Run
from attn.walkthrough.bench import Bench, cross_weights, exact_match, losses, parameters, without
from attn.walkthrough.claims import Check, Claim, Numbers, Table

_STRINGS = 100
_TASK = "mirror_or_next"
_MUCH, _FAVOURED = 0.25, 2.0  # a mass, and how many times its frequency, from which a head attends to something


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Strings of up to `max_length` to train on, of `length` to look at; steps; how many heads against one; seeds."""

    max_length: int
    length: int
    steps: int
    num_heads: int
    seeds: tuple[int, ...]
    each: int


def measure(sizes: Sizes, bench: Bench) -> Numbers:
    """One head against many on a task of two relations; of the many, what each attends to and what is lost with it."""
    lengths, each = range(min(4, sizes.max_length), sizes.max_length + 1), sizes.each
    runs = []
    for seed in sizes.seeds:
        many, one = (_train(sizes, bench, num_heads, seed) for num_heads in (sizes.num_heads, 1))
        weights, questions = cross_weights(many, sizes.length, _STRINGS)
        weights = np.moveaxis(weights[:, -1, :, : sizes.length], 1, 0)  # the last layer's, [N B n S]
        sources = questions.sources[:, : sizes.length]
        whole = float(np.mean(exact_match(many, lengths, each)))
        runs.append(
            {
                "seed": seed,
                "many": {"exact_match": whole, "losses": losses(many)},
                "one": {"exact_match": float(np.mean(exact_match(one, lengths, each))), "losses": losses(one)},
                "divergence": divergence(weights).tolist(),
                "attends_to": [
                    attends_to(head[..., : sizes.length], sources, many.config.task.symbols) for head in weights
                ],
                "without_head": [
                    float(np.mean(exact_match(without(many, inside="cross", matrix="W_O", head=n), lengths, each)))
                    for n in range(sizes.num_heads)
                ],
                "maps": weights.mean(1).tolist(),
            }
        )  # fmt: skip
    counts = {name: parameters(_settings(sizes, n, 0)) for name, n in (("many", sizes.num_heads), ("one", 1))}
    return {"num_heads": sizes.num_heads, "length": sizes.length, "parameters": counts, "runs": runs}


def _train(sizes: Sizes, bench: Bench, num_heads: int, seed: int) -> Run:
    return bench.trained(_settings(sizes, num_heads, seed))


def _settings(sizes: Sizes, num_heads: int, seed: int) -> dict[str, dict]:
    """The heads share the width: W_Q, W_K, W_V and W_O have as many numbers whatever their number."""
    return {
        "task": {"name": _TASK, "max_length": sizes.max_length},
        "model": {"num_heads": num_heads},
        "training": {"steps": sizes.steps, "seed": seed},
    }


def divergence(p: Float[np.ndarray, "N B T S"]) -> Float[np.ndarray, "N N"]:
    """The Jensen-Shannon divergence of each pair of heads, in bits, the mean over rows: 0 alike, 1 disjoint."""

    def entropy(q):
        return -np.sum(np.where(q > 0, q * np.log2(np.maximum(q, 1e-30)), 0), axis=-1)

    of_each = entropy(p)
    pairs = [[np.mean(entropy((a + b) / 2) - (x + y) / 2) for b, y in zip(p, of_each)] for a, x in zip(p, of_each)]
    return np.maximum(np.array(pairs), 0)


def attends_to(
    weights: Float[np.ndarray, "B T S"], sources: Int[np.ndarray, "B n"], symbols: int
) -> dict[str, float | str]:
    """What a head's mass falls on: an offset from the start, j = t + d, or from the end, j = n - 1 - t + d, or content.

    Content is a symbol: the share of the mass on the symbol that it favours most, over what that symbol's frequency
    would give it by chance.
    """
    n = weights.shape[-1]
    t = np.arange(n)
    mean = weights.mean(0)

    def best(center: np.ndarray) -> tuple[float, int]:
        masses = {}
        for d in range(-2, 3):
            inside = (center + d >= 0) & (center + d < n)
            masses[d] = float(mean[t[inside], (center + d)[inside]].mean())
        return max((mass, d) for d, mass in masses.items())

    (from_start, start), (from_end, end) = best(t), best(n - 1 - t)
    holds = [sources == v for v in range(1, symbols + 1)]
    total = max(weights.sum(), 1e-30)  # a head may rest on the end token
    favours = [(weights * of[:, None]).sum() / total / max(of.mean(), 1e-30) for of in holds]
    if max(from_start, from_end) < _MUCH:
        nature = f"symbol {1 + int(np.argmax(favours))}" if max(favours) >= _FAVOURED else "nothing"
    else:
        nature = f"start, t{start:+d}" if from_start >= from_end else f"end, n−1−t{end:+d}"
    return {
        "from_start": from_start,
        "from_end": from_end,
        "content": float(max(favours)),
        "nature": nature,
    }


def check(numbers: Numbers) -> list[Check]:
    """Heads that differ and share the two relations out; many that learn what one learns less of."""
    runs = numbers["runs"]

    def area(run: dict, which: str) -> float:
        return float(np.mean([loss for _, loss in run[which]["losses"]]))

    def lost(run: dict) -> float:
        """With the head whose loss is felt most."""
        return run["many"]["exact_match"] - min(run["without_head"])

    off_diagonal = [np.array(run["divergence"])[np.triu_indices(numbers["num_heads"], 1)] for run in runs]
    both = [min(max(head[name] for head in run["attends_to"]) for name in ("from_start", "from_end")) for run in runs]
    counts = numbers["parameters"].values()
    return [
        Check("parameters: fewer over more", min(counts) / max(counts), least=1.0, premise=True),
        Check("divergence of the two heads that differ most, bits, least seed", min(map(max, off_diagonal)), least=0.5),
        Check("mass on one offset from the start and, by another head, from the end: the lesser, least seed",
              min(both), least=0.3),
        Check("exact match lost with the head that matters most, least seed", min(map(lost, runs)), least=0.5),
        Check("exact match of many heads, worst seed", min(run["many"]["exact_match"] for run in runs), least=0.9),
        Check("many heads less one wide head, exact match, mean over seeds",
              np.mean([run["many"]["exact_match"] - run["one"]["exact_match"] for run in runs]), least=0.05),
        Check("mean training loss of one wide head over that of many, mean over seeds",
              np.mean([area(run, "one") / area(run, "many") for run in runs]), least=1.1),
    ]  # fmt: skip


def draw(numbers: Numbers) -> Figure:
    """The loss of one head and of many; of the first seed each head's mean map and their divergences."""
    first = numbers["runs"][0]
    figure = Figure(figsize=(13, 2.7), layout="constrained")
    axes = figure.subplots(1, 3 + numbers["num_heads"])
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
    """What each head of each seed attends to, and what is left without it."""
    rows = [
        [run["seed"], n, head["nature"], head["from_start"], head["from_end"], head["content"], left]
        for run in numbers["runs"]
        for n, (head, left) in enumerate(zip(run["attends_to"], run["without_head"]), start=1)
    ]
    header = [
        "seed",
        "head",
        "most mass from",
        "from start",
        "from end",
        "symbol it favours most, over its frequency",
        "exact match without it",
    ]
    versus = [[run["seed"], run["many"]["exact_match"], run["one"]["exact_match"]] for run in numbers["runs"]]
    return [
        Table("Heads of the cross-attention", header, rows),
        Table("Exact match", ["seed", f"{numbers['num_heads']} heads", "one wide head"], versus),
    ]


CLAIM = Claim(
    title="Heads",
    sentence="Several heads attend to different things at once; with as many parameters one wide head, whose weights "
    "must serve all relations together, does less well.",
    source="Vaswani et al. 2017, section 3.2.2",
    link="https://arxiv.org/abs/1706.03762",
    equation=r"\mathrm{MultiHead}=\mathrm{Concat}(\mathrm{head}_1,\ldots,\mathrm{head}_N)W^{O},\quad "
    r"\mathrm{head}_n=\mathrm{Attention}(QW^{Q}_n,KW^{K}_n,VW^{V}_n)",
    method=[
        "A task of two relations at once: each output is the mirror image of its place, x(n−1−t), if that symbol is "
        "odd, and else the symbol after its place, x(t+1), around the end. A Transformer with several heads learns it "
        "and one with a single head as wide as all of them, with as many parameters.",
        "Of the several: the Jensen-Shannon divergence of the weights of each pair, the mass of each on its best "
        "offset from the start and from the end (up to two places off) and on one kind of symbol over chance; and "
        "exact match with each head removed, its part of W_O at zero.",
    ],
    full=Sizes(16, 12, 2_500, 4, (0, 1, 2), 50),
    quick=Sizes(8, 8, 1_000, 4, (0,), 30),
    measure=measure,
    check=check,
    draw=draw,
    tables=tables,
)
