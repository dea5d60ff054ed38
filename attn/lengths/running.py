"""A whole table: train, ask, keep what was found, training by training.

The folder holds `ROW.json` for each row, with an entry for each model that has been trained and asked, and the models
themselves under `runs/`. What is there is not done again.
"""

import json
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from attn.lengths.asking import exact_at, examine
from attn.lengths.table import Table, Training
from attn.training.config import from_mapping, to_mapping
from attn.training.folders import RunError, write_whole
from attn.training.programs import keep_programs
from attn.walkthrough.bench import Bench, machine


def run_table(
    table: Table,
    names: Sequence[str],
    folder: pathlib.Path,
    *,
    say: Callable[[str], None] = print,
    track: Callable[[Sequence], Iterable] = iter,
) -> None:
    """Train and ask what rows of a table lack in a folder.

    Args:
      table: the rows.
      names: of the rows.
      folder: to write to, or to go on with.
      say: shows a line.
      track: wraps a sequence of lengths, to show progress.

    Raises:
      RunError: what the folder holds is damaged, or of another table.
    """
    keep_programs(folder / "programs")
    bench = Bench(folder / "runs", say)
    done = {name: read(table, name, folder) for name in table.rows}  # all: a page shows all, and damage is said first
    missing = [each for name in names for each in table.trainings(name) if each.name not in done[name]]
    models = sum(len(table.trainings(name)) for name in names)
    say(f"{models} models in {len(names)} rows, of which {len(missing)} are missing in {folder}")
    for number, training in enumerate(missing, start=1):
        say(f"model {number} of {len(missing)}: {training.name}")
        found, path = _found(table, training, bench, track), folder / f"{training.row}.json"
        held = _held(path)
        if training.name in held:  # of the same settings, as has been read: it is only asked more now
            found["seconds"]["training"] = held[training.name]["seconds"]["training"]
        # Beside all that the file holds by now, also of seeds that were not asked for this time.
        write_whole(path, json.dumps(held | {training.name: found}) + "\n")
        say(f"  {shortly(table, found)}")


def _held(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What a row's file holds, unread."""
    return json.loads(path.read_text()) if path.exists() else {}


def _asked(table: Table, training: Training, held: dict[str, dict[str, Any]]) -> bool:
    """Whether a model has been asked all that its row asks by now."""
    if training.name not in held:
        return False
    ends = held[training.name]["ends"]
    far = {str(table.asked.far)} if table.is_far(training) else set()
    return all(end in ends and far <= ends[end]["exact"].keys() for end in table.rows[training.row].ends)


def _found(table: Table, training: Training, bench: Bench, track: Callable) -> dict[str, Any]:
    """Train a model, for as long as it needs and the budgets allow, and ask it."""
    row = table.rows[training.row]
    seconds = []
    for steps in table.budgets_of(training.row):
        settings = table.settings(training, steps)
        anew, began = not bench.begun(settings), time.perf_counter()
        run = bench.trained(settings)
        seconds.append(time.perf_counter() - began if anew else None)  # it was stopped: the rest is not known
        if exact := exact_at(run, row.ends[0], table.longest):
            break
    began, far = time.perf_counter(), table.is_far(training)
    ends = {end: examine(run, end, table.asked, far=far, track=track) for end in row.ends}
    return {
        "row": training.row,
        "task": training.task,
        "symbols": training.symbols,
        "seed": training.seed,
        "settings": _settings(table, training),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(run.params)),
        "steps": steps,
        "exact_at_longest": exact,
        "seconds": {"training": seconds, "asking": time.perf_counter() - began},
        "ends": ends,
        "machine": machine(),
    }


def _settings(table: Table, training: Training) -> dict[str, Any]:
    """What decides a result, as JSON gives it back: to tell results of another table."""
    budgets = table.budgets_of(training.row)
    config = to_mapping(table.configured(training, budgets[0]))
    kept = {group: config[group] for group in ("task", "model", "optimizer")}
    drawn = {name: config["training"][name] for name in ("batch_size", "one_length")}
    return json.loads(json.dumps(kept | drawn | {"budgets": budgets, "asked": vars(table.asked)}))


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a result; what was not yet a setting of the optimizer when it was measured has its default."""
    return settings | {"optimizer": to_mapping(from_mapping({"optimizer": settings["optimizer"]}))["optimizer"]}


def read(table: Table, name: str, folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What a folder holds of a row, by the names of its trainings.

    Raises:
      RunError: the file is damaged, or of other settings.
    """
    path = folder / f"{name}.json"
    try:
        held = _held(path)
        for each in held.values():  # also of seeds, and with ends, that this table does not ask
            training = Training(name, each["task"], each["symbols"], each["seed"])
            if _with_defaults(each["settings"]) != _settings(table, training):
                raise RunError(f"{path}: of other settings; delete it to do it again, or give another --output")
        found = {each.name: held[each.name] for each in table.trainings(name) if _asked(table, each, held)}
        for each in found.values():
            shortly(table, each)  # all of it can be shown
        return found
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        said = f"{type(error).__name__}: {error}"
        raise RunError(f"{path}: cannot be read ({said}); delete it to do it again") from None


def shortly(table: Table, found: dict[str, Any]) -> str:
    """What was found of a model, in a line."""
    said = [f"{found['steps']} steps, {'' if found['exact_at_longest'] else 'not '}exact at {table.longest}"]
    for end, counts in found["ends"].items():
        exact = ", ".join(f"{each['exact']} of {each['strings']} at {at}" for at, each in counts["exact"].items())
        said.append(f"end {end}: {100 * accuracy(found, end, table.asked.beyond):.2f} % of tokens, exact {exact}")
    return "; ".join(said)


def accuracy(found: dict[str, Any], end: str, lengths: Iterable[int]) -> float:
    """The share of tokens that are right, averaged over lengths."""
    counts = [found["ends"][end]["tokens"][str(length)] for length in lengths]
    return sum(each["right"] / each["tokens"] for each in counts) / len(counts)
