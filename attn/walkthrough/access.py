"""Claim: what the decoder knows of the source it reads directly, by weighing values with softmax(Q K^T / sqrt(d_k))."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from attn.functional import attention
from attn.runs import Run
from attn.walkthrough.bench import Bench, configured, put_back, without
from attn.walkthrough.claims import Check, Claim, Numbers, Table

_ASKED = ("as trained", "removed", "averaged", "put back")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the training on strings of up to `max_length`, and how many strings of each length are asked."""

    max_length: int
    steps: int
    seeds: tuple[int, ...]
    each: int


def measure(sizes: Sizes, bench: Bench) -> Numbers:
    """Take the cross-attention away and give it back; and work one small example by hand."""
    shortest = 4  # shorter strings can be right by luck
    return {
        "lengths": [shortest, sizes.max_length],
        "seeds": [_ask(reversing(bench, sizes, seed), shortest, sizes.each) for seed in sizes.seeds],
        "symbols": configured({}).task.symbols,
        "by_hand": by_hand(),
    }


def reversing(bench: Bench, sizes, seed: int, task: str = "reverse") -> Run:
    """The Transformer of configs/reverse.py, or on another task; several claims look at it."""
    return bench.trained(
        {
            "task": {"name": task, "max_length": sizes.max_length},
            "training": {"steps": sizes.steps, "seed": seed},
        }
    )


def _ask(run: Run, shortest: int, each: int) -> dict[str, dict[str, float]]:
    """Exact match and token accuracy of one run, whole and without its cross-attention."""
    both = without(without(run, inside="cross", matrix="W_O"), inside="cross", matrix="W_Q")
    changed = {
        "as trained": run,
        "removed": without(run, inside="cross", matrix="W_O"),
        "averaged": without(run, inside="cross", matrix="W_Q"),
        "put back": put_back(put_back(both, run, inside="cross", matrix="W_O"), run, inside="cross", matrix="W_Q"),
    }
    lengths = range(shortest, run.config.task.max_length + 1)
    scores = {name: changed[name].evaluate(lengths, each).overall() for name in _ASKED}
    return {
        name: {"exact_match": some.exact_match.value(), "token_accuracy": some.token_accuracy.value()}
        for name, some in scores.items()
    }


def by_hand() -> dict:
    """Three tokens of width 2, each step in NumPy's float64, and the same from `attn.attention`."""
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
    return {
        "steps": {name: matrix.tolist() for name, matrix in steps.items()},
        "error": float(abs(out - library).max()),
    }


def check(numbers: Numbers) -> list[Check]:
    """Right with it, lost without it, right again; and the library equals the hand."""

    def exact(name: str) -> list[float]:
        return [seed[name]["exact_match"] for seed in numbers["seeds"]]

    back = [abs(seed["put back"]["exact_match"] - seed["as trained"]["exact_match"]) for seed in numbers["seeds"]]
    return [
        Check("exact match as trained, worst seed", min(exact("as trained")), least=0.9),
        Check("with the cross-attention removed (W_O = 0), best seed", max(exact("removed")), most=0.001),
        Check("with all its weights even (W_Q = 0), best seed", max(exact("averaged")), most=0.001),
        Check("put back: change from as trained, any seed", max(back), most=0.0),
        Check("|worked by hand − attn.attention|, largest entry", numbers["by_hand"]["error"], most=1e-6),
    ]


def draw(numbers: Numbers) -> Figure:
    """Exact match and token accuracy of all four."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    for ax, name in zip(figure.subplots(1, 2), ("exact_match", "token_accuracy")):
        values = np.array([[seed[asked][name] for asked in _ASKED] for seed in numbers["seeds"]])
        ax.bar(_ASKED, values.mean(0), color=["tab:blue", "tab:red", "tab:orange", "tab:blue"])
        for row in values:
            ax.plot(_ASKED, row, "k.", markersize=4)
        ax.set(title=name.replace("_", " "), ylim=(0, 1.05))
    ax.axhline(1 / numbers["symbols"], color="0.4", linestyle=":", linewidth=0.8)  # a symbol's chance
    return figure


def tables(numbers: Numbers) -> list[Table]:
    """Every number of the example by hand."""
    return [Table(name, [], matrix) for name, matrix in numbers["by_hand"]["steps"].items()]


CLAIM = Claim(
    title="Direct access",
    sentence="All that the decoder knows of the source comes through cross-attention: every output looks directly at "
    "every input, and without that look only chance is left.",
    source="Bahdanau et al. 2015, section 3.1; Vaswani et al. 2017, section 3.2",
    link="https://arxiv.org/abs/1409.0473",
    equation=r"\mathrm{Attention}(Q,K,V)=\mathrm{softmax}\left(QK^{T}/\sqrt{d_k}\right)V",
    method=[
        "A trained Transformer reverses held-out strings: as it is; with the output matrices of its cross-attention at "
        "zero, so that nothing is read; with the query matrices at zero, so that all weights are even and the mean of "
        "the source is read; and with the matrices put back. Chance of a whole string of n symbols is 16⁻ⁿ.",
        "Below, three tokens are worked through by hand, from x to the output; each row is a token.",
    ],
    full=Sizes(32, 2_000, (0, 1, 2), 100),
    quick=Sizes(12, 800, (0,), 50),
    measure=measure,
    check=check,
    draw=draw,
    tables=tables,
)
