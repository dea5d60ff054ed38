"""The report of gpu.py: ratios to the peers, figures that have an aim, and tables on the terminal."""

import statistics
import sys

from attention_report import grid
from gpu_cases import WITH_SCORE
from gpu_peers import MODES
from rich.console import Console
from rich.table import Table

OURS = "attn-pallas_gpu"
CUDNN, FLEX = "jax.nn-cudnn", "torch-flex"
AIMS = {CUDNN: 0.8, FLEX: 1.0}  # times as fast: as cuDNN without a score, as FlexAttention with one

# Differences between the contestants, written to the results for their readers.
DIFFERENCES = {
    "arrays": "each gets contiguous arrays in its own axis order: attn and jax.nn [B T N H], torch [B N T H]",
    "batch": "attn is called under jax.vmap; masks, slopes and documents are the same for every sequence",
    "masks": "torch-flex gets a block mask that was made before, which is not timed; attn finds the tiles that the "
    "documents need in every call, since their numbers are traced",
    "backward": "attn and jax.nn run one compiled program that returns the output and three gradients; torch runs "
    "forward and torch.autograd.grad; forward without backward runs under torch.no_grad",
    "samples": "one sample is of several calls that follow each other without waiting, and of one wait at the end; "
    "short calls can be bound by the time in which Python starts them",
    "tflops": "operations of the visible pairs alone: 4 H a pair forward, 14 H forward+backward",
    "torch-flex": "torch.compile with dynamic=False on a GPU; on a CPU it is not compiled, and has no backward",
    "torch-flash, torch-cudnn": "scaled_dot_product_attention, restricted to this backend",
    "tiles": "attn-pallas_gpu-N has square tiles of N queries and keys, without a change to its number of warps",
}


def times(cell: dict, mode: str) -> dict[str, float]:
    """Return {contestant: median in ms} of a cell."""
    found = {name: each.get(mode, {}).get("median_ms") for name, each in cell["contestants"].items()}
    return {name: ms for name, ms in found.items() if ms}


def ratios(cells: list[dict]) -> list[dict]:
    """Return how many times as fast our kernels are as each peer, with the aim where there is one."""
    found = []
    for cell in cells:
        for mode in MODES:
            medians = times(cell, mode)
            for peer, ms in medians.items():
                if peer.startswith("attn") or OURS not in medians:
                    continue
                row = {key: cell[key] for key in ("case", "T", "width")} | {"mode": mode, "peer": peer}
                row["times_as_fast"] = round(ms / medians[OURS], 3)
                if peer in AIMS and (peer == FLEX) == (cell["case"] in WITH_SCORE):
                    row["aim"] = AIMS[peer]
                found.append(row)
    return found


def figures(rows: list[dict]) -> list[dict]:
    """Return the median and the least of the ratios that have an aim, per peer and mode."""
    found = []
    for peer, aim in AIMS.items():
        for mode in MODES:
            of_mode = [row for row in rows if (row["peer"], row["mode"]) == (peer, mode)]
            if values := [row["times_as_fast"] for row in of_mode if "aim" in row]:
                named = {"figure": f"times as fast as {peer}, {mode}", "aim": aim, "cells": len(values)}
                found.append(named | {"median": round(statistics.median(values), 3), "least": min(values)})
    return found


def tiles(cells: list[dict]) -> list[dict]:
    """Return the times of our kernels with other tiles, and the fastest of them."""
    found = []
    for cell in cells:
        for mode in MODES if all(name.startswith(OURS) for name in cell["contestants"]) else ():
            if medians := times(cell, mode):
                named = {"width": cell["width"], "mode": mode, "fastest": min(medians, key=medians.get)}
                found.append(named | {"ms": medians})
    return found


def print_tables(results: dict):
    """Print the results on the terminal: what was measured, and what was not reached."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    if results["cells"]:
        console.print(cell_table(results["cells"]))
    if found := results["tiles"]:
        lines = [(str(row["width"]), row["mode"], *(f"{ms:,.3f}" for ms in row["ms"].values())) for row in found]
        console.print(grid("tiles: median milliseconds", ["width", "", *found[0]["ms"]], lines))
    if found := results["figures"]:
        keys = ("figure", "median", "least", "aim", "cells")
        console.print(grid("figures", list(keys), [tuple(str(row[key]) for key in keys) for row in found]))
    right = sum(row["right"] for row in results["checks"])
    print(f"checks right: {right} of {len(results['checks'])}; cells measured: {len(results['cells'])}")
    if results["small"]:
        print("a small run shows that everything runs: its times and ratios say nothing about a GPU")
    if results["not_reached"]:
        print(f"not reached in time: {len(results['not_reached'])} checks and cells, which the results list")
    for each in results["failures"]:
        print(f"{each['failure']}; last: {each['at']}")


def cell_table(cells: list[dict]) -> Table:
    """Return a table with one line per cell and mode: the times of the contestants, and two ratios."""
    named = [name for cell in cells for name in cell["contestants"] if not name.startswith(f"{OURS}-")]
    names, lines = list(dict.fromkeys(named)), []
    for cell in sorted(cells, key=lambda cell: (cell["case"], cell["width"], cell["T"])):
        for mode in MODES if set(cell["contestants"]) & {*AIMS} else ():  # not those of tiles
            medians = times(cell, mode)
            shown = [f"{medians[name]:,.3f}" if name in medians else "-" for name in names]
            ratio = [f"{medians[peer] / medians[OURS]:.2f}" if {peer, OURS} <= {*medians} else "-" for peer in AIMS]
            lines.append((cell["case"], f"{cell['T']:,}", str(cell["width"]), mode, *shown, *ratio))
    columns = ["case", "T", "width", "", *names, *(f"times as fast as {peer}" for peer in AIMS)]
    return grid("median milliseconds", columns, lines)
