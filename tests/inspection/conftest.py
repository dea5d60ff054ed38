"""Runs to intervene in: a trained one, and untrained ones of several models, in float64 too."""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn.nn.models import MODELS
from attn.runs import Run
from attn.studies.probes import untrained
from attn.training.state import model_structure

OUTSIDE = pathlib.Path(__file__).parents[1] / "extending/mine/causal_model.py"
_SIZES = dict(width=24, num_heads=4, feed_forward_width=20)
_MODELS = {
    "transformer": dict(num_encoder_layers=2, num_decoder_layers=2, **_SIZES),
    "decoder_only": dict(num_layers=2, **_SIZES),
    "encoder_only": dict(num_layers=2, **_SIZES),
    "causal_model": dict(num_layers=2, **_SIZES),  # from outside of the package
    "lstm": dict(width=12, num_layers=1),
}


@pytest.fixture(scope="session")
def run(copy_run) -> Run:
    """A trained run: it copies."""
    return attn.load(copy_run)


@pytest.fixture(scope="module")
def outside():
    """Register a model from outside of the package; forget it afterwards."""
    before = dict(MODELS)
    spec = importlib.util.spec_from_file_location("mine_causal_model", OUTSIDE)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield
    MODELS.clear()
    MODELS.update(before)


@pytest.fixture(scope="module")
def new_run(outside):
    """`new_run(model, float64)`: an untrained run, whose answers and weights differ from input to input."""

    def make(name: str, float64: bool = False) -> Run:
        task = {"name": "reverse", "symbols": 6, "max_length": 6}
        run = untrained({"task": task, "model": {"name": name, **_MODELS[name]}})
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), run.params)
        if not float64:
            return dataclasses.replace(run, params=params)
        config = dataclasses.replace(run.config, model=dataclasses.replace(run.config.model, dtype="float64"))
        graphdef, _ = model_structure(config, run.vocabulary)
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        return Run(run.folder, config, run.vocabulary, graphdef, params, 0)

    return make
