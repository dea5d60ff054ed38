"""Train every model of a study once, resume interrupted trainings, and run a study job by job.

The folder of a study holds its results as JSON, its models under `runs/`, which `attn.load` opens, and compiled
programs under `programs/`. Existing results and models are not computed again.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attn import runs
from attn.runs import Run
from attn.studies.report import save_json
from attn.training import meshes
from attn.training.checkpoints import CheckpointError
from attn.training.config import Config, from_mapping, to_mapping
from attn.training.data import load as load_data
from attn.training.folders import Folder, RunError
from attn.training.loop import train
from attn.training.programs import keep_programs
from attn.training.progress import Clock
from attn.training.state import State, model_structure

Settings = dict[str, Any]  # of a run, by section, and its imports, as `attn.training.config.from_mapping` takes them

_STEPS_PER_CALL = 250  # at most, so that Ctrl-C is noticed soon
_WATCHED = "watched/{:08d}.json"  # one file per step
_EXAMPLES = 200  # of the evaluation at the end of a training; few, since studies do their own evaluations


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Trains runs in a folder: opens a finished run, resumes an interrupted one from its checkpoint.

    Attributes:
      folder: holds one folder per run.
      say: prints a line.
    """

    folder: pathlib.Path
    say: Callable[[str], None] = print

    def is_started(self, settings: Settings) -> bool:
        """Return whether a run with these settings exists, finished or not."""
        return Folder(self.folder / name_of(configured(settings))).newest_step() is not None

    def train(self, settings: Settings, watch: Callable[[Run], Any] | None = None) -> Run:
        """Return the run with these settings, trained to its end.

        Args:
          settings: by section; missing ones have the defaults of `attn.training.config`.
          watch: called with the run at every checkpoint; `watched` returns its results, which must be plain values.

        Raises:
          RunError: the folder of the run is damaged.
        """
        config = configured(settings)
        name = name_of(config) + ("-watched" if watch else "")
        folder, data = Folder(self.folder / name), load_data(config)
        mesh = meshes.model_mesh(config.training.batch_size, config.mesh)
        with _delete_to_repair(folder.path, RunError, CheckpointError):
            if folder.is_run():
                folder.config()  # so that a damaged config is reported before the training
            run = runs.load(folder.path) if folder.newest_step() == config.training.steps else None
            if run is None or run.step != config.training.steps:  # the newest checkpoint may be damaged
                self.say(f"training {name}, {config.training.steps:,} steps")
                with folder.held():
                    if not folder.is_run():
                        folder.create(config, data)
                    on_checkpoint = watch and _watcher(config, folder, watch)
                    train(config, data, folder, mesh, Clock(), resume=True, on_checkpoint=on_checkpoint)
                run = runs.load(folder.path)
            return run

    def watched(self, run: Run) -> list[dict]:
        """Return the results of `watch` at every checkpoint of a run, by step: `{"step", "seen"}`."""
        steps, every = run.config.training.steps, run.config.training.checkpoint_every
        paths = [run.folder / _WATCHED.format(step) for step in [*range(every, steps, every), steps]]
        with _delete_to_repair(run.folder, OSError, ValueError):
            return [json.loads(path.read_text()) for path in paths]


def run_jobs(noun: str, jobs: Mapping[str, Callable[[Trainer], None]], folder: pathlib.Path):
    """Run the jobs of a study, by name, one after another in the study's folder.

    A job trains the models that it needs and saves its result before it returns. `noun` names it in progress lines,
    such as "claim".
    """
    folder.mkdir(parents=True, exist_ok=True)
    keep_programs(folder / "programs")
    trainer = Trainer(folder / "runs")
    for number, (name, job) in enumerate(jobs.items(), start=1):
        print(f"{noun} {number} of {len(jobs)}: {name}")
        job(trainer)


def settings_of(task: str, max_length: int, steps: int, seed: int = 0, /, **model: Any) -> Settings:
    """Return the settings of a run on strings of up to `max_length` symbols; `model` holds settings of the model."""
    training = {"steps": steps, "seed": seed}
    return {"task": {"name": task, "max_length": max_length}, "model": model, "training": training}


def configured(settings: Settings) -> Config:
    """Return the config of a run: ten checkpoints, and one evaluation at the end."""
    steps = settings.get("training", {}).get("steps", 2_000)
    defaults = {
        "training": {
            "steps_per_call": min(max(1, steps // 10), _STEPS_PER_CALL),
            "evaluate_every": steps,
            "checkpoint_every": max(1, steps // 10),
            "snapshots": 0,
        },
        "evaluation": {"examples": _EXAMPLES, "intermediate_examples": 1},
    }
    return from_mapping({**settings, **{name: group | settings.get(name, {}) for name, group in defaults.items()}})


def name_of(config: Config) -> str:
    """Return the name of a run: task, model, seed, and a digest of all settings."""
    digest = hashlib.sha256(json.dumps(to_mapping(config), sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.task.name}-{config.model.name}-seed{config.training.seed}-{digest}"


def losses(run: Run) -> list[tuple[int, float]]:
    """Return the training loss by step, in nats per token."""
    with _delete_to_repair(run.folder, OSError, ValueError, KeyError, TypeError):
        rows = [json.loads(line) for line in Folder(run.folder).metrics.read_text().splitlines()]
        return [(row["step"], row["loss"]) for row in rows]


def machine() -> dict[str, Any]:
    """Return the devices, cores and versions of this machine, to be saved with a result."""
    return {
        "devices": [device.device_kind for device in jax.devices()],
        "cores": meshes.cores(),
        "jax": jax.__version__,
        "attn": importlib.metadata.version("attn"),
    }


@contextlib.contextmanager
def _delete_to_repair(folder: pathlib.Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn errors about damaged files into a RunError that names the run's folder and says what to do."""
    try:
        yield
    except errors as error:
        raise RunError(f"{folder}: damaged ({error}); delete it to train it again") from None


def _watcher(config: Config, folder: Folder, watch: Callable[[Run], Any]) -> Callable[[State], None]:
    """Make `state -> None`, which saves the result of `watch` for the run at that state."""
    graphdef, _ = model_structure(config, config.task.vocabulary)

    def save(state: State):
        # A copy: the next training step overwrites the state's memory.
        params = jax.tree.map(jnp.asarray, jax.device_get(state.kept))
        run = Run(folder.path, config, config.task.vocabulary, graphdef, params, int(state.step))
        path = folder.path / _WATCHED.format(run.step)
        path.parent.mkdir(exist_ok=True)
        save_json(path, {"step": run.step, "seen": watch(run)})

    return save
