"""Claim: the decoder reads the source directly, by weighing values with softmax(Q K^T / sqrt(d_k))."""

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from attn.functional import attention
from attn.runs import Run
from attn.studies.jobs import Trainer, configured, settings_of
from attn.studies.probes import restored, without
from attn.studies.report import Table, panels
from attn.studies.walkthrough.claims import Check, Claim, Numbers, Sizes

_CONDITIONS = ("as trained", "removed", "averaged", "put back")
_SHORTEST = 4  # shorter strings can be right by luck


def measure(sizes: Sizes, trainer: Trainer) -> Numbers:
    """Remove the cross-attention and put it back; compute one small example by hand."""
    settings = [settings_of("reverse", sizes.max_length, sizes.steps, seed) for seed in sizes.seeds]
    return {
        "lengths": [_SHORTEST, sizes.max_length],
        "seeds": [_evaluate(trainer.train(each), sizes) for each in settings],
        "symbols": configured({}).task.symbols,
        "by_hand": by_hand(),
    }


def _evaluate(run: Run, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Return exact match and token accuracy of a run under each condition."""
    removed, averaged = (without(run, inside="cross", matrix=matrix) for matrix in ("W_O", "W_Q"))
    back = restored(without(removed, inside="cross", matrix="W_Q"), run, inside="cross", matrix="W_O")
    changed = (run, removed, averaged, restored(back, run, inside="cross", matrix="W_Q"))
    lengths = range(_SHORTEST, sizes.max_length + 1)
    metrics = {name: each.evaluate(lengths, sizes.each).overall() for name, each in zip(_CONDITIONS, changed)}
    return {
        name: {"exact_match": each.exact_match.value(), "token_accuracy": each.token_accuracy.value()}
        for name, each in metrics.items()
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
    return [
        Check("exact match as trained, worst seed", min(exact["as trained"]), least=0.9),
        Check("with the cross-attention removed (W_O = 0), best seed", max(exact["removed"]), most=0.001),
        Check("with all its weights equal (W_Q = 0), best seed", max(exact["averaged"]), most=0.001),
        Check("put back: change from as trained, any seed", max(change), most=0.0),
        Check("|worked by hand − attn.attention|, largest entry", numbers["by_hand"]["error"], most=1e-6),
    ]


def draw(numbers: Numbers) -> Figure:
    """Exact match and token accuracy under all four conditions."""
    figure, axes = panels(2, 7, 3)
    for ax, name in zip(axes, ("exact_match", "token_accuracy")):
        values = np.array([[seed[condition][name] for condition in _CONDITIONS] for seed in numbers["seeds"]])
        ax.bar(_CONDITIONS, values.mean(0), color=["tab:blue", "tab:red", "tab:orange", "tab:blue"])
        for row in values:
            ax.plot(_CONDITIONS, row, "k.", markersize=4)
        ax.set(title=name.replace("_", " "), ylim=(0, 1.05))
    axes[1].axhline(1 / numbers["symbols"], color="0.4", linestyle=":", linewidth=0.8)  # guessing one symbol
    return figure


def tables(numbers: Numbers) -> list[Table]:
    """Return all numbers of the example by hand."""
    return [Table(name, [], matrix) for name, matrix in numbers["by_hand"]["steps"].items()]


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
        "the source is read; and with the matrices put back. Chance of a whole string of n symbols is 16⁻ⁿ.",
        "Below, three tokens are worked through by hand, from x to the output; each row is a token.",
    ],
    full=Sizes(max_length=32, steps=2_000, seeds=(0, 1, 2), each=100),
    quick=Sizes(max_length=12, steps=800, seeds=(0,), each=50),
)  # fmt: skip
