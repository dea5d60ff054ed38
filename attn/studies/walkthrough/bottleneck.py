"""Claim: one hidden state cannot carry a long sequence, and its gradient fades with distance; attention's does not."""

import numpy as np
from matplotlib.figure import Figure

from attn.runs import Run
from attn.studies import probes
from attn.studies.jobs import Settings, Trainer, settings_of
from attn.studies.report import Table, panels, tick_lengths
from attn.studies.walkthrough.claims import Check, Claim, Numbers, Sizes

_MODELS = {
    "LSTM": {"name": "lstm"},
    "GRU": {"name": "gru"},
    "LSTM with attention": {"name": "lstm", "attention": "multiplicative"},
    "Transformer": {"name": "transformer"},
}
_STRINGS = 4  # whose gradients are averaged


def measure(sizes: Sizes, trainer: Trainer) -> Numbers:
    """Train all models with equally many parameters and examples; evaluate each length; follow the gradient back."""
    count = probes.count_parameters(_settings(sizes, _MODELS["Transformer"]))
    models = {}
    for name, model in _MODELS.items():
        if name != "Transformer":
            model = probes.match_width(_settings(sizes, model), count)["model"]
        models[name] = _measure_model(sizes, trainer, model)
    return {"lengths": list(sizes.lengths), "models": models}


def _settings(sizes: Sizes, model: dict, seed: int = 0) -> Settings:
    settings = settings_of("reverse", sizes.trained_to, sizes.steps, seed, **{"width": sizes.width} | model)
    settings["task"]["min_length"] = min(sizes.lengths)
    return settings


def _measure_model(sizes: Sizes, trainer: Trainer, model: dict) -> dict:
    runs = []
    for seed in sizes.seeds:
        settings = _settings(sizes, model, seed)
        run = trainer.train(settings)
        runs.append(
            {
                "seed": seed,
                "exact_match": probes.exact_match(run, sizes.lengths, sizes.each),
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


def gradient_by_distance(run: Run, length: int) -> list[float]:
    """Return the norm of d(logits of the last symbol) / d(embedding of the symbol k before the last one), for each k.

    The mean over some strings. The last symbol of a reversed string is the first of the source, the farthest.
    """
    norms = probes.teacher_forced(probes.gradient_norms, run, probes.held_out(run, length, _STRINGS))
    return norms.mean(axis=0)[:length][::-1].tolist()  # without the end token


def check(numbers: Numbers) -> list[Check]:
    """Check that a state cannot carry long strings and attention can, and that the gradients explain it."""
    models, shortest, longest = numbers["models"], numbers["lengths"][0], numbers["lengths"][-1]

    def exact(index: int, *names: str) -> list[float]:
        return [run["exact_match"][index] for name in names for run in models[name]["runs"]]

    def far_over_near(when: str, *names: str) -> list[float]:
        """Return the gradient of the first source symbol over that of the last, the nearest; 0 if both fade."""
        norms = [run[f"gradient_{when}"] for name in names for run in models[name]["runs"]]
        return [far / max(near, np.finfo(np.float32).tiny) for near, *_, far in norms]

    counts = [model["parameters"] for model in models.values()]
    at_longest = f"exact match at length {longest}"
    gradient = "gradient at the farthest over at the nearest source symbol"
    trained = min(far_over_near("after", "Transformer"))
    return [
        Check("parameters: fewest over most", min(counts) / max(counts), least=0.95, premise=True),
        Check(f"exact match at length {shortest}, LSTM and GRU, worst seed: short strings do get through",
              min(exact(0, "LSTM", "GRU")), least=0.9),
        Check(f"{at_longest}, LSTM, best seed", max(exact(-1, "LSTM")), most=0.1),
        Check(f"{at_longest}, GRU, best seed", max(exact(-1, "GRU")), most=0.1),
        Check(f"{at_longest}, LSTM with attention, worst seed", min(exact(-1, "LSTM with attention")), least=0.9),
        Check(f"{at_longest}, Transformer, worst seed", min(exact(-1, "Transformer")), least=0.9),
        Check(f"{gradient}, untrained LSTM and GRU, largest", max(far_over_near("before", "LSTM", "GRU")), most=0.1),
        Check(f"{gradient}, untrained Transformer, smallest seed",
              min(far_over_near("before", "Transformer")), least=0.1),
        Check(f"{gradient}, trained Transformer, whose answer is the farthest, smallest seed", trained, least=1.0),
        Check(f"{gradient}, trained LSTM, largest seed, over trained Transformer, smallest",
              max(far_over_near("after", "LSTM")) / trained, most=0.1),
    ]  # fmt: skip


def draw(numbers: Numbers) -> Figure:
    """Exact match by length, and the gradient by distance before and after training."""
    figure, (left, middle, right) = panels(3, 11, 3.4)
    for (name, model), color in zip(numbers["models"].items(), ("tab:red", "tab:orange", "tab:green", "tab:blue")):
        for number, run in enumerate(model["runs"]):
            style = {"color": color, "alpha": 0.8, "label": None if number else name}
            left.plot(numbers["lengths"], run["exact_match"], ".-", **style)
            middle.plot(run["gradient_before"], linewidth=1, **style)
            right.plot(run["gradient_after"], linewidth=1, **style)
    left.set(xlabel="length", ylabel="exact match", ylim=(-0.03, 1.03), title="held-out strings")
    tick_lengths(left, numbers["lengths"])
    for ax, when in ((middle, "before"), (right, "after")):
        ax.set(yscale="log", xlabel="distance k from the last symbol", title=f"|d last output / d input|, {when}")
    left.legend(fontsize=8)
    return figure


def tables(numbers: Numbers) -> list[Table]:
    """Return sizes, and exact match by length for the worst and the best seed."""
    rows = []
    for name, model in numbers["models"].items():
        matches = np.array([run["exact_match"] for run in model["runs"]])
        cells = [f"{low:.2f} to {high:.2f}" for low, high in zip(matches.min(0), matches.max(0))]
        rows.append([name, model["width"], model["parameters"], model["examples"], *cells])
    header = ["model", "width", "parameters", "examples", *(f"length {n}" for n in numbers["lengths"])]
    return [Table("Exact match, worst to best seed", header, rows)]


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
        "multiplicative attention (Luong et al. 2015), and a Transformer learn to reverse strings, with the same "
        "examples, optimizer and steps, and equally many parameters. They are trained on lengths a little beyond the "
        "evaluated ones, since the very longest are learned last, and evaluated on held-out strings of each length.",
        "The cause: the Jacobian of the last symbol's logits with respect to the embedding of each source symbol, its "
        "Frobenius norm against the distance k from the last one, before and after training. The last symbol "
        "of a reversed string is the first of the source, so what it needs is the farthest.",
    ],
    full=Sizes(lengths=(4, 8, 16, 32, 64, 128), trained_to=144, width=64, steps=4_000, seeds=(0, 1, 2), each=100),
    quick=Sizes(lengths=(4, 8, 16, 24), trained_to=27, width=64, steps=800, seeds=(0,), each=50),
)  # fmt: skip
