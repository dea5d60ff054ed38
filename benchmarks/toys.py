"""The small models in the styles of BERT, GPT-2, Llama, T5 and ViT: steps, exact match and seconds of each config.

python benchmarks/toys.py

Each run is `python train.py --config=configs/NAME.py` in its own process, one after another. Writes results/toys.json.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from machine import describe

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "toys.json"
RUNS = {
    "bert": ("bert", {}),
    "gpt2": ("gpt2", {}),
    "gpt2_copy": ("gpt2", {"task.name": "copy"}),
    "llama": ("llama", {}),
    "llama_copy": ("llama", {"task.name": "copy"}),
    "t5": ("t5", {}),
    "vit": ("vit", {}),
}


def train(config: str, changes: dict[str, str]) -> dict:
    """Train a config; return the steps, the exact match on held-out sources, and the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "train.py", f"--config=configs/{config}.py", f"--workdir={folder}/run"]
        words += [f"--config.{key}={value}" for key, value in changes.items()]
        subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((pathlib.Path(folder) / "run" / "summary.json").read_text())
    return {
        "steps": summary["steps"],
        "exact_match": summary["exact_match"],
        "examples": summary["examples_evaluated"],
        "seconds": summary["seconds"]["total"],
    }


def main():
    """Train all configs with these seeds, print a line each, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Seeds of the runs.")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, help="JSON file to write.")
    arguments = parser.parse_args()
    rows = {name: {} for name in RUNS}
    for seed in arguments.seeds:
        for name, (config, changes) in RUNS.items():
            row = rows[name][str(seed)] = train(config, changes | {"training.seed": str(seed)})
            print(
                f"{name:<11} seed {seed}  {row['steps']:>5,} steps  {row['exact_match']:.4f}  {row['seconds']:.0f} s",
                flush=True,
            )
            arguments.output.write_text(json.dumps({"machine": describe(), "runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
