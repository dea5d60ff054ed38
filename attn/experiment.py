"""A whole experiment, as `train.py` runs it: make the config, train, evaluate, draw attention maps, summarise."""

import contextlib
import dataclasses
import os
import pathlib
import re
import shlex
import shutil
import sys
from collections.abc import Sequence

import jax
import numpy as np

from attn.inspection.capture import capture
from attn.runs import Run
from attn.settings import LOCAL_PATH, error_message
from attn.startup import NOTHING_WRITTEN
from attn.tasks import builders
from attn.tasks.examples import DataError, Questions
from attn.tasks.generated import Generated
from attn.tasks.stored import Stored
from attn.tasks.vocabulary import UNREADABLE, Pieces, Vocabulary, before
from attn.training import data as training_data
from attn.training import flags, locks, meshes, rows
from attn.training.checkpoints import CheckpointError
from attn.training.checks import check_fits, check_runs
from attn.training.config import Config, ConfigError, to_mapping
from attn.training.evaluation import Evaluated
from attn.training.folders import Folder, RunError, new_folder, newest_folder
from attn.training.identity import PATHS, flat, may_change
from attn.training.locks import LockError
from attn.training.loop import Interrupted, Outcome, TrainingError, train
from attn.training.programs import keep_programs
from attn.training.progress import Clock, percent, readable, shortened
from attn.training.signals import stopped_by_sigterm
from attn.training.state import model_structure

_SAMPLES, _MAX_SHOWN = 3, 80  # questions at the end of the report, and the most characters of each side
_METRICS = {
    "exact_match": "held-out exact match",
    "token_accuracy": "token accuracy      ",
    "error_rate": "error rate          ",
}


@dataclasses.dataclass(frozen=True)
class Request:
    """The options of `train.py`.

    Attributes:
      config: path of the config file; None for the default, or, to resume, for the config of the run.
      overrides: `{"section.name": text}`.
      workdir: the run's folder; None for a new one, or, to resume, for the newest.
      resume: continue an existing run.
      distributed: "auto", "on" or "off".
    """

    config: str | None
    overrides: dict[str, str]
    workdir: str | None
    resume: bool
    distributed: str


DEFAULT_CONFIG = pathlib.Path("configs/reverse.py")


def _default_config() -> pathlib.Path:
    """Return the default config file: in the current folder, or else in the checkout."""
    return DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else pathlib.Path(__file__).parent.parent / DEFAULT_CONFIG


def run(request: Request) -> int:
    """Run the experiment.

    Returns:
      The exit status: 0 done, 1 training failed, 2 an invalid request, 130 interrupted.
    """
    clock, was_started = Clock(), meshes.is_started()
    try:
        folder, config = prepare(request)
        if meshes.is_started() and not was_started:
            raise ConfigError(
                f"config.imports: importing {', '.join(config.imports)} computes with JAX before its devices are set "
                "up: at the top of a file make arrays with NumPy, or make them in the functions that use them"
            )
        finished = folder.summary() if request.resume else None
        if request.resume:
            _check_resumable(folder, config, finished)
    except (ConfigError, RunError, LockError) as error:
        return fail(error, 2)
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror or error}", 2)
    except KeyboardInterrupt:
        return fail(NOTHING_WRITTEN, 130)
    try:
        with stopped_by_sigterm():
            return _train_and_report(request, folder, config, finished, clock)
    except (ConfigError, DataError, RunError, LockError, CheckpointError, meshes.DistributedError) as error:
        return fail(error, 2)
    except TrainingError as error:
        return fail(error, 1)
    except jax.errors.JaxRuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
        message = re.sub(r"^[A-Z_]+: ", "", str(error).splitlines()[0]).rstrip(".")
        return fail(f"{message}; a smaller config.training.batch_size or model needs less", 1)
    except OSError as error:  # a full disk, a folder that may not be written
        return fail(f"{error.filename or folder.path}: {error.strerror or error}", 2)
    except KeyboardInterrupt:
        return fail(f"stopped; {_how_to_resume(folder)}" if folder.is_run() else NOTHING_WRITTEN, 130)
    except Interrupted as error:
        return fail(f"{error}; {_how_to_resume(folder)}", 130)


def _load_data(request: Request, folder: Folder, config: Config) -> Generated | Stored:
    """Load the data of a run; check that its model fits them, and that a resumed run began with the same data."""
    data = training_data.load(config, folder.vocabulary(config) if request.resume else None)
    check_fits(config, data)
    if request.resume:
        folder.check_data(data)
    return data


def _train_and_report(request: Request, folder: Folder, config: Config, finished: dict | None, clock: Clock) -> int:
    """Train, evaluate, draw and report; return the exit status.

    Args:
      request: the options of `train.py`.
      folder, config: of the run.
      finished: the summary of the run if it is resumed and was finished.
      clock: counts the seconds of each phase.
    """
    if finished and (finished["steps"] >= config.training.steps or finished.get("stopped_when_exact")):
        _update_finished(folder, config)
        more = "; for more steps give --config.training.steps=N" if finished["steps"] >= config.training.steps else ""
        print(f"{folder.path} is finished already{more or ', as its answers were exact'}")
        report(finished, folder)
        return 0
    # Errors in data files are reported before waiting for other hosts. TFDS data are loaded later, since that runs JAX.
    data = None if config.data.source == "tfds" else _load_data(request, folder, config)
    keep_programs()
    meshes.use_cores(config.training.batch_size, config.mesh.size)
    meshes.start_hosts(request.distributed)
    data = data or _load_data(request, folder, config)
    mesh = meshes.model_mesh(config.training.batch_size, config.mesh)
    check_runs(config, data)
    data.questions("test", 100, config.evaluation.seed)  # wrong answers of a rule are reported before writing
    is_writer = jax.process_index() == 0
    with folder.held() if is_writer else contextlib.nullcontext():
        if is_writer:
            folder.update_config(config) if request.resume else folder.create(config, data)
        outcome = train(config, data, folder, mesh, clock, resume=request.resume)
        if is_writer:
            draw(config, data, folder, outcome)
            summary = summarise(config, data, folder, outcome, clock)
    if is_writer:
        report(summary, folder)
    return 0


def _check_resumable(folder: Folder, config: Config, finished: dict | None):
    """Check that a run can resume with these settings, without changing anything.

    Raises:
      ConfigError: fewer steps than the run has done.
      RunError: `metrics.jsonl` is damaged.
      LockError: another process trains it.
    """
    done = max(folder.newest_step() or 0, finished["steps"] if finished else 0)
    if config.training.steps < done:
        raise ConfigError(
            f"config.training.steps: got {config.training.steps}, must be at least {done}, the steps that {folder.path}"
            " has done already"
        )
    rows.read(folder.metrics)
    locks.check_free(folder.path)


def fail(error, status: int) -> int:
    """Print an error as one line on stderr; return the exit status."""
    print(readable(f"error: {error}" if status != 130 else str(error)), file=sys.stderr)
    return status


def prepare(request: Request) -> tuple[Folder, Config]:
    """Return the folder and the config of a request, without writing anything.

    Raises:
      ConfigError, RunError: the request is not valid.
    """
    workdir = request.workdir
    if workdir is not None:
        if message := error_message(str, workdir, LOCAL_PATH):
            raise ConfigError(f"--workdir: {message}")
        workdir = os.path.expanduser(workdir)  # shells do not expand ~ after `=`
    if not request.resume:
        path = str(_default_config()) if request.config is None else request.config
        config = _with_absolute_paths(flags.load_config(path, request.overrides))
        folder = Folder(workdir) if workdir is not None else new_folder(pathlib.Path(path).stem)
        folder.check_new()
        return folder, config
    folder = Folder(workdir) if workdir is not None else newest_folder()
    before = folder.config()
    if request.config:
        kept = {"imports": ",".join(before.imports)} if before.imports else {}
        config = flags.load_config(request.config, kept | request.overrides)
    else:
        config = flags.override(to_mapping(before), request.overrides)
    config = _with_absolute_paths(config)
    old, new = flat(to_mapping(before)), flat(to_mapping(config))
    for key in old | new:
        if old.get(key) != new.get(key) and not may_change(key):
            raise ConfigError(
                f"config.{key}: got {new.get(key)!r}, must stay {old.get(key)!r} to resume {folder.path}; "
                "for another value start another run"
            )
    return folder, config


def _update_finished(folder: Folder, config: Config):
    """Write new paths of the data, or another implementation of attention, into the config of a finished run."""
    before = folder.config()
    changed = dataclasses.replace(before, data=config.data, model=config.model)
    if changed != before:
        folder.check_data(training_data.load(changed, folder.vocabulary(before)))
        folder.update_config(changed)


def _with_absolute_paths(config: Config) -> Config:
    """Return the config with absolute paths, so that the run's data are found from any current folder."""
    paths = {name: getattr(config.data, name) for name in PATHS}
    if config.data.source == "tfds":
        paths["folder"] = paths["folder"] or builders.default_folder()
    # A bucket, as in gs://bucket/folder, is not a path on this machine.
    local = {name: path for name, path in paths.items() if path and "://" not in path}
    absolute = {name: os.path.abspath(os.path.expanduser(path)) for name, path in local.items()}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **(paths | absolute)))


def summarise(config: Config, data: Generated | Stored, folder: Folder, outcome: Outcome, clock: Clock) -> dict:
    """Write summary.json and return its content; fractions are in 0..1."""
    metrics = outcome.evaluated.metrics
    summary = {
        "task": data.name,
        "source": config.data.source,
        **metrics.overall().values(),
        "examples_evaluated": int(metrics.overall().exact_match.count),
        "lengths_evaluated": [length for length, _ in metrics.by_length()],
        "beam": _beam(config, outcome.beam),
        "stopped_when_exact": outcome.exact,
        "steps": int(outcome.state.step),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(outcome.state.params)),
        "seed": config.training.seed,
        "seconds": clock.so_far(),
        "jax": jax.__version__,
        "devices": [f"{device.device_kind} {device.id}" for device in jax.devices()],
        "samples": [_sample(data, outcome, row) for row in _sample_rows(data.vocabulary, outcome.questions)],
    }
    folder.write_summary(summary)
    return summary


def draw(config: Config, data: Generated | Stored, folder: Folder, outcome: Outcome):
    """Draw the attention maps of the answer to the longest of the samples."""
    *_, row = _sample_rows(data.vocabulary, outcome.questions)
    graphdef, _ = model_structure(config, data.vocabulary)
    params = jax.device_get(outcome.state.kept)
    run = Run(folder.path, config, data.vocabulary, graphdef, params, int(outcome.state.step))
    source = outcome.questions.sources[row][: outcome.questions.lengths[row]]
    run.draw(capture(run.model, data.vocabulary, source, outcome.evaluated.answers[row]), folder.picture)


def _beam(config: Config, beam: Evaluated | None) -> dict | None:
    """Return the metrics of the additional beam, if there is one."""
    return beam and {"width": config.evaluation.beam_width, **beam.metrics.overall().values()}


def _sample_rows(vocabulary: Vocabulary, questions: Questions) -> list[int]:
    """Choose a few questions, short to medium, that can be read at a glance, and typed as inputs as they are shown."""
    lengths = questions.lengths
    shortest, longest = int(lengths.min()), min(int(lengths.max()), max(int(lengths.min()), 12))
    rows = []
    for k in range(min(_SAMPLES, len(lengths))):
        length = shortest + (longest - shortest) * (k + 1) // _SAMPLES
        nearest = [int(row) for row in np.argsort(abs(lengths - length), kind="stable") if row not in rows]
        rows.append(next((row for row in nearest if _reads_back(vocabulary, questions.sources[row])), nearest[0]))
    return rows


def _reads_back(vocabulary: Vocabulary, source: np.ndarray) -> bool:
    """Return whether the text of a source is read as the same tokens; unknown or unprintable pieces are not."""
    text = vocabulary.write(source, side="source")
    if isinstance(vocabulary, Pieces) and vocabulary.unknown_pieces(text):
        return False
    return _can_be_typed(text) and vocabulary.read(text) == before(vocabulary.source_end, source)


def _can_be_typed(text: str) -> bool:
    return readable(text) == text and UNREADABLE not in text


def _sample(data: Generated | Stored, outcome: Outcome, row: int) -> dict:
    """Return one question of the evaluation as text: input, answer, and the accepted answers."""
    vocabulary, questions = data.vocabulary, outcome.questions
    answer, targets = outcome.evaluated.answers[row], questions.targets[questions.source_rows == row]
    return {
        "input": vocabulary.write(questions.sources[row], side="source"),
        "answer": vocabulary.write(answer),
        "accepted": [vocabulary.write(target) for target in targets],
        # Tokens are compared, as in the metrics: two texts may differ only in characters that cannot be shown.
        "right": before(vocabulary.end, answer) in [before(vocabulary.end, target) for target in targets],
    }


def report(summary: dict, folder: Folder):
    """Print the final lines of a run, from its summary."""
    lengths, seconds, beam = summary["lengths_evaluated"], summary["seconds"], summary["beam"]
    evaluated = f"{summary['examples_evaluated']:,} of lengths {lengths[0]} to {lengths[-1]}"
    if len(lengths) < lengths[-1] - lengths[0] + 1:
        evaluated += f" ({len(lengths)} of these lengths)"
    phases = ", ".join(f"{name} {seconds[name]:.1f}" for name in ("import", "compile", "train", "evaluate"))
    print()
    for name, label in _METRICS.items():
        line = f"{label}  {percent(summary[name], up=name == 'error_rate')}"
        line += f"   with a beam of {beam['width']}: {percent(beam[name], up=name == 'error_rate')}" if beam else ""
        print(line + (f"   of {evaluated}, never trained on" if name == "exact_match" else ""))
    if "held_out_loss" in summary:
        print(f"held-out loss         {summary['held_out_loss']:8.4f} nats per token")
    print(f"time                  {seconds['total']:6.1f} s   ({phases}) for {summary['steps']:,} steps")
    for sample in summary["samples"]:
        source, answer = (_printable(sample[name]) for name in ("input", "answer"))
        accepted = _printable(" or ".join(sample["accepted"]))
        print(f"  {source}  ->  {answer}   ({'right' if sample['right'] else f'wrong, should be {accepted}'})")
    print(f"run                   {folder.path}")
    print(f"attention maps        {folder.picture}")
    print(f"next                  {shlex.join(_next(folder.path, [sample['input'] for sample in summary['samples']]))}")


def _next(run: pathlib.Path, inputs: Sequence[str]) -> list[str]:
    """Return a command that works as it is printed: predict for an input that can be typed, else inspect."""
    for text in filter(_can_be_typed, inputs):
        # `--` keeps an input such as "-5" from being read as an option.
        return [*_command(), "predict", _argument(run), *(["--"] if text.startswith("-") else []), text]
    return [*_command(), "inspect", _argument(run)]


def _how_to_resume(folder: Folder) -> str:
    return "resume with: " + shlex.join(["python", "train.py", "--resume", f"--workdir={_argument(folder.path)}"])


def _argument(path: pathlib.Path) -> str:
    """Return a path as an argument that is not read as an option or as a home folder."""
    return f"./{path}" if str(path).startswith(("-", "~")) else str(path)


def _printable(text: str) -> str:
    return shortened(readable(text), _MAX_SHOWN)


def _command() -> list[str]:
    """Return the words that call the `attn` script from here."""
    if shutil.which("attn"):
        return ["attn"]
    script = pathlib.Path(sys.executable).parent / "attn"
    if not script.exists():
        return [sys.executable, "-m", "attn.cli"]
    relative = os.path.relpath(script)
    return [str(script) if relative.startswith("..") else relative]
