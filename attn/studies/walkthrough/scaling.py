"""Claim: without the division by sqrt(d_k) the softmax saturates, and its gradients are too small to learn from."""

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from attn.functional import attention_weights
from attn.studies.jobs import Trainer, losses, settings_of
from attn.studies.probes import exact_match
from attn.studies.report import BLUE, GRAY, VERMILION, Table, panels, tick_lengths
from attn.studies.walkthrough.claims import Check, Claim, Numbers, Sizes


def measure(sizes: Sizes, trainer: Trainer) -> Numbers:
    """Measure variances, entropies and Jacobians of random queries and keys; train with the scale and without."""
    return {
        "keys": sizes.keys,
        "by_width": [_at_width(sizes, width) for width in sizes.widths],
        "trained_width": sizes.trained_width,
        "trainings": [_train(sizes, trainer, scaled, seed) for seed in sizes.seeds for scaled in (True, False)],
    }


def _at_width(sizes: Sizes, width: int) -> dict:
    """Measure products and weights of queries and keys with independent standard normal entries."""
    first, second, third, fourth = jax.random.split(jax.random.key(width), 4)
    pairs = (sizes.pairs, width)
    products = jnp.sum(jax.random.normal(first, pairs) * jax.random.normal(second, pairs), axis=-1)
    query = jax.random.normal(third, (sizes.queries, width))
    key = jax.random.normal(fourth, (sizes.keys, width))
    row = {"width": width}
    for name, scale in (("scaled", width**-0.5), ("unscaled", 1.0)):
        weights = attention_weights(query, key, scale=scale)
        row[name] = {
            "variance": float(jnp.var(products * scale)),
            "entropy": float(jnp.mean(-jnp.sum(jax.scipy.special.xlogy(weights, weights), axis=-1))),
            "jacobian": float(jnp.mean(jax.vmap(_jacobian_norm)(weights))),
        }
    return row


def _jacobian_norm(p):
    """Return the Frobenius norm of d softmax(s) / d s = diag(p) - p p^T."""
    return jnp.linalg.norm(jnp.diag(p) - jnp.outer(p, p))


def _train(sizes: Sizes, trainer: Trainer, scaled: bool, seed: int) -> dict:
    mechanism = "sinusoidal" if scaled else "sinusoidal + unscaled"
    model = {"num_heads": 1, "head_width": sizes.trained_width, "mechanism": mechanism}
    run = trainer.train(settings_of("reverse", sizes.max_length, sizes.steps, seed, **model))
    exact = float(np.mean(exact_match(run, range(2, sizes.max_length + 1), 20)))
    return {"scaled": scaled, "seed": seed, "losses": losses(run), "exact_match": exact}


def check(numbers: Numbers) -> list[Check]:
    """Check the variances, that the softmax saturates at the greatest width, and that training is then worse."""
    rows, last = numbers["by_width"], numbers["by_width"][-1]
    at_width, entropy = f"at d_k = {last['width']}", np.log(numbers["keys"])

    def mean_loss(scaled: bool) -> float:
        """Return the mean loss over the training, over all seeds."""
        curves = [run["losses"] for run in numbers["trainings"] if run["scaled"] == scaled]
        return float(np.mean([loss for losses in curves for _, loss in losses]))

    return [
        Check("variance of q·k over d_k, without the scale: farthest from 1 over all widths, as |x − 1|",
              max(abs(row["unscaled"]["variance"] / row["width"] - 1) for row in rows), most=0.1),
        Check("variance of q·k/√d_k: farthest from 1 over all widths, as |x − 1|",
              max(abs(row["scaled"]["variance"] - 1) for row in rows), most=0.1),
        Check(f"entropy of the weights {at_width} over its greatest value log S, with the scale",
              last["scaled"]["entropy"] / entropy, least=0.7),
        Check(f"entropy of the weights {at_width} over log S, without the scale",
              last["unscaled"]["entropy"] / entropy, most=0.2),
        Check(f"norm of the softmax's Jacobian {at_width}, without the scale over with it",
              last["unscaled"]["jacobian"] / last["scaled"]["jacobian"], most=0.5),
        Check(f"mean training loss at d_k = {numbers['trained_width']}, without the scale over with it, all seeds",
              mean_loss(False) / mean_loss(True), least=1.5),
    ]  # fmt: skip


def draw(numbers: Numbers) -> Figure:
    """Against the width, with the scale and without: variance, entropy, norm of the Jacobian; and loss by step."""
    figure, axes = panels(4, 10, 2.6)
    rows = numbers["by_width"]
    styles = {
        "scaled": {"color": BLUE, "marker": "o", "label": "with 1/√d_k"},
        "unscaled": {"color": VERMILION, "marker": "s", "linestyle": "--", "label": "without"},
    }
    titles = {"variance": "variance of q·k", "entropy": "entropy, nats", "jacobian": "norm of Jacobian"}
    for ax, (name, title) in zip(axes, titles.items()):
        for kind, style in styles.items():
            ax.plot([row["width"] for row in rows], [row[kind][name] for row in rows], **style)
        ax.set(xlabel="width d_k", title=title)
        tick_lengths(ax, [row["width"] for row in rows])
        ax.tick_params(axis="x", labelsize=7)
    axes[0].set_yscale("log")
    axes[0].legend()
    for ax in axes[1:3]:
        ax.set_ylim(bottom=0)
    entropy = np.log(numbers["keys"])
    axes[1].axhline(entropy, color=GRAY, linewidth=1, linestyle=":")
    axes[1].text(rows[-1]["width"], 1.02 * entropy, "even weights: log S", ha="right", va="bottom", color=GRAY)
    axes[1].set_ylim(top=1.2 * entropy)
    for number, run in enumerate(numbers["trainings"]):
        style = styles["scaled" if run["scaled"] else "unscaled"]
        axes[3].plot(*zip(*run["losses"]), **style | {"label": style["label"] if number < 2 else None})
    axes[3].set(xlabel="step", title=f"loss, d_k = {numbers['trained_width']:,}", yscale="log")
    return figure


def tables(numbers: Numbers) -> list[Table]:
    """Return the loss and exact match of each training."""
    rows = [
        ["with" if run["scaled"] else "without", run["seed"], run["losses"][-1][1], run["exact_match"]]
        for run in numbers["trainings"]
    ]
    return [Table("Trainings", ["scale", "seed", "loss at the end", "exact match, mean over lengths"], rows)]


CLAIM = Claim(
    measure, check, draw, tables,
    title="Divide by √d_k",
    sentence="The dot products of queries and keys grow with their width d_k. Divided by √d_k they do not, and the "
    "softmax keeps a gradient that a model can learn from.",
    source="Vaswani et al. 2017, section 3.2.1 and its footnote",
    link="https://arxiv.org/abs/1706.03762",
    equation=r"\mathrm{Var}(q\cdot k)=d_k,\quad \mathrm{Var}(q\cdot k/\sqrt{d_k})=1,\quad "
    r"\partial\,\mathrm{softmax}(s)/\partial s=\mathrm{diag}(p)-pp^{T}",
    method=[
        "Queries and keys with independent standard normal entries: the variance of their products, and, for one query "
        "over S keys, the entropy of its weights and the Frobenius norm of the softmax's Jacobian, all with the scale "
        "and without, against the width d_k.",
        "Then two Transformers with one wide head learn to reverse strings. They differ only in the scale.",
    ],
    full=Sizes(
        widths=(4, 16, 64, 256, 1024, 4096), pairs=20_000, queries=256, keys=64, trained_width=1024,
        max_length=16, steps=1_500, seeds=(0, 1, 2)
    ),
    quick=Sizes(
        widths=(4, 64, 1024, 4096), pairs=10_000, queries=128, keys=64, trained_width=256,
        max_length=8, steps=300, seeds=(0,)
    ),
)  # fmt: skip
