"""Claim: the whole source must pass through one state, which holds few bits; attention reads every input directly."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attn.runs import Run
from attn.studies import probes
from attn.studies.jobs import Settings, Trainer, settings_of
from attn.studies.readout import Readings, linear_bits
from attn.studies.report import BLUE, GRAY, GREEN, PURPLE, VERMILION, Table, panels, tick_lengths
from attn.studies.walkthrough.claims import Check, Claim, Numbers, Sizes
from attn.tasks.generated import Generated

# The first is the model whose width is given; the others get as many parameters.
_MODELS = {
    "LSTM": {"name": "lstm"},
    "GRU": {"name": "gru"},
    "LSTM with attention": {"name": "lstm", "attention": "multiplicative"},
    "Transformer": {"name": "transformer", "head_width": 8},
}
_COLORS = dict(zip(_MODELS, (VERMILION, PURPLE, GREEN, BLUE)))
_DASHES = dict(zip(_MODELS, ("o-", "v-.", "^--", "s:")))
_STATES = {"LSTM": 2, "GRU": 1, "LSTM with attention": 2}  # times the width: numbers of the state
_STATE_ALONE, _ATTENTION = ("LSTM", "GRU"), ("LSTM with attention", "Transformer")
_SYMBOLS = 4  # 2 bits per symbol
_SHORT = 8
_STRINGS = 4  # whose gradients are averaged
_TINY = float(np.finfo(np.float32).tiny)


def measure(sizes: Sizes, trainer: Trainer) -> Numbers:
    """Train all models at each width; measure what they answer, what their states hold, and their gradients."""
    rows = []
    for width in sizes.widths:
        first, *others = _MODELS
        models = {first: {**_MODELS[first], "width": width}}
        count = probes.count_parameters(_settings(sizes, models[first]))
        for name in others if width in sizes.compared else ():
            models[name] = probes.match_width(_settings(sizes, _MODELS[name]), count)["model"]
        measured = {name: _measure_model(sizes, trainer, model) for name, model in models.items()}
        rows.append({"width": width, "models": measured})
    # Whether it is the state that limits the narrowest, or the number of steps.
    narrowest = {**_MODELS["LSTM"], "width": sizes.widths[0]}
    longer = _measure_model(sizes, trainer, narrowest, times=sizes.longer)
    return {
        "lengths": list(sizes.lengths),
        "probed": list(sizes.probed),
        "bits": np.log2(_SYMBOLS),
        "rows": rows,
        "longer": {"times": sizes.longer, "model": longer},
    }


def _settings(sizes: Sizes, model: dict, seed: int = 0, times: int = 1) -> Settings:
    settings = settings_of("reverse", sizes.trained_to, times * sizes.steps, seed, **model)
    settings["task"]["symbols"] = _SYMBOLS
    return settings | {
        "imports": ["attn.studies.batches"],
        "data": {"source": "short_strings"},
        "optimizer": {"name": "muon", "learning_rate": 1e-2},
    }


def _measure_model(sizes: Sizes, trainer: Trainer, model: dict, times: int = 1) -> dict:
    """Train a model with each seed, for the usual steps or `times` as many, and measure it."""
    runs = []
    for seed in sizes.seeds:
        settings = _settings(sizes, model, seed, times)
        run = trainer.train(settings)
        trainer.say(f"measuring {run.folder.name}")
        exact = probes.exact_match(run, sizes.lengths, sizes.each)
        runs.append(
            {
                "seed": seed,
                "exact_match": exact,
                "half_length": half_length(sizes.lengths, exact),
                **_bits(run, sizes),
                "gradient_before": gradient_by_distance(probes.untrained(settings), sizes.distance),
                "gradient_after": gradient_by_distance(run, max(sizes.lengths)),
            }
        )
    return {
        "parameters": probes.count_parameters(settings),
        "examples": times * sizes.steps * run.config.training.batch_size,
        "width": settings["model"]["width"],
        "runs": runs,
    }


def half_length(lengths: Sequence[int], exact_match: Sequence[float]) -> float:
    """Return the length at which exact match falls below one half, interpolated between ascending lengths.

    The shortest length if exact match is below one half there; the longest if it never falls below.
    """
    for (shorter, above), (longer, below) in itertools.pairwise(zip(lengths, exact_match)):
        if above >= 0.5 > below:
            return shorter + (longer - shorter) * (above - 0.5) / (above - below)
    return float(lengths[0] if exact_match[0] < 0.5 else lengths[-1])


def _bits(run: Run, sizes: Sizes) -> dict[str, list[float]]:
    """Return, for each probed length, the bits of a source that the decoder and a linear probe of the state read."""
    data, recurrent = Generated(run.config.task), run.config.model.name != "transformer"
    answered, probed = [], []
    for length in sizes.probed:
        fitted, tested = (
            data.questions_of_each_length(part, [length], count, 0)
            for part, count in (("validation", sizes.fitted), ("test", sizes.fitted // 2))
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


def check(numbers: Numbers) -> list[Check]:
    """Check that a state cannot carry long strings, that its size decides how long, and that attention can."""
    rows, lengths, probed = numbers["rows"], numbers["lengths"], numbers["probed"]
    models = [row["models"] for row in rows]

    def exact(index: int, names: tuple[str, ...]) -> list[float]:
        return [run["exact_match"][index] for run in _runs(models, *names)]

    def far_over_near(when: str, *names: str) -> list[float]:
        """Return the gradient of the first source symbol over that of the last, the nearest; 0 if both fade."""
        norms = [run[f"gradient_{when}"] for run in _runs(models, *names)]
        return [far / max(near, _TINY) for near, *_, far in norms]

    counts = [[model["parameters"] for model in row.values()] for row in models]
    short = [exact(index, _STATE_ALONE) for index, length in enumerate(lengths) if length <= _SHORT]
    half, held = (
        {name: _means(models, name, what) for name in _STATE_ALONE} for what in ("half_length", "probed_bits")
    )
    per_bit = [length / bits if bits > 0 else np.nan for name in half for length, bits in zip(half[name], held[name])]
    wider = [wide / narrow for name in half for narrow, wide in itertools.pairwise(half[name])]
    source = probed[-1] * numbers["bits"]
    at_longest, gradient = f"exact match at length {lengths[-1]}", "gradient at the farthest over at the nearest symbol"
    trained = min(far_over_near("after", "Transformer"))
    return [
        Check("parameters: fewest over most, any width", min(min(row) / max(row) for row in counts), least=0.95,
              premise=True),
        Check(f"exact match at lengths up to {_SHORT}, LSTM and GRU, worst length, width and seed: short strings do "
              "get through", min(map(min, short)), least=0.99, premise=True),
        Check(f"{at_longest}, LSTM and GRU, best width and seed", max(exact(-1, _STATE_ALONE)), most=0.1),
        Check(f"{at_longest}, LSTM with attention, worst width and seed", min(exact(-1, _ATTENTION[:1])), least=0.9),
        Check(f"{at_longest}, Transformer, worst width and seed", min(exact(-1, _ATTENTION[1:])), least=0.9),
        Check("length at which exact match is one half, LSTM, widest over narrowest",
              half["LSTM"][-1] / half["LSTM"][0], least=1.5),
        Check("the same, each width over the next narrower one, LSTM and GRU, least", min(wider), least=1.1),
        Check("the same over the bits that a probe reads from the state, LSTM and GRU, all widths: largest over "
              "smallest", max(per_bit) / min(per_bit), most=1.5),
        Check(f"bits of the source that the decoder reads at length {probed[-1]}, as a share, LSTM and GRU, most",
              max(run["answered_bits"][-1] / source for run in _runs(models, *_STATE_ALONE)), most=0.9),
        Check("the same, LSTM with attention and Transformer, least",
              min(run["answered_bits"][-1] / source for run in _runs(models, *_ATTENTION)), least=0.95),
        Check(f"bits that a probe reads from the state at length {probed[-1]} over those at {probed[-2]}, LSTM and "
              "GRU, most",
              max(run["probed_bits"][-1] / run["probed_bits"][-2] for run in _runs(models, *_STATE_ALONE)), most=1.25),
        Check(f"length at which exact match is one half, LSTM of width {rows[0]['width']}, with "
              f"{numbers['longer']['times']} times the steps over as usual: the steps do not limit it",
              _means([{"LSTM": numbers["longer"]["model"]}], "LSTM", "half_length")[0] / half["LSTM"][0], most=1.25),
        Check(f"{gradient}, untrained LSTM and GRU, largest", max(far_over_near("before", "LSTM", "GRU")), most=0.1),
        Check(f"{gradient}, untrained Transformer, smallest", min(far_over_near("before", "Transformer")), least=0.1),
        Check(f"{gradient}, trained Transformer, whose answer is the farthest, smallest", trained, least=1.0),
        Check(f"{gradient}, trained LSTM, largest, over trained Transformer, smallest",
              max(far_over_near("after", "LSTM")) / trained, most=0.1),
    ]  # fmt: skip


def _runs(models: list[dict], *names: str) -> list[dict]:
    return [run for row in models for name in names if name in row for run in row[name]["runs"]]


def _means(models: list[dict], name: str, what: str) -> list[float]:
    """Return, for each width, the mean over seeds of a number of a model's runs; of a list, its last number."""
    return [
        float(np.mean([np.atleast_1d(run[what])[-1] for run in row[name]["runs"]])) for row in models if name in row
    ]


def draw(numbers: Numbers) -> Figure:
    """Held-out strings, what the states hold, and how far gradients reach in the widest models; lines are means."""
    figure, (exact, half, proportion, bits, before, after) = panels(3, 11.5, 6.6, rows=2)
    _draw_exact(exact, numbers)
    _draw_half(half, numbers, lambda name, model: [_STATES[name] * model["width"]] * len(model["runs"]))
    half.set(xlabel="numbers of the state", title="length at which half are right")
    tick_lengths(half, sorted({2 * row["width"] for row in numbers["rows"]}))
    half.axhline(numbers["lengths"][-1], color=GRAY, linestyle="--", linewidth=1)
    half.text(0.02, numbers["lengths"][-1] + 0.5, "longest that was evaluated",
              transform=half.get_yaxis_transform(), va="bottom", fontsize=8)  # fmt: skip
    _draw_half(proportion, numbers, lambda name, model: [run["probed_bits"][-1] for run in model["runs"]])
    proportion.set(
        xlabel="bits that a linear probe reads from the state", title="and what the state holds", xlim=(0, None)
    )
    proportion.legend(loc="lower right")
    _draw_bits(bits, numbers)
    for ax, when in ((before, "before"), (after, "after")):
        for name, model in _widest_compared(numbers).items():
            norms = np.mean([run[f"gradient_{when}"] for run in model["runs"]], axis=0)
            every = max(1, len(norms) // 10)
            ax.plot(np.maximum(norms, _TINY), _DASHES[name], color=_COLORS[name], label=name, markevery=every)
        ax.set(yscale="log", xlabel="distance k from the last symbol", ylabel="|d last output / d input|",
               title=f"gradient {when} training")  # fmt: skip
    before.set_ylim(bottom=1e-20)  # below it a gradient underflows soon
    before.legend(loc="lower right")
    return figure


def _widest_compared(numbers: Numbers) -> dict[str, dict]:
    """Return the models of the greatest width at which there are all of them."""
    return [row["models"] for row in numbers["rows"] if row["models"].keys() == _MODELS.keys()][-1]


def _draw_exact(ax: Axes, numbers: Numbers):
    """Draw exact match against the length: a line per width, wider ones darker."""
    for number, row in enumerate(numbers["rows"]):
        fade = 0.3 + 0.7 * (number + 1) / len(numbers["rows"])
        for name in filter(row["models"].__contains__, ("LSTM", *_ATTENTION)):
            matches = np.mean([run["exact_match"] for run in row["models"][name]["runs"]], axis=0)
            label = f"{name}, width {row['width']}" if name == "LSTM" else None if number else name
            ax.plot(numbers["lengths"], matches, _DASHES[name], color=_COLORS[name], alpha=fade, label=label)
    ax.axhline(0.5, color=GRAY, linewidth=0.8, linestyle=":")
    ax.set(xlabel="length, symbols", ylabel="exact match", ylim=(-0.03, 1.03), title="held-out strings")
    ax.legend(loc="lower left")


def _draw_half(ax: Axes, numbers: Numbers, place: Callable[[str, dict], list[float]]):
    """Draw the length at which exact match is one half, of models without attention, against what `place` gives."""
    for name in _STATE_ALONE:
        models = [row["models"][name] for row in numbers["rows"] if name in row["models"]]
        halves = [run["half_length"] for model in models for run in model["runs"]]
        places = [x for model in models for x in place(name, model)]
        ax.plot(places, halves, _DASHES[name][0], color=_COLORS[name], label=name)
    ax.set(ylabel="length, symbols", ylim=(0, 1.15 * numbers["lengths"][-1]))


def _draw_bits(ax: Axes, numbers: Numbers):
    """Draw the bits that decoder and probe read against those of the source, for the narrowest and the widest LSTM."""
    source = np.array(numbers["probed"]) * numbers["bits"]
    for row, marker in ((numbers["rows"][0], "v"), (numbers["rows"][-1], "o")):
        for what, dash, words in (("answered_bits", "-", "decoder"), ("probed_bits", "--", "linear probe")):
            means = np.mean([run[what] for run in row["models"]["LSTM"]["runs"]], axis=0)
            label = f"LSTM, width {row['width']}: {words}"
            ax.plot(source, means, dash, marker=marker, color=_COLORS["LSTM"], label=label)
    attention = [run["answered_bits"] for run in _widest_compared(numbers)["LSTM with attention"]["runs"]]
    style = {"marker": "^", "color": _COLORS["LSTM with attention"]}
    ax.plot(source, np.mean(attention, axis=0), "-", label="LSTM with attention: decoder", **style)
    ax.set(xlabel="bits of the source", ylabel="bits read", title="what is read", ylim=(0, 1.7 * source[-1]))
    ax.legend(loc="upper left")


def tables(numbers: Numbers) -> list[Table]:
    """Return per model and width: sizes, lengths and bits, as means over seeds."""
    rows = []
    for row in numbers["rows"]:
        for name, model in row["models"].items():
            halves, shares = ([run[what] for run in model["runs"]] for what in ("half_length", "answered_bits"))
            longest = numbers["lengths"][-1]
            half = f"beyond {longest}" if max(halves) == longest else f"{np.mean(halves):.1f}"
            state = _STATES[name] * model["width"] if name in _STATES else "none"
            probed = [run["probed_bits"][-1] for run in model["runs"] if run["probed_bits"]]
            bits = [f"{np.mean(shares, axis=0)[-1]:.1f}", f"{np.mean(probed):.1f}" if probed else "none"]
            rows.append([name, model["width"], model["parameters"], model["examples"], state, half, *bits])
    at = f"at length {numbers['probed'][-1]}"
    header = ["model", "width", "parameters", "examples", "numbers of the state", "half are right at length"]
    header += [f"bits that the decoder reads {at}", f"bits that a probe reads {at}"]
    return [Table("Means over seeds", header, rows)]


CLAIM = Claim(
    measure, check, draw, tables,
    title="The bottleneck",
    sentence="A recurrent network squeezes a sequence through one hidden state: the longer it is, the less gets "
    "through, and the gradient of what was read long ago fades. Attention reads every input directly.",
    source="Bahdanau et al. 2015, sections 1 and 5.1; Cho et al. 2014, On the properties; Bengio et al. 1994",
    link="https://arxiv.org/abs/1409.0473",
    equation=r"\frac{\partial h_T}{\partial x_{T-k}}=\left(\prod_{i=T-k+1}^{T}\frac{\partial h_i}{\partial "
    r"h_{i-1}}\right)\frac{\partial h_{T-k}}{\partial x_{T-k}}",
    method=[
        "An LSTM and a GRU, whose decoder starts from the encoder's last state and sees nothing else, an LSTM with "
        "multiplicative attention (Luong et al. 2015), and a Transformer learn to reverse strings of four different "
        "symbols, 2 bits each, with the same examples, optimizer and steps. Each width of the LSTM is compared with "
        "others of as many parameters. Every batch has one length n, drawn with a probability of about 1/√n, so that "
        "short strings are learned first and well. "
        "They are trained on lengths a little beyond the evaluated ones, since the very longest are learned last, and "
        "evaluated on held-out strings of each length.",
        "Whether it is the state, or the number of steps: the narrowest LSTM is also trained for more steps.",
        "What the state holds: the bits that the decoder reads from it (the length times 2, plus log2 of its "
        "probabilities of the correct symbols), and the bits that a linear probe reads, a logistic regression per "
        "position, fitted to one part of the held-out strings and measured on another. Both are lower bounds.",
        "The gradient: the Jacobian of the last symbol's logits with respect to the embedding of each source symbol, "
        "its Frobenius norm against the distance k from the last one: before training over a greater distance, after "
        "it over the greatest evaluated length. The last symbol of a reversed string is the first of the source, so "
        "what it needs is the farthest.",
    ],
    full=Sizes(lengths=(4, 5, 6, 7, 8, 12, 16, 20, 24, 28, 32, 36, 40), trained_to=48, distance=128,
               probed=(10, 20, 40), widths=(32, 64, 128), compared=(32, 64, 128), steps=3_000, longer=4,
               seeds=(0, 1, 2), each=200, fitted=2_000),
    quick=Sizes(lengths=(4, 6, 8, 12, 16), trained_to=20, distance=64, probed=(8, 16), widths=(32, 64), compared=(32,),
                steps=800, longer=2, seeds=(0,), each=50, fitted=500),
)  # fmt: skip
