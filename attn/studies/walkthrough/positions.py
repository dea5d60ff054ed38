"""Claim: without positions the encoder sees a set; sinusoids add them so that a shift is one rotation."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from attn.functional.positions import sinusoidal
from attn.runs import Run
from attn.studies.jobs import Trainer, settings_of
from attn.studies.probes import encode, exact_match, position_table
from attn.studies.report import BLUE, GREEN, VERMILION, Table, panels, tick_lengths
from attn.studies.walkthrough.claims import Check, Claim, Numbers, Sizes

# Of lines by encoding; where all are equal, each can be seen below the next one.
_STYLES = {
    "none": {"color": VERMILION, "marker": "s"},
    "sinusoidal": {"color": BLUE, "marker": "o", "linewidth": 3.5, "markersize": 8},
    "learned": {"color": GREEN, "marker": "^", "linestyle": "--"},
}


def measure(sizes: Sizes, trainer: Trainer) -> Numbers:
    """Permute the input; copy with each encoding; fit one linear map from each position to a later one."""
    lengths, shifts = [n for n in (2, 4, 8, 16, 32, 64, 128) if n <= sizes.max_length], sizes.shifts
    runs = {name: [_train(sizes, trainer, name, seed) for seed in sizes.seeds] for name in _STYLES}
    wave = np.asarray(sinusoidal(jnp.arange(sizes.max_length), sizes.width), np.float64)
    learned = [position_table(run)[: sizes.max_length] for run in runs["learned"]]
    return {
        "permuted": {name: _permuted(runs[name][0], sizes.max_length) for name in ("none", "sinusoidal")},
        "lengths": lengths,
        "copied": {name: [exact_match(run, lengths, 50) for run in of_name] for name, of_name in runs.items()},
        "shifts": list(shifts),
        "random": [float(np.sqrt(max(0, 1 - sizes.width / (sizes.max_length - k)))) for k in shifts],
        "closed_form": [float(np.abs(wave[k:] - wave[:-k] @ rotation(k, sizes.width).T).max()) for k in shifts],
        "fitted": {
            "sinusoidal": [[_residual(wave, k) for k in shifts]],
            "learned": [[_residual(table, k) for k in shifts] for table in learned],
        },
    }


def _train(sizes: Sizes, trainer: Trainer, name: str, seed: int) -> Run:
    mechanism = f"learned({sizes.max_length + 1})" if name == "learned" else name
    model = {"width": sizes.width, "mechanism": mechanism}
    return trainer.train(settings_of("copy", sizes.max_length, sizes.steps, seed, **model))


def _permuted(run: Run, length: int) -> float:
    """Return the error of encoding a permuted source against permuting the encoded one, in units of the last place."""
    rng = np.random.default_rng(0)
    tokens, order = jnp.asarray(rng.integers(1, 17, length), jnp.int32), rng.permutation(length)
    one, other = encode(run, tokens)[order], encode(run, tokens[order])
    return float(jnp.abs(one - other).max() / (jnp.abs(one).max() * jnp.finfo(jnp.float32).eps))


def rotation(shift: int, width: int) -> Float[np.ndarray, "D D"]:
    """Return R with PE(t + shift) = R PE(t) for every t: each pair (sin, cos) is rotated by its own angle."""
    matrix = np.zeros((width, width))
    for m in range(0, width, 2):
        angle = shift / 10_000 ** (m / width)
        matrix[m : m + 2, m : m + 2] = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    return matrix


def _residual(rows: Float[np.ndarray, "T D"], shift: int) -> float:
    """Return the relative error of the best linear map from row t to row t + shift, by least squares over all t.

    It is the square root of the unexplained over the total squared deviation from the mean row: 0 if all is explained,
    1 if nothing is. There are more rows than columns, so an exact map need not exist.
    """
    now, later = rows[:-shift], rows[shift:]
    fit, *_ = np.linalg.lstsq(now, later, rcond=None)
    return float(np.linalg.norm(later - now @ fit) / np.linalg.norm(later - later.mean(0)))


def check(numbers: Numbers) -> list[Check]:
    """Check that the encoder sees a set only without positions, and that only sinusoids have an exact linear map."""
    kept = [index for index, length in enumerate(numbers["lengths"]) if length >= 4]  # shorter ones can be luck
    copied = {name: np.array(rows)[:, kept].mean(axis=1) for name, rows in numbers["copied"].items()}
    return [
        Check("permuting the source moves the encoding without positions, units in the last place",
              numbers["permuted"]["none"], most=64),
        Check("permuting the source moves the encoding with sinusoids",
              numbers["permuted"]["sinusoidal"], least=10_000),
        Check("copying without positions: exact match from length 4 on, best seed", copied["none"].max(), most=0.02),
        Check("copying with sinusoids: exact match from length 4 on, worst seed",
              copied["sinusoidal"].min(), least=0.95),
        Check("copying with learned positions: exact match from length 4 on, worst seed", copied["learned"].min(),
              least=0.95),
        Check("|PE(t+k) − R(k) PE(t)|, closed form, worst t and k", max(numbers["closed_form"]), most=1e-4),
        Check("share missed by the best linear map from PE(t) to PE(t+k): sinusoids, worst k",
              np.max(numbers["fitted"]["sinusoidal"]), most=0.01),
        Check("share missed by the best linear map: learned positions, best k and seed",
              np.min(numbers["fitted"]["learned"]), least=0.5),
    ]  # fmt: skip


def draw(numbers: Numbers) -> Figure:
    """Exact match by length for each encoding, and what the best linear map misses by shift, one line per seed."""
    figure, (left, right) = panels(2, 8, 3)
    for name, style in _STYLES.items():
        for number, row in enumerate(numbers["copied"][name]):
            left.plot(numbers["lengths"], row, **style, label=None if number else name)
        for number, row in enumerate(numbers["fitted"].get(name, [])):
            right.plot(numbers["shifts"], row, **style | {"markersize": 3}, label=None if number else name)
    right.plot(numbers["shifts"], numbers["closed_form"], "x", color=BLUE, label="sinusoidal, closed form")
    right.plot(numbers["shifts"], numbers["random"], ":", color="k", label="random rows, expected")
    left.set(xlabel="length", ylabel="exact match", title="copying", ylim=(-0.03, 1.05))
    tick_lengths(left, numbers["lengths"])
    left.legend(title="positions", alignment="left", loc="center right")
    right.set(yscale="log", xlabel="shift k", ylabel="share missed", title="best linear map PE(t) → PE(t+k)")
    right.legend(loc="center", bbox_to_anchor=(0.5, 0.6))
    return figure


def tables(numbers: Numbers) -> list[Table]:
    """Return the rotation of a shift by one, for a width of 4."""
    return [Table("R(1) for D = 4: PE(t + 1) = R(1) PE(t) for every t", [], rotation(1, 4).tolist())]


CLAIM = Claim(
    measure, check, draw, tables,
    title="Positions",
    sentence="Attention alone sees a set: without positions, a permuted input gives the permuted output. Sinusoids "
    "tell positions apart, and a shift by k is one linear map, the same at every position.",
    source="Vaswani et al. 2017, section 3.5",
    link="https://arxiv.org/abs/1706.03762",
    equation=r"PE(t+k)=R(k)\,PE(t),\quad R(k)=\mathrm{diag}_m\left(\cos\omega_mk,\ \sin\omega_mk;\ "
    r"-\sin\omega_mk,\ \cos\omega_mk\right),\quad \omega_m=10000^{-2m/D}",
    method=[
        "The encoder of a trained model reads a string and the same string permuted; the second encoding is compared "
        "with the first one permuted. Sums over keys run in another order, so the last bits may differ.",
        "Models with sinusoids, with a learned table and without positions learn to copy.",
        "For every shift k the closed form is compared with the sinusoids themselves, in float32; and the linear map "
        "that best takes row t to row t + k, for all t at once, is found by least squares. Of rows of random "
        "numbers it is expected to miss a share of √(1 − D / (T − k)).",
    ],
    full=Sizes(width=32, max_length=96, steps=2_500, seeds=(0, 1, 2), shifts=tuple(range(1, 33))),
    quick=Sizes(width=24, max_length=48, steps=600, seeds=(0,), shifts=(1, 2, 4, 8)),
)  # fmt: skip
