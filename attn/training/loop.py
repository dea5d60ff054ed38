"""Training: compile, run steps, report, evaluate in between, save checkpoints, evaluate at the end."""

import ctypes
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attn.tasks.examples import Questions
from attn.tasks.generated import Generated
from attn.tasks.stored import StackedBatches, Stored
from attn.training import checkpoints
from attn.training.config import Config
from attn.training.folders import Folder
from attn.training.identity import digest_of
from attn.training.judging import Judgement, build_answer, judge, judging_batches
from attn.training.meshes import replicate, tokens_like
from attn.training.optimizers import learning_rate
from attn.training.programs import compiled, compiling
from attn.training.progress import Clock, Display, Row, readable
from attn.training.signals import stopped_by_sigterm, watch_signals
from attn.training.state import State, initial_state, model_structure
from attn.training.steps import Dispatch, Report, arguments_of, build_dispatch, dispatch_length, stored_specs
from attn.training.stopping import Exactness, compile_exactness


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line for the user."""


class Interrupted(RuntimeError):
    """Training was asked to stop, and its state is saved; the message is one line for the user."""


class Outcome(NamedTuple):
    """The result of a finished training run; `beam` if there is an additional beam.

    `exact` says whether it ended because the answers were exact.
    """

    state: State
    questions: Questions
    judgement: Judgement
    beam: Judgement | None
    exact: bool


class Programs(NamedTuple):
    """The compiled programs, made once before the first step."""

    state: State
    advance: Callable[[State, int, int], tuple[State, Report]]  # (state, its step, until) -> (state, report)
    judge: Callable[[nnx.State, Questions], Judgement]  # greedily
    judge_beam: Callable[[nnx.State, Questions], Judgement] | None
    exactness: Exactness | None  # at which training stops


def train(
    config: Config,
    data: Generated | Stored,
    folder: Folder | None,
    mesh: Mesh,
    clock: Clock,
    *,
    resume: bool,
    on_checkpoint: Callable[[State], None] | None = None,
) -> Outcome:
    """Train to the last step and evaluate.

    Args:
      config: of the run.
      data: to learn from and to be judged on.
      folder: to write to and resume from. Every host may read it; host 0 alone writes.
      mesh: over which batches are shared out.
      clock: counts the seconds of each phase.
      resume: go on from the newest checkpoint, if there is one.
      on_checkpoint: called with every state that is about to be saved.

    Returns:
      The final state, and the judgement on the questions of the test.

    Raises:
      TrainingError: the loss is not finite.
      Interrupted: SIGINT or SIGTERM came; the state has been saved.
      checkpoints.CheckpointError: no checkpoint can be used.
      OSError: something cannot be written.
    """
    writes = folder if jax.process_index() == 0 else None
    restored = _restored(config, data, folder, writes) if resume else None
    first = 0 if restored is None else int(restored.step)
    with stopped_by_sigterm(), Display(writes, config.training.steps, first) as display:
        for line in data.describe():
            display.say(readable(line))
        with clock.phase("compile"):
            programs = compile_programs(config, data, mesh)
        state = programs.state
        if restored is not None:
            state = replicate(restored, mesh)
            display.say(f"resumed at step {first:,}")
        settings = config.evaluation
        on_the_way = data.questions("validation", settings.intermediate_examples, settings.seed)
        with watch_signals() as stop:
            state, exact = _run(config, state, programs, on_the_way, writes, display, clock, stop, on_checkpoint)
    with clock.phase("evaluate"):
        questions = data.questions("test", settings.examples, settings.seed)
        judgement = programs.judge(state.kept, questions)
        beam = programs.judge_beam and programs.judge_beam(state.kept, questions)
    return Outcome(state, questions, judgement, beam, exact)


def _restored(config: Config, data: Generated | Stored, folder: Folder, writes: Folder | None) -> State | None:
    """The newest state that was saved and verifies; the host that writes sets damaged ones aside and says so."""
    like = jax.eval_shape(lambda: initial_state(config, data.vocabulary))

    def say(line: str):
        if writes:
            print(readable(line), file=sys.stderr, flush=True)

    return checkpoints.restore_newest(folder.checkpoints, like, digest_of(config), say, set_aside=writes is not None)


def _run(config, state, programs, on_the_way, folder, display, clock, stop, on_checkpoint) -> tuple[State, bool]:
    """From the state's step to the last, or to that at which the answers are exact, and whether they are."""
    training = config.training
    rate = learning_rate(config.optimizer, training.steps)
    step = int(state.step)
    display.begin()
    # A run that is resumed may have been ended between finding that it is exact and saying so.
    again = programs.exactness is not None and step > 0 and step % training.evaluate_every == 0
    exact = again and _evaluate(programs, state, on_the_way, clock)[1]
    while step < training.steps and not exact:
        every = (training.evaluate_every, training.checkpoint_every, training.steps_per_call)
        until = min(training.steps, *(step - step % n + n for n in every))
        before = clock.seconds["train"]
        with clock.phase("train"):
            state, report = programs.advance(state, step, until)
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
        # `rate(k)` is that of the update that leads from step k to k + 1.
        row = Row(step, loss, float(report.tokens) / (clock.seconds["train"] - before), float(rate(step - 1)))
        if step % training.evaluate_every == 0 and step < training.steps:
            values, exact = _evaluate(programs, state, on_the_way, clock)
            row = row._replace(**values)
        display.show(row)
        stopping = stop.is_set()
        if folder and (step % training.checkpoint_every == 0 or step == training.steps or exact or stopping):
            if on_checkpoint is not None:
                on_checkpoint(state)
            checkpoints.save(folder.checkpoints, state, digest_of(config))
            stopping = stop.is_set()  # also while it was saved
        if stopping:
            raise Interrupted(f"stopped at step {step:,}, which is saved")
    if programs.exactness is not None:
        on = f"exact on {programs.exactness.count:,} validation sources"
        display.say(f"{on} at step {step:,}: stopped" if exact else f"not yet {on} at step {step:,}, the last one")
    return state, exact


def _evaluate(programs: Programs, state: State, questions: Questions, clock: Clock) -> tuple[dict[str, float], bool]:
    """The metrics of some validation sources by name, none where there are no sources; and whether training is over."""
    if not len(questions.lengths):
        return {}, False
    with clock.phase("evaluate"):
        scores = programs.judge(state.kept, questions).scores.overall()
        right = programs.exactness is not None and scores.exact_match.value() == 1.0
        return scores.values(), right and programs.exactness.holds(state.kept)


def compile_programs(config: Config, data: Generated | Stored, mesh: Mesh) -> Programs:
    """Compile what the run needs, at the same time, since one program's compilation keeps one core busy."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def initial() -> State:
        return initial_state(config, data.vocabulary)

    def start() -> State:
        return compiled(jax.jit(initial, out_shardings=everywhere), mesh=mesh, level=0)()

    shapes = jax.eval_shape(initial)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
    beams = [1] if config.evaluation.beam_width == 1 else [1, config.evaluation.beam_width]

    with compiling() as pool:
        advance = pool.submit(compile_steps, config, data, mesh, shapes)
        state = pool.submit(start)
        stops = config.training.stop_when_exact > 0
        exactness = pool.submit(compile_exactness, config, data, mesh, shapes.params) if stops else None
        judges = [pool.submit(compile_judge, config, data, mesh, shapes.params, width) for width in beams]
        greedy, *beam = (judge.result() for judge in judges)
        judge_beam = beam[0] if beam else None
        programs = Programs(state.result(), advance.result(), greedy, judge_beam, exactness and exactness.result())
    _give_memory_back()
    return programs


def _give_memory_back():
    """Return to the system what compiling has freed: glibc would keep it, by the hundreds of MiB."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def compile_steps(
    config: Config, data: Generated | Stored, mesh: Mesh, shapes: State
) -> Callable[[State, int, int], tuple[State, Report]]:
    """Steps from one to another, in dispatches, on the batches that (seed, step) decides."""
    count, specs = dispatch_length(config, data), stored_specs(data)
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    def stored(step: int, until: int) -> StackedBatches | None:
        if isinstance(data, Generated):
            return None
        return data.batches(config.training.batch_size, config.training.seed).stacked(step, until, count, mesh.size)

    dispatch = build_dispatch(config, data, mesh)
    given = arguments_of(dispatch, config, data, mesh, shapes)
    with compiling() as pool:
        longest_first = "advance", "draw", "unpack", "pack"
        parts = {
            name: pool.submit(compiled, getattr(dispatch, name), *given[name], mesh=mesh) for name in longest_first
        }
        dispatch = Dispatch(**{name: part.result() for name, part in parts.items()})

    def advance(state: State, step: int, until: int) -> tuple[State, Report]:
        reports = []
        for first in range(step, until, count):
            last = min(first + count, until)
            batches = jax.device_put(stored(first, last), places)
            state, report = dispatch(state, replicate(np.int32(last), mesh), batches)
            reports.append(jax.device_get(report))
        return state, jax.tree.map(lambda *values: sum(values), *reports)

    return advance


def compile_judge(
    config: Config, data: Generated | Stored, mesh: Mesh, params: nnx.State, beam_width: int
) -> Callable[[nnx.State, Questions], Judgement]:
    """Answers to questions as long as the longest that is asked, each width compiled by itself."""
    vocabulary = data.vocabulary
    longest, most = data.longest_question, config.evaluation.batch_size
    batches = judging_batches(config, vocabulary, longest, most, mesh, beam_width)
    graphdef, _ = model_structure(config, vocabulary)
    answer = build_answer(vocabulary, graphdef, mesh, beam_width)
    of_width = {
        width: compiled(answer, params, tokens_like(size, width, mesh), mesh=mesh) for width, size in batches.items()
    }

    def answers(params, sources):
        return of_width[sources.shape[1]](params, sources)

    return lambda params, questions: judge(answers, params, questions, vocabulary, batches, mesh)
