"""The toy models in the styles of published families: their configs, and pictures of what a vision Transformer sees."""

import importlib
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from attn.inspection import pictures
from attn.nn.style import STYLES, parse
from attn.studies.probes import untrained
from attn.tasks.generated import Generated
from attn.training.checks import check_runs
from attn.training.config import to_mapping
from attn.training.flags import load_config

TOYS = {
    "bert": ("encoder_only", "fill"),
    "gpt2": ("decoder_only", "reverse"),
    "llama": ("decoder_only", "reverse"),
    "t5": ("transformer", "reverse"),
    "vit": ("vision_transformer", "digit"),
}


def config_of(repository, name: str, **changes: str):
    return load_config(str(repository / f"configs/{name}.py"), changes)


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_is_the_style_that_its_name_says_and_its_docstring_says_what_it_scores(repository, name):
    config = config_of(repository, name)
    assert (config.model.name, config.task.name, config.model.style) == (*TOYS[name], name)
    assert parse(config.model.style) == config.model.choices == STYLES[name]  # also the place of its norms
    check_runs(config, Generated(config.task))
    about = importlib.import_module(f"configs.{name}").__doc__
    assert f"\npython train.py --config=configs/{name}.py\n" in about
    assert re.search(r"\d+\.\d\d %\sof\s10,000\sheld-out", about) and re.search(r"\d seconds\son\stwo\scores", about)


def test_the_docstrings_of_the_toys_are_as_measured(repository):
    """Steps, seconds and exact match of seed 0, by benchmarks/toys.py."""
    runs = json.loads((repository / "benchmarks/results/toys.json").read_text())["runs"]
    assert {name.partition("_")[0] for name in runs} == set(TOYS)
    for name in TOYS:
        about = " ".join(importlib.import_module(f"configs.{name}").__doc__.split())
        rows = [each["0"] for key, each in runs.items() if key.partition("_")[0] == name]
        steps, seconds = (
            " and ".join(texts) for texts in zip(*((f"{r['steps']:,}", f"{r['seconds']:.0f}") for r in rows))
        )
        assert f"{steps} steps, {seconds} seconds" in about
        for row in rows:
            assert f"{100 * row['exact_match']:.2f} % of {row['examples']:,}" in about


def test_the_toys_have_what_their_families_have(repository):
    models = {name: config_of(repository, name).model for name in TOYS}
    assert {name for name, model in models.items() if model.tied_embeddings} == {"bert", "gpt2", "t5"}
    assert (models["llama"].num_groups, models["llama"].num_heads) == (2, 4)
    mechanisms = {name: model.mechanism for name, model in models.items()}
    assert mechanisms.pop("t5").cross == "unscaled"
    assert {name: mechanism.partition("(")[0] for name, mechanism in mechanisms.items()} == {
        "bert": "learned",
        "gpt2": "learned",
        "llama": "rotary",
        "vit": "learned_grid",
    }


@pytest.fixture(scope="module")
def vit(repository):
    return untrained(to_mapping(config_of(repository, "vit")))


def test_the_attention_of_the_class_token_is_drawn_over_the_picture(vit, tmp_path):
    symbols = np.random.default_rng(0).integers(1, 513, 16)
    maps = vit.look(" ".join(map(str, symbols)))
    assert maps.picture.shape == (12, 12) and maps.source[-1] == "end"
    for patch, pixel in itertools.product(range(16), range(9)):
        y, x = 3 * (patch // 4) + pixel // 3, 3 * (patch % 4) + pixel % 3
        assert maps.picture[y, x] == (symbols[patch] - 1) // 2**pixel % 2
    layers, heads = maps.weights["encoder"].shape[:2]
    figure = pictures.draw_maps(maps, "a picture")
    axes = np.array(figure.axes).reshape(2 * layers, heads)
    for layer, head in itertools.product(range(layers), range(heads)):
        attention, ink = axes[layer, head].get_images()
        expected = maps.weights["encoder"][layer, head, -1, :16].reshape(4, 4)
        np.testing.assert_array_equal(attention.get_array(), expected)
        np.testing.assert_array_equal(ink.get_array().filled(0), maps.picture)
        assert attention.get_extent() == ink.get_extent()  # each patch lies under its pixels
    path = vit.draw(maps, tmp_path / "maps.png")
    assert imread(path).ndim == 3


def test_what_is_not_a_square_picture_is_drawn_without_one(vit, repository):
    assert vit.look("1 2 3").picture is None
    text = untrained(to_mapping(config_of(repository, "bert"))).look("1 11 2")
    assert text.picture is None
    assert len(pictures.draw_maps(text, "a text").figure.axes) == np.prod(text.weights["encoder"].shape[:2])


def test_the_end_after_the_class_is_certain(vit):
    """So that it adds nothing to the loss, and a run may stop when the margins of its answers are large."""
    source = jnp.array([*range(1, 17), vit.vocabulary.end])
    logits = vit.model(source, jnp.array([vit.vocabulary.begin, 3]))
    assert jax.nn.softmax(logits[1])[vit.vocabulary.end] == 1.0


@pytest.mark.parametrize("base", ["reverse", "copy", "decoder_only", "encoder_only", "language_model"])
@pytest.mark.parametrize("style", [*STYLES, "llama(norm=post)"])
def test_a_style_is_itself_in_every_config(repository, base, style):
    model = config_of(repository, base, **{"model.style": style}).model
    assert model.choices == parse(style) and model.norm == parse(style).norm
    assert config_of(repository, base, **{"model.style": style, "model.norm": "pre"}).model.choices.norm == "pre"
