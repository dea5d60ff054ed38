"""Training: it learns, it repeats itself to the bit, it resumes, it stops when it must."""

import contextlib
import dataclasses
import functools
import itertools
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from event_rows import in_float32, rows_of_events
from flax import nnx

import attn
import attn.studies.tape
from attn import experiment
from attn.tasks.examples import EXAMPLES, decoder_input
from attn.tasks.generated import Generated
from attn.training import checkpoints, data, meshes, steps
from attn.training.config import Config, to_mapping
from attn.training.evaluation import Evaluator, build_programs
from attn.training.flags import load_config
from attn.training.folders import Folder
from attn.training.groups import AdamW, Data
from attn.training.identity import digest_of
from attn.training.loop import compile_programs, compile_steps
from attn.training.optimizers import learning_rate
from attn.training.progress import Display
from attn.training.state import initial_state, model_structure
from attn.training.steps import build_step_programs, example_loss


@pytest.fixture(scope="module")
def config(repository, tiny) -> Config:
    return load_config(str(repository / "configs/copy.py"), tiny | {"training.steps_per_call": "7"})


@contextlib.contextmanager
def counting_compilations():
    """The names of what XLA compiles inside."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        listener := lambda event, duration, **kw: compiled.append(event)
    )
    yield (names := [])
    names += [event for event in compiled if event == "/jax/core/compile/backend_compile_duration"]
    jax.monitoring.unregister_event_duration_listener(listener)


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@functools.cache
def programs_of(config: Config, devices: int):
    """A mesh, a maker of initial states, and the programs of several steps."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), (meshes.DATA,))
    return (
        mesh,
        jax.jit(lambda: initial_state(config, config.task.vocabulary)),
        build_step_programs(config, data.load(config), mesh),
    )


def call_once(config: Config, devices: int, until=5):
    mesh, start, programs = programs_of(config, devices)
    return programs(meshes.replicate(start(), mesh), meshes.replicate(np.int32(until), mesh), None)


def test_a_tiny_model_learns_to_copy_every_held_out_string(copy_run):
    summary = json.loads((copy_run / "summary.json").read_text())
    assert summary["exact_match"] == 1.0
    assert summary["token_accuracy"] == 1.0
    assert summary["examples_evaluated"] == 1000
    assert summary["lengths_evaluated"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.nightly
def test_same_seed_same_bits_and_another_seed_other_bits(config):
    one, same = call_once(config, 2), call_once(config, 2)
    for a, b in zip(leaves(one), leaves(same)):
        np.testing.assert_array_equal(a, b)
    reseeded = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=1))
    other = call_once(reseeded, 2)
    assert float(other[1].tokens) != float(one[1].tokens)
    assert any((a != b).any() for a, b in zip(leaves(one[0].params), leaves(other[0].params)))


@pytest.mark.nightly
def test_one_device_and_two_take_the_same_steps(config):
    (one, report), (two, both) = call_once(config, 1), call_once(config, 2)
    assert float(report.tokens) == float(both.tokens)
    np.testing.assert_allclose(float(report.loss.value()), float(both.loss.value()), rtol=1e-5)
    for a, b in zip(leaves(one.params), leaves(two.params)):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_a_call_stops_where_it_is_told(config):
    state, _ = call_once(config, 2, until=5)
    assert int(state.step) == 5


def test_loss_and_update_are_those_of_a_plain_step(config):
    """One step against AdamW written out, on the mean loss over the batch's tokens."""
    training = dataclasses.replace(config.training, replaced_tokens=0.0)
    config = dataclasses.replace(config, optimizer=AdamW(warmup_fraction=0.1), training=training)
    graphdef, _ = model_structure(config, config.task.vocabulary)
    start = jax.jit(lambda: initial_state(config, config.task.vocabulary))()
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.training.seed), EXAMPLES), 0)
    keys = [jax.random.fold_in(key, n) for n in range(config.training.batch_size)]

    def loss(params):
        model, begin = nnx.merge(graphdef, params), config.task.vocabulary.begin
        sample_keys, dropout_keys = zip(*map(jax.random.split, keys))
        examples = jax.vmap(config.task.sample)(jnp.stack(sample_keys))
        losses = jax.vmap(lambda example, key: example_loss(model, example, decoder_input(example.target, begin), key))
        reports = losses(examples, jnp.stack(dropout_keys))
        return reports.loss.sum.sum() / reports.loss.count.sum()

    _, drawn = Generated(config.task).batches(config.training.batch_size, config.training.seed).batch(0)
    plain = [config.task.sample(jax.random.split(key)[0]) for key in keys[:5]]
    for k, example in enumerate(plain):
        np.testing.assert_array_equal(drawn.source[k], example.source)
        np.testing.assert_array_equal(drawn.target[k], example.target)
    value, gradient = jax.jit(jax.value_and_grad(loss))(start.params)
    state, report = call_once(config, 2, until=1)
    np.testing.assert_allclose(float(report.loss.value()), float(value), rtol=1e-5)
    assert np.sqrt(sum((g.astype(float) ** 2).sum() for g in leaves(gradient))) < config.optimizer.clip_norm
    moments = np.concatenate([m.ravel() for m in leaves(gradient)]) * (1 - config.optimizer.beta1)
    np.testing.assert_allclose(np.asarray(state.optimizer[1][0].mu), moments, atol=1e-6)
    # At the first step AdamW moves every parameter by the rate, the first of 40 in the warm-up, against its gradient.
    for before, after, g in zip(leaves(start.params), leaves(state.params), leaves(gradient)):
        far = abs(g) > 1e-4  # where its epsilon does not matter
        np.testing.assert_allclose((after - before)[far], -(3e-3 / 40) * np.sign(g)[far], rtol=2e-2)


@pytest.mark.nightly
def test_batches_of_one_length_draw_it_anew_at_every_step(config):
    """The tokens of 32 strings of n symbols, copied, are 32 (2 n + 2): a whole n for one length, and many n in time."""
    shared = dataclasses.replace(config, data=Data(source="one_length"))
    tokens = [float(call_once(shared, 2, until=until)[1].tokens) for until in range(1, 8)]
    each = np.diff([0, *tokens]) / config.training.batch_size
    lengths = (each - 2) / 2
    assert (lengths == lengths.round()).all() and len(set(lengths)) > 2
    assert lengths.min() >= config.task.min_length and lengths.max() <= config.task.max_length
    mixed = float(call_once(config, 2, until=1)[1].tokens) / config.training.batch_size
    assert mixed != round(mixed)
    one, two = (call_once(shared, devices, until=3) for devices in (1, 2))
    np.testing.assert_allclose(float(one[1].loss.value()), float(two[1].loss.value()), rtol=1e-5)


@pytest.mark.nightly
def test_training_and_evaluation_compile_once(config):
    mesh = meshes.data_mesh(config.training.batch_size)
    generated = Generated(config.task)
    programs = compile_programs(config, generated, mesh)
    state, questions = programs.state, generated.questions("test", 100, seed=0)
    # The transfers to the devices are compiled at their first use.
    programs.evaluate(state.params, questions)
    state, _ = programs.advance(state, 0, 1)
    with counting_compilations() as compiled:
        for step, until in ((1, 3), (3, 10), (10, 12)):
            state, _ = programs.advance(state, step, until)
            programs.evaluate(state.params, questions)
    assert compiled == []
    assert int(state.step) == 12


@pytest.mark.nightly
def test_a_call_up_to_another_step_compiles_nothing(config):
    call_once(config, 2, until=2)
    with counting_compilations() as compiled:
        for until in (4, 6):
            call_once(config, 2, until)
    assert compiled == []


def test_evaluation_counts_what_a_plain_loop_counts(copy_run):
    run = attn.load(copy_run)
    task, vocabulary = run.config.task, run.vocabulary
    mesh = meshes.data_mesh(8)
    # Longer than it was trained on, so that some answers are wrong.
    questions = Generated(task).questions_of_each_length("test", [3, 6, 12], 7, seed=0)
    evaluator = Evaluator(vocabulary, mesh, {5: 8, 13: 4}, *build_programs(vocabulary, run.graphdef, mesh))
    metrics, answers = evaluator.evaluate(meshes.replicate(run.params, mesh), questions)
    exact, right_tokens, tokens, edits = {}, 0, 0, 0
    for source, length, answer in zip(questions.sources, questions.lengths, answers):
        right = [*source[:length].tolist(), vocabulary.end]
        exact.setdefault(int(length), []).append(answer.tolist() == right + [0] * (len(answer) - len(right)))
        right_tokens += sum(a == b for a, b in zip(answer.tolist(), right))
        tokens += len(right)
        written = answer.tolist()
        written = written[: written.index(vocabulary.end)] if vocabulary.end in written else written
        edits += edit_distance(written, right[:-1])
    assert 0 < sum(map(sum, exact.values())) < len(questions.lengths)
    assert {n: s.exact_match.sum for n, s in metrics.by_length()} == {n: sum(e) for n, e in exact.items()}
    assert metrics.overall().token_accuracy == (right_tokens, tokens)
    assert metrics.overall().error_rate == (edits, tokens - len(questions.lengths))


def edit_distance(a: list, b: list) -> int:
    """Insertions, deletions and substitutions between two sequences, by the textbook's table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row, above = [i], row
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def request(repository, tiny, folder, *, config="copy", resume=False, **overrides):
    overrides = (
        tiny | {"training.steps": "60", "training.checkpoint_every": "20", "training.steps_per_call": "10"} | overrides
    )
    return experiment.Request(
        None if resume else str(repository / f"configs/{config}.py"), overrides, str(folder), resume, "off"
    )


def final_state(folder, config) -> list[np.ndarray]:
    files = Folder(folder)
    return leaves(
        checkpoints.restore(
            files.checkpoints,
            files.newest_step(),
            jax.eval_shape(lambda: initial_state(config, files.vocabulary(config))),
            digest_of(config),
        )
    )


# By day a run is killed and goes on, in test_kills.py, and another falls back, in test_checkpoints.py.
@pytest.mark.nightly
@pytest.mark.parametrize("source", ["generated", "tfds", "pairs"])
def test_a_stopped_run_resumes_to_the_same_bits(repository, tiny, tmp_path, capsys, monkeypatch, source):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    if source == "tfds":
        tiny = tiny | {"data.source": "tfds", "data.folder": str(tmp_path / "tfds"), "task.symbols": "3"}
    if source == "pairs":
        rows = itertools.islice(itertools.product("abcdef", repeat=4), 700)
        lines = ["".join(row[k % 4 :]) for k, row in enumerate(rows)]
        (tmp_path / "pairs.tsv").write_text("".join(f"{line}\t{line}\n" for line in lines))
        tiny = {name: value for name, value in tiny.items() if not name.startswith("task.")}
        tiny |= {"data.path": str(tmp_path / "pairs.tsv"), "model.dropout": "0.1"}
    config = "pairs" if source == "pairs" else "copy"
    assert experiment.run(request(repository, tiny, whole, config=config)) == 0
    # Ask the second run to stop, as a terminal would, when it reports step 30.
    show = Display.show

    def show_and_interrupt(self, row):
        show(self, row)
        if row.step == 30:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Display, "show", show_and_interrupt)
    assert experiment.run(request(repository, tiny, halves, config=config)) == 130
    assert "--resume" in capsys.readouterr().err
    assert Folder(halves).newest_step() == 30
    monkeypatch.setattr(Display, "show", show)
    assert experiment.run(request(repository, tiny, halves, resume=True)) == 0
    config = Folder(whole).config()
    for a, b in zip(final_state(whole, config), final_state(halves, config)):
        np.testing.assert_array_equal(a, b)
    rows = [
        [json.loads(row)["loss"] for row in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, halves)
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 6


@pytest.mark.nightly
def test_stopped_at_its_last_step_it_is_evaluated_when_it_resumes(repository, tiny, tmp_path, monkeypatch, capsys):
    show = Display.show

    def show_and_interrupt(self, row):
        show(self, row)
        if row.step == 60:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Display, "show", show_and_interrupt)
    assert experiment.run(request(repository, tiny, tmp_path / "run")) == 130
    assert "stopped at step 60, which is saved; resume with: python train.py --resume" in capsys.readouterr().err
    assert Folder(tmp_path / "run").summary() is None
    monkeypatch.setattr(Display, "show", show)
    assert experiment.run(request(repository, tiny, tmp_path / "run", resume=True)) == 0
    assert Folder(tmp_path / "run").summary()["steps"] == 60


def test_a_finished_run_is_never_lost(repository, tiny, copy_run, capsys):
    before = {path: path.read_bytes() for path in copy_run.rglob("*") if path.is_file()}
    again = experiment.Request(str(repository / "configs/copy.py"), tiny, str(copy_run), False, "off")
    assert experiment.run(again) == 2
    assert "holds a run already" in capsys.readouterr().err
    resumed = experiment.Request(None, {}, str(copy_run), True, "off")
    assert experiment.run(resumed) == 0
    assert "finished already" in capsys.readouterr().out
    changed = experiment.Request(None, {"model.width": "64"}, str(copy_run), True, "off")
    assert experiment.run(changed) == 2
    assert "config.model.width: got 64, must stay 32" in capsys.readouterr().err
    done = Folder(copy_run).newest_step()
    fewer = experiment.Request(None, {"training.steps": str(done - 1)}, str(copy_run), True, "off")
    assert experiment.run(fewer) == 2
    out, err = capsys.readouterr()
    said = f"config.training.steps: got {done - 1}, must be at least {done}, the steps that {copy_run} has done already"
    assert (out, err) == ("", f"error: {said}\n")
    assert {path: path.read_bytes() for path in copy_run.rglob("*") if path.is_file()} == before


@pytest.mark.nightly
def test_a_loss_that_is_not_finite_stops_the_run(repository, tiny, tmp_path, capsys):
    wild = {
        "optimizer.learning_rate": "1000",
        "optimizer.clip_norm": "1e30",
        "model.norm": "post",
        "optimizer.weight_decay": "1e30",
    }
    assert experiment.run(request(repository, tiny, tmp_path / "wild", **wild)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the loss is" in error and "step 10" in error
    assert not (tmp_path / "wild/summary.json").exists()


def test_a_run_folder_holds_what_it_promises(copy_run):
    assert json.loads((copy_run / "config.json").read_text()) == to_mapping(Folder(copy_run).config())
    rows = [json.loads(row) for row in (copy_run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((copy_run / "summary.json").read_text())
    steps = range(100, summary["steps"] + 1, 100)
    assert [row["step"] for row in rows] == [*steps]
    config = Folder(copy_run).config()
    rate = learning_rate(config.optimizer, config.training.steps)
    assert [row["learning_rate"] for row in rows] == [float(rate(step - 1)) for step in steps]
    assert rows_of_events(copy_run) == in_float32(rows)
    assert rows[-1]["loss"] < 0.1 < rows[0]["loss"]
    assert list(copy_run.glob("events.out.tfevents.*"))
    assert (copy_run / "attention.png").stat().st_size > 10_000
    assert set(summary) >= {
        "exact_match",
        "token_accuracy",
        "error_rate",
        "examples_evaluated",
        "steps",
        "parameters",
        "seed",
        "jax",
        "devices",
    }
    assert set(summary["seconds"]) == {"import", "compile", "train", "evaluate", "total"}
    assert (summary["seed"], summary["jax"]) == (0, jax.__version__)
    params = jax.tree.leaves(model_structure(Folder(copy_run).config(), attn.load(copy_run).vocabulary)[1])
    assert summary["parameters"] == sum(leaf.size for leaf in params)


def test_a_checkpoint_of_another_shape_or_config_is_named(copy_run, repository, tiny):
    folder = Folder(copy_run)
    other = load_config(str(repository / "configs/copy.py"), tiny | {"model.width": "16"})
    step = folder.newest_step()
    like = jax.eval_shape(lambda: initial_state(other, other.task.vocabulary))
    with pytest.raises(checkpoints.CheckpointError, match=r"is float32\[[\d, ]+\], must be float32\[[\d, ]+\]"):
        checkpoints.restore(folder.checkpoints, step, like, digest_of(folder.config()))
    with pytest.raises(checkpoints.CheckpointError, match="written with other settings"):
        checkpoints.restore(folder.checkpoints, step, like, digest_of(other))


def test_the_largest_divisor_that_fits():
    assert [meshes.largest_divisor(*pair) for pair in ((32, 2), (32, 7), (7, 6), (6, 100), (5, 1))] == [2, 4, 1, 6, 1]


def test_on_a_tpu_the_number_of_devices_divides_those_of_the_host():
    """tests/accelerators/test_devices.py compiles for these numbers."""
    assert [meshes.num_devices(batch, 8, "tpu") for batch in (32, 30, 12, 7, 1)] == [8, 2, 4, 1, 1]
    assert [meshes.num_devices(30, host, "tpu") for host in (1, 4, 6)] == [1, 2, 6]
    assert [meshes.num_devices(30, 8, platform) for platform in ("cpu", "gpu")] == [6, 6]


@pytest.mark.nightly
def test_steps_are_the_same_however_many_of_them_fit_into_a_call(config, monkeypatch):
    """The batches of a call lie in memory: of large ones it has fewer."""
    data, mesh = Generated(config.task), meshes.data_mesh(config.training.batch_size)
    ends, lengths = [], []
    for fitting in (1 << 26, 3 * config.training.batch_size * (7 + 7 + 7) * 4):
        monkeypatch.setattr(steps, "_LARGEST", fitting)
        lengths.append(steps.steps_per_call(config, data))
        start = meshes.replicate(jax.jit(lambda: initial_state(config, config.task.vocabulary))(), mesh)
        ends.append(compile_steps(config, data, mesh, start)(start, 0, 8))
    assert lengths[0] > lengths[1] == 3
    (one, report), (few, reports) = ends
    np.testing.assert_allclose(float(report.loss.value()), float(reports.loss.value()), rtol=1e-6)
    assert report.tokens == reports.tokens
    for a, b in zip(leaves(one), leaves(few)):
        np.testing.assert_allclose(a, b, atol=1e-6)
