"""What came of a table, for people: Markdown tables and a figure, made from the numbers alone."""

import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from attn.lengths.running import accuracy
from attn.lengths.table import ENDS, Table

Found = Mapping[str, Mapping[str, Any]]  # by the names of trainings
BEGIN, END = "<!-- made by attn lengths: begin -->", "<!-- made by attn lengths: end -->"
_DASHES = ("-", "--", ":", "-.")


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
        f"tokens right, {asked.beyond[0]} to {asked.beyond[-1]}, %",
        *(f"exact at {length:,}, %" for length in asked.exact),
        f"structured at {asked.structured:,}, %",
        f"exact at {asked.far:,}",
    ]
    return ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]


def _line(table: Table, name: str, end: str, runs: Sequence[Mapping[str, Any]]) -> str | None:
    """A row with answers that end in one way: of several seeds the best, the median and the worst."""
    if not runs:
        return None
    asked = table.asked
    steps = sorted({run["steps"] for run in runs})
    exact = sum(run["exact_at_longest"] for run in runs)

    def exactly(length: int) -> Callable[[Mapping[str, Any]], float]:
        return lambda run: _share(run["ends"][end]["exact"][str(length)])

    def structured(run) -> float:
        counts = run["ends"][end]["structured"].values()
        return sum(each["exact"] for each in counts) / sum(each["strings"] for each in counts)

    measures = [lambda run: accuracy(run, end, asked.beyond), *map(exactly, asked.exact), structured]
    far = [counts for run in runs if (counts := run["ends"][end]["exact"].get(str(asked.far)))]
    cells = [
        f"`{name}`",
        table.builds_in(name),
        end,
        f"{runs[0]['parameters']:,}",
        f"{exact} of {len(runs)} ({' or '.join(f'{each:,}' for each in steps)})",
        *(_spread([100 * measure(run) for run in runs]) for measure in measures),
        f"{sum(counts['exact'] for counts in far)} of {sum(counts['strings'] for counts in far)}"
        if far
        else "not asked",
    ]
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
    """Share of tokens right against length, the length given: a line a row, its seeds' spread, training shaded."""
    tasks = list(dict.fromkeys(each["task"] for each in found.values() if each["symbols"] == symbols))
    names = [name for name in table.rows if any(_of(found, name, task, symbols) for task in tasks)]
    figure = Figure(figsize=(4.4 * len(tasks) + 2.6, 4.8), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    colors = [f"C{number}" for number in range(10)]
    for ax, task in zip(axes, tasks):
        ax.axvspan(1, table.longest, color="0.92", label="lengths of training")
        for number, name in enumerate(names):
            runs, end = _of(found, name, task, symbols), table.rows[name].ends[-1]
            if not runs:
                continue
            lengths = sorted(map(int, runs[0]["ends"][end]["tokens"]))
            shares = [[100 * accuracy(run, end, [length]) for run in runs] for length in lengths]
            style = dict(color=colors[number % 10], ls=_DASHES[number // 10 % 4])
            ax.plot(lengths, [statistics.median(some) for some in shares], lw=1.4, label=name, **style)
            ax.fill_between(
                lengths, *([pick(some) for some in shares] for pick in (min, max)), alpha=0.15, color=style["color"]
            )
        ax.set(title=f"{task}, {symbols} symbols", xscale="log", xlabel="length of the source", ylim=(-3, 103))
        ticks = [4, 10, 20, table.longest, 100, 200, 500]
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
    axes[0].set_ylabel("tokens right, %")
    handles = {text: handle for ax in axes for handle, text in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside right upper", fontsize=7)
    return figure


def write(table: Table, found: Found, picture: str) -> str:
    """The part of a page that the program makes: what was asked, the tables, and the figure."""
    asked = table.asked
    ends = "".join(f"- **{name}**: {says}\n" for name, says in ENDS.items())
    return (
        f"{BEGIN}\n"
        f"Trained on strings of 1 to {table.longest} symbols, {' or '.join(f'{steps:,}' for steps in table.budgets)} "
        f"steps of {_batch(table)} strings: where a model is not exact at {table.longest} after fewer steps, it is "
        "trained anew for more. Of several seeds best / median / worst are shown, or one number where they are alike."
        f"\n\nTokens: {asked.each} held-out strings of each of the lengths {_list(asked.beyond)}, written token by "
        f"token; the mean over lengths. Exact: whole strings, end included, of {asked.strings:,} "
        f"({asked.far_strings} a seed at {asked.far:,}); where one of the first 50 is wrong, of those 50. "
        "Structured: strings of one symbol, with one odd symbol at each place, alternating, periodic, palindromes, all "
        f"equal but the ends. The answer's end:\n\n{ends}\n"
        f"![Share of tokens right against length]({picture})\n\n"
        f"{tables(table, found)}{END}"
    )


def _batch(table: Table) -> int:
    name = next(iter(table.rows))
    return table.configured(table.trainings(name)[0], table.budgets[0]).training.batch_size


def _list(numbers: Iterable[int]) -> str:
    *first, last = numbers
    return f"{', '.join(map(str, first))} and {last}"


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
