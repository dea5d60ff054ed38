"""Recurrent models go through the same trainer, decoding, evaluation and pictures as the Transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

import attn
from attn import cli, experiment
from attn.inspection.influence import influence
from attn.tasks.examples import decoder_input

SIZES = {"task.symbols": "4", "task.max_length": "4", "training.steps": "400", "evaluation.examples": "200"}


@pytest.fixture(scope="module", params=["none", "additive", "multiplicative"])
def run(request, repository, tmp_path_factory) -> attn.runs.Run:
    folder = tmp_path_factory.mktemp("recurrent") / request.param
    sizes = SIZES | {"model.width": "32", "model.attention": request.param, "optimizer.learning_rate": "1e-2"}
    asked = experiment.Request(str(repository / "configs/lstm.py"), sizes, str(folder), False, "off")
    assert experiment.run(asked) == 0
    return attn.load(folder)


def test_it_learns_short_strings(run):
    assert run.evaluate([1, 2, 3], 50).overall().exact_match.value() > 0.9


def test_a_beam_answers_as_well(run):
    texts = ["1 2 3", "4 4"]
    greedy, beam = run.predict(texts), run.predict(texts, beam_width=3)
    assert greedy == beam == ["3 2 1", "4 4"]


def test_it_is_drawn_and_told_of(run, tmp_path, capsys):
    assert cli.main(["inspect", str(run.folder), "1 2 3", "--output", str(tmp_path / "map.png")]) == 0
    assert imread(tmp_path / "map.png").ndim == 3
    assert cli.main(["inspect", str(run.folder)]) == 0
    assert "lstm" in capsys.readouterr().out


def test_without_attention_influence_is_shown_instead(run):
    maps = run.look("1 2 3")
    if run.config.model.attention != "none":
        assert maps.influence is None
        assert maps.weights.cross.shape == (1, 1, 4, 4)
        return
    assert [len(weights) for weights in maps.weights] == [0, 0, 0]
    assert maps.influence.shape == (4, 4)


def test_influence_is_the_slope_of_the_logits(run):
    """Beside finite differences, in every direction of one embedding, of one step's logits."""
    source = jnp.array([1, 2, 3, run.vocabulary.end])
    read = decoder_input(jnp.array([3, 2, 1, run.vocabulary.end]), run.vocabulary.begin)
    found = influence(run.model, source, read, jnp.array([2]))
    width, eps = 32, 1e-2

    @jax.jit
    def logits(shift):
        return run.model(source, read, shift=shift)[2]

    for j in range(len(source)):
        nudges = jnp.zeros((width, len(source), width)).at[jnp.arange(width), j, jnp.arange(width)].set(eps)
        slopes = (jax.vmap(logits)(nudges) - jax.vmap(logits)(-nudges)) / (2 * eps)
        np.testing.assert_allclose(found[0, j], np.linalg.norm(slopes), rtol=2e-2)
