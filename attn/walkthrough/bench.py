"""Where measurements train their models: ordinary runs, each trained once, kept in the walkthrough's folder.

Any of them can be opened with `attn.load`, and one that was interrupted goes on from its checkpoint.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attn import runs
from attn.runs import Run
from attn.tasks.examples import Questions, decoder_input
from attn.tasks.generated import Generated
from attn.training import meshes
from attn.training.checkpoints import CheckpointError
from attn.training.config import Config, from_mapping, to_mapping
from attn.training.folders import Folder, RunError, write_whole
from attn.training.loop import train
from attn.training.progress import Clock
from attn.training.state import State, initial_state, model_structure

_STEPS = 250  # on the way from one look to the next whether to stop: at most so many
_EXAMPLES = 200  # of the judgement that ends a training; measurements ask for themselves


@dataclasses.dataclass(frozen=True)
class Bench:
    """What a measurement works with.

    Attributes:
      folder: where its runs are kept.
      say: shows a line.
    """

    folder: pathlib.Path
    say: Callable[[str], None] = print

    def begun(self, settings: dict[str, dict]) -> bool:
        """Whether a run with these settings, not watched, is there already, whole or in part."""
        return Folder(self.folder / name_of(configured(settings))).newest_step() is not None

    def trained(self, settings: dict[str, dict], watch: Callable[[Run], Any] | None = None) -> Run:
        """A run with these settings, trained to its end.

        Args:
          settings: by section, as of a config; the rest is as in `attn.training.config`.
          watch: called with the run at every checkpoint; `watched` gives back what it returned, plain values.
        """
        config = configured(settings)
        name = name_of(config) + ("-watched" if watch else "")
        folder, data = Folder(self.folder / name), Generated(config.task)
        mesh = meshes.data_mesh(config.training.batch_size)
        with _delete_to_mend(folder.path, RunError, CheckpointError):
            if folder.is_run():
                folder.config()  # damaged, it is said before the training
            run = runs.load(folder.path) if folder.newest_step() == config.training.steps else None
            if run is None or run.step != config.training.steps:  # the newest checkpoint may be damaged
                self.say(f"training {name}, {config.training.steps:,} steps")
                with folder.held():
                    if not folder.is_run():
                        folder.create(config, data)
                    writer = _writer(config, folder, watch)
                    train(config, data, folder, mesh, Clock(), resume=True, on_checkpoint=writer)
                run = runs.load(folder.path)
            return run

    def watched(self, run: Run) -> list[dict]:
        """What was seen of a run at every checkpoint: `{"step", "seen"}`, by step."""
        steps, every = run.config.training.steps, run.config.training.checkpoint_every
        paths = [_watched(run.folder, step) for step in [*range(every, steps, every), steps]]
        with _delete_to_mend(run.folder, OSError, ValueError):
            return [json.loads(path.read_text()) for path in paths]


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and with."""
    return {
        "devices": [device.device_kind for device in jax.devices()],
        "cores": meshes.cores(),
        "jax": jax.__version__,
        "attn": importlib.metadata.version("attn"),
    }


def configured(settings: dict[str, dict]) -> Config:
    """The config with these settings; a training is saved ten times, shown at least as often, and judged at its end."""
    steps = settings.get("training", {}).get("steps", 2_000)
    often = {
        "steps_per_dispatch": min(max(1, steps // 10), _STEPS),
        "evaluate_every": steps,
        "checkpoint_every": max(1, steps // 10),
    }
    quiet = {"training": often, "evaluation": {"examples": _EXAMPLES, "examples_on_the_way": 1}}
    return from_mapping({**settings, **{name: more | settings.get(name, {}) for name, more in quiet.items()}})


def untrained(settings: dict[str, dict]) -> Run:
    """The same run before its first step."""
    config = configured(settings)
    graphdef, _ = model_structure(config, config.task.vocabulary)
    params = jax.jit(lambda: initial_state(config, config.task.vocabulary).params)()
    return Run(pathlib.Path(name_of(config)), config, config.task.vocabulary, graphdef, params, 0)


def name_of(config: Config) -> str:
    """A name that tells runs apart: what people look for, and a digest of everything else."""
    digest = hashlib.sha256(json.dumps(to_mapping(config), sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.task.name}-{config.model.name}-seed{config.training.seed}-{digest}"


def losses(run: Run) -> list[tuple[int, float]]:
    """The training loss by step, in nats a token."""
    with _delete_to_mend(run.folder, OSError, ValueError, KeyError, TypeError):
        rows = [json.loads(line) for line in Folder(run.folder).metrics.read_text().splitlines()]
        return [(row["step"], row["loss"]) for row in rows]


@contextlib.contextmanager
def _delete_to_mend(folder: pathlib.Path, *errors: type[Exception]) -> Iterator[None]:
    """Name the run in which something is damaged, and what to do."""
    try:
        yield
    except errors as error:
        raise RunError(f"{folder}: damaged ({error}); delete it to train it again") from None


def exact_match(run: Run, lengths: Collection[int], each: int) -> list[float]:
    """The share of held-out strings of each length that are answered exactly."""
    scores = run.evaluate(sorted(lengths), each).exact_match
    return [float(scores.sum[length] / scores.count[length]) for length in sorted(lengths)]


def parameters(settings: dict[str, dict]) -> int:
    """How many numbers the model of these settings learns."""
    config = configured(settings)
    return sum(leaf.size for leaf in jax.tree.leaves(model_structure(config, config.task.vocabulary)[1]))


def matched(settings: dict[str, dict], count: int) -> dict[str, dict]:
    """The settings with the width at which the model has as many parameters as may be, but no more than `count`."""

    def of_width(width: int) -> dict[str, dict]:
        return {**settings, "model": {**settings["model"], "width": width}}

    few, many = 1, 2
    while parameters(of_width(many)) <= count:
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if parameters(of_width(middle)) <= count else (few, middle)
    return of_width(few)


def cross_weights(run: Run, length: int, strings: int) -> tuple[Float[np.ndarray, "B L N T S"], Questions]:
    """The cross-attention of held-out strings of one length, the right tokens read, and the strings."""
    questions = Generated(run.config.task).questions_of_each_length("test", [length], strings, 0)
    weights = _cross(run.graphdef, run.vocabulary.begin, run.params, questions.sources, questions.targets)
    return np.asarray(weights), questions


@functools.partial(jax.jit, static_argnums=(0, 1))
def _cross(graphdef: nnx.GraphDef, begin: int, params: nnx.State, sources, targets) -> Float[Array, "B L N T S"]:
    model = nnx.merge(graphdef, params)

    def one(source, target):
        return model(source, decoder_input(target, begin), return_weights=True)[1].cross

    return jax.vmap(one)(sources, targets)


def without(run: Run, *, inside: str, matrix: str, head: int | None = None) -> Run:
    """The run with a matrix of its attention layers at zero, or a head's part of it.

    Without W_O an attention layer adds nothing; without W_Q all scores are zero and the weights even.

    Args:
      run: of a Transformer.
      inside: part of the matrix's path, such as "decoder.0.cross".
      matrix: "W_Q", "W_K", "W_V" or "W_O".
      head: whose part, None for all.
    """
    heads = 0 if matrix == "W_O" else 1  # the axis of the heads
    rows = (slice(None),) * heads + (slice(None) if head is None else head,)
    return _with(run, inside, matrix, lambda path, value: value.at[rows].set(0.0))


def put_back(run: Run, original: Run, *, inside: str, matrix: str) -> Run:
    """The run with a matrix of its attention layers as it is in the original; `inside`, `matrix` as of `without`."""
    saved = dict(nnx.to_flat_state(original.params))
    return _with(run, inside, matrix, lambda path, value: saved[path][...])


def _with(run: Run, inside: str, matrix: str, change: Callable) -> Run:
    """The run with `(path, value) -> value` applied to a matrix of its attention layers."""
    flat = [
        (path, leaf.replace(change(path, leaf[...])))
        if path[-1] == matrix and inside in ".".join(map(str, path))
        else (path, leaf)
        for path, leaf in nnx.to_flat_state(run.params)
    ]
    return dataclasses.replace(run, params=nnx.from_flat_state(flat))


def _watched(folder: pathlib.Path, step: int) -> pathlib.Path:
    return folder / "watched" / f"{step:08d}.json"


def _writer(config: Config, folder: Folder, watch: Callable[[Run], Any] | None) -> Callable[[State], None] | None:
    """Write down what is seen of a training on its way."""
    if watch is None:
        return None
    graphdef, _ = model_structure(config, config.task.vocabulary)

    def write(state: State):
        params = jax.tree.map(jnp.asarray, jax.device_get(state.kept))
        run = Run(folder.path, config, config.task.vocabulary, graphdef, params, int(state.step))
        path = _watched(folder.path, run.step)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps({"step": run.step, "seen": watch(run)}))

    return write
