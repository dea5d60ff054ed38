"""Claim: one hidden state cannot carry a long sequence, and its gradient fades with distance; attention's does not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from attn.inspection.influence import influence
from attn.runs import Run
from attn.tasks.examples import decoder_input
from attn.tasks.generated import Generated
from attn.walkthrough.bench import Bench, exact_match, matched, parameters, untrained
from attn.walkthrough.claims import Check, Claim, Numbers, Table

_MODELS = {
    "LSTM": {"name": "lstm"},
    "GRU": {"name": "gru"},
    "LSTM with attention": {"name": "lstm", "attention": "multiplicative"},
    "Transformer": {"name": "transformer"},
}
_STRINGS = 4  # whose gradients are averaged


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Lengths that are asked; of training, somewhat more; width of the Transformer; steps; seeds; strings of each."""

    lengths: tuple[int, ...]
    trained_to: int
    width: int
    steps: int
    seeds: tuple[int, ...]
    each: int


def measure(sizes: Sizes, bench: Bench) -> Numbers:
    """Train all models with as many parameters on as many examples; ask each length; follow the gradient back."""
    settings = {name: _settings(sizes, model) for name, model in _MODELS.items()}
    count = parameters(settings["Transformer"])
    numbers = {"lengths": list(sizes.lengths), "models": {}}
    for name, given in settings.items():
        given = given if name == "Transformer" else matched(given, count)
        runs = []
        for seed in sizes.seeds:
            seeded = {**given, "training": {**given["training"], "seed": seed}}
            run = bench.trained(seeded)
            runs.append(
                {
                    "seed": seed,
                    "exact_match": exact_match(run, sizes.lengths, sizes.each),
                    "gradient_before": gradient_by_distance(untrained(seeded), max(sizes.lengths)),
                    "gradient_after": gradient_by_distance(run, max(sizes.lengths)),
                }
            )
        numbers["models"][name] = {
            "parameters": parameters(given),
            "examples": sizes.steps * run.config.training.batch_size,
            "width": given["model"]["width"],
            "runs": runs,
        }
    return numbers


def _settings(sizes: Sizes, model: dict) -> dict[str, dict]:
    return {
        "task": {"name": "reverse", "min_length": min(sizes.lengths), "max_length": sizes.trained_to},
        "model": {**model, "width": sizes.width},
        "training": {"steps": sizes.steps},
    }


def gradient_by_distance(run: Run, length: int) -> list[float]:
    """The norm of d(logits of the last symbol) / d(embedding of the symbol k places before the last), for each k.

    The mean over some strings. The last symbol of a reversed string is the first of the source, the farthest.
    """
    questions = Generated(run.config.task).questions_of_each_length("test", [length], _STRINGS, 0)
    pairs = zip(questions.sources, questions.targets)
    norms = [_norms(run.graphdef, run.vocabulary.begin, run.params, *pair) for pair in pairs]
    return np.mean(norms, axis=0)[:length][::-1].tolist()  # without the end token


@functools.partial(jax.jit, static_argnums=(0, 1))
def _norms(graphdef: nnx.GraphDef, begin: int, params: nnx.State, source, target) -> Float[Array, "S"]:
    """Of the last symbol, which stands before the target's end token; both are as long as can be."""
    last = jnp.array([len(target) - 2])
    return influence(nnx.merge(graphdef, params), source, decoder_input(target, begin), last)[0]


def check(numbers: Numbers) -> list[Check]:
    """Long strings are beyond a state and within attention's reach, and the gradient tells why."""
    models, longest = numbers["models"], numbers["lengths"][-1]

    def at_longest(name: str) -> list[float]:
        return [run["exact_match"][-1] for run in models[name]["runs"]]

    def at_shortest(name: str) -> list[float]:
        return [run["exact_match"][0] for run in models[name]["runs"]]

    def far_over_near(when: str, *names: str) -> list[float]:
        """The gradient of the first source symbol, the farthest, over that of the last, the nearest; 0 if both fade."""
        norms = [run[f"gradient_{when}"] for name in names for run in models[name]["runs"]]
        return [far / max(near, np.finfo(np.float32).tiny) for near, *_, far in norms]

    counts = [model["parameters"] for model in models.values()]
    shortest, gradient = numbers["lengths"][0], "gradient at the farthest over at the nearest source symbol"
    return [
        Check("parameters: fewest over most", min(counts) / max(counts), least=0.95, premise=True),
        Check(f"exact match at length {shortest}, LSTM and GRU, worst seed: short strings do get through",
              min(at_shortest("LSTM") + at_shortest("GRU")), least=0.9),
        Check(f"exact match at length {longest}, LSTM, best seed", max(at_longest("LSTM")), most=0.1),
        Check(f"exact match at length {longest}, GRU, best seed", max(at_longest("GRU")), most=0.1),
        Check(f"exact match at length {longest}, LSTM with attention, worst seed",
              min(at_longest("LSTM with attention")), least=0.9),
        Check(f"exact match at length {longest}, Transformer, worst seed", min(at_longest("Transformer")), least=0.9),
        Check(f"{gradient}, untrained LSTM and GRU, largest", max(far_over_near("before", "LSTM", "GRU")), most=0.1),
        Check(f"{gradient}, untrained Transformer, smallest seed",
              min(far_over_near("before", "Transformer")), least=0.1),
        Check(f"{gradient}, trained Transformer, whose answer is the farthest, smallest seed",
              min(far_over_near("after", "Transformer")), least=1.0),
        Check(f"{gradient}, trained LSTM, largest seed, over trained Transformer, smallest",
              max(far_over_near("after", "LSTM")) / min(far_over_near("after", "Transformer")), most=0.1),
    ]  # fmt: skip


def draw(numbers: Numbers) -> Figure:
    """Exact match by length, and the gradient by distance before and after training."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for (name, model), color in zip(numbers["models"].items(), ("tab:red", "tab:orange", "tab:green", "tab:blue")):
        for number, run in enumerate(model["runs"]):
            label = None if number else name
            left.plot(numbers["lengths"], run["exact_match"], ".-", color=color, label=label, alpha=0.8)
            for ax, when in ((middle, "before"), (right, "after")):
                ax.plot(run[f"gradient_{when}"], color=color, linewidth=1, label=label, alpha=0.8)
    left.set(xscale="log", xlabel="length", ylabel="exact match", ylim=(-0.03, 1.03), title="held-out strings")
    left.set_xticks(numbers["lengths"], numbers["lengths"])
    left.minorticks_off()
    for ax, when in ((middle, "before"), (right, "after")):
        ax.set(yscale="log", xlabel="distance k from the last symbol", title=f"|d last output / d input|, {when}")
    left.legend(fontsize=8)
    return figure


def tables(numbers: Numbers) -> list[Table]:
    """Sizes, and exact match by length, worst and best seed."""
    rows = []
    for name, model in numbers["models"].items():
        matches = np.array([run["exact_match"] for run in model["runs"]])
        cells = [f"{low:.2f} to {high:.2f}" for low, high in zip(matches.min(0), matches.max(0))]
        rows.append([name, model["width"], model["parameters"], model["examples"], *cells])
    header = ["model", "width", "parameters", "examples", *(f"length {n}" for n in numbers["lengths"])]
    return [Table("Exact match, worst to best seed", header, rows)]


CLAIM = Claim(
    title="The bottleneck",
    sentence="A recurrent network squeezes a sequence through one hidden state: the longer it is, the less gets "
    "through, and the gradient of what was read long ago fades. Attention looks at every input directly.",
    source="Bahdanau et al. 2015, sections 1 and 5.1; Cho et al. 2014, On the properties; Bengio et al. 1994",
    link="https://arxiv.org/abs/1409.0473",
    equation=r"\frac{\partial h_T}{\partial x_{T-k}}=\left(\prod_{i=T-k+1}^{T}\frac{\partial h_i}{\partial "
    r"h_{i-1}}\right)\frac{\partial h_{T-k}}{\partial x_{T-k}}",
    method=[
        "An LSTM and a GRU, whose decoder starts from the encoder's last state and sees nothing else, an LSTM with "
        "multiplicative attention (Luong et al. 2015), and a Transformer learn to reverse strings: the same examples, "
        "optimizer and steps, and as many parameters. They are trained on lengths a little beyond those asked, since "
        "the very longest are learnt last, and answer held-out strings of each length.",
        "The cause: the Jacobian of the last symbol's logits with respect to the embedding of each source symbol, its "
        "Frobenius norm against the distance k from the last one, before and after training. The last symbol "
        "of a reversed string is the first of the source, so that what it needs is the farthest.",
    ],
    full=Sizes((4, 8, 16, 32, 64, 128), 144, 64, 4_000, (0, 1, 2), 100),
    quick=Sizes((4, 8, 16, 24), 27, 64, 800, (0,), 50),
    measure=measure,
    check=check,
    draw=draw,
    tables=tables,
)
