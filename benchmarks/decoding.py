"""Measure how long decoding token by token and confirming in one pass take, far past the training length.

    python benchmarks/decoding.py

Trains the row anchored_to_source of configs/lengths.py on reverse, then decodes the answers to 64 strings of 1,000
symbols and to one of 10,000, each with an end token that the model writes. Confirms the same strings in one pass, in
the same process. Compilation is not counted. Writes benchmarks/results/decoding.json.
"""

import argparse
import json
import pathlib
import platform
import tempfile
import time

import jax

from attn.studies.jobs import Trainer
from attn.studies.lengths.evaluation import Evaluator
from attn.studies.lengths.study import Job
from attn.tasks.generated import Generated
from attn.training import meshes
from attn.training.flags import run_file

ROOT = pathlib.Path(__file__).parent.parent


def main():
    """Train, measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strings", type=int, default=64, help="Number of strings of 1,000 symbols (%(default)s).")
    output = ROOT / "benchmarks/results/decoding.json"
    parser.add_argument("--output", type=pathlib.Path, default=output, help="File of the results.")
    arguments = parser.parse_args()
    meshes.use_cores(meshes.cores())
    study, job = run_file(ROOT / "configs/lengths.py", "get_study"), Job("anchored_to_source", "reverse", 2, 0)
    with tempfile.TemporaryDirectory() as scratch:
        run = Trainer(pathlib.Path(scratch), lambda line: None).train(study.settings(job, study.budgets[0]))
    evaluator = Evaluator(run, "learned")
    rows = [measure(evaluator, 1_000, arguments.strings), measure(evaluator, 10_000, 1)]
    machine = {"cores": meshes.cores(), "python": platform.python_version(), "jax": jax.__version__}
    arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    print(f"wrote {arguments.output}")


def measure(evaluator: Evaluator, length: int, strings: int) -> dict:
    """Return the seconds for strings of one length, after compilation."""
    questions = Generated(evaluator.task).questions_of_each_length("test", [length], strings, 0)
    programs = {"token by token": evaluator.decoded, "confirmed in one pass": evaluator.confirmed}
    row = {"length": length, "strings": len(questions.sources)}
    for name, program in programs.items():
        program(questions)  # compiles
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
