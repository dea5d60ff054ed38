"""Save the results of a full run of the walkthrough: JSON files in results/walkthrough, figures in docs/walkthrough.

attn walkthrough --output runs/walkthrough
python benchmarks/walkthrough.py runs/walkthrough

Prints the verdicts and checks as docs/walkthrough.md lists them.
"""

import argparse
import pathlib

from attn.studies.report import save_json
from attn.studies.walkthrough.claims import Check, verdict
from attn.studies.walkthrough.registry import CLAIMS
from attn.studies.walkthrough.running import as_values, read
from attn.training.folders import RunError

ROOT = pathlib.Path(__file__).parent.parent
RESULTS, FIGURES = "benchmarks/results/walkthrough", "docs/walkthrough"


def line(check: Check) -> str:
    """Return a check as one item of a Markdown list."""
    return f"- {check.says}: {check.measured:.4g}, must be {check.must_be()}: {'holds' if check.holds() else 'no'}"


def main():
    """Read a run, print its checks, and write its JSON files and figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="Folder of the run, such as runs/walkthrough.")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT, help="Folder to write below (the repository).")
    arguments = parser.parse_args()
    folder, results, figures = arguments.folder, arguments.output / RESULTS, arguments.output / FIGURES
    try:
        all_measured = {name: read(folder, name) for name in CLAIMS}
    except RunError as error:
        parser.error(str(error))
    for name, measured in all_measured.items():
        if measured is None or measured.quick:
            parser.error(f"{folder}: {name} has not been measured{' at full size' if measured else ''}")
    for output in (results, figures):
        output.mkdir(parents=True, exist_ok=True)
    for name, claim in CLAIMS.items():
        measured = all_measured[name]
        checks = claim.check(measured.numbers)
        print(f"## {claim.title}: {verdict(checks)}\n\n{claim.sentence}\n", *map(line, checks), "", sep="\n")
        claim.figure(measured.numbers).savefig(figures / f"{name}.png", dpi=90)
        save_json(results / f"{name}.json", as_values(name, measured), indent=2)


if __name__ == "__main__":
    main()
