"""Claim: without positions the encoder sees a set; sinusoids add them so that a shift is one rotation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from matplotlib.figure import Figure

from attn.functional.positions import sinusoidal
from attn.runs import Run
from attn.walkthrough.bench import Bench, exact_match
from attn.walkthrough.claims import Check, Claim, Numbers, Table

_LEARNERS = ("none", "sinusoidal", "learned")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the models, of their training on strings of up to `max_length`, and which shifts are looked at."""

    width: int
    max_length: int
    steps: int
    seeds: tuple[int, ...]
    shifts: tuple[int, ...]


def measure(sizes: Sizes, bench: Bench) -> Numbers:
    """Permute the input; copy with each encoding; look for a linear map from each position to one some steps on."""
    runs = {(name, seed): _train(sizes, bench, name, seed) for name in _LEARNERS for seed in sizes.seeds}
    lengths = [n for n in (2, 4, 8, 16, 32, 64, 128) if n <= sizes.max_length]
    places = np.arange(sizes.max_length)
    wave = np.asarray(sinusoidal(jnp.asarray(places), sizes.width), np.float64)
    tables = [np.asarray(runs["learned", seed].params["table"][...], np.float64)[places] for seed in sizes.seeds]
    return {
        "permuted": {name: _moved(runs[name, sizes.seeds[0]], sizes.max_length) for name in ("none", "sinusoidal")},
        "lengths": lengths,
        "copied": {name: [exact_match(runs[name, seed], lengths, 50) for seed in sizes.seeds] for name in _LEARNERS},
        "shifts": list(sizes.shifts),
        "random": [float(np.sqrt(max(0, 1 - sizes.width / (sizes.max_length - k)))) for k in sizes.shifts],
        "closed_form": [float(np.abs(wave[k:] - wave[:-k] @ rotation(k, sizes.width).T).max()) for k in sizes.shifts],
        "fitted": {
            "sinusoidal": [[_residual(wave, k) for k in sizes.shifts]],
            "learned": [[_residual(table, k) for k in sizes.shifts] for table in tables],
        },
    }


def _train(sizes: Sizes, bench: Bench, name: str, seed: int) -> Run:
    return bench.trained(
        {
            "task": {"name": "copy", "max_length": sizes.max_length},
            "model": {"width": sizes.width, "positions": name, "max_length": sizes.max_length + 1},
            "training": {"steps": sizes.steps, "seed": seed},
        }
    )


def _moved(run: Run, length: int) -> float:
    """How far encoding a permuted source is from permuting the encoded one, in units of the last place (2^-23)."""
    rng = np.random.default_rng(0)
    tokens, order = jnp.asarray(rng.integers(1, 17, length), jnp.int32), rng.permutation(length)
    encode = jax.jit(lambda params, source: nnx.merge(run.graphdef, params).encode(source)[0])
    one, other = encode(run.params, tokens)[order], encode(run.params, tokens[order])
    return float(jnp.abs(one - other).max() / (jnp.abs(one).max() * jnp.finfo(jnp.float32).eps))


def rotation(shift: int, width: int) -> Float[np.ndarray, "D D"]:
    """R with PE(t + shift) = R PE(t) for every t: each pair (sin, cos) turned by the angle that its wave has gained."""
    matrix = np.zeros((width, width))
    for m in range(0, width, 2):
        angle = shift / 10_000 ** (m / width)
        matrix[m : m + 2, m : m + 2] = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    return matrix


def _residual(rows: Float[np.ndarray, "T D"], shift: int) -> float:
    """What even the best linear map from row t to row t + shift misses, by least squares over all t.

    The root of the missed over the whole squared deviation from the mean row: 0 is all explained, 1 nothing. There are
    more rows than columns, so that a map that misses nothing need not exist.
    """
    now, later = rows[:-shift], rows[shift:]
    found, *_ = np.linalg.lstsq(now, later, rcond=None)
    return float(np.linalg.norm(later - now @ found) / np.linalg.norm(later - later.mean(0)))


def check(numbers: Numbers) -> list[Check]:
    """A set without positions, a sequence with them; a linear map for sinusoids, none for a learned table."""

    def of_long(name: str) -> np.ndarray:
        """Exact match by seed, over the lengths from 4 on: shorter ones can be right by luck."""
        kept = [place for place, length in enumerate(numbers["lengths"]) if length >= 4]
        return np.array(numbers["copied"][name])[:, kept].mean(axis=1)

    return [
        Check("permuting the source moves the encoding without positions, units in the last place",
              numbers["permuted"]["none"], most=64),
        Check("permuting the source moves the encoding with sinusoids",
              numbers["permuted"]["sinusoidal"], least=10_000),
        Check("copying without positions: exact match from length 4 on, best seed", of_long("none").max(), most=0.02),
        Check("copying with sinusoids: exact match from length 4 on, worst seed",
              of_long("sinusoidal").min(), least=0.95),
        Check("copying with learned positions: exact match from length 4 on, worst seed", of_long("learned").min(),
              least=0.95),
        Check("|PE(t+k) − R(k) PE(t)|, closed form, worst t and k", max(numbers["closed_form"]), most=1e-4),
        Check("share missed by the best linear map from PE(t) to PE(t+k): sinusoids, worst k",
              np.max(numbers["fitted"]["sinusoidal"]), most=0.01),
        Check("share missed by the best linear map: learned positions, best k and seed",
              np.min(numbers["fitted"]["learned"]), least=0.5),
    ]  # fmt: skip


def draw(numbers: Numbers) -> Figure:
    """Exact match by length for each encoding, and what the best linear map misses by shift."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, color in zip(_LEARNERS, ("tab:red", "tab:blue", "tab:green")):
        for number, row in enumerate(numbers["copied"][name]):
            left.plot(numbers["lengths"], row, ".-", color=color, label=None if number else name)
        for number, row in enumerate(numbers["fitted"].get(name, [])):
            right.plot(numbers["shifts"], row, ".-", color=color, label=None if number else name)
    right.plot(numbers["shifts"], numbers["closed_form"], "x", color="tab:blue", label="closed form (largest error)")
    right.plot(numbers["shifts"], numbers["random"], ":", color="0.5", label="rows of random numbers, expected")
    left.set(xscale="log", xlabel="length", ylabel="exact match", title="copying", ylim=(-0.03, 1.03))
    left.set_xticks(numbers["lengths"], numbers["lengths"])
    left.minorticks_off()
    right.set(yscale="log", xlabel="shift k", ylabel="share missed", title="best linear map PE(t) → PE(t+k)")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    return figure


def tables(numbers: Numbers) -> list[Table]:
    """The rotation of a shift by one, for a width of 4."""
    return [Table("R(1) for D = 4: PE(t + 1) = R(1) PE(t) for every t", [], rotation(1, 4).tolist())]


CLAIM = Claim(
    title="Positions",
    sentence="Attention alone sees a set: without positions the encoder commutes with every permutation. Sinusoids "
    "tell places apart, and moving on by k is one linear map, the same at every place.",
    source="Vaswani et al. 2017, section 3.5",
    link="https://arxiv.org/abs/1706.03762",
    equation=r"PE(t+k)=R(k)\,PE(t),\quad R(k)=\mathrm{diag}_m\left(\cos\omega_mk,\ \sin\omega_mk;\ "
    r"-\sin\omega_mk,\ \cos\omega_mk\right),\quad \omega_m=10000^{-2m/D}",
    method=[
        "The encoder of a trained model reads a string and the same string permuted; the second encoding is held "
        "against the first one permuted. Sums over keys run in another order, so the last bits may differ.",
        "Models with sinusoids, with a learned table and without positions learn to copy.",
        "For every shift k the closed form is held against the sinusoids themselves, in float32; and the linear map "
        "that best takes row t to row t + k, for all t at once, is found by least squares. Rows of random numbers "
        "would miss the square root of 1 - D / (T - k).",
    ],
    full=Sizes(32, 96, 2_500, (0, 1, 2), tuple(range(1, 33))),
    quick=Sizes(24, 48, 600, (0,), (1, 2, 4, 8)),
    measure=measure,
    check=check,
    draw=draw,
    tables=tables,
)  # fmt: skip
