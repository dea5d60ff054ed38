"""Training stops once it is exact, and what it keeps is what was found to be so."""

import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn import experiment
from attn.tasks.examples import decoder_input, with_replaced
from attn.tasks.generated import Generated
from attn.training import checkpoints, meshes
from attn.training.decoding import confirmed, margins
from attn.training.flags import load_config
from attn.training.folders import Folder
from attn.training.identity import digest_of
from attn.training.progress import Display
from attn.training.state import State, initial_state
from attn.training.steps import build_step_programs


def restored(folder) -> State:
    """The state of the newest checkpoint."""
    files, config = Folder(folder), Folder(folder).config()
    like = jax.eval_shape(lambda: initial_state(config, files.vocabulary(config)))
    return checkpoints.restore(files.checkpoints, files.newest_step(), like, digest_of(config))


def request(repository, folder, overrides, *, resume=False) -> experiment.Request:
    return experiment.Request(
        None if resume else str(repository / "configs/copy.py"), overrides, str(folder), resume, "off"
    )


def rows_of(folder) -> list[tuple]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row.get("exact_match")) for row in rows]


def test_a_run_ends_when_it_is_exact(copy_run):
    summary, config = json.loads((copy_run / "summary.json").read_text()), Folder(copy_run).config()
    assert summary["stopped_when_exact"] and summary["exact_match"] == 1.0
    assert summary["steps"] < config.training.steps
    assert summary["steps"] == Folder(copy_run).newest_step() == rows_of(copy_run)[-1][0]


def test_what_is_kept_is_what_was_evaluated(copy_run):
    run, state = attn.load(copy_run), restored(copy_run)
    for kept, average, last in zip(*map(jax.tree.leaves, (run.params, state.average, state.params))):
        np.testing.assert_array_equal(kept, average)
        assert (np.asarray(kept) != np.asarray(last)).any()
    questions = Generated(run.config.task).questions("validation", 10_000, run.config.evaluation.seed)
    lowest = margins(run.model, run.vocabulary, *map(jnp.asarray, (questions.sources, questions.targets))).min()
    assert lowest >= 2.99  # 3, but for the rounding of another program
    scores = run.evaluate(examples=50)
    assert scores.overall().exact_match.value() == 1.0


def test_a_finished_run_says_that_it_was_exact(copy_run, capsys):
    assert experiment.run(experiment.Request(None, {}, str(copy_run), True, "off")) == 0
    assert "is finished already, as its answers were exact" in capsys.readouterr().out


@pytest.mark.nightly
def test_a_run_that_was_killed_before_its_summary_goes_no_further(copy_run, tmp_path):
    shutil.copytree(copy_run, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    assert experiment.run(experiment.Request(None, {}, str(tmp_path / "run"), True, "off")) == 0
    assert rows_of(tmp_path / "run") == rows_of(copy_run)
    assert Folder(tmp_path / "run").summary()["stopped_when_exact"]


@pytest.mark.nightly
def test_a_stopped_run_resumes_to_the_same_end(repository, tiny, copy_run, tmp_path, monkeypatch):
    show, run = Display.show, tmp_path / "run"

    def show_and_interrupt(self, row):
        show(self, row)
        if row.step == 100:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Display, "show", show_and_interrupt)
    assert experiment.run(request(repository, run, tiny)) == 130
    assert Folder(run).newest_step() == 100
    monkeypatch.setattr(Display, "show", show)
    assert experiment.run(request(repository, run, {}, resume=True)) == 0
    assert rows_of(run) == rows_of(copy_run)
    for one, other in zip(*(jax.tree.leaves(restored(folder)) for folder in (copy_run, run)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.nightly
def test_the_last_step_without_exact_answers_is_said(repository, tiny, tmp_path, capsys):
    few = tiny | {"training.steps": "4", "training.evaluate_every": "2", "training.steps_per_call": "2"}
    assert experiment.run(request(repository, tmp_path / "run", few)) == 0
    count = len(Generated(Folder(tmp_path / "run").config().task).questions("validation", 10_000, 0).lengths)
    assert f"not yet exact on {count:,} validation sources at step 4, the last one" in capsys.readouterr().out
    assert not Folder(tmp_path / "run").summary()["stopped_when_exact"]


def test_margins_are_those_of_the_logits_and_positive_where_the_answer_is_written(copy_run):
    run = attn.load(copy_run)
    # Longer than trained on, so that some answers are wrong.
    questions = Generated(run.config.task).questions_of_each_length("test", [5, 9], 20, seed=0)
    asked = [jnp.asarray(tokens) for tokens in (questions.sources, questions.targets)]
    found, right = (check(run.model, run.vocabulary, *asked) for check in (margins, confirmed))
    np.testing.assert_array_equal(found > 0, right)
    assert 0 < right.sum() < len(right)
    logits_of = jax.jit(lambda source, target: run.model(source, decoder_input(target, run.vocabulary.begin)))
    for source, target, margin in zip(*(x[::7] for x in asked), found[::7]):
        length = int((target != 0).sum())
        logits = np.asarray(logits_of(source, target), np.float64)[:length, 1:]  # padding is never written
        leads = [row[token - 1] - np.delete(row, token - 1).max() for row, token in zip(logits, np.asarray(target))]
        assert float(margin) == pytest.approx(min(leads), abs=1e-3)


def test_tokens_are_replaced_in_their_share_by_any_but_padding():
    tokens = jnp.full(20_000, 3)
    read = np.asarray(with_replaced(tokens, jax.random.key(0), 0.25, 6))
    assert read[0] == 3 and set(read) == {1, 2, 3, 4, 5}
    assert (read != 3).mean() == pytest.approx(0.25 * 4 / 5, abs=0.01)
    np.testing.assert_array_equal(read, with_replaced(tokens, jax.random.key(0), 0.25, 6))
    np.testing.assert_array_equal(with_replaced(tokens, jax.random.key(0), 0.0, 6), tokens)


@pytest.mark.nightly
def test_the_average_is_that_of_the_parameters_of_all_steps(repository, tiny):
    config = load_config(str(repository / "configs/copy.py"), tiny | {"optimizer.averaging": "0.5"})
    mesh = meshes.data_mesh(config.training.batch_size)
    programs = build_step_programs(config, Generated(config.task), mesh)
    state = meshes.replicate(jax.jit(lambda: initial_state(config, config.task.vocabulary))(), mesh)
    average = None
    for step in range(5):
        state, _ = programs(state, meshes.replicate(np.int32(step + 1), mesh), None)
        params = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state.params)]
        weight = 1 / (1 + 0.5 * step)
        average = params if average is None else [a + (p - a) * weight for a, p in zip(average, params)]
    for mean, expected in zip(jax.tree.leaves(state.average), average):
        np.testing.assert_allclose(mean, expected, atol=1e-6)
