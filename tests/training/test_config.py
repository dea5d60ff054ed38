"""Settings: every wrong one is one line that names the key, what was given and what is allowed."""

import dataclasses

import jax
import pytest

import attn.studies.tape  # noqa: F401  registers its model and mechanisms
from attn.functional.implementations import IMPLEMENTATIONS
from attn.mechanisms.rows import LengthUnknown
from attn.nn.models import MODELS
from attn.tasks.generated import Generated
from attn.training.checks import check_runs, run_shapes
from attn.training.config import Config, ConfigError, from_mapping, parse, record, to_mapping
from attn.training.flags import load_config, override, split_overrides
from attn.training.groups import OPTIMIZERS, AdamW, Training
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


def test_every_number_and_name_of_a_model_optimizer_or_training_has_a_constraint():
    records = [*(model.settings for model in MODELS.values()), *OPTIMIZERS.values()]
    records += [record([section], {}) for section in ("training", "evaluation")]
    free = {"name", "tied_embeddings", "implementation", "mechanism"}
    for each in records:
        fields = {field.name: field.metadata.get("constraint") for field in dataclasses.fields(each)}
        assert [name for name, constraint in fields.items() if name not in free and constraint is None] == []


def test_a_config_shows_the_settings_that_its_model_has():
    config = from_mapping({"model": {"name": "lstm", "attention": "additive"}})
    assert set(to_mapping(config)["model"]) == {"name", "width", "num_layers", "attention", *SHARED}
    assert set(to_mapping(Config())["model"]).isdisjoint({"num_layers", "attention"})
    assert from_mapping(to_mapping(config)) == config


SHARED = ("dropout", "tied_embeddings", "dtype")


def test_a_setting_of_another_model_is_refused():
    message = r"config\.model\.num_heads: means nothing for config\.model\.name = 'gru'; only 'transformer' or "
    with pytest.raises(ConfigError, match=message):
        from_mapping({"model": {"name": "gru", "num_heads": 8}})
    with pytest.raises(ConfigError, match="only 'lstm' or 'gru' has it"):
        from_mapping({"model": {"attention": "additive"}})
    assert from_mapping({"model": {"name": "gru", "width": 65}}).model.width == 65  # which 4 heads do not divide


def test_another_model_keeps_the_settings_that_both_have(repository):
    config = load_config(
        str(repository / "configs/reverse.py"), {"model.name": "decoder_only", "model.num_layers": "3"}
    )
    assert (config.model.name, config.model.num_layers, config.model.width) == ("decoder_only", 3, 64)
    with pytest.raises(ConfigError, match="num_encoder_layers: means nothing for"):
        load_config(
            str(repository / "configs/reverse.py"), {"model.name": "decoder_only", "model.num_encoder_layers": "3"}
        )


@pytest.mark.parametrize("name", ["lstm", "gru", "lstm_attention"])
def test_recurrent_configs_have_as_many_parameters_as_the_default(repository, name):
    def parameters(config: Config) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(model_structure(config, config.task.vocabulary)[1]))

    config = load_config(str(repository / f"configs/{name}.py"))
    assert parameters(config) == pytest.approx(parameters(Config()), rel=0.01)


def test_the_default_config_is_that_of_configs_reverse_for_a_fixed_number_of_steps(repository):
    """Studies, whose budgets are fixed, build on the defaults; configs/reverse.py goes on until it is exact."""
    reverse = load_config(str(repository / "configs/reverse.py"))
    assert dataclasses.replace(reverse, optimizer=AdamW(), training=Training()) == Config()
    assert (Training().stop_when_exact, AdamW().name, AdamW().averaging) == (0, "adamw", 0)
    assert reverse.training.stop_when_exact and reverse.optimizer.averaging


@pytest.mark.parametrize("name", ["reverse", "copy"])
def test_the_other_optimizer_is_one_setting_away(repository, name):
    assert load_config(str(repository / f"configs/{name}.py"), {"optimizer.name": "adamw"}).optimizer.name == "adamw"


@pytest.mark.parametrize("name", ["lstm", "gru", "lstm_attention", "pairs", "tape"])
def test_what_does_not_become_exact_trains_for_a_fixed_number_of_steps(repository, name):
    config = load_config(str(repository / f"configs/{name}.py"), {"data.path": "p.tsv"} if name == "pairs" else {})
    assert (config.training.stop_when_exact, config.optimizer.name) == (0, "adamw")


def test_a_setting_of_another_optimizer_is_refused_and_not_shown():
    said = r"config\.optimizer\.momentum: means nothing for config\.optimizer\.name = 'adamw'; only 'muon' has it"
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
        ({"model": {"mechanism": "sinusodal"}}, ["config.model.mechanism", "did you mean 'sinusoidal'"]),
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
            ["config.training.replaced_tokens", "got 0.5", "'tape'", "does not read the answer"],
        ),
        ({"training": {"stop_when_exact": -1}}, ["config.training.stop_when_exact", "at least 0"]),
        ({"optimizer": {"learning_rate": 0}}, ["config.optimizer.learning_rate", "greater than 0"]),
        ({"model": {"dropout": 1.0}}, ["config.model.dropout", "less than 1"]),
        ({"model": {"mechanism": "learned(20)"}}, ["config.model.mechanism", "20 positions", "must tell 33 apart"]),
        ({"model": {"mechanism": {"cross": "rotry"}}}, ["config.model.mechanism.cross", "did you mean 'rotary'"]),
        ({"model": {"mechanism": {"corss": "none"}}}, ["config.model.mechanism.corss", "did you mean 'cross'"]),
        ({"model": {"mechanism": 3}}, ["config.model.mechanism", "got 3"]),
        (
            {"model": {"mechanism": "randomized(rotary, at_test='even')"}},
            ["config.model.mechanism", "spaced", "random"],
        ),
        (
            {"model": {"mechanism": {"decoder": "randomized(rotary, range=20)"}}},
            ["config.model.mechanism", "20 positions", "must tell 33 apart"],
        ),
        ({"model": {"mechanism": "randomized(learned)"}}, ["config.model.mechanism", "range = 2048"]),
        (
            {"model": {"name": "tape", "mechanism": "randomized(rotary, range=60)"}},
            ["config.model.mechanism", "60 positions", "must tell 66 apart"],
        ),
        ({"model": {"name": "bert"}}, ["config.model.name", "'bert'", "transformer, decoder_only"]),
        ({"model": {"mechanism": "rotary(fraction=2)"}}, ["'rotary': fraction: got 2", "at most 1"]),
        ({"model": {"mechanism": "softcap(-1)"}}, ["'softcap': cap: got -1", "greater than 0"]),
        ({"model": {"mechanism": "window(-1, 0)"}}, ["'window': left: got -1", "at least 0"]),
        ({"model": {"mechanism": "scaled(0)"}}, ["'scaled': scale: got 0", "greater than 0"]),
        ({"model": {"mechanism": "scaled"}}, ["'scaled'", "scale"]),
        ({"model": {"mechanism": "sinusoidal(base=-2)"}}, ["'sinusoidal': base: got -2", "greater than 0"]),
        ({"model": {"mechanism": "shaw(clip=1_000_000_000_000)"}}, ["'shaw': clip: got 1000000000000", "65,536"]),
        ({"model": {"mechanism": "t5(1)"}}, ["'t5': num_buckets: got 1", "at least 2"]),
        ({"model": {"mechanism": "learned(0)"}}, ["'learned': max_length: got 0", "at least 1"]),
        (
            {"task": {"name": "add"}, "model": {"name": "encoder_only"}},
            ["config.model.name", "'encoder_only'", "answer to 1 tokens has at most 1", "add may have 2"],
        ),
        (
            {"task": {"name": "duplicate", "min_length": 3}, "model": {"name": "encoder_only"}},
            ["config.model.name", "'encoder_only'", "answer to 3 tokens has at most 3", "duplicate may have 6"],
        ),
        (
            {"task": {"name": "palindrome"}, "model": {"name": "decoder_only", "prefix": "visible"}},
            ["config.model.name", "'palindrome' have no source", "prefix = 'visible'", "'decoder_only' with default"],
        ),
        ({"imports": ["no_such_module"]}, ["config.imports", "'no_such_module'", "cannot be imported"]),
        ({"imports": "os"}, ["config.imports", "names of modules"]),
        ({"imports": ["my_mechanism.py"]}, ["config.imports", "names of modules without .py"]),
        (
            {"model": {"implementation": "flash"}},
            ["config.model.implementation: got 'flash'", "auto, fastest, ", "pallas_tpu", "cudnn"],
        ),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ConfigError) as error:
        from_mapping(settings)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_overrides_take_the_type_of_their_setting():
    assert parse("model.width", "1_024", {}) == 1024
    assert parse("model.head_width", "None", {}) is None
    assert parse("model.head_width", "8", {}) == 8
    assert parse("model.tied_embeddings", "true", {}) is True
    assert parse("optimizer.beta1", "5e-1", {}) == 0.5
    assert parse("task.name", "copy", {}) == "copy"


def test_one_text_stands_for_the_mechanism_of_all_attention_and_each_can_be_replaced():
    settings = {"model": {"mechanism": "sinusoidal"}}
    mechanism = override(settings, {"model.mechanism.cross": "rotary"}).model.mechanism
    assert dataclasses.astuple(mechanism) == ("sinusoidal", "sinusoidal", "rotary")
    mechanism = override({}, {"model.mechanism.encoder": "none", "model.mechanism": "rotary"}).model.mechanism
    assert dataclasses.astuple(mechanism) == ("none", "rotary", "rotary")
    assert from_mapping(to_mapping(from_mapping({"model": {"mechanism": "t5"}}))).model.mechanism.cross == "t5"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": {"mechanism": {"cross": "anchored"}}, "task": {"name": "add"}}, ["length of the answer", "add"]),
        ({"model": {"mechanism": "randomized(rotary)"}, "task": {"name": "add"}}, ["length of the answer", "add"]),
        ({"model": {"name": "tape"}, "task": {"name": "add"}}, ["length of the answer", "add"]),
        ({"model": {"implementation": "reverse_only", "dropout": 0.1}}, ["'reverse_only' does not support dropout"]),
        ({"model": {"implementation": "cudnn"}}, ["'cudnn' does not support"]),
    ],
)
def test_a_model_that_does_not_run_is_named_before_anything_is_written(settings, words, monkeypatch):
    without_dropout = dataclasses.replace(IMPLEMENTATIONS["reference"], features={"mask", "score"})
    monkeypatch.setitem(IMPLEMENTATIONS, "reverse_only", without_dropout)
    config = from_mapping(settings)
    with pytest.raises(ConfigError, match=r"^config\.model: ") as error:
        check_runs(config, Generated(config.task))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_mechanism_that_counts_from_the_end_of_the_answer_runs_where_its_length_is_known():
    config = from_mapping({"model": {"mechanism": {"cross": "anchored"}}})
    check_runs(config, Generated(config.task))
    with pytest.raises(LengthUnknown, match="length of the answer"):
        run_shapes(config, Generated(config.task), None)


def test_overrides_are_taken_out_of_the_command_line():
    rest, overrides = split_overrides(["p", "--config=a.py", "--config.model.width=8", "--resume", "--config.x", "1"])
    assert rest == ["p", "--config=a.py", "--resume"]
    assert overrides == {"model.width": "8", "x": "1"}
    with pytest.raises(ConfigError, match="needs a value"):
        split_overrides(["--config.model.width", "--resume"])


@pytest.mark.parametrize("beside", ["config.json", "checkpoints"])
def test_no_module_in_the_folder_of_a_run_is_executed(beside, tmp_path, monkeypatch):
    """Nor in one that holds nothing but a config, when it is opened as a run."""
    (tmp_path / "module_of_a_run.py").write_text("raise SystemExit('it ran')")
    (tmp_path / beside).mkdir() if beside == "checkpoints" else (tmp_path / beside).write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"'module_of_a_run' is found in the folder of a run .*from which no code"):
        from_mapping({"imports": ["module_of_a_run"]}, run=tmp_path if beside == "config.json" else None)


@pytest.mark.parametrize("beside", ["config.json", "checkpoints"])
def test_no_module_in_the_folder_of_a_run_is_imported_by_another_one(beside, tmp_path, monkeypatch):
    """A command that is given the current folder as the run; a module of the user tries an optional import."""
    mine, run = tmp_path / "mine", tmp_path / "run"
    mine.mkdir()
    (mine / "module_with_an_option.py").write_text("try:\n    import an_option\nexcept ImportError:\n    pass\n")
    run.mkdir()
    (run / "an_option.py").write_text("raise SystemExit('it ran')")
    (run / beside).mkdir() if beside == "checkpoints" else (run / beside).write_text("{}")
    monkeypatch.syspath_prepend(mine)
    monkeypatch.chdir(run)
    from_mapping({"imports": ["module_with_an_option"]}, run=run)


def test_a_file_with_the_name_of_another_module_is_named(tmp_path, monkeypatch):
    (tmp_path / "statistics.py").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"'statistics' is another module, .*statistics.py, not .*: rename that file"):
        from_mapping({"imports": ["statistics"]})


def test_an_error_inside_an_import_names_its_line(tmp_path, monkeypatch):
    (tmp_path / "module_with_an_error.py").write_text("\nx = {}['nothing']\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"KeyError: 'nothing'\), line 2 of .*module_with_an_error.py$"):
        from_mapping({"imports": ["module_with_an_error"]})
    with pytest.raises(ConfigError, match="must be names of modules without"):
        from_mapping({"imports": ["./module_with_an_error.py"]})
