"""The commands of `attn`: each takes the arguments that `attn.cli` has parsed, and returns the exit status."""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Collection, Iterable, Sequence

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from attn import checking
from attn.functional import Unsupported, sharding
from attn.inspection import pictures
from attn.pretrained.files import FileError
from attn.runs import Run, load
from attn.settings import LOCAL_PATH, error_message, one_of
from attn.studies import report
from attn.tasks.examples import DataError
from attn.tasks.vocabulary import InputError, Pieces, Vocabulary
from attn.training import meshes
from attn.training.checkpoints import CheckpointError
from attn.training.checks import in_one_line
from attn.training.config import ConfigError
from attn.training.evaluation import Metrics
from attn.training.flags import run_file
from attn.training.folders import RUNS, Folder, RunError, file_in_the_way, write_whole
from attn.training.locks import LockError
from attn.training.loop import Interrupted, TrainingError
from attn.training.programs import keep_programs
from attn.training.progress import readable, shortened

_COLUMN = 14  # characters of a metric

# Errors whose message is one line for the user.
ERRORS = (
    CheckpointError,
    ConfigError,
    DataError,
    FileError,
    InputError,
    LockError,
    RunError,
    TrainingError,
    Unsupported,
)


def _naming_mistakes(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Decorate a command of a run so that an error in a module that the run imports is one line."""

    @functools.wraps(command)
    def run(arguments: argparse.Namespace) -> int:
        try:
            return command(arguments)
        except ERRORS:
            raise
        except Exception as error:
            if (message := in_one_line(error, Folder(arguments.run).config().imports)) is None:
                raise
            raise ConfigError(f"{arguments.run}: {message}") from None

    return run


@_naming_mistakes
def predict(arguments: argparse.Namespace) -> int:
    """Print the answer to each input."""
    texts = arguments.inputs
    if not texts and sys.stdin is not None:  # None if it is closed
        # Only \n and \r\n end lines, as in a file of pairs; Unicode's other line separators are part of the text.
        lines = sys.stdin.buffer.read().decode("utf-8-sig", errors="replace").removesuffix("\n")
        texts = [line.removesuffix("\r") for line in lines.split("\n")] if lines else []
    if not texts:
        raise InputError("no input: give inputs as arguments, or one per line on standard input")
    run = _load(arguments.run)
    answers = run.predict(texts, beam_width=arguments.beam)
    for number, text in enumerate(texts, start=1):
        _warn_of_unknown(run.vocabulary, text, number)
    for answer in answers:
        print(readable(answer))  # one line, also if the answer has line ends, as a model of bytes may write them
    return 0


def _warn_of_unknown(vocabulary: Vocabulary, text: str, number: int = 1):
    """Print the pieces of an input that are not in the vocabulary of the training pairs."""
    if isinstance(vocabulary, Pieces) and (unknown := vocabulary.unknown_pieces(text)):
        pieces = ", ".join(repr(piece) for piece in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        print(f"input {number}: {pieces} not in the vocabulary, read as unknown", file=sys.stderr)


@_naming_mistakes
def evaluate(arguments: argparse.Namespace) -> int:
    """Evaluate a run: print a table, write a JSON file and a plot."""
    run = _load(arguments.run)
    stem = run.folder / "evaluation" if arguments.output is None else pathlib.Path(arguments.output)
    if stem.name in ("", ".."):
        raise InputError(f"--output={arguments.output}: must name files, such as FOLDER/STEM")
    json_path, png_path = (stem.with_name(stem.name + ending) for ending in (".json", ".png"))
    report.check_writable(json_path)
    report.check_writable(png_path)
    metrics = run.evaluate(
        arguments.lengths, arguments.examples, part=arguments.part, beam_width=arguments.beam, track=_track
    )

    rows = [{"length": length, **_row(row)} for length, row in metrics.by_length()]
    if missing := set(arguments.lengths or ()) - {row["length"] for row in rows}:
        print(f"no sources of length {', '.join(_ranges(missing))} are held out", file=sys.stderr)
    names = [*metrics.overall().values()]
    print("  ".join([f"{'length':>6}", f"{'sources':>7}", *(name.replace("_", " ").rjust(_COLUMN) for name in names)]))
    for row in [*rows, {"length": "all", **_row(metrics.overall())}]:
        means = (f"{row[name]:>{_COLUMN}.4f}" for name in names)
        print("  ".join([f"{row['length']:>6}", f"{row['sources']:>7,}", *means]))

    values = {
        "run": str(run.folder),
        "step": run.step,
        "beam": arguments.beam,
        "overall": _row(metrics.overall()),
        "by_length": rows,
    }
    write_whole(json_path, json.dumps(values, indent=2) + "\n")
    title = f"{run.name}, trained for {run.step:,} steps"
    pictures.save(pictures.draw_lengths(metrics, run.trained_lengths(), title), png_path)
    print(f"wrote {json_path} and {png_path}")
    return 0


def _ranges(numbers: set[int]) -> list[str]:
    """Format numbers as text, consecutive ones as a range: "1", "5 to 8"."""
    starts = sorted(number for number in numbers if number - 1 not in numbers)
    ends = sorted(number for number in numbers if number + 1 not in numbers)
    return [f"{start} to {end}" if end > start else f"{start}" for start, end in zip(starts, ends)]


def _row(metrics: Metrics) -> dict:
    return {"sources": int(metrics.exact_match.count), **metrics.values()}


def inspect(arguments: argparse.Namespace) -> int:
    """Describe a run or a pretrained model, or draw its attention maps for an input."""
    from attn import pretrained  # imported here, since runs do not need it

    return _inspect_foreign(arguments) if pretrained.is_foreign(arguments.run) else _inspect_run(arguments)


@_naming_mistakes
def _inspect_run(arguments: argparse.Namespace) -> int:
    run = _load(arguments.run)
    if arguments.input is None:
        _check_has_input(arguments)
        print("\n".join(map(readable, run.about())))
        return 0
    output = _inspection_file(arguments, run.folder)
    if output.suffix == ".html":
        compare = arguments.compare and _load_any(arguments.compare)
        options = dict(training=arguments.training, effects=arguments.effects, warn=_warn)
        run.view(arguments.input, compare=compare, **options).save(output)
    else:
        run.inspect(arguments.input, output)
    _warn_of_unknown(run.vocabulary, arguments.input)
    print(f"wrote {output}")
    return 0


def _load_any(path: str):
    """Return the run or the pretrained model of a folder."""
    from attn import pretrained

    return pretrained.load(path) if pretrained.is_foreign(path) else _load(path)


def _inspect_foreign(arguments: argparse.Namespace) -> int:
    from attn import pretrained
    from attn.pretrained.foundation import Vision

    model = pretrained.load(arguments.run)
    if arguments.input is None:
        _check_has_input(arguments)
        print("\n".join(map(readable, model.about())))
        return 0
    if arguments.training:
        raise InputError("--training: pretrained weights have no snapshots of their training; give a run")
    if arguments.effects:
        raise InputError("--effects: pretrained weights have no held-out strings; give a run")
    output = _inspection_file(arguments, pathlib.Path())
    title = f"{pathlib.Path(arguments.run).name}: {shortened(readable(arguments.input), 90)}"
    compare = arguments.compare and _load_any(arguments.compare)
    try:
        given = _pixels(arguments.input) if isinstance(model.model, Vision) else arguments.input
        if output.suffix == ".html":
            model.view(given, compare=compare, title=title).save(output)
        else:
            pictures.save(pictures.draw_maps(model.look(given), title), output)
    except ERRORS:
        raise
    except ValueError as error:
        raise InputError(str(error)) from None
    print(f"wrote {output}")
    return 0


def _check_has_input(arguments: argparse.Namespace):
    given = {"--output": arguments.output, "--compare": arguments.compare}
    for name, value in given.items():
        if value is not None:
            raise InputError(f"{name}={value}: give an INPUT to draw")
    for name in ("training", "effects"):
        if getattr(arguments, name):
            raise InputError(f"--{name}: give an INPUT to draw")


def _pixels(path: str) -> np.ndarray:
    """Read the picture of a vision model, an array [C height width] in a file of NumPy."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"INPUT={path}: must be a .npy file with an array [C height width] ({reason})") from None


def _inspection_file(arguments: argparse.Namespace, folder: pathlib.Path) -> pathlib.Path:
    """Return the file to write maps into: that of --output, or one in a folder."""
    needs_page = [name for name in ("compare", "training", "effects") if getattr(arguments, name)]
    default = folder / ("inspect.html" if needs_page else "inspect.png")
    output = default if arguments.output is None else pathlib.Path(arguments.output)
    if output.suffix not in (".html", ".png", ".svg", ".pdf"):
        raise InputError(f"--output={output}: the ending must be .html, .png, .svg or .pdf")
    if needs_page and output.suffix != ".html":
        raise InputError(f"--output={output}: the ending must be .html, since a picture cannot show --{needs_page[0]}")
    report.check_writable(output)
    return output


def _resumable(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Decorate a command so that Ctrl-C ends it with one line and status 130; the same command resumes."""

    @functools.wraps(command)
    def run(arguments: argparse.Namespace) -> int:
        meshes.use_cores(meshes.cores())
        try:
            return command(arguments)
        except (Interrupted, KeyboardInterrupt) as error:
            print(f"{str(error) or 'stopped'}; the same command resumes from there", file=sys.stderr)
            return 130

    return run


@_resumable
def walkthrough(arguments: argparse.Namespace) -> int:
    """Measure the claims and print for each whether it holds."""
    from attn.studies.walkthrough.claims import verdict  # imported here, since no other command needs them
    from attn.studies.walkthrough.registry import CLAIMS
    from attn.studies.walkthrough.running import walk

    names = _chosen(arguments.only, CLAIMS)
    folder = _output(arguments.output, RUNS / ("walkthrough-quick" if arguments.quick else "walkthrough"))
    measured = walk(folder, names, quick=arguments.quick)
    print()
    for name, each in measured.items():
        checks = CLAIMS[name].check(each.numbers)
        print(f"{name:<12} {verdict(checks):<14} {each.seconds:5.0f} s  {CLAIMS[name].title}")
        for check in checks:
            mark = " " if check.holds() else "!"
            print(f"   {mark} {check.measured:>10.4g}  must be {check.must_be():<24}  {check.says}")
    print(f"\nwrote {folder / 'index.html'}")
    return 0


@_resumable
def lengths(arguments: argparse.Namespace) -> int:
    """Train and evaluate the rows of a study, and write the report."""
    from attn.studies.lengths import page  # imported here, since no other command needs them
    from attn.studies.lengths.running import read, run_study, summary

    path = pathlib.Path(arguments.config)
    study = _study(path, arguments.seeds)
    names = _chosen(arguments.only, study.rows)
    folder = _output(arguments.output, RUNS / path.stem)
    page_path = folder / "lengths.md" if arguments.page is None else pathlib.Path(arguments.page)
    if arguments.page is not None:
        report.check_writable(page_path, "--page")
    report.check_page(page_path)
    run_study(study, names, folder, track=_track)
    results = {name: each for row in study.rows for name, each in read(study, row, folder).items()}
    print()
    for name, each in results.items():
        print(f"{name}: {summary(study, each)}")
    picture = page_path.with_suffix(".png")
    report.save_markdown(page_path, page.write(study, results, picture.name), page.draw(study, results))
    print(f"\nwrote {page_path} and {picture}")
    return 0


def _study(path: pathlib.Path, seeds: int | None):
    """Return the study of a config file, with at most `seeds` seeds per row."""
    from attn.studies.lengths.study import Study

    study = run_file(path, "get_study")
    if not isinstance(study, Study):
        raise ConfigError(f"--config={path}: get_study() returned {study!r}, must be a Study of attn.studies.lengths")
    study.check()
    if seeds is not None:
        rows = {name: dataclasses.replace(row, seeds=min(seeds, row.seeds)) for name, row in study.rows.items()}
        study = dataclasses.replace(study, rows=rows)
    return study


def _chosen(only: Sequence[str] | None, known: Collection[str]) -> list[str]:
    """Return the names of --only, each once; all known names if it is not given."""
    for name in only or ():
        if message := error_message(str, name, one_of(known)):
            raise InputError(f"--only: {message}")
    return list(dict.fromkeys(known if only is None else only))


def _output(path: str | None, default: pathlib.Path) -> pathlib.Path:
    """Return the folder to write to, that of --output if it is given."""
    if path is not None and (message := error_message(str, path, LOCAL_PATH)):
        raise InputError(f"--output: {message}")
    folder = default if path is None else pathlib.Path(path).expanduser()
    if file := file_in_the_way(folder):
        raise InputError(f"--output={folder}: {file} is a file, must be a folder")
    return folder


def _load(path: str) -> Run:
    keep_programs()
    meshes.use_cores(meshes.cores())
    return load(path, _warn)


def _warn(line: str):
    print(readable(line), file=sys.stderr)


def _track(batches: Sequence) -> Iterable:
    """Wrap batches to show progress on a terminal."""
    console = Console(stderr=True)
    return track(batches, "evaluating", console=console, transient=True, disable=not console.is_terminal)


def check(arguments: argparse.Namespace) -> int:
    """Check the implementations of attention on this device; return 1 if one of them is wrong."""
    output = None if arguments.output is None else pathlib.Path(arguments.output)
    if output is not None and (message := error_message(str, str(output), LOCAL_PATH)):
        raise RunError(f"--output: {message}")
    if output is not None:
        report.check_writable(output)
    try:
        jax.devices("cpu")
    except RuntimeError:
        raise RunError("attn check computes the exact values on the CPU: add cpu to JAX_PLATFORMS") from None
    lengths = arguments.lengths or ([1024] if sharding.platform() == "cpu" else [1024, 4096, 8192])
    print(f"{sharding.device_kind()}, JAX {jax.__version__}")
    results = checking.run(lengths, functools.partial(print, flush=True))
    if output is not None:
        write_whole(output, json.dumps(results, indent=1) + "\n")
        print(f"wrote {output}")
    wrong = [name for name, cases in results["values"].items() if not all(each["right"] for each in cases.values())]
    print(f"wrong: {', '.join(wrong)}" if wrong else "every result is right")
    chosen = ", ".join(results["preferred"])
    others = (
        "as before: no kernel is right and faster everywhere" if not chosen else f"{chosen} first, by these results"
    )
    print(f'"auto" and "fastest" choose {others}')
    return 1 if wrong else 0
