"""Run a study of lengths: train, evaluate, and save the results, model by model.

The folder holds `ROW.json` for each row, with one entry per model that has been trained and evaluated.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from attn.nn.models import MODELS
from attn.studies.jobs import Trainer, machine, run_jobs
from attn.studies.lengths.evaluation import evaluate, is_exact
from attn.studies.lengths.study import Job, Study
from attn.studies.report import load_json, other_settings, save_json
from attn.training.config import to_mapping
from attn.training.groups import OPTIMIZERS

Result = Mapping[str, Any]  # of one model


def run_study(study: Study, names: Sequence[str], folder: pathlib.Path, track: Callable[[Sequence], Iterable] = iter):
    """Train and evaluate the models of these rows, except those whose results are in the folder.

    `track` wraps a sequence of lengths to show progress.

    Raises:
      RunError: a result in the folder is damaged, or was produced with different settings.
    """
    # All rows, so that damage is reported before any training.
    done = {name: read(study, name, folder) for name in study.rows}
    missing = [job for name in names for job in study.jobs(name) if job.name not in done[name]]
    models = sum(len(study.jobs(name)) for name in names)
    print(f"{models} models in {len(names)} rows, of which {len(missing)} are missing in {folder}")

    def run_job(job: Job) -> Callable[[Trainer], None]:
        def run(trainer: Trainer):
            result, path = _measure(study, job, trainer, track), folder / f"{job.row}.json"
            saved = load_json(path, dict) or {}
            if job.name in saved:  # an incomplete result: only its evaluation is new, so keep the time of its training
                result["seconds"]["training"] = saved[job.name]["seconds"]["training"]
            save_json(path, saved | {job.name: result})
            print(f"  {summary(study, result)}")

        return run

    run_jobs("model", {job.name: run_job(job) for job in missing}, folder)


def _measure(study: Study, job: Job, trainer: Trainer, track: Callable) -> dict[str, Any]:
    """Train a model, with the first budget that is enough or the last one, and evaluate it."""
    row = study.rows[job.row]
    seconds = []
    for steps in study.budgets_of(job.row):
        settings = study.settings(job, steps)
        is_new, start = not trainer.is_started(settings), time.perf_counter()
        run = trainer.train(settings)
        # The time of a resumed training would miss its first part, so it is not recorded.
        seconds.append(time.perf_counter() - start if is_new else None)
        if exact := is_exact(run, row.ends[0], study.longest):
            break
    start, far = time.perf_counter(), study.is_far(job)
    ends = {end: evaluate(run, end, study.grid, far=far, track=track) for end in row.ends}
    return {
        **vars(job),
        "settings": _relevant_settings(study, job),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(run.params)),
        "steps": steps,
        "exact_at_longest": exact,
        "seconds": {"training": seconds, "asking": time.perf_counter() - start},
        "ends": ends,
        "machine": machine(),
    }


def _relevant_settings(study: Study, job: Job) -> dict[str, Any]:
    """Return the settings that a result depends on, as read back from JSON."""
    config = to_mapping(study.configured(job))
    groups = {group: config[group] for group in ("task", "model", "optimizer")}
    drawn = {"batch_size": config["training"]["batch_size"], "one_length": config["data"]["source"] == "one_length"}
    return json.loads(json.dumps(groups | drawn | {"budgets": study.budgets_of(job.row), "asked": vars(study.grid)}))


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a result's settings with defaults for those that did not exist when it was measured."""
    model, optimizer = settings["model"], settings["optimizer"]
    of_model = dataclasses.asdict(MODELS[model["name"]].settings(model["name"])) | model
    of_optimizer = dataclasses.asdict(OPTIMIZERS[optimizer.get("name", "adamw")]()) | optimizer
    return settings | {"model": of_model, "optimizer": of_optimizer}


def _is_complete(study: Study, job: Job, result: Result) -> bool:
    """Return whether a result has all ends and lengths that its row needs."""
    far = {str(study.grid.far)} if study.is_far(job) else set()
    ends = result["ends"]
    return all(end in ends and far <= ends[end]["exact"].keys() for end in study.rows[job.row].ends)


def read(study: Study, name: str, folder: pathlib.Path) -> dict[str, Result]:
    """Return the complete results of a row, by the names of its models.

    Raises:
      RunError: the file is damaged, or was produced with different settings.
    """
    path = folder / f"{name}.json"

    def parse(saved: dict[str, Result]) -> dict[str, Result]:
        for result in saved.values():  # also those of seeds and ends that the study does not have now
            job = Job(name, result["task"], result["symbols"], result["seed"])
            relevant = _relevant_settings(study, job)  # imports the study's modules, which the next line needs
            if _with_defaults(result["settings"]) != relevant:
                raise other_settings(path)
        jobs = {job.name: job for job in study.jobs(name) if job.name in saved}
        results = {key: saved[key] for key, job in jobs.items() if _is_complete(study, job, saved[key])}
        for result in results.values():
            summary(study, result)  # raises if the result cannot be shown
        return results

    return load_json(path, parse) or {}


def summary(study: Study, result: Result) -> str:
    """Return one line about a model."""
    parts = [f"{result['steps']} steps, {'' if result['exact_at_longest'] else 'not '}exact at {study.longest}"]
    for end, counts in result["ends"].items():
        exact = ", ".join(f"{each['exact']} of {each['strings']} at {n}" for n, each in counts["exact"].items())
        percent = 100 * token_accuracy(result, end, study.grid.beyond)
        parts.append(f"end {end}: {percent:.2f} % of tokens, exact {exact}")
    return "; ".join(parts)


def token_accuracy(result: Result, end: str, lengths: Iterable[int]) -> float:
    """Return the fraction of correct tokens, averaged over lengths."""
    counts = [result["ends"][end]["tokens"][str(length)] for length in lengths]
    return sum(each["right"] / each["tokens"] for each in counts) / len(counts)
