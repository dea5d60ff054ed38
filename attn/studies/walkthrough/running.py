"""Run the walkthrough: measure claim by claim, save the results, and write the page.

The folder holds NAME.json for each claim that has been measured, and `index.html`.
"""

import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from attn.studies.jobs import Trainer, machine, run_jobs
from attn.studies.report import load_json, other_settings, save_json
from attn.studies.walkthrough import page
from attn.studies.walkthrough.claims import Measurement, verdict
from attn.studies.walkthrough.registry import CLAIMS
from attn.training.folders import write_whole


def walk(folder: pathlib.Path, names: Sequence[str], *, quick: bool) -> dict[str, Measurement]:
    """Measure these claims, except those whose results are in the folder, and write the page.

    Returns all results in the folder, in the order of the walkthrough.

    Raises:
      RunError: a result in the folder is damaged, or was measured at other sizes.
    """
    measured = {name: result for name in CLAIMS if (result := read(folder, name)) is not None}
    for name, result in measured.items():
        if result.quick != quick:
            raise other_settings(folder / f"{name}.json", f" (continue {'without' if quick else 'with'} --quick)")
        if result.sizes != sizes_of(name, quick):
            raise other_settings(folder / f"{name}.json")

    def measure(name: str) -> Callable[[Trainer], None]:
        def run(trainer: Trainer):
            start = time.time()
            numbers = CLAIMS[name].measure(CLAIMS[name].sizes(quick), trainer)
            seconds = time.time() - start
            # `_plain` converts through JSON, so that a page is the same from measured and from saved numbers.
            measured[name] = Measurement(quick, sizes_of(name, quick), _plain(numbers), seconds, machine())
            save_json(folder / f"{name}.json", as_values(name, measured[name]), indent=2)

        return run

    for name in names:
        if name in measured:
            print(f"{name} is measured already; delete {name}.json to measure it again")
    for name, reason in (missing := {each: CLAIMS[each].missing() for each in names}).items():
        if reason is not None and name not in measured:
            print(f"{name} is not measured: {reason}")
    to_measure = [name for name in names if name not in measured and missing[name] is None]
    try:
        run_jobs("claim", {name: measure(name) for name in to_measure}, folder)
    finally:  # if interrupted, write a page of the claims measured so far
        write_whole(folder / "index.html", page.write(measured))
    return {name: measured[name] for name in CLAIMS if name in measured}


def sizes_of(name: str, quick: bool) -> dict[str, Any]:
    """Return the sizes of a claim's measurement, as read back from JSON."""
    return _plain(vars(CLAIMS[name].sizes(quick)))


def _plain(values: Any) -> Any:
    return json.loads(json.dumps(values))


def as_values(name: str, measured: Measurement) -> dict[str, Any]:
    """Return the content of a claim's JSON: the claim, its verdict with the checks, and the measurement."""
    claim = CLAIMS[name]
    checks = claim.check(measured.numbers)
    return {
        "claim": name,
        "sentence": claim.sentence,
        "source": claim.source,
        "verdict": verdict(checks),
        "checks": [{**check._asdict(), "holds": check.holds()} for check in checks],
        **measured._asdict(),
    }


def read(folder: pathlib.Path, name: str) -> Measurement | None:
    """Return the measurement of a claim in a folder; None if the claim is not measured.

    Raises:
      RunError: the file is damaged.
    """

    def parse(values: dict[str, Any]) -> Measurement:
        measured = Measurement(*(values[field] for field in Measurement._fields))
        page.section(name, measured)  # raises if the result cannot be shown
        return measured

    return load_json(folder / f"{name}.json", parse)
