"""The command line: `attn predict | evaluate | inspect` use a trained run, `attn walkthrough | lengths` run studies.

`attn check` checks the implementations of attention on the device at hand.
"""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from attn import startup

_SAVES_NOTHING = ("predict", "evaluate", "inspect")  # commands with nothing to save when they are interrupted


class _Parser(argparse.ArgumentParser):
    """A parser that reports a wrong command line in one line."""

    def error(self, message: str):
        """Print the message and exit with status 2."""
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    allow_any_text()
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    with startup.leaving_at_once("stopped"):
        from attn import commands  # imported here since it takes seconds: --help and wrong flags answer at once
    saves_nothing = arguments.command in _SAVES_NOTHING
    try:
        with startup.leaving_at_once("stopped") if saves_nothing else contextlib.nullcontext():
            return getattr(commands, arguments.command)(arguments)
    except commands.ERRORS as error:
        print(f"error: {commands.readable(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        return 2


def script():
    """Run the command line as the process of the `attn` script."""
    startup.run(main)


def allow_any_text():
    """Print characters that standard output cannot encode as escapes, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; options may stand anywhere after the command, also between RUN and INPUT."""
    parser, commands = _parsers()
    if argv and argv[0] in commands:
        return commands[argv[0]].parse_intermixed_args(argv[1:], argparse.Namespace(command=argv[0]))
    return parser.parse_args(argv)


def _parsers() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the parser of the whole command line, and those of each command."""
    parser = _Parser(
        prog="attn",
        description="Use a trained run, given by its folder RUN (runs/reverse-...), or measure claims about attention.",
    )
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )

    for add in (_add_predict, _add_evaluate, _add_inspect, _add_walkthrough, _add_lengths, _add_check):
        add(commands)
    return parser, commands.choices


def _add_predict(commands):
    predict = commands.add_parser("predict", help="Print the answer to each input, one per line, in order.")
    _add_run(predict)
    predict.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="*",
        type=_text,
        help='Input such as "3 1 4 1 5". Without inputs, one per line is read from standard input.',
    )
    _add_beam(predict)


def _add_evaluate(commands):
    evaluate = commands.add_parser(
        "evaluate", help="Compute exact match and token accuracy by length: a table, a JSON file and a plot."
    )
    _add_run(evaluate)
    evaluate.add_argument(
        "--lengths",
        metavar="A:B",
        type=_lengths,
        help="Lengths of the source: A to B, or a list such as 1,8,40:50. Default: those of training, or of the part.",
    )
    evaluate.add_argument(
        "--examples",
        metavar="N",
        type=_whole(1_000_000),
        help="Number of held-out sources per length. Default: 100, or the whole part if no lengths are given.",
    )
    evaluate.add_argument(
        "--part",
        metavar="PART",
        help="Part of a file of pairs or of TFDS data: validation, test or test_long. Default: the whole of test.",
    )
    _add_beam(evaluate)
    evaluate.add_argument(
        "--output", metavar="STEM", help="Write the results to STEM.json and STEM.png. Default: RUN/evaluation."
    )


def _add_inspect(commands):
    inspect = commands.add_parser(
        "inspect",
        help="Draw the attention maps of every layer and head, as a picture or as a page to look into; or describe the "
        "data and the model. Of a run, or of a folder of pretrained weights.",
    )
    inspect.add_argument(
        "run",
        metavar="RUN",
        help="Folder of the run; or a folder with config.json and weights, as the library transformers writes it, or a "
        "GGUF file.",
    )
    inspect.add_argument(
        "input",
        metavar="INPUT",
        nargs="?",
        type=_text,
        help='Input to draw the attention maps for, such as "3 1 4 1 5", or a text; for a vision model the path of a '
        ".npy file. Without it, the run or the model is described.",
    )
    inspect.add_argument(
        "--output",
        metavar="FILE",
        help="Write to this file: a page for the browser (.html), or a picture (.png, .svg or .pdf). Default: "
        "RUN/inspect.png, RUN/inspect.html with one of the next options; in the current folder for pretrained weights.",
    )
    inspect.add_argument(
        "--compare",
        metavar="RUN2",
        help="On a page, show a second run or pretrained model beside it, with the same tokens, layers and heads.",
    )
    inspect.add_argument(
        "--training",
        action="store_true",
        help="On a page, show a slider through training: of each run the steps with snapshots "
        "(config.training.snapshots) or checkpoints.",
    )
    inspect.add_argument(
        "--effects",
        action="store_true",
        help="On a page, sort heads also by how exact match on held-out strings changes when a head is removed.",
    )


def _add_walkthrough(commands):
    walkthrough = commands.add_parser(
        "walkthrough",
        help="Measure every claim about attention, and write a table, JSON files and one page.",
        description="Train the models that the claims need, measure each claim, and write FOLDER/NAME.json and "
        "FOLDER/index.html. The same command resumes an interrupted run.",
    )
    walkthrough.add_argument(
        "--only",
        metavar="NAMES",
        type=_names,
        help="Measure only these claims, separated by commas: "
        "bottleneck,access,scaling,heads,cross,positions,parallel,reading,blocks,atoms. Default: all.",
    )
    walkthrough.add_argument(
        "--quick",
        action="store_true",
        help="Reduce widths, lengths and seeds: minutes instead of half an hour or more.",
    )
    walkthrough.add_argument(
        "--output",
        metavar="FOLDER",
        help="Write to this folder, or resume in it. Default: runs/walkthrough, or runs/walkthrough-quick.",
    )


def _add_lengths(commands):
    lengths = commands.add_parser(
        "lengths",
        help="Train the rows of a study, and evaluate them on strings far longer than those of training.",
        description="Train the rows of a study for every task, alphabet and seed, evaluate them on strings far longer "
        "than those of training, and write FOLDER/ROW.json, FOLDER/lengths.md and FOLDER/lengths.png. The same command "
        "resumes an interrupted run.",
    )
    lengths.add_argument(
        "--config",
        metavar="FILE",
        default="configs/lengths.py",
        help="Python file with a function get_study(). Default: configs/lengths.py.",
    )
    lengths.add_argument(
        "--only",
        metavar="ROWS",
        type=_names,
        help="Run only these rows, separated by commas, such as anchored,rotary. Default: all.",
    )
    lengths.add_argument(
        "--seeds", metavar="N", type=_whole(1_000), help="Run at most N seeds of each row. Default: those of the study."
    )
    lengths.add_argument(
        "--output",
        metavar="FOLDER",
        help="Write to this folder, or resume in it. Default: runs/lengths, by the name of the config file.",
    )
    lengths.add_argument(
        "--page",
        metavar="FILE",
        help="Markdown file into which the tables are written, between its marks. Default: FOLDER/lengths.md.",
    )


def _add_check(commands):
    check = commands.add_parser(
        "check",
        help="Check the implementations of attention on this device: values, gradients, semantics and times.",
        description="Compare every implementation that runs on this device with the equation in float64 on the CPU, "
        'measure its times, and say what "auto" would choose. Takes about five minutes on a TPU or GPU.',
    )
    check.add_argument(
        "--lengths",
        metavar="N,...",
        type=_lengths,
        help="Numbers of positions at which to measure times. Default: 1024,4096,8192; on a CPU 1024.",
    )
    check.add_argument(
        "--output", metavar="FILE", help="Write the results to this JSON file. Default: none is written."
    )


def _add_run(command: argparse.ArgumentParser):
    command.add_argument("run", metavar="RUN", help="Folder of the run.")


def _add_beam(command: argparse.ArgumentParser):
    command.add_argument(
        "--beam",
        metavar="W",
        type=_whole(1_000),
        default=1,
        help="Decode with a beam of this width. Default: 1, which is greedy decoding.",
    )


def _text(argument: str) -> str:
    """Decode an argument as standard input is decoded: bytes that are not UTF-8 become replacement characters."""
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
    """Make a parser of whole numbers from 1 to `most`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 to {most:,}")
        return int(text)

    return parse


if __name__ == "__main__":
    script()
