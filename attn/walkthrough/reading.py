"""Claim: where cross-attention points is what the answer is made from, so that weights can be read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from attn.nn.encoder_decoder import PAD, Cache
from attn.runs import Run
from attn.tasks.examples import decoder_input
from attn.tasks.generated import Generated
from attn.walkthrough.access import reversing
from attn.walkthrough.bench import Bench
from attn.walkthrough.claims import Check, Claim, Numbers


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the training on strings of up to `max_length`, and how many strings of which length are looked at."""

    max_length: int
    steps: int
    seeds: tuple[int, ...]
    length: int
    strings: int


def measure(sizes: Sizes, bench: Bench) -> Numbers:
    """For both tasks: what the argmax points at, and what hiding it does."""
    return {
        "length": sizes.length,
        "runs": [
            {"task": task, "seed": seed, **_read(reversing(bench, sizes, seed, task), sizes)}
            for task in ("reverse", "copy")
            for seed in sizes.seeds
        ],
    }


def _read(run: Run, sizes: Sizes) -> dict:
    """Shares over all symbols of all strings."""
    questions = Generated(run.config.task).questions_of_each_length("test", [sizes.length], sizes.strings, 0)
    true_place = run.config.task.kind.index(np.arange(sizes.length), sizes.length)
    looked = _looks(run.graphdef, run.vocabulary.begin, run.params, questions.sources, questions.targets)
    weights, answers, hidden = map(np.asarray, looked)
    n = sizes.length
    weights = weights[:, -1, :, :n]  # the last layer's, over the symbols and the end token: [B N n n+1]
    pointed = weights.mean(1).argmax(-1)  # [B n]
    # Another place than the one pointed at, each with the same probability.
    elsewhere = (pointed + np.random.default_rng(0).integers(1, n + 1, pointed.shape)) % (n + 1)
    changed = hidden[:, :, :n] != answers[:, None, :n]  # [B hidden place, step]

    def share_changed(places) -> float:
        return float(np.take_along_axis(changed.swapaxes(1, 2), places[..., None], axis=-1).mean())

    return {
        "right": float((answers == questions.targets).mean()),
        "argmax_is_true_source": float((pointed == true_place).mean()),
        "argmax_by_head": (weights.argmax(-1) == true_place).mean((0, 2)).tolist(),
        "changed_without_argmax": share_changed(pointed),
        "changed_without_random": share_changed(elsewhere),
        "changed_by_distance": [[d, _at_distance(changed, true_place, d)] for d in range(-n // 2, n // 2 + 1)],
    }


def _at_distance(changed, true_place, distance: int) -> float:
    """How often an answer changes when the place at a distance from its true source is hidden."""
    n = len(true_place)
    steps = [t for t in range(n) if 0 <= true_place[t] + distance < n]
    return float(changed[:, true_place[steps] + distance, steps].mean())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _looks(graphdef: nnx.GraphDef, begin: int, params: nnx.State, sources, targets):
    """Weights `[B L N T S]`, answers `[B T]`, and answers with each source place hidden from cross-attention `[B S T]`.

    Teacher-forced: the right tokens are read.
    """
    model = nnx.merge(graphdef, params)

    def look(source, target):
        read = decoder_input(target, begin)
        memory, _ = model.encode(source)
        cache = model.start(memory, jnp.sum(source != PAD), len(target))
        logits, _, (_, cross) = model.decode(read, cache, return_weights=True)
        hidden = jax.vmap(lambda place: model.decode(read, hide(cache, place))[0].argmax(-1))(jnp.arange(len(source)))
        return cross, logits.argmax(-1), hidden

    return jax.vmap(look)(sources, targets)


def hide(cache: Cache, place) -> Cache:
    """The cache without the keys and values of one place of the source; the places after it move up."""

    def moved(rows):
        numbers = jnp.arange(len(rows))
        return rows[jnp.where(numbers < place, numbers, jnp.minimum(numbers + 1, len(rows) - 1))]

    return cache._replace(memory=jax.tree.map(moved, cache.memory), source_length=cache.source_length - 1)


def check(numbers: Numbers) -> list[Check]:
    """The weights point at the source, hiding it changes the answer, hiding others does not."""

    def of_all(name: str) -> list[float]:
        return [run[name] for run in numbers["runs"]]

    return [
        Check("symbols for which the argmax of the mean head is the true source, worst run",
              min(of_all("argmax_is_true_source")), least=0.9),
        Check("answers that change when the place it points at is hidden, worst run",
              min(of_all("changed_without_argmax")), least=0.9),
        Check("answers that change when another place is hidden, at random, worst run",
              max(of_all("changed_without_random")), most=0.1),
    ]  # fmt: skip


def draw(numbers: Numbers) -> Figure:
    """The three shares of each run, and how often the answer changes by the distance of what is hidden."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = {
        "argmax_is_true_source": "argmax is the\ntrue source",
        "changed_without_argmax": "changes without\nthe argmax",
        "changed_without_random": "changes without\na random place",
    }
    colors = {"reverse": "tab:blue", "copy": "tab:orange"}
    for number, run in enumerate(numbers["runs"]):
        aside = np.arange(3) + 0.08 * (number - (len(numbers["runs"]) - 1) / 2)  # runs that agree stay visible
        label = f"{run['task']}, seed {run['seed']}"
        left.plot(aside, [run[name] for name in names], "o", color=colors[run["task"]], alpha=0.7, label=label)
        right.plot(*zip(*run["changed_by_distance"]), ".-", color=colors[run["task"]], alpha=0.7)
    left.set_xticks(range(3), names.values(), fontsize=8)
    left.set(ylim=(-0.03, 1.05), xlim=(-0.5, 2.5), ylabel="share of symbols")
    right.set(xlabel="hidden place, from the true source", ylabel="answers that change", ylim=(-0.03, 1.05))
    left.legend(fontsize=8)
    return figure


CLAIM = Claim(
    title="Reading it",
    sentence="The weights can be read: the source symbol that cross-attention points at is the one that the answer is "
    "made from.",
    source="Bahdanau et al. 2015, section 5.2.1; doubted by Jain and Wallace 2019",
    link="https://arxiv.org/abs/1902.10186",
    equation=r"\hat{\jmath}(t)=\mathrm{argmax}_j\ \frac{1}{N}\sum_n p^{(n)}_{tj}",
    method=[
        "Of held-out strings, the cross-attention of the last layer, the mean of its heads: how often its argmax names "
        "the source symbol that the task asks for, among all symbols and the end token.",
        "Faithfulness: the keys and values of one source place are hidden from all cross-attention of all steps, and "
        "the answer at a step is taken again; hidden is the place that the argmax of that step points at, or "
        "another one at random. The right tokens are read throughout.",
    ],
    full=Sizes(32, 2_000, (0, 1, 2), 20, 200),
    quick=Sizes(12, 800, (0,), 10, 100),
    measure=measure,
    check=check,
    draw=draw,
)  # fmt: skip
