"""Claim: a recurrent state holds a limited number of bits, which grows with its size; attention has no such limit."""

import itertools

import numpy as np
from matplotlib.figure import Figure

from attn.runs import Run
from attn.studies import probes
from attn.studies.jobs import Settings, Trainer, settings_of
from attn.studies.readout import Readings, linear_bits
from attn.studies.report import Table, panels, tick_lengths
from attn.studies.walkthrough.claims import Check, Claim, Numbers, Sizes
from attn.tasks.generated import Generated

# The first is the model whose width is given; the others get as many parameters.
_MODELS = {
    "LSTM": {"name": "lstm"},
    "GRU": {"name": "gru"},
    "LSTM with attention": {"name": "lstm", "attention": "multiplicative"},
    "Transformer": {"name": "transformer", "head_width": 8},
}
_COLORS = dict(zip(_MODELS, ("tab:red", "tab:orange", "tab:green", "tab:blue")))
_STATE_ALONE, _ATTENTION = ("LSTM", "GRU"), ("LSTM with attention", "Transformer")
_SYMBOLS = 4  # 2 bits per symbol
_SHORT = 8
_STRINGS = 4  # whose gradients are averaged
_TINY = np.finfo(np.float32).tiny


def measure(sizes: Sizes, trainer: Trainer) -> Numbers:
    """Train all models at each width; measure what they answer, what their states hold, and their gradients."""
    rows = []
    for width in sizes.widths:
        first, *others = _MODELS
        models = {first: {**_MODELS[first], "width": width}}
        count = probes.count_parameters(_settings(sizes, models[first]))
        for name in others:
            models[name] = probes.match_width(_settings(sizes, _MODELS[name]), count)["model"]
        measured = {name: _measure_model(sizes, trainer, model) for name, model in models.items()}
        rows.append({"width": width, "models": measured})
    return {"lengths": list(sizes.lengths), "probed": list(sizes.probed), "bits": np.log2(_SYMBOLS), "rows": rows}


def _settings(sizes: Sizes, model: dict, seed: int = 0) -> Settings:
    settings = settings_of("reverse", max(sizes.lengths), sizes.steps, seed, **model)
    settings["task"]["symbols"] = _SYMBOLS
    return settings | {
        "imports": ["attn.studies.batches"],
        "data": {"source": "short_strings"},
        "optimizer": {"name": "muon", "learning_rate": 1e-2},
    }


def _measure_model(sizes: Sizes, trainer: Trainer, model: dict) -> dict:
    runs = []
    for seed in sizes.seeds:
        settings = _settings(sizes, model, seed)
        run = trainer.train(settings)
        exact = probes.exact_match(run, sizes.lengths, sizes.each)
        runs.append(
            {
                "seed": seed,
                "exact_match": exact,
                "half_length": half_length(sizes.lengths, exact),
                **_bits(run, sizes),
                "gradient_before": gradient_by_distance(probes.untrained(settings), max(sizes.lengths)),
                "gradient_after": gradient_by_distance(run, max(sizes.lengths)),
            }
        )
    return {
        "parameters": probes.count_parameters(settings),
        "examples": sizes.steps * run.config.training.batch_size,
        "width": settings["model"]["width"],
        "runs": runs,
    }


def half_length(lengths: list[int], exact_match: list[float]) -> float | None:
    """Return the length at which exact match falls below one half, interpolated; None if it never does."""
    points = list(zip(lengths, exact_match))
    for (shorter, above), (longer, below) in itertools.pairwise(points):
        if above >= 0.5 > below:
            return shorter + (longer - shorter) * (above - 0.5) / (above - below)
    return None


def _bits(run: Run, sizes: Sizes) -> dict[str, list[float]]:
    """Return, for each probed length, the bits of a source that the decoder and a linear probe of the state read."""
    data, recurrent = Generated(run.config.task), run.config.model.name != "transformer"
    answered, probed = [], []
    for length in sizes.probed:
        fitted, tested = (
            data.questions_of_each_length(part, [length], sizes.fitted, 0) for part in ("validation", "test")
        )
        likelihoods = probes.teacher_forced(probes.log2_likelihoods, run, tested)
        answered.append(float((np.log2(_SYMBOLS) + likelihoods).sum(axis=1).mean()))
        if recurrent:
            readings = [
                Readings(probes.teacher_forced(probes.last_state, run, each), each.sources[:, :length] - 1)
                for each in (fitted, tested)
            ]
            probed.append(float(linear_bits(*readings, _SYMBOLS).sum()))
    return {"answered_bits": answered, "probed_bits": probed}


def gradient_by_distance(run: Run, length: int) -> list[float]:
    """Return the norm of d(logits of the last symbol) / d(embedding of the symbol k before the last one), for each k.

    The mean over some strings. The last symbol of a reversed string is the first of the source, the farthest.
    """
    norms = probes.teacher_forced(probes.gradient_norms, run, probes.held_out(run, length, _STRINGS))
    return norms.mean(axis=0)[:length][::-1].tolist()  # without the end token
