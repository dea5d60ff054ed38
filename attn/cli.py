"""`attn predict | evaluate | inspect RUN ...`: ask a trained run."""

import argparse
import io
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

from attn.tasks.examples import DataError
from attn.tasks.vocabulary import InputError, Pieces
from attn.training.folders import RunError


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line."""

    def error(self, message: str):
        """Leave with status 2."""
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    allow_any_text()
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except (DataError, InputError, RunError) as error:
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


def allow_any_text():
    """Show signs that standard output cannot encode by their escapes, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="attn", description="Ask a trained run. RUN is its folder, such as runs/reverse-...")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)

    predict = commands.add_parser("predict", help="print the answer to each input, one a line, in order")
    predict.add_argument("run", metavar="RUN", help="folder of the run")
    predict.add_argument(
        "inputs", metavar="INPUT", nargs="*", type=_text, help='such as "3 1 4 1 5"; standard input if none'
    )
    _add_beam(predict)
    predict.set_defaults(command=_predict)

    evaluate = commands.add_parser("evaluate", help="exact match and token accuracy by length: table, JSON and plot")
    evaluate.add_argument("run", metavar="RUN", help="folder of the run")
    evaluate.add_argument(
        "--lengths",
        metavar="A:B",
        type=_lengths,
        help="lengths of the source, A to B or a list such as 1,8,40:50 (those of training, or of the part)",
    )
    evaluate.add_argument(
        "--examples",
        metavar="N",
        type=_whole(1_000_000),
        help="held-out sources of each length (100, or all of the part if no lengths are given either)",
    )
    evaluate.add_argument(
        "--part", metavar="PART", help="of pairs and of TFDS data: validation, test or test_long (test, all of it)"
    )
    _add_beam(evaluate)
    evaluate.add_argument("--output", metavar="STEM", help="writes STEM.json and STEM.png (RUN/evaluation)")
    evaluate.set_defaults(command=_evaluate)

    inspect = commands.add_parser(
        "inspect", help="tell what a run has learnt from, or draw what every layer and head attends to"
    )
    inspect.add_argument("run", metavar="RUN", help="folder of the run")
    inspect.add_argument(
        "input",
        metavar="INPUT",
        nargs="?",
        type=_text,
        help='what to draw it for, such as "3 1 4 1 5"; data and vocabulary if none',
    )
    inspect.add_argument("--output", metavar="FILE", help="picture to write: .png, .svg or .pdf (RUN/inspect.png)")
    inspect.set_defaults(command=_inspect)
    return parser


def _add_beam(command: argparse.ArgumentParser):
    command.add_argument(
        "--beam",
        metavar="W",
        type=_whole(1_000),
        default=1,
        help="beam search of this width; 1, the default, is greedy",
    )


def _predict(arguments) -> int:
    texts = arguments.inputs
    if not texts:
        # As a file of pairs is read: other signs that end lines in some scripts are part of the text.
        lines = sys.stdin.buffer.read().decode("utf-8-sig", errors="replace").removesuffix("\n")
        texts = [line.removesuffix("\r") for line in lines.split("\n")] if lines else []
    if not texts:
        raise InputError("no input: give inputs as arguments, or one a line on standard input")
    run = _load(arguments.run)
    answers = run.predict(texts, beam_width=arguments.beam)
    for number, text in enumerate(texts, start=1):
        _warn_of_unknown(run.vocabulary, text, number)
    for answer in answers:
        print(answer)
    return 0


def _warn_of_unknown(vocabulary, text: str, number: int = 1):
    """Say which pieces of an input the training pairs did not have."""
    if isinstance(vocabulary, Pieces) and (unknown := vocabulary.unknown_pieces(text)):
        named = ", ".join(repr(piece) for piece in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        print(f"input {number}: {named} not in the vocabulary, read as unknown", file=sys.stderr)


def _evaluate(arguments) -> int:
    run = _load(arguments.run)
    stem = pathlib.Path(arguments.output) if arguments.output else run.folder / "evaluation"
    if not stem.name:
        raise InputError(f"--output={arguments.output}: must name files, such as FOLDER/STEM")
    json_path, png_path = (stem.with_name(stem.name + ending) for ending in (".json", ".png"))
    _check_writable(json_path)
    scores = run.evaluate(
        arguments.lengths, arguments.examples, part=arguments.part, beam_width=arguments.beam, track=_track
    )

    rows = [{"length": length, **_row(row)} for length, row in scores.by_length()]
    print(f"{'length':>6}  {'sources':>7}  {'exact match':>11}  {'token accuracy':>14}  {'error rate':>10}")
    for row in [*rows, {"length": "all", **_row(scores.overall())}]:
        means = f"{row['exact_match']:>11.4f}  {row['token_accuracy']:>14.4f}  {row['error_rate']:>10.4f}"
        print(f"{row['length']:>6}  {row['sources']:>7,}  {means}")

    from attn.inspection import pictures  # here, since `predict` needs no plots

    values = {
        "run": str(run.folder),
        "step": run.step,
        "beam": arguments.beam,
        "overall": _row(scores.overall()),
        "by_length": rows,
    }
    json_path.write_text(json.dumps(values, indent=2) + "\n")
    title = f"{run.name}, trained for {run.step:,} steps"
    pictures.save(pictures.draw_lengths(scores, run.trained_lengths(), title), png_path)
    print(f"wrote {json_path} and {png_path}")
    return 0


def _row(scores) -> dict:
    return {"sources": int(scores.exact_match.count), **scores.values()}


def _inspect(arguments) -> int:
    run = _load(arguments.run)
    if arguments.input is None:
        if arguments.output:
            raise InputError(f"--output={arguments.output}: give an INPUT to draw")
        print("\n".join(run.about()))
        return 0
    output = pathlib.Path(arguments.output) if arguments.output else run.folder / "inspect.png"
    if output.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--output={output}: the ending must be .png, .svg or .pdf")
    _check_writable(output)
    written = run.inspect(arguments.input, output)
    _warn_of_unknown(run.vocabulary, arguments.input)
    print(f"wrote {written}")
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


def _text(argument: str) -> str:
    """An argument as standard input is read: what is no UTF-8 becomes a replacement sign."""
    return os.fsencode(argument).decode(errors="replace")


def _lengths(text: str) -> list[int]:
    """Parse "1:64", "5" or "1,8,40:50"."""
    lengths = []
    for part in text.split(","):
        first, colon, last = part.partition(":")
        ends = [first, last if colon else first]
        if not all(end.isdecimal() and 1 <= int(end) <= 100_000 for end in ends) or int(ends[0]) > int(ends[1]):
            raise argparse.ArgumentTypeError(f"{text!r} must be lengths such as 1:64 or 1,8,40:50, of at least 1")
        lengths += range(int(ends[0]), int(ends[1]) + 1)
    return sorted(set(lengths))


def _whole(most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 to {most:,}")
        return int(text)

    return parse


if __name__ == "__main__":
    sys.exit(main())
