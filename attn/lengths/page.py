"""What came of a table, for people: Markdown tables and a figure, made from the numbers alone."""

import collections
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attn.lengths.asking import FIRST
from attn.lengths.running import accuracy
from attn.lengths.table import ENDS, Table

Found = Mapping[str, Mapping[str, Any]]  # by the names of trainings
BEGIN, END = "<!-- made by attn lengths: begin -->", "<!-- made by attn lengths: end -->"
_DASHES = ("-", "--", ":", "-.")
_TICKS = (100, 200, 500, 1_000, 2_000, 5_000, 10_000)


def tables(table: Table, found: Found) -> str:
    """One table for each task and alphabet, a line for each row and way to end; rows without results are left out."""
    parts = []
    for symbols in sorted({each["symbols"] for each in found.values()}):
        for task in dict.fromkeys(each["task"] for each in found.values()):
            lines = [
                line
                for name in table.rows
                for end in table.rows[name].ends
                if (line := _line(table, name, end, _of(found, name, task, symbols)))
            ]
            if lines:
                parts += [f"### {task}, {symbols} symbols\n", *_head(table), *lines, ""]
    return "\n".join(parts)


def _of(found: Found, name: str, task: str, symbols: int) -> list[Mapping[str, Any]]:
    """The results of a row at a task, by seed."""
    return [each for each in found.values() if (each["row"], each["task"], each["symbols"]) == (name, task, symbols)]


def _head(table: Table) -> list[str]:
    asked = table.asked
    names = [
        *("row", "what it builds in", "end", "parameters", f"seeds exact at {table.longest} (steps)"),
        "longest training, s",
        f"tokens right, {asked.beyond[0]} to {asked.beyond[-1]}, %",
        *(f"exact at {length:,}, %" for length in asked.exact),
        f"structured at {asked.structured:,}, %",
        *([f"exact at {asked.far:,}"] if table.far else []),
    ]
    return ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]


def _line(table: Table, name: str, end: str, runs: Sequence[Mapping[str, Any]]) -> str | None:
    """A row with answers that end in one way: of several seeds the best, the median and the worst."""
    if not runs:
        return None
    asked = table.asked
    steps = sorted({run["steps"] for run in runs})
    exact = sum(run["exact_at_longest"] for run in runs)
    seconds = [run["seconds"]["training"][-1] for run in runs]

    def exactly(length: int) -> Callable[[Mapping[str, Any]], float]:
        return lambda run: _share(run["ends"][end]["exact"][str(length)])

    def structured(run) -> float:
        return statistics.mean(map(_share, run["ends"][end]["structured"].values()))

    measures = [lambda run: accuracy(run, end, asked.beyond), *map(exactly, asked.exact), structured]
    far = [each for run in runs if (each := run["ends"][end]["exact"].get(str(asked.far)))]
    cells = [
        f"`{name}`",
        table.builds_in(name),
        end,
        f"{runs[0]['parameters']:,}",
        f"{exact} of {len(runs)} ({' or '.join(f'{each:,}' for each in steps)})",
        f"{max(known):.0f}" if (known := [each for each in seconds if each is not None]) else "not known",
        *(_spread([100 * measure(run) for run in runs]) for measure in measures),
    ]
    if table.far:
        counts = [sum(each[what] for each in far) for what in ("exact", "strings")]
        cells.append(f"{counts[0]} of {counts[1]}" if far else "not asked")
    return "| " + " | ".join(cells) + " |"


def _share(counts: Mapping[str, int]) -> float:
    return counts["exact"] / counts["strings"]


def _spread(values: Sequence[float]) -> str:
    """Best, median and worst; one number where all are alike."""
    shown = [_percent(value) for value in (max(values), statistics.median(values), min(values))]
    return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


def _percent(value: float) -> str:
    """Rounded so that nothing short of all reads as all."""
    text = f"{value:.1f}"
    return "< 100" if text == "100.0" and value < 100 else text


def draw(table: Table, found: Found, symbols: int) -> Figure:
    """Share of tokens right against length: a line a row with its seeds' spread, an axes a group and task.

    The length is given; the lengths of training are shaded.
    """
    tasks = list(dict.fromkeys(each["task"] for each in found.values() if each["symbols"] == symbols))
    names = [name for name in table.rows if any(_of(found, name, task, symbols) for task in tasks)]
    groups = list(dict.fromkeys(table.rows[name].group for name in names))
    size = (3.6 * len(tasks) + 2.6, 2.5 * len(groups) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(groups), len(tasks), squeeze=False, sharex=True, sharey=True)
    for group, across in zip(groups, grid):
        for ax, task in zip(across, tasks):
            ax.axvspan(1, table.longest, color="0.92", label="lengths of training")
            ax.axhline(100 / symbols, color="0.7", lw=0.8, label="guessing")
            for number, name in enumerate(name for name in names if table.rows[name].group == group):
                _draw_row(ax, _of(found, name, task, symbols), table.rows[name].ends[-1], name, number)
        across[0].set_ylabel(f"{group}\ntokens right, %" if group else "tokens right, %")
        handles = {text: handle for ax in across for handle, text in zip(*ax.get_legend_handles_labels())}
        across[-1].legend(handles.values(), handles, loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=7)
    for ax, task in zip(grid[0], tasks):
        ax.set_title(f"{task}, {symbols} symbols")
    for ax in grid[-1]:
        asked = (*table.asked.within, *table.asked.beyond)
        ticks = [at for at in (4, 10, 20, table.longest, *_TICKS) if min(asked) <= at <= max(asked)]
        ax.set(xscale="log", xlabel="length of the source", ylim=(-3, 103))
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
    return figure


def _draw_row(ax: Axes, runs: Sequence[Mapping[str, Any]], end: str, name: str, number: int):
    """The line of a row: the median of its seeds, and from the worst to the best."""
    if not runs:
        return
    lengths = sorted(map(int, runs[0]["ends"][end]["tokens"]))
    shares = [[100 * accuracy(run, end, [length]) for run in runs] for length in lengths]
    color, dashes = f"C{number % 10}", _DASHES[number % len(_DASHES)]
    # Later lines are thinner, so that those beneath are seen where all are alike.
    ax.plot(
        lengths, [*map(statistics.median, shares)], dashes, color=color, lw=max(1.0, 3.2 - 0.4 * number), label=name
    )
    ax.fill_between(lengths, [*map(min, shares)], [*map(max, shares)], alpha=0.15, color=color)


def write(table: Table, found: Found, picture: str) -> str:
    """The part of a page that the program makes: what was asked, the tables, and the figure."""
    return (
        f"{BEGIN}\n"
        f"{_trained(table)} Of several seeds best / median / worst are shown, or one number where they are alike.\n\n"
        f"{_asked(table, found)}\n"
        f"![Share of tokens right against length]({picture})\n\n"
        f"{tables(table, found)}{END}"
    )


def _asked(table: Table, found: Found) -> str:
    """What the columns of the tables stand for."""
    asked, used = table.asked, {end for row in table.rows.values() for end in row.ends}
    far = f" ({asked.far_strings} a seed at {asked.far:,})" if table.far else ""
    ends = "".join(f"- **{name}**: {says}\n" for name, says in ENDS.items() if name in used)
    return (
        f"Tokens: {asked.each} held-out strings of each of the lengths {_list(asked.beyond)}, answered freely; the "
        f"mean over lengths. Exact: whole strings, end included, of {asked.strings:,}{far}. Structured: whole strings "
        "of one symbol, with one odd symbol at each place, alternating, periodic, palindromes, all equal but the ends; "
        f"the mean over these kinds. Of a length or kind with an error among the first {FIRST} strings, these alone "
        f"are counted. Seconds are those of the training that counts, {_devices(found)}; not known where it, or what "
        "is asked of it, was stopped on the way, or another row had trained the same model. The answer's end:\n\n"
        f"{ends}"
    )


def _devices(found: Found) -> str:
    """What was measured on what: the device of most models, and rows of which some were on another."""
    rows = collections.defaultdict(list)
    for each in found.values():
        rows[each["machine"]["devices"][0]].append(each["row"])
    usual, *others = sorted(rows, key=lambda device: len(rows[device]), reverse=True)
    said = [f"{', '.join(f'`{name}`' for name in dict.fromkeys(rows[device]))} on {device}" for device in others]
    return "; ".join([f"on {usual}", *said])


def _trained(table: Table) -> str:
    """How the rows were trained, in a sentence or two."""
    name = next(iter(table.rows))
    config = table.configured(table.trainings(name)[0], table.budgets[0])
    steps = " or ".join(f"{steps:,}" for steps in table.budgets)
    said = (
        f"Trained on strings of 1 to {table.longest} symbols, {steps} steps of {config.training.batch_size} strings at "
        f"learning rate {config.optimizer.learning_rate:g}"
    )
    if len(table.budgets) == 1:
        return f"{said}."
    return (
        f"{said}: where a model is not exact at {table.longest} after fewer steps, it is trained anew for more, and "
        "the last training counts."
    )


def _list(numbers: Iterable[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def into(text: str, part: str) -> str | None:
    """A page with its part between the marks replaced; None where it has no marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return before + part + after if begin and end else None


def save(table: Table, found: Found, path: pathlib.Path):
    """Write the part into a page, between its marks if it is there already, and the figure beside it.

    Raises:
      ValueError: the page is there, and has no marks.
    """
    symbols = min(each["symbols"] for each in found.values())
    picture = path.with_suffix(".png")
    part = write(table, found, picture.name)
    text = into(path.read_text(), part) if path.exists() else part + "\n"
    if text is None:
        raise ValueError(f"{path}: has no lines {BEGIN} and {END} to write between")
    path.write_text(text)
    draw(table, found, symbols).savefig(picture, dpi=110)
