"""`attn predict | evaluate | inspect RUN ...`: ask a trained run. `attn walkthrough | lengths`: measure."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from attn import startup

_QUESTIONS = ("predict", "evaluate", "inspect")  # commands that have nothing to save when they are interrupted


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line."""

    def error(self, message: str):
        """Leave with status 2."""
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    allow_any_text()
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    with startup.leaving_at_once("stopped"):
        from attn import commands  # here, so that --help and bad flags answer at once
    asking = arguments.command in _QUESTIONS
    try:
        with startup.leaving_at_once("stopped") if asking else contextlib.nullcontext():
            return getattr(commands, arguments.command)(arguments)
    except commands.ERRORS as error:
        print(f"error: {commands.readable(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        return 2


def script():
    """The command `attn`."""
    startup.run(main)


def allow_any_text():
    """Show signs that standard output cannot encode by their escapes, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read a command line; options may stand anywhere after the command, also between RUN and INPUT."""
    parser, commands = _parsers()
    if argv and argv[0] in commands:
        return commands[argv[0]].parse_intermixed_args(argv[1:], argparse.Namespace(command=argv[0]))
    return parser.parse_args(argv)


def _parsers() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the parser of the whole command line, and those of each command."""
    parser = _Parser(
        prog="attn",
        description="Ask a trained run, RUN, by its folder (runs/reverse-...), or measure claims about attention.",
    )
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )

    predict = commands.add_parser("predict", help="print the answer to each input, one a line, in order")
    predict.add_argument("run", metavar="RUN", help="folder of the run")
    predict.add_argument(
        "inputs", metavar="INPUT", nargs="*", type=_text, help='such as "3 1 4 1 5"; standard input if none'
    )
    _add_beam(predict)

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

    _add_walkthrough(commands)
    _add_lengths(commands)
    return parser, commands.choices


def _add_walkthrough(commands):
    walkthrough = commands.add_parser(
        "walkthrough",
        help="measure every claim about attention: a table, JSON files and one page",
        description="Train the models that the claims need, measure each claim, and write FOLDER/NAME.json and "
        "FOLDER/index.html. The same command resumes an interrupted run.",
    )
    walkthrough.add_argument(
        "--only",
        metavar="NAMES",
        type=_names,
        help="some of bottleneck,access,scaling,heads,cross,positions,parallel,reading (all)",
    )
    walkthrough.add_argument(
        "--quick",
        action="store_true",
        help="at reduced widths, lengths and seeds: minutes instead of half an hour or more",
    )
    walkthrough.add_argument(
        "--output", metavar="FOLDER", help="folder to write to or to resume (runs/walkthrough, or -quick after it)"
    )


def _add_lengths(commands):
    lengths = commands.add_parser(
        "lengths",
        help="train the rows of a study and evaluate them on strings far longer than those of training",
        description="Train the rows of a study for every task, alphabet and seed, evaluate them on strings far longer "
        "than those of training, and write FOLDER/ROW.json, FOLDER/lengths.md and FOLDER/lengths.png. The same command "
        "resumes an interrupted run.",
    )
    lengths.add_argument(
        "--config",
        metavar="FILE",
        default="configs/lengths.py",
        help="Python file with get_study() (configs/lengths.py)",
    )
    lengths.add_argument("--only", metavar="ROWS", type=_names, help="some of its rows, such as anchored,rotary (all)")
    lengths.add_argument(
        "--seeds", metavar="N", type=_whole(1_000), help="how many seeds of each row at most (as the study says)"
    )
    lengths.add_argument(
        "--output", metavar="FOLDER", help="folder to write to or to resume (runs/lengths, by the file's name)"
    )
    lengths.add_argument(
        "--page", metavar="FILE", help="Markdown file to write the tables into, between marks (FOLDER/lengths.md)"
    )


def _add_beam(command: argparse.ArgumentParser):
    command.add_argument(
        "--beam",
        metavar="W",
        type=_whole(1_000),
        default=1,
        help="beam search of this width; 1, the default, is greedy",
    )


def _text(argument: str) -> str:
    """An argument as standard input is read: what is no UTF-8 becomes a replacement sign."""
    return os.fsencode(argument).decode(errors="replace")


def _names(text: str) -> list[str]:
    """Parse "scaling,heads"."""
    return [name.strip() for name in text.split(",")]


def _lengths(text: str) -> list[int]:
    """Parse "1:64", "5" or "1,8,40:50"."""
    lengths = []
    for part in text.split(","):
        first, colon, last = part.partition(":")
        ends = [first, last if colon else first]
        if not all(end.isdecimal() and 1 <= int(end) <= 100_000 for end in ends) or int(ends[0]) > int(ends[1]):
            raise argparse.ArgumentTypeError(f"{text!r} must be lengths such as 1:64 or 1,8,40:50, from 1 to 100,000")
        lengths += range(int(ends[0]), int(ends[1]) + 1)
    return sorted(set(lengths))


def _whole(most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 to {most:,}")
        return int(text)

    return parse


if __name__ == "__main__":
    script()
