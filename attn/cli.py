"""`attn predict | evaluate | inspect RUN ...`: ask a trained run."""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from attn.tasks.vocabulary import InputError
from attn.training.folders import RunError


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line."""

    def error(self, message: str):
        """Leave with status 2."""
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output left early, as `head` does
        sys.stderr.close()
        return 0
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="attn", description="Ask a trained run. RUN is its folder, such as runs/reverse-...")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)

    predict = commands.add_parser("predict", help="print the answer to each input, one a line, in order")
    predict.add_argument("run", metavar="RUN", help="folder of the run")
    predict.add_argument("inputs", metavar="INPUT", nargs="*", help='such as "3 1 4 1 5"; standard input if none')
    predict.set_defaults(command=_predict)

    evaluate = commands.add_parser("evaluate", help="exact match and token accuracy by length: table, JSON and plot")
    evaluate.add_argument("run", metavar="RUN", help="folder of the run")
    evaluate.add_argument(
        "--lengths",
        metavar="A:B",
        type=_lengths,
        help="lengths A to B, or a list such as 1,8,40:50 (those of training)",
    )
    evaluate.add_argument(
        "--examples", metavar="N", type=_count, default=100, help="held-out strings of each length (%(default)s)"
    )
    evaluate.add_argument("--output", metavar="STEM", help="writes STEM.json and STEM.png (RUN/evaluation)")
    evaluate.set_defaults(command=_evaluate)

    inspect = commands.add_parser("inspect", help="draw what every layer and head attends to")
    inspect.add_argument("run", metavar="RUN", help="folder of the run")
    inspect.add_argument("input", metavar="INPUT", help='such as "3 1 4 1 5"')
    inspect.add_argument("--output", metavar="FILE", help="picture to write: .png, .svg or .pdf (RUN/inspect.png)")
    inspect.set_defaults(command=_inspect)
    return parser


def _predict(arguments) -> int:
    texts = arguments.inputs
    if not texts:
        texts = sys.stdin.buffer.read().decode(errors="replace").splitlines()
    if not texts:
        raise InputError("no input: give inputs as arguments, or one a line on standard input")
    for answer in _load(arguments.run).predict(texts):
        print(answer)
    return 0


def _evaluate(arguments) -> int:
    run = _load(arguments.run)
    task = run.config.task
    lengths = arguments.lengths or range(task.min_length, task.max_length + 1)
    stem = pathlib.Path(arguments.output) if arguments.output else run.folder / "evaluation"
    json_path, png_path = (stem.with_name(stem.name + ending) for ending in (".json", ".png"))
    _check_writable(json_path)
    scores = run.evaluate(list(lengths), arguments.examples, track=_track)

    rows = [{"length": length, **_row(row)} for length, row in scores.by_length()]
    print(f"{'length':>6}  {'strings':>7}  {'exact match':>11}  {'token accuracy':>14}")
    for row in [*rows, {"length": "all", **_row(scores.overall())}]:
        print(f"{row['length']:>6}  {row['strings']:>7,}  {row['exact_match']:>11.4f}  {row['token_accuracy']:>14.4f}")

    from attn.inspection import pictures  # here, since `predict` needs no plots

    values = {"run": str(run.folder), "step": run.step, "overall": _row(scores.overall()), "by_length": rows}
    json_path.write_text(json.dumps(values, indent=2) + "\n")
    title = f"{task.name}, trained for {run.step:,} steps"
    pictures.save(pictures.draw_lengths(scores, (task.min_length, task.max_length), title), png_path)
    print(f"wrote {json_path} and {png_path}")
    return 0


def _row(scores) -> dict:
    return {
        "strings": int(scores.exact_match.count),
        "exact_match": scores.exact_match.value(),
        "token_accuracy": scores.token_accuracy.value(),
    }


def _inspect(arguments) -> int:
    run = _load(arguments.run)
    output = pathlib.Path(arguments.output) if arguments.output else run.folder / "inspect.png"
    if output.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--output={output}: the ending must be .png, .svg or .pdf")
    _check_writable(output)
    print(f"wrote {run.inspect(arguments.input, output)}")
    return 0


def _load(path: str):
    from attn.training import meshes  # here and below, so that --help and bad flags answer at once

    meshes.use_cores(meshes.cores())
    from attn.runs import load

    return load(path)


def _check_writable(path: pathlib.Path):
    """Find out before the work is done whether its result can be written."""
    if path.is_dir():
        raise InputError(f"--output={path}: a folder, must be a file")
    if not path.parent.is_dir():
        raise InputError(f"--output={path}: no such folder as {path.parent}")


def _track(batches: Sequence):
    """Progress on a terminal, over batches of strings."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(batches, "evaluating", console=console, transient=True, disable=not console.is_terminal)


def _lengths(text: str) -> list[int]:
    """Parse "1:64", "5" or "1,8,40:50"."""
    lengths = []
    for part in text.split(","):
        first, colon, last = part.partition(":")
        ends = [first, last if colon else first]
        if not all(end.isdigit() and 1 <= int(end) <= 100_000 for end in ends) or int(ends[0]) > int(ends[1]):
            raise argparse.ArgumentTypeError(f"{text!r} must be lengths such as 1:64 or 1,8,40:50, of at least 1")
        lengths += range(int(ends[0]), int(ends[1]) + 1)
    return sorted(set(lengths))


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 to 1,000,000")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
