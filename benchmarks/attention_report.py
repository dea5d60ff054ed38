"""The report of attention.py: tables on the terminal, a plot, and JSON."""

import itertools
import json
import math
import pathlib
import sys

from attention_job import MASKS
from rich.console import Console
from rich.table import Table


def print_tables(summary: dict):
    """Print all results on the terminal."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    speed = summary["speed"]
    for setup in dict.fromkeys(row["setup"] for row in speed):
        rows = [row for row in speed if row["setup"] == setup]
        console.print(speed_table(rows, f"{setup}: median milliseconds", milliseconds, modes(rows)))
        console.print(speed_table(rows, f"{setup}: temporary MiB, seconds to compile", needs, modes(rows)[-1:]))
    if summary["checks"]:
        console.print(check_table(summary["checks"]))
    for section in ("freedom", "skipping"):
        if summary[section]:
            console.print(variant_table(section, summary[section]))
    if summary["memory"]:
        console.print(speed_table(summary["memory"], "memory: temporary MiB, seconds to compile", needs, [None]))
    if summary["figures"]:
        rows = [(row["figure"], f"{row['value']:,.3f}", row["target"]) for row in summary["figures"]]
        console.print(grid("figures", ["", "value", "target"], rows))


def modes(rows: list[dict]) -> list[str]:
    """Return forward and forward+backward, in the order measured."""
    return list(dict.fromkeys(row["mode"] for row in rows))


def speed_table(rows: list[dict], title: str, cell, shown_modes: list) -> Table:
    """Return a table with one line per length, mask and mode, and one column per contestant."""
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    lines = {}
    for row in rows:
        if row.get("mode") in shown_modes:
            line = lines.setdefault((f"{row['T']:,}", row["mask"], row.get("mode") or ""), dict.fromkeys(names, ""))
            line[row["contestant"]] = cell(row)
    return grid(title, ["T", "mask", "", *names], [(*key, *line.values()) for key, line in lines.items()])


def milliseconds(row: dict) -> str:
    """Return a cell of the table of times."""
    return f"{row['median_ms']:,.3f}" if "median_ms" in row else "-"


def needs(row: dict) -> str:
    """Return a cell of the table of memory and compile time, which are known even if the program was not run."""
    if "compile_seconds" not in row:
        return "-"
    mib = "-" if row["temporary_bytes"] is None else f"{row['temporary_bytes'] / 2**20:,.1f}"
    return f"{mib}, {row['compile_seconds']:.2f} s"


def check_table(checks: list[dict]) -> Table:
    """Return a table of each contestant's largest difference from the formula over all masks."""
    worst = {}
    for row in checks:
        line = worst.setdefault((row["setup"], row["contestant"]), [])
        line.append(row.get("largest_difference", math.inf))
    shown = [(*key, "-" if math.inf in line else f"{max(line):.2g}") for key, line in worst.items()]
    title = f"largest difference from the formula in float64, T {checks[0]['T']:,}"
    return grid(title, ["set-up", "contestant", ""], shown)


def variant_table(section: str, rows: list[dict]) -> Table:
    """Return a table that compares variants of attn with each other."""
    lines = []
    for row in rows:
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3f}"
        extra = row["mask"] if "mask" in row else f"{row['setup']}, {row['visible']:.1%} visible"
        lines.append((f"{row['T']:,}", row["variant"], extra, milliseconds(row), ratio))
    return grid(f"{section}: forward+backward", ["T", "", "", "ms", "ratio"], lines)


def grid(title: str, columns: list[str], rows: list[tuple]) -> Table:
    """Return a table whose columns of numbers are aligned to the right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        words = any(not row[number][:1].isdigit() and row[number] != "-" for row in rows)
        table.add_column(column, justify="left" if words else "right")
    for row in rows:
        table.add_row(*row)
    return table


def plot(rows: list[dict], file: pathlib.Path):
    """Plot time and temporary memory of forward+backward against the length, one column per set-up."""
    import matplotlib  # imported here: --help should not wait for it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    setups = list(dict.fromkeys(row["setup"] for row in rows))
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    figure, axes = pyplot.subplots(2, len(setups), figsize=(1 + 4.2 * len(setups), 8), sharey="row", squeeze=False)
    quantities = (("median_ms", 1, "ms, forward+backward"), ("temporary_bytes", 2**20, "temporary MiB"))
    for (key, unit, label), line in zip(quantities, axes):
        line[0].set_ylabel(label)
        for setup, ax in zip(setups, line):
            ax.set(title=setup, xlabel="T", yscale="log")
            ax.set_xscale("log", base=2)
            ax.grid(alpha=0.3)
            for (number, name), mask in itertools.product(enumerate(names), MASKS):
                where = (setup, name, mask, "forward+backward")
                here = [row for row in rows if (row["setup"], row["contestant"], row["mask"], row["mode"]) == where]
                points = [(row["T"], row[key] / unit) for row in here if row.get(key)]
                if points:
                    # Each line is thinner than the one before, since some coincide.
                    style = {"color": f"C{number}", "marker": "osv^Dx*P"[number], "linewidth": max(1, 4 - number)}
                    ax.plot(*zip(*points), "-" if mask == "causal" else ":", label=f"{name}, {mask}", **style)
    axes[0][0].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def as_json(summary: dict) -> str:
    """Return JSON with one line per row."""
    parts = []
    for key, value in summary.items():
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
        else:
            text = json.dumps(value, indent=2).replace("\n", "\n  ")
        parts.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
