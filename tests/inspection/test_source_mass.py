"""The mass on the true source, beside plain Python; true sources beside the answers."""

import numpy as np
import pytest
from right_answers import RIGHT

from attn.inspection.capture import Maps
from attn.inspection.source_mass import source_mass
from attn.tasks.rules import RULES
from attn.tasks.sequences import Task

MOVING = [name for name, rule in RULES.items() if rule.true_sources is not None]


def test_the_rules_that_move_symbols_say_from_where():
    assert {"copy", "reverse", "duplicate", "mirror_or_next", "sort", "palindrome"} == {*MOVING}


@pytest.mark.parametrize("name", MOVING)
def test_a_symbol_of_the_answer_is_the_one_at_its_true_source(name):
    rng = np.random.default_rng(0)
    for length in (1, 2, 5, 8):
        source = rng.integers(1, 7, length).tolist()
        true = Task(name, symbols=6).true_sources(np.array(source))
        assert [source[j] for j in true] == RIGHT[name](source, 6)
        if name == "sort":
            assert sorted(true) == list(range(length))


def maps_of(kind, axes, weights, source, read):
    return Maps({kind: weights}, None, {kind: axes}, source, read, [*read[1:], "end"])


@pytest.mark.parametrize("begin", [[], ["begin"]], ids=["source", "after a begin token"])
def test_the_mass_is_that_of_plain_python(begin):
    """A begin token comes before the source in tasks whose answers continue their sources."""
    rng, n = np.random.default_rng(0), 4
    source = [*begin, "3", "1", "4", "2", *([] if begin else ["end"])]
    read = ["begin", "2", "4", "1", "3"]
    weights = rng.uniform(size=(2, 3, n + 1, len(source) + len(read)))
    found = source_mass(maps_of("decoder", ("answer", "both"), weights, source, read), Task("reverse"))["decoder"]
    for layer in range(2):
        for head in range(3):
            total = sum(weights[layer, head, t, len(begin) + n - 1 - t] for t in range(n))
            np.testing.assert_allclose(found[layer, head], total / n)


def test_an_answer_that_is_cut_short_has_fewer_rows():
    weights = np.eye(3)[None, None, ::-1] * np.array([1.0, 0.5, 0.25])[:, None]
    maps = maps_of("cross", ("answer", "source"), weights, ["3", "1", "end"], ["begin"])
    np.testing.assert_allclose(source_mass(maps, Task("copy"))["cross"], (0 + 0.5) / 2)
    short = maps._replace(weights={"cross": weights[:, :, :1]})
    np.testing.assert_allclose(source_mass(short, Task("copy"))["cross"], 0)


def test_a_trained_head_points_at_the_true_source(run):
    mass = source_mass(run.look("3 1 4 1 5"), run.config.task)
    assert mass.keys() == {"cross"} and mass["cross"].shape == (1, 4) and mass["cross"].max() > 0.5


def test_a_task_whose_answers_are_not_in_its_sources_has_none():
    weights = np.ones((1, 1, 2, 3))
    assert source_mass(maps_of("cross", ("answer", "source"), weights, ["3", "1", "end"], ["begin"]), Task("add")) == {}
