"""Claim: the decoder reads the source directly, by weighing values with softmax(Q K^T / sqrt(d_k))."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from attn.functional import attention
from attn.runs import Run
from attn.studies.jobs import Trainer, configured, settings_of
from attn.studies.probes import held_out, restored, without
from attn.studies.report import BLUE, PURPLE, VERMILION, Table, panels
from attn.studies.walkthrough.claims import Check, Claim, Numbers, Sizes

_CONDITIONS = ("as trained", "removed", "averaged", "put back")
_CHANCE = 0.001  # largest exact match that counts as chance
_SHORTEST_SHOWN, _LONGEST_SHOWN = 3, 12  # lengths with equal weights in the table


def measure(sizes: Sizes, trainer: Trainer) -> Numbers:
    """Remove the cross-attention and put it back; compute one small example by hand."""
    symbols = configured({}).task.symbols
    shortest = shortest_beyond_chance(symbols)
    runs = [trainer.train(settings_of("reverse", sizes.max_length, sizes.steps, seed)) for seed in sizes.seeds]
    lengths = range(_SHORTEST_SHOWN, sizes.max_length + 1)
    strings = [held_out(runs[0], length, sizes.each).sources[:, :length] for length in lengths]
    return {
        "lengths": [shortest, sizes.max_length],
        "seeds": [_evaluate(run, lengths, shortest, sizes.each) for run in runs],
        "chance": [[length, float(np.mean([*map(order_chance, each)]))] for length, each in zip(lengths, strings)],
        "symbols": symbols,
        "by_hand": by_hand(),
    }


def shortest_beyond_chance(symbols: int) -> int:
    """Return the shortest length at which knowing the symbols of a string, not their order, is worth less than chance.

    Of all strings of n symbols out of K, one who knows only how often each symbol occurs puts the share
    binom(n + K - 1, n) / K^n in order on average: each multiset is guessed right once, however many orders it has.
    """
    return next(n for n in itertools.count(1) if math.comb(n + symbols - 1, n) / symbols**n <= _CHANCE)


def order_chance(string) -> float:
    """Return the chance to put the symbols of a string in order by luck: prod_k m_k! / n!, where k occurs m_k times."""
    counts = np.unique(np.asarray(string), return_counts=True)[1].tolist()
    return math.prod(map(math.factorial, counts)) / math.factorial(len(string))


def _evaluate(run: Run, lengths: range, shortest: int, each: int) -> dict[str, dict]:
    """Return exact match and token accuracy of a run under each condition, and exact match by length."""
    removed, averaged = (without(run, inside="cross", matrix=matrix) for matrix in ("W_O", "W_Q"))
    back = restored(without(removed, inside="cross", matrix="W_Q"), run, inside="cross", matrix="W_O")
    changed = (run, removed, averaged, restored(back, run, inside="cross", matrix="W_Q"))
    return {name: _metrics(changed_run, lengths, shortest, each) for name, changed_run in zip(_CONDITIONS, changed)}


def _metrics(run: Run, lengths: range, shortest: int, each: int) -> dict:
    """Return the metrics over the lengths from `shortest` on, and exact match by each length."""
    by_length = dict(run.evaluate(lengths, each).by_length())
    long = [metrics for length, metrics in by_length.items() if length >= shortest]

    def over_long(name: str) -> float:
        means = [getattr(metrics, name) for metrics in long]
        return sum(mean.sum for mean in means) / sum(mean.count for mean in means)

    return {
        "exact_match": over_long("exact_match"),
        "token_accuracy": over_long("token_accuracy"),
        "by_length": [[length, metrics.exact_match.value()] for length, metrics in by_length.items()],
    }


def by_hand() -> dict:
    """Compute attention over three tokens of width 2 step by step in float64, and again with `attn.attention`."""
    x = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    W_Q, W_K, W_V = np.array([[1.0, 0.0], [1.0, 2.0]]), np.array([[0.0, 1.0], [2.0, 1.0]]), np.array([[3.0, 0], [0, 1]])
    query, key, value = x @ W_Q, x @ W_K, x @ W_V
    scores = query @ key.T / np.sqrt(2)
    exponentials = np.exp(scores)
    weights = exponentials / exponentials.sum(axis=-1, keepdims=True)
    out = weights @ value
    library = np.asarray(attention(*(jnp.asarray(each, jnp.float32) for each in (query, key, value))))
    steps = {
        "x": x, "W_Q": W_Q, "W_K": W_K, "W_V": W_V, "Q = x W_Q": query, "K = x W_K": key, "V = x W_V": value,
        "s = Q Kᵀ / √2": scores, "exp(s)": exponentials, "p = exp(s) / Σ exp(s)": weights, "p V": out,
        "attn.attention(Q, K, V)": library,
    }  # fmt: skip
    tables = {name: matrix.tolist() for name, matrix in steps.items()}
    return {"steps": tables, "error": float(abs(out - library).max())}


def check(numbers: Numbers) -> list[Check]:
    """Check that answers are right with cross-attention, wrong without it, and right again; and check the example."""
    exact = {name: [seed[name]["exact_match"] for seed in numbers["seeds"]] for name in _CONDITIONS}
    change = [abs(back - trained) for back, trained in zip(exact["put back"], exact["as trained"])]
    shortest, longest = numbers["lengths"]
    luck = max(chance for length, chance in numbers["chance"] if length >= shortest)
    return [
        Check(f"putting the symbols in order by luck: chance at lengths {shortest} to {longest}, largest of any length",
              luck, most=_CHANCE, premise=True),
        Check("exact match as trained, worst seed", min(exact["as trained"]), least=0.9),
        Check("with the cross-attention removed (W_O = 0), best seed", max(exact["removed"]), most=_CHANCE),
        Check("with all its weights equal (W_Q = 0), best seed", max(exact["averaged"]), most=_CHANCE),
        Check("put back: change from as trained, any seed", max(change), most=0.0),
        Check("|worked by hand − attn.attention|, largest entry", numbers["by_hand"]["error"], most=1e-6),
    ]  # fmt: skip


def draw(numbers: Numbers) -> Figure:
    """Exact match and token accuracy under all four conditions, and exact match by length with equal weights."""
    figure, (*axes, short) = panels(3, 11.5, 3.4)
    shortest, longest = numbers["lengths"]
    for ax, name in zip(axes, ("exact_match", "token_accuracy")):
        values = np.array([[seed[condition][name] for condition in _CONDITIONS] for seed in numbers["seeds"]])
        ax.bar(_CONDITIONS, values.mean(0), color=[BLUE, VERMILION, PURPLE, BLUE])
        for row in values:
            ax.plot(_CONDITIONS, row, "k.", markersize=4)
        ax.set(title=f"{name.replace('_', ' ')}, lengths {shortest} to {longest}", ylim=(0, 1.05))
        ax.tick_params("x", labelsize=8)
    axes[1].axhline(1 / numbers["symbols"], color="0.4", linestyle=":", linewidth=0.8)  # guessing one symbol
    axes[1].text(1.5, 0.15, "dotted: one symbol guessed", ha="center", fontsize=8)
    shown = equal_weights(numbers)
    short.plot([row[0] for row in shown], [row[1] for row in shown], "k-", label="symbols known, order by luck")
    for number in range(len(numbers["seeds"])):
        label = "all weights equal, each seed" if number == 0 else None
        short.plot([row[0] for row in shown], [row[2 + number] for row in shown], "o", color=PURPLE, label=label)
    short.axvspan(_SHORTEST_SHOWN - 0.5, shortest - 0.5, color="0.92", label="too short to count")
    short.set(title="all weights equal, short strings", xlabel="length", ylabel="exact match")
    short.set_xlim(_SHORTEST_SHOWN - 0.5, shown[-1][0] + 0.5)
    short.legend(fontsize=8)
    return figure


def equal_weights(numbers: Numbers) -> list[list]:
    """Return by length the chance of one who knows the symbols, not their order, and exact match with equal weights."""
    by_seed = [dict(seed["averaged"]["by_length"]) for seed in numbers["seeds"]]
    return [
        [length, chance, *(exact[length] for exact in by_seed)]
        for length, chance in numbers["chance"]
        if length <= _LONGEST_SHOWN
    ]


def tables(numbers: Numbers) -> list[Table]:
    """Return exact match with equal weights by length, and all numbers of the example by hand."""
    header = ["length", "order by luck", *(f"run {number}" for number in range(1, 1 + len(numbers["seeds"])))]
    short = Table("Exact match with all weights equal", header, equal_weights(numbers))
    return [short, *(Table(name, [], matrix) for name, matrix in numbers["by_hand"]["steps"].items())]


CLAIM = Claim(
    measure, check, draw, tables,
    title="Direct access",
    sentence="All that the decoder knows of the source comes through cross-attention: every output looks directly at "
    "every input, and without it only chance is left.",
    source="Bahdanau et al. 2015, section 3.1; Vaswani et al. 2017, section 3.2",
    link="https://arxiv.org/abs/1409.0473",
    equation=r"\mathrm{Attention}(Q,K,V)=\mathrm{softmax}\left(QK^{T}/\sqrt{d_k}\right)V",
    method=[
        "A trained Transformer reverses held-out strings: as it is; with the output matrices of its cross-attention at "
        "zero, so that nothing is read; with the query matrices at zero, so that all weights are equal and the mean of "
        "the source is read; and with the matrices put back.",
        "The mean of the source still tells which symbols there are, though not their order. With luck they are put in "
        "order: for a string of n symbols, of which symbol k occurs mₖ times, with a chance of Πₖ mₖ! / n!, on average "
        "binom(n+15, n) / 16ⁿ. This is 6 % at length 4 and less than 0.1 % from length 7 on, so strings of 7 symbols "
        "and more are counted; the table shows shorter ones as well.",
        "Below, three tokens are worked through by hand, from x to the output; each row is a token.",
    ],
    full=Sizes(max_length=32, steps=2_000, seeds=(0, 1, 2), each=100),
    quick=Sizes(max_length=12, steps=800, seeds=(0,), each=50),
)  # fmt: skip
