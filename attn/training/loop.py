"""Training: compile, dispatch steps, show, judge on the way, keep checkpoints, judge at the end."""

import contextlib
import math
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attn.tasks.evaluation import held_out_strings
from attn.training import checkpoints
from attn.training.config import Config
from attn.training.folders import Folder
from attn.training.judging import Judgement, Strings, build_judge, judge_all, strings_like
from attn.training.meshes import replicate
from attn.training.progress import Clock, Display, Row
from attn.training.state import State, build_dispatch, initial_state, learning_rate, model_structure


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line for the user."""


class Interrupted(RuntimeError):
    """Training was asked to stop, and its state is saved; the message is one line for the user."""


class Outcome(NamedTuple):
    """What a finished training run leaves in memory."""

    state: State
    strings: Strings
    judgement: Judgement


class Programs(NamedTuple):
    """What is compiled, once, before the first step."""

    state: State
    dispatch: jax.stages.Compiled
    judge: jax.stages.Compiled
    batch_size: int  # of the judge: the config's, rounded up to a multiple of the mesh


def train(config: Config, folder: Folder | None, mesh: Mesh, clock: Clock, *, resume: bool) -> Outcome:
    """Train to the last step and judge.

    Args:
      config: of the run.
      folder: to write to and resume from. Every host may read it; host 0 alone writes.
      mesh: over which batches are shared out.
      clock: counts the seconds of each phase.
      resume: go on from the newest checkpoint, if there is one.

    Returns:
      The final state, and the judgement on held-out strings.

    Raises:
      TrainingError: the loss is not finite.
      Interrupted: SIGINT or SIGTERM came; the state has been saved.
      checkpoints.CheckpointError: the checkpoint does not fit.
    """
    newest = folder.newest_step() if resume else None
    writes = folder if jax.process_index() == 0 else None
    with Display(writes, config.training.steps, newest or 0) as display, _watch_signals() as stop:
        with clock.phase("compile"):
            programs = compile_programs(config, mesh)
        state = programs.state
        if newest is not None:
            state = replicate(checkpoints.restore(folder.checkpoints, newest, state), mesh)
            display.say(f"resumed at step {newest:,}")
        state = _run(config, state, programs, mesh, writes, display, clock, stop)
    with clock.phase("evaluate"):
        strings = final_strings(config)
        judgement = judge_all(programs.judge, state.params, strings, programs.batch_size, mesh)
    return Outcome(state, strings, judgement)


def _run(config, state, programs, mesh, folder, display, clock, stop) -> State:
    """From the state's step to the last."""
    training = config.training
    rate = learning_rate(config.optimizer, training.steps)
    on_the_way = strings_on_the_way(config)
    step = int(state.step)
    display.begin()
    while step < training.steps:
        every = (training.evaluate_every, training.checkpoint_every, training.steps_per_dispatch)
        until = min(training.steps, *(step - step % n + n for n in every))
        before = clock.seconds["train"]
        with clock.phase("train"):
            state, report = programs.dispatch(state, replicate(np.int32(until), mesh))
            report = jax.device_get(report)
        step, loss = until, float(report.loss.value())
        # The last update of a dispatch comes after its last loss.
        sound = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))
        if not math.isfinite(loss) or not sound:
            saved = folder and folder.newest_step()
            what = f"the loss is {loss}" if sound else f"parameters are not finite (the loss is {loss})"
            raise TrainingError(
                f"{what} at step {step:,}: stopped"
                + (f"; the newest checkpoint is of step {saved:,}" if saved else "")
                + "; a lower config.optimizer.learning_rate or config.optimizer.clip_norm may help"
            )
        row = Row(step, loss, float(report.tokens) / (clock.seconds["train"] - before), float(rate(step)))
        if step % training.evaluate_every == 0 and step < training.steps:
            with clock.phase("evaluate"):
                judgement = judge_all(programs.judge, state.params, on_the_way, programs.batch_size, mesh)
            scores = judgement.scores.overall()
            row = row._replace(exact_match=scores.exact_match.value(), token_accuracy=scores.token_accuracy.value())
        display.show(row)
        if folder and (step % training.checkpoint_every == 0 or step == training.steps or stop.is_set()):
            checkpoints.save(folder.checkpoints, state)
        if stop.is_set() and step < training.steps:
            raise Interrupted(f"stopped at step {step:,}, which is saved")
    return state


def compile_programs(config: Config, mesh: Mesh) -> Programs:
    """Compile what the run needs, at the same time, since one program's compilation keeps one core busy."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def start() -> State:
        # It runs once: on a CPU, compiling it thoroughly would cost more than it saves.
        quickly = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
        return jax.jit(lambda: initial_state(config), out_shardings=everywhere, compiler_options=quickly)()

    shapes = jax.eval_shape(lambda: initial_state(config))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)

    def dispatch():
        until = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        return build_dispatch(config, mesh).lower(shapes, until).compile()

    batch_size = math.ceil(config.evaluation.batch_size / mesh.size) * mesh.size

    def judge():
        graphdef, _ = model_structure(config)
        length = config.task.max_length
        return (
            build_judge(config.task, graphdef, mesh, length)
            .lower(shapes.params, strings_like(batch_size, length, mesh))
            .compile()
        )

    # Several hosts must compile in one order; one host may do it all at once.
    with ThreadPoolExecutor(1 if jax.process_count() > 1 else 3) as pool:
        programs = [pool.submit(make) for make in (dispatch, start, judge)]
        dispatch, state, judge = (program.result() for program in programs)
    return Programs(state, dispatch, judge, batch_size)


def final_strings(config: Config) -> Strings:
    """The held-out strings that decide."""
    return _strings(config, config.evaluation.examples, config.evaluation.seed)


def strings_on_the_way(config: Config) -> Strings:
    """Held-out strings for the progress display, another draw than the final ones; nothing depends on them."""
    return _strings(config, config.evaluation.examples_on_the_way, config.evaluation.seed + 1)


def _strings(config: Config, total: int, seed: int) -> Strings:
    lengths = list(range(config.task.min_length, config.task.max_length + 1))
    return Strings(*held_out_strings(config.task, lengths, total, seed))


@contextlib.contextmanager
def _watch_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that the loop can save and leave; a second SIGINT acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield stop
        return

    def ask(number, frame):
        stop.set()
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
