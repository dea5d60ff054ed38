"""Print how the communication of a training step grows with chips and parameters, from the recorded programs.

    python benchmarks/communication.py

The messages are those of results/programs.json. Bandwidths and speeds are the published figures of the makers: nothing
here was measured. The times are what these figures allow at best; the latency of each message comes on top.
"""

import argparse
import json
import pathlib
from typing import NamedTuple

PROGRAMS = pathlib.Path(__file__).parent / "results/programs.json"


class Chip(NamedTuple):
    """Published figures of a chip.

    Attributes:
      gigabytes: per second that it sends to others of its slice or host: half of the published sum of both directions.
      teraflops: 10^12 floating point operations per second in bfloat16, without sparsity.
    """

    gigabytes: float
    teraflops: float


# https://docs.cloud.google.com/tpu/docs/v5e, .../v5p and .../v6e; NVIDIA H100 Tensor Core GPU Datasheet (SXM), NVLink.
CHIPS = {"v5e": Chip(200, 197), "v5p": Chip(600, 459), "v6e": Chip(400, 918), "h100": Chip(450, 989)}
DEVICES = ("v5e-4", "v5e-16", "v5e-64", "v5e-256", "v5p-4", "v6e-4", "h100-8")
SIZES = (1e6, 1e8, 1e9)  # numbers of parameters


def sent(message: float, chips: int) -> float:
    """Return the bytes that each chip sends in a ring all-reduce: each part of the message twice, but for its own."""
    return 2 * (chips - 1) / chips * message


def by_devices() -> list[str]:
    """Return the rows of the table of devices: the message of a step of configs/reverse.py, and what becomes of it."""
    programs = json.loads(PROGRAMS.read_text())["programs"]["reverse"]
    rows = []
    for name in DEVICES:
        kind, chips = name.split("-")
        chips = int(chips)
        (message,) = programs[name]["advance"]["collectives"].values()
        each = sent(message["bytes"], chips)
        microseconds = each / CHIPS[kind].gigabytes / 1e3
        numbers = f"{message['count']} | {message['bytes']:,} | {each:,.0f} | {microseconds:.1f} | {2 * (chips - 1)}"
        rows.append(f"| {name} | {numbers} |")
    return rows


def by_parameters() -> list[str]:
    """Return the rows of the table of model sizes: the message, and its time on 256 chips at least."""
    rows = []
    for parameters in SIZES:
        message = 4 * (parameters + 3)
        times = [sent(message, 256) / CHIPS[kind].gigabytes / 1e6 for kind in ("v5e", "v6e")]
        rows.append(f"| {parameters:,.0f} | {message:,.0f} | {' | '.join(f'{time:,.2f}' for time in times)} |")
    return rows


def tokens_to_hide(kind: str) -> float:
    """Return the tokens per chip and step at which a message of any size takes as long as the step's arithmetic.

    A step takes 6 operations per parameter and token, and sends 4 bytes per parameter, twice.
    """
    chip = CHIPS[kind]
    return (8 / (chip.gigabytes * 1e9)) / (6 / (chip.teraflops * 1e12))


def main():
    """Print the tables."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| devices | all-reduces | bytes | sent per chip | microseconds at least | messages in a row |")
    print(*by_devices(), sep="\n")
    print("\n| parameters | bytes | v5e-256, ms | v6e-256, ms |")
    print(*by_parameters(), sep="\n")
    print()
    print(*(f"{kind}: {tokens_to_hide(kind):,.0f} tokens per chip" for kind in CHIPS), sep="\n")


if __name__ == "__main__":
    main()
