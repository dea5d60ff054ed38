"""Settings: every wrong one is one line that names the key, what was given and what is allowed."""

import dataclasses

import jax
import pytest

from attn.training.config import RULES, Config, ConfigError, from_mapping, parse, to_mapping
from attn.training.flags import load_config, override, split_overrides
from attn.training.groups import Optimizer, Training
from attn.training.state import model_structure


def settings_of(config: Config) -> dict:
    return {f"{s}.{n}": v for s, group in to_mapping(config).items() for n, v in group.items()}


def test_mapping_and_config_are_inverse():
    config = from_mapping({"task": {"name": "copy", "symbols": 5}, "model": {"head_width": 3}})
    assert (config.task.name, config.task.symbols, config.model.head_width) == ("copy", 5, 3)
    assert from_mapping(to_mapping(config)) == config


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().task = None


def flat(settings, path=""):
    """The paths of all settings."""
    for name, value in settings.items():
        yield from flat(value, f"{path}{name}.") if isinstance(value, dict) else [path + name]


def test_every_number_and_name_has_a_rule():
    free = {"model.tied_embeddings", "training.one_length"}  # a boolean is either
    every = set(flat(dataclasses.asdict(Config())))
    assert every - free == set(RULES)


def test_a_config_shows_the_settings_that_its_model_has():
    config = from_mapping({"model": {"name": "lstm", "attention": "additive"}})
    assert set(to_mapping(config)["model"]) == {"name", "width", "num_layers", "attention", *SHARED}
    assert set(to_mapping(Config())["model"]).isdisjoint({"num_layers", "attention"})
    assert from_mapping(to_mapping(config)) == config


SHARED = ("dropout", "tied_embeddings", "dtype")


def test_a_setting_of_another_model_is_refused():
    said = (
        r"config\.model\.num_heads: got 8, means nothing for config\.model\.name = 'gru'; "
        "only 'transformer' or 'tape' has it"
    )
    with pytest.raises(ConfigError, match=said):
        from_mapping({"model": {"name": "gru", "num_heads": 8}})
    with pytest.raises(ConfigError, match="only 'lstm' or 'gru' has it"):
        from_mapping({"model": {"attention": "additive"}})
    assert from_mapping({"model": {"name": "gru", "width": 65}}).model.width == 65  # which 4 heads do not divide


@pytest.mark.parametrize("name", ["lstm", "gru", "lstm_attention"])
def test_recurrent_configs_have_as_many_parameters_as_the_default(repository, name):
    def parameters(config: Config) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(model_structure(config, config.task.vocabulary)[1]))

    config = load_config(str(repository / f"configs/{name}.py"))
    assert parameters(config) == pytest.approx(parameters(Config()), rel=0.01)


def test_the_default_config_is_that_of_configs_reverse_for_a_fixed_number_of_steps(repository):
    """Studies, whose budgets are fixed, build on the defaults; configs/reverse.py goes on until it is exact."""
    reverse = load_config(str(repository / "configs/reverse.py"))
    assert dataclasses.replace(reverse, optimizer=Optimizer(), training=Training()) == Config()
    assert (Training().stop_when_exact, Optimizer().name, Optimizer().averaging) == (0, "adamw", 0)
    assert reverse.training.stop_when_exact and reverse.optimizer.averaging


@pytest.mark.parametrize("name", ["reverse", "copy"])
def test_the_other_optimizer_is_one_setting_away(repository, name):
    assert load_config(str(repository / f"configs/{name}.py"), {"optimizer.name": "adamw"}).optimizer.name == "adamw"


@pytest.mark.parametrize("name", ["lstm", "gru", "lstm_attention", "pairs", "tape"])
def test_what_does_not_become_exact_trains_for_a_fixed_number_of_steps(repository, name):
    config = load_config(str(repository / f"configs/{name}.py"), {"data.path": "p.tsv"} if name == "pairs" else {})
    assert (config.training.stop_when_exact, config.optimizer.name) == (0, "adamw")


def test_a_setting_of_another_optimizer_is_refused_and_not_shown():
    said = (
        r"config\.optimizer\.momentum: got 0.9, means nothing for config\.optimizer\.name = 'adamw'; only 'muon' has it"
    )
    with pytest.raises(ConfigError, match=said):
        from_mapping({"optimizer": {"momentum": 0.9}})
    assert "momentum" not in to_mapping(Config())["optimizer"]
    config = from_mapping({"optimizer": {"name": "muon", "momentum": 0.9}})
    assert to_mapping(config)["optimizer"]["momentum"] == 0.9
    assert from_mapping(to_mapping(config)) == config


def test_stopping_when_exact_needs_strings_for_validation():
    short = {"task": {"symbols": 2, "max_length": 7}, "training": {"stop_when_exact": 10}}
    with pytest.raises(
        ConfigError, match=r"config\.training\.stop_when_exact: got 10, must be 0 for reverse with .* 7 symbols"
    ):
        from_mapping(short)
    from_mapping(short | {"task": {"symbols": 2, "max_length": 8}})


def test_seven_heads_do_not_divide_the_default_width():
    with pytest.raises(ConfigError, match=r"config\.model\.num_heads: got 7, must divide config\.model\.width = 64"):
        from_mapping({"model": {"num_heads": 7}})
    assert from_mapping({"model": {"num_heads": 7, "head_width": 9}}).model.head_width == 9


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": {"widht": 3}}, ["config.model.widht", "did you mean 'width'"]),
        ({"modle": {}}, ["config.modle", "did you mean 'model'"]),
        ({"model": 3}, ["config.model", "got 3"]),
        ({"model": {"width": "64"}}, ["config.model.width", "'64'", "whole number"]),
        ({"model": {"width": 64.0}}, ["config.model.width", "64.0", "whole number"]),
        ({"model": {"width": True}}, ["config.model.width", "True", "whole number"]),
        ({"model": {"width": None}}, ["config.model.width", "None", "whole number"]),
        ({"model": {"tied_embeddings": 1}}, ["config.model.tied_embeddings", "true or false"]),
        ({"model": {"norm": "prenorm"}}, ["config.model.norm", "'prenorm'", "pre, post"]),
        ({"model": {"positions": "sinusodal"}}, ["config.model.positions", "did you mean 'sinusoidal'"]),
        ({"task": {"symbols": 1}}, ["config.task.symbols", "got 1", "at least 2"]),
        ({"task": {"min_length": 9, "max_length": 8}}, ["config.task.min_length", "got 9", "max_length = 8"]),
        ({"training": {"steps": 0}}, ["config.training.steps", "got 0", "at least 1"]),
        ({"optimizer": {"learning_rate": float("nan")}}, ["config.optimizer.learning_rate", "nan"]),
        ({"optimizer": {"name": "adam"}}, ["config.optimizer.name", "did you mean 'adamw'", "adamw, muon"]),
        ({"optimizer": {"rest_learning_rate": 0.5}}, ["config.optimizer.rest_learning_rate", "only 'muon' has it"]),
        ({"optimizer": {"averaging": 1}}, ["config.optimizer.averaging", "less than 1"]),
        ({"training": {"replaced_tokens": 1.5}}, ["config.training.replaced_tokens", "at most 1"]),
        (
            {"model": {"name": "tape"}, "training": {"replaced_tokens": 0.5}},
            ["config.training.replaced_tokens", "got 0.5", "'tape'", "reads no target"],
        ),
        ({"training": {"stop_when_exact": -1}}, ["config.training.stop_when_exact", "at least 0"]),
        ({"optimizer": {"learning_rate": 0}}, ["config.optimizer.learning_rate", "greater than 0"]),
        ({"model": {"dropout": 1.0}}, ["config.model.dropout", "less than 1"]),
        ({"model": {"positions": "learned", "max_length": 20}}, ["config.model.max_length", "at least 33"]),
        ({"model": {"positions": "rotary", "head_width": 1}}, ["config.model.positions", "rotary"]),
        ({"model": {"positions": {"cross": "rotry"}}}, ["config.model.positions.cross", "did you mean 'rotary'"]),
        ({"model": {"positions": {"corss": "none"}}}, ["config.model.positions.corss", "did you mean 'cross'"]),
        ({"model": {"positions": {"at_test": "even"}}}, ["config.model.positions.at_test", "spaced, random"]),
        (
            {"model": {"positions": {"decoder": "randomized_rotary", "range": 20}}},
            ["config.model.positions.range", "got 20", "at least 33"],
        ),
        ({"model": {"positions": "randomized_learned"}}, ["config.model.max_length", "positions.range = 2048"]),
        (
            {"model": {"name": "tape", "positions": {"encoder": "randomized_rotary", "range": 60}}},
            ["config.model.positions.range", "got 60", "at least 66"],
        ),
        (
            {"data": {"source": "pairs"}, "model": {"positions": {"cross": "anchored"}}},
            ["config.model.positions.cross", "'anchored'", "end of the answer"],
        ),
        (
            {"data": {"source": "pairs"}, "model": {"positions": {"encoder": "randomized_rotary"}}},
            ["config.model.positions.encoder", "'randomized_rotary'", "draws a position", "length is not known"],
        ),
        ({"data": {"source": "pairs"}, "model": {"name": "tape"}}, ["config.model.name", "'tape'", "length"]),
        ({"data": {"source": "tfds"}, "training": {"one_length": True}}, ["config.training.one_length", "generated"]),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ConfigError) as error:
        from_mapping(settings)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_overrides_take_the_type_of_their_setting():
    assert parse("model.width", "1_024") == 1024
    assert parse("model.head_width", "None") is None
    assert parse("model.head_width", "8") == 8
    assert parse("model.tied_embeddings", "true") is True
    assert parse("optimizer.beta1", "5e-1") == 0.5
    assert parse("task.name", "copy") == "copy"


def test_a_name_stands_for_the_positions_of_all_attention_and_each_can_be_replaced():
    settings = {"model": {"positions": "sinusoidal"}}
    positions = override(settings, {"model.positions.cross": "rotary"}).model.positions
    assert positions.by_kind() == {"encoder": "sinusoidal", "decoder": "sinusoidal", "cross": "rotary"}
    positions = override({}, {"model.positions.encoder": "none", "model.positions": "rotary"}).model.positions
    assert positions.by_kind() == {"encoder": "none", "decoder": "rotary", "cross": "rotary"}
    assert from_mapping(to_mapping(from_mapping({"model": {"positions": "t5"}}))).model.positions.cross == "t5"


def test_overrides_are_taken_out_of_the_command_line():
    rest, overrides = split_overrides(["p", "--config=a.py", "--config.model.width=8", "--resume", "--config.x", "1"])
    assert rest == ["p", "--config=a.py", "--resume"]
    assert overrides == {"model.width": "8", "x": "1"}
    with pytest.raises(ConfigError, match="needs a value"):
        split_overrides(["--config.model.width", "--resume"])
