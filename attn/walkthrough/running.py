"""The whole walkthrough: measure claim by claim, keep what is measured, and write the page.

The folder holds NAME.json for each claim that has been measured, `index.html`, and under `runs/` the models that were
trained for them, beside `programs/`, what was compiled. A claim whose JSON is there is not measured again.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from attn.training.folders import RunError, write_whole
from attn.training.programs import keep_programs
from attn.walkthrough import page
from attn.walkthrough.bench import Bench, machine
from attn.walkthrough.claims import Claim, Measured, verdict
from attn.walkthrough.registry import CLAIMS


def walk(
    folder: pathlib.Path, names: Sequence[str], *, quick: bool, say: Callable[[str], None] = print
) -> dict[str, Measured]:
    """Measure the claims of these names, unless they have been, and write the page.

    Args:
      folder: to write to.
      names: of `CLAIMS`.
      quick: at reduced sizes.
      say: shows a line.

    Returns:
      All that the folder holds, these claims or others, in the order of the walkthrough.

    Raises:
      RunError: what the folder holds is damaged, or was measured at other sizes.
    """
    found = {name: measured for name in CLAIMS if (measured := read(folder, name)) is not None}
    for name, measured in found.items():
        if measured.quick != quick or measured.sizes != sizes_of(CLAIMS[name], quick):
            of = "quick" if measured.quick else "full"
            agree = "" if measured.quick == quick else f"go on {'with' if measured.quick else 'without'} --quick, "
            raise RunError(
                f"{folder / name}.json: of a {of} run of other sizes; {agree}give another --output, or delete the file"
            )
    folder.mkdir(parents=True, exist_ok=True)
    keep_programs(folder / "programs")
    bench = Bench(folder / "runs", say)
    try:
        for number, name in enumerate(names, start=1):
            if name in found:
                known = f"{name} is measured already; delete {name}.json to measure it again"
                say(f"claim {number} of {len(names)}: {known}")
                continue
            say(f"claim {number} of {len(names)}: {name}")
            found[name] = _measure(CLAIMS[name], bench, quick)
            write_whole(folder / f"{name}.json", as_json(name, found[name]))
    finally:  # of what there is, also where the rest was stopped
        write_whole(folder / "index.html", page.write(found))
    return {name: found[name] for name in CLAIMS if name in found}


def sizes_of(claim: Claim, quick: bool) -> dict[str, Any]:
    """The sizes of a measurement, as JSON gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(claim.quick if quick else claim.full)))


def _measure(claim: Claim, bench: Bench, quick: bool) -> Measured:
    began = time.time()
    numbers = claim.measure(claim.quick if quick else claim.full, bench)
    return Measured(quick, sizes_of(claim, quick), json.loads(json.dumps(numbers)), time.time() - began, machine())


def as_json(name: str, measured: Measured) -> str:
    """The JSON of a claim: what it says, what was measured, and what follows."""
    claim = CLAIMS[name]
    checks = claim.check(measured.numbers)
    said = {
        "claim": name,
        "sentence": claim.sentence,
        "source": claim.source,
        "verdict": verdict(checks),
        "checks": [{**check._asdict(), "holds": check.holds()} for check in checks],
    }
    return json.dumps(said | measured._asdict(), indent=2) + "\n"


def read(folder: pathlib.Path, name: str) -> Measured | None:
    """What a folder holds of a claim, if it has been measured.

    Raises:
      RunError: the file is damaged.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        measured = Measured(*(values[field] for field in Measured._fields))
        page.section(name, measured)  # all of it can be shown
        return measured
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
        said = f"{type(error).__name__}: {error}"
        raise RunError(f"{path}: cannot be read ({said}); delete it to measure the claim again") from None
