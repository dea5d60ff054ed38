"""The settings that decide the arrays of a run, and their digest."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping

from attn.training.config import Config, to_mapping

PATHS = ("path", "validation", "test", "folder")  # settings of `data`; the files there have digests in data.json
# Settings that may change when a run resumes: length of training, intervals of reports, paths of the data; and the
# implementation of attention and the mesh, so that a run may move to a machine without those it was started with.
_MAY_CHANGE = (
    *("training.steps", "training.stop_when_exact", "training.steps_per_call"),
    *("training.evaluate_every", "training.checkpoint_every", "training.snapshots", "model.implementation"),
    *(f"data.{name}" for name in PATHS),
)


def may_change(key: str) -> bool:
    """Return whether a run may resume with another value of the setting `key`, such as "training.steps"."""
    return key in _MAY_CHANGE or key.startswith(("evaluation.", "mesh."))


def flat(settings: Mapping, path: str = "") -> dict:
    """Return nested settings as `{"section.name": value}`."""
    values = {}
    for name, value in settings.items():
        values |= flat(value, f"{path}{name}.") if isinstance(value, Mapping) else {path + name: value}
    return values


def digest_of(config: Config) -> str:
    """Return the SHA-256 of the settings that decide the arrays.

    Settings at their default are left out, so that a later version may add settings and still open old runs.
    """
    usual = Config()
    model, optimizer = (
        dataclasses.replace(type(group)(), name=default.name)
        for group, default in ((config.model, usual.model), (config.optimizer, usual.optimizer))
    )
    defaults = flat(dataclasses.asdict(dataclasses.replace(usual, model=model, optimizer=optimizer)))
    deciding = {
        key: value
        for key, value in flat(to_mapping(config)).items()
        if not may_change(key) and (key not in defaults or defaults[key] != value)
    }
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
