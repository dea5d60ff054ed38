"""How long strings far past the training length take to answer, token by token, and to confirm in one pass.

    python benchmarks/decoding.py

Trains the row anchored_to_source of configs/lengths.py on reverse, then answers 64 strings of 1,000 symbols and one of
10,000 with an end token of the model's own. Compilation is not counted; the same strings are confirmed in one pass in
the same process. Writes benchmarks/results/decoding.json.
"""

import argparse
import json
import pathlib
import platform
import tempfile
import time

import jax

from attn.lengths.asking import Examiner
from attn.lengths.table import Training
from attn.tasks.generated import Generated
from attn.training import meshes
from attn.training.flags import run_file
from attn.walkthrough.bench import Bench

ROOT = pathlib.Path(__file__).parent.parent


def main():
    """Train, answer, print, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strings", type=int, default=64, help="strings of 1,000 symbols (%(default)s)")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results/decoding.json")
    arguments = parser.parse_args()
    meshes.use_cores(meshes.cores())
    table, training = (
        run_file(ROOT / "configs/lengths.py", "get_table"),
        Training("anchored_to_source", "reverse", 2, 0),
    )
    with tempfile.TemporaryDirectory() as scratch:
        run = Bench(pathlib.Path(scratch), lambda line: None).trained(table.settings(training, table.budgets[0]))
    examiner = Examiner(run, "learned")
    rows = [measure(examiner, 1_000, arguments.strings), measure(examiner, 10_000, 1)]
    machine = {"cores": meshes.cores(), "python": platform.python_version(), "jax": jax.__version__}
    arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    print(f"wrote {arguments.output}")


def measure(examiner: Examiner, length: int, strings: int) -> dict:
    """Seconds for some strings of one length, once what is needed is compiled."""
    questions = Generated(examiner.task).questions_of_each_length("test", [length], strings, 0)
    programs = {"token by token": examiner.written, "confirmed in one pass": examiner.confirmed}
    row = {"length": length, "strings": len(questions.sources)}
    for name, program in programs.items():
        program(questions)
        began = time.perf_counter()
        result = program(questions)
        row[name] = round(time.perf_counter() - began, 2)
        if name == "token by token":
            right = (result[:, : questions.targets.shape[1]] == questions.targets).all(1)
            row["exact"] = int(right.sum())
    print(
        f"{row['strings']:>3} strings of {length:>6,} symbols: {row['token by token']:6.2f} s token by token, "
        f"{row['confirmed in one pass']:6.2f} s confirmed in one pass, {row['exact']} exact",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
