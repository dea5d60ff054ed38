"""The report of a study of lengths: Markdown tables and a figure."""

import collections
import statistics
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attn.studies.lengths.evaluation import FIRST
from attn.studies.lengths.running import Result, token_accuracy
from attn.studies.lengths.study import ENDS, Study
from attn.studies.report import Table, tick_lengths

Results = Mapping[str, Result]  # by the names of models
_DASHES = ("-", "--", ":", "-.")
_TICKS = (100, 200, 500, 1_000, 2_000, 5_000, 10_000)


def write(study: Study, results: Results, picture: str) -> str:
    """Return the generated part of a page: the protocol, the figure, and the tables."""
    return (
        f"{_training(study)} Of several seeds best / median / worst are shown, or one number where they are alike.\n\n"
        f"{_protocol(study, results)}\n"
        f"![Share of tokens right against length]({picture})\n\n"
        f"{tables(study, results)}"
    )


def tables(study: Study, results: Results) -> str:
    """Return one table per task and alphabet, with one line per row and end; rows without results are omitted."""
    parts = []
    for symbols in sorted({each["symbols"] for each in results.values()}):
        for task in dict.fromkeys(each["task"] for each in results.values()):
            lines = [
                _cells(study, name, end, runs)
                for name in study.rows
                if (runs := _of(results, name, task, symbols))
                for end in study.rows[name].ends
            ]
            if lines:
                rows = [[*line.values()] for line in lines]
                parts.append(Table(f"{task}, {symbols} symbols", [*lines[0]], rows).markdown())
    return "\n".join(parts)


def _of(results: Results, name: str, task: str, symbols: int) -> list[Result]:
    """Return the results of a row on a task, by seed."""
    return [each for each in results.values() if (each["row"], each["task"], each["symbols"]) == (name, task, symbols)]


def _cells(study: Study, name: str, end: str, runs: Sequence[Result]) -> dict[str, str]:
    """Return the cells of a row and one of its ends, by the names of the columns."""
    grid, counts = study.grid, [run["ends"][end] for run in runs]
    steps = sorted({run["steps"] for run in runs})
    # Only the last training counts; its time is None if it was interrupted.
    seconds = [run["seconds"]["training"][-1] for run in runs if run["seconds"]["training"][-1] is not None]
    far = [each["exact"][str(grid.far)] for each in counts if str(grid.far) in each["exact"]]
    far_exact, far_strings = (sum(each[name] for each in far) for name in ("exact", "strings"))
    return {
        "row": f"`{name}`",
        "prior": study.prior(name),
        "end": end,
        "parameters": f"{runs[0]['parameters']:,}",
        f"seeds exact at {study.longest} (steps)": f"{sum(run['exact_at_longest'] for run in runs)} of {len(runs)} "
        f"({' or '.join(f'{each:,}' for each in steps)})",
        "longest training, s": f"{max(seconds):.0f}" if seconds else "not known",
        f"tokens right, {grid.beyond[0]} to {grid.beyond[-1]}, %": _spread(
            token_accuracy(run, end, grid.beyond) for run in runs
        ),
        **{f"exact at {n:,}, %": _spread(_share(each["exact"][str(n)]) for each in counts) for n in grid.exact},
        f"structured at {grid.structured:,}, %": _spread(
            statistics.mean(map(_share, each["structured"].values())) for each in counts
        ),
        **({f"exact at {grid.far:,}": f"{far_exact} of {far_strings}" if far else "not measured"} if study.far else {}),
    }


def _share(counts: Mapping[str, int]) -> float:
    return counts["exact"] / counts["strings"]


def _spread(shares: Iterable[float]) -> str:
    """Return best, median and worst in percent; one number if all look the same."""
    values = [100 * share for share in shares]
    shown = [_percent(value) for value in (max(values), statistics.median(values), min(values))]
    return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


def _percent(value: float) -> str:
    """Return a percentage as text, so that only 100 is shown as 100."""
    text = f"{value:.1f}"
    return "< 100" if text == "100.0" and value < 100 else text


def draw(study: Study, results: Results) -> Figure:
    """Draw token accuracy against length, with given answer lengths for rows that have them.

    There is one plot per group and task, and one line per row with the range of its seeds; lengths of training are
    shaded. Only the smallest alphabet is shown.
    """
    symbols = min(each["symbols"] for each in results.values())
    tasks = list(dict.fromkeys(each["task"] for each in results.values() if each["symbols"] == symbols))
    names = [name for name in study.rows if any(_of(results, name, task, symbols) for task in tasks)]
    groups = list(dict.fromkeys(study.rows[name].group for name in names))
    figure = Figure(figsize=(3.6 * len(tasks) + 2.6, 2.5 * len(groups) + 0.8), layout="constrained")
    axes = figure.subplots(len(groups), len(tasks), squeeze=False, sharex=True, sharey=True)
    for group, across in zip(groups, axes):
        for ax, task in zip(across, tasks):
            ax.axvspan(1, study.longest, color="0.92", label="lengths of training")
            ax.axhline(100 / symbols, color="0.7", lw=0.8, label="guessing")
            for number, name in enumerate(name for name in names if study.rows[name].group == group):
                _draw_row(ax, _of(results, name, task, symbols), study.rows[name].ends[-1], name, number)
        across[0].set_ylabel(f"{group}\ntokens right, %" if group else "tokens right, %")
        handles = {text: handle for ax in across for handle, text in zip(*ax.get_legend_handles_labels())}
        across[-1].legend(handles.values(), handles, loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=7)
    for ax, task in zip(axes[0], tasks):
        ax.set_title(f"{task}, {symbols} symbols")
    lengths = (*study.grid.within, *study.grid.beyond)
    for ax in axes[-1]:
        ax.set(xlabel="length of the source", ylim=(-3, 103))
        tick_lengths(ax, [n for n in (4, 10, 20, study.longest, *_TICKS) if min(lengths) <= n <= max(lengths)])
    return figure


def _draw_row(ax: Axes, runs: Sequence[Result], end: str, name: str, number: int):
    """Draw the median of a row's seeds as a line, and the range from the worst to the best."""
    if not runs:
        return
    lengths = sorted(map(int, runs[0]["ends"][end]["tokens"]))
    percents = [[100 * token_accuracy(run, end, [length]) for run in runs] for length in lengths]
    color, dashes = f"C{number % 10}", _DASHES[number % len(_DASHES)]
    width = max(1.0, 3.2 - 0.4 * number)  # later lines are thinner, so that equal lines can all be seen
    ax.plot(lengths, [*map(statistics.median, percents)], dashes, color=color, lw=width, label=name)
    ax.fill_between(lengths, [*map(min, percents)], [*map(max, percents)], alpha=0.15, color=color)


def _protocol(study: Study, results: Results) -> str:
    """Return the explanation of the columns of the tables."""
    grid, used = study.grid, {end for row in study.rows.values() for end in row.ends}
    far = f" ({grid.far_strings} per seed at {grid.far:,})" if study.far else ""
    ends = "".join(f"- **{name}**: {text}\n" for name, text in ENDS.items() if name in used)
    return (
        f"Prior: what a row is given that others must learn. Tokens: {grid.each} held-out strings of each of the "
        f"lengths {_list(grid.beyond)}, decoded greedily; the mean over lengths. Exact: whole strings, end included, "
        f"of {grid.strings:,}{far}. Structured: whole strings of one symbol, with one odd symbol at each position, "
        "alternating, periodic, palindromes, all equal but the ends; the mean over these kinds. If one of the first "
        f"{FIRST} strings of a length or kind is wrong, only these are counted. Seconds: those of the last training, "
        f"{_devices(results)}; not known if the training or its evaluation was interrupted, or if another row had "
        f"trained the same model. End:\n\n{ends}"
    )


def _devices(results: Results) -> str:
    """Return the device of most models, and the rows with models that were trained on another device."""
    rows = collections.defaultdict(list)
    for each in results.values():
        rows[each["machine"]["devices"][0]].append(each["row"])
    usual, *others = sorted(rows, key=lambda device: len(rows[device]), reverse=True)
    named = [f"{', '.join(f'`{name}`' for name in dict.fromkeys(rows[device]))} on {device}" for device in others]
    return "; ".join([f"on {usual}", *named])


def _training(study: Study) -> str:
    """Return a description of the rows' training."""
    config = study.configured(study.jobs(next(iter(study.rows)))[0])
    steps = " or ".join(f"{steps:,}" for steps in study.budgets)
    text = (
        f"Trained on strings of 1 to {study.longest} symbols, {steps} steps of {config.training.batch_size} strings at "
        f"learning rate {config.optimizer.learning_rate:g}"
    )
    if len(study.budgets) == 1:
        return f"{text}."
    return (
        f"{text}: a model that is not exact at {study.longest} after fewer steps is trained again, from the start, for "
        "more, and the last training counts."
    )


def _list(numbers: Iterable[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last
