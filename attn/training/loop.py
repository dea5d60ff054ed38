"""Training: compile, run steps, report, evaluate in between, save checkpoints and snapshots, evaluate at the end."""

import ctypes
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from attn.tasks.examples import Questions
from attn.tasks.generated import Generated
from attn.tasks.stored import StackedBatches, Stored
from attn.training import checkpoints, snapshots
from attn.training.config import Config
from attn.training.evaluation import Evaluated, Evaluator, batch_sizes, build_programs
from attn.training.folders import Folder
from attn.training.identity import digest_of
from attn.training.meshes import DATA, fetch, replicate, tokens_like
from attn.training.optimizers import learning_rate
from attn.training.placement import Placement, placement_of
from attn.training.programs import compiled, compiling
from attn.training.progress import Clock, Display, Row, readable
from attn.training.signals import stopped_by_sigterm, watch_signals
from attn.training.state import State, initial_state, model_structure
from attn.training.steps import (
    Report,
    StepPrograms,
    arguments_of,
    build_step_programs,
    steps_per_call,
    stored_specs,
)
from attn.training.stopping import Exactness, compile_exactness


class TrainingError(RuntimeError):
    """Training cannot continue; the message is one line for the user."""


class Interrupted(RuntimeError):
    """Training was interrupted, and its state is saved; the message is one line for the user."""


class Outcome(NamedTuple):
    """The result of a finished training run.

    Attributes:
      state: the last one.
      questions: held-out examples, of the test part.
      evaluated: the result of decoding them greedily.
      beam: the result with a beam; None if the config has none.
      exact: whether training ended because the answers were exact.
    """

    state: State
    questions: Questions
    evaluated: Evaluated
    beam: Evaluated | None
    exact: bool


class Programs(NamedTuple):
    """The initial state and the compiled programs, made once before the first step.

    Attributes:
      state: the initial one.
      advance: from `compile_steps`.
      evaluate: (parameters, questions) -> metrics and answers, decoded greedily.
      evaluate_beam: the same with a beam; None if the config has none.
      exactness: the condition for stopping early; None if the config has none.
      placement: of the state on the mesh.
    """

    state: State
    advance: Callable[..., tuple[State, Report]]
    evaluate: Callable[[nnx.State, Questions], Evaluated]
    evaluate_beam: Callable[[nnx.State, Questions], Evaluated] | None
    exactness: Exactness | None
    placement: Placement


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
      data: to train and to evaluate on.
      folder: to write to and resume from; None to keep no files. Every host may read it; only host 0 writes.
      mesh: over which batches are sharded.
      clock: counts the seconds of each phase.
      resume: continue from the newest checkpoint, if there is one.
      on_checkpoint: called with every state that is about to be saved.

    Raises:
      TrainingError: the loss is not finite.
      Interrupted: SIGINT or SIGTERM came; the state has been saved.
      checkpoints.CheckpointError: no checkpoint can be used.
      OSError: a file cannot be written.
    """
    output = folder if jax.process_index() == 0 else None
    restored = _restore(config, data, folder, output) if resume else None
    first = 0 if restored is None else int(restored.step)
    if output:  # those of a future that was not saved are recorded again
        snapshots.discard(output.snapshots, -1 if restored is None else first)
    with stopped_by_sigterm(), Display(output, config.training.steps, first) as display:
        for line in data.describe():
            display.say(readable(line))
        with clock.phase("compile"):
            programs = compile_programs(config, data, mesh)
        state = programs.state
        if restored is not None:
            state = programs.placement.place(restored)
            display.say(f"resumed at step {first:,}")
        settings = config.evaluation
        intermediate = data.questions("validation", settings.intermediate_examples, settings.seed)
        recorder = _recorder(config, folder, output, state, display)
        with watch_signals() as stop:
            state, exact = _run(
                config, state, programs, intermediate, output, display, clock, stop, on_checkpoint, recorder
            )
    with clock.phase("evaluate"):
        questions = data.questions("test", settings.examples, settings.seed)
        evaluated = programs.evaluate(state.kept, questions)
        beam = programs.evaluate_beam and programs.evaluate_beam(state.kept, questions)
    return Outcome(programs.placement.whole(state), questions, evaluated, beam, exact)


def _restore(config: Config, data: Generated | Stored, folder: Folder, output: Folder | None) -> State | None:
    """Return the newest saved state that verifies; the host that writes renames and reports damaged checkpoints."""
    like = jax.eval_shape(lambda: initial_state(config, data.vocabulary))

    def say(line: str):
        if output:
            print(readable(line), file=sys.stderr, flush=True)

    return checkpoints.restore_newest(folder.checkpoints, like, digest_of(config), say, set_aside=output is not None)


def _recorder(
    config: Config, folder: Folder | None, output: Folder | None, state: State, display: Display
) -> snapshots.Recorder:
    """Make the recorder of snapshots; without a folder, none are recorded."""
    training = config.training
    steps, note = snapshots.plan(training.snapshots if folder else 0, training.steps, state.kept)
    if note:
        display.say(note)
    return snapshots.Recorder(output and output.snapshots, steps, digest_of(config), display.say)


def _run(
    config, state, programs, intermediate, folder, display, clock, stop, on_checkpoint, recorder
) -> tuple[State, bool]:
    """Train from the state's step to the last, or until the answers are exact; also return whether they are."""
    training = config.training
    rate = learning_rate(config.optimizer, training.steps)
    step = int(state.step)
    display.begin()
    if step == 0:
        with clock.phase("train"):
            recorder.record(0, state.kept)
    # A resumed run may have been killed between the evaluation that found it exact and its end.
    evaluated_before = programs.exactness is not None and step > 0 and step % training.evaluate_every == 0
    exact = evaluated_before and _evaluate(programs, state, intermediate, clock)[1]
    while step < training.steps and not exact:
        every = (training.evaluate_every, training.checkpoint_every, training.steps_per_call)
        until = min(training.steps, *(step - step % n + n for n in every))
        before = clock.seconds["train"]
        with clock.phase("train"):
            state, report = programs.advance(state, step, until, recorder)
        step, loss = until, float(report.loss.value())
        # The parameters are checked too: the last update of a call comes after its last loss.
        finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(fetch(state.params)))
        if not math.isfinite(loss) or not finite:
            saved = folder and folder.newest_step()
            problem = f"the loss is {loss}" if finite else f"parameters are not finite (the loss is {loss})"
            raise TrainingError(
                f"{problem} at step {step:,}: stopped"
                + (f"; the newest checkpoint is of step {saved:,}" if saved else "")
                + "; a lower config.optimizer.learning_rate or config.optimizer.clip_norm may help"
            )
        # `rate(k)` is the learning rate of the update from step k to k + 1.
        row = Row(step, loss, float(report.tokens) / (clock.seconds["train"] - before), float(rate(step - 1)))
        if step % training.evaluate_every == 0 and step < training.steps:
            values, exact = _evaluate(programs, state, intermediate, clock)
            row = row._replace(**values)
        display.show(row)
        stopping = stop.is_set()
        is_due = step % training.checkpoint_every == 0 or step == training.steps or exact or stopping
        whole = programs.placement.whole(state) if is_due else None
        if folder and is_due:
            if on_checkpoint is not None:
                on_checkpoint(whole)
            checkpoints.save(folder.checkpoints, whole, digest_of(config))
            stopping = stop.is_set()  # a signal may have come while the state was saved
        if stopping:
            raise Interrupted(f"stopped at step {step:,}, which is saved")
    if programs.exactness is not None:
        goal = f"exact on {programs.exactness.count:,} validation sources"
        display.say(f"{goal} at step {step:,}: stopped" if exact else f"not yet {goal} at step {step:,}, the last one")
    return state, exact


def _evaluate(programs: Programs, state: State, questions: Questions, clock: Clock) -> tuple[dict[str, float], bool]:
    """Return the metrics by name, which is empty without questions; and whether training may stop, being exact."""
    if not len(questions.lengths):
        return {}, False
    with clock.phase("evaluate"):
        metrics = programs.evaluate(state.kept, questions).metrics.overall()
        right = programs.exactness is not None and metrics.exact_match.value() == 1.0
        return metrics.values(), right and programs.exactness.holds(state.kept)


def compile_programs(config: Config, data: Generated | Stored, mesh: Mesh) -> Programs:
    """Compile the programs of a run, several at a time, since compiling one program keeps one core busy."""
    placement = placement_of(config, data.vocabulary, mesh)

    def initial() -> State:
        return initial_state(config, data.vocabulary)

    shapes = placement.shapes(jax.eval_shape(initial))

    def compute_initial() -> State:
        places = jax.tree.map(lambda x: x.sharding, shapes)
        return compiled(jax.jit(lambda: placement.spread(initial()), out_shardings=places), mesh=mesh, level=0)()

    beams = [1] if config.evaluation.beam_width == 1 else [1, config.evaluation.beam_width]

    with compiling() as pool:
        advance = pool.submit(compile_steps, config, data, mesh, shapes)
        state = pool.submit(compute_initial)
        stops_early = config.training.stop_when_exact > 0
        exactness = pool.submit(compile_exactness, config, data, mesh, shapes.params) if stops_early else None
        evaluations = [pool.submit(compile_evaluate, config, data, mesh, shapes.params, width) for width in beams]
        greedy, *beam = (evaluation.result() for evaluation in evaluations)
        exactness = exactness and exactness.result()
        programs = Programs(state.result(), advance.result(), greedy, beam[0] if beam else None, exactness, placement)
    _release_memory()
    return programs


def _release_memory():
    """Return freed memory to the system: glibc would keep hundreds of MiB after compiling."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def compile_steps(
    config: Config, data: Generated | Stored, mesh: Mesh, shapes: State
) -> Callable[..., tuple[State, Report]]:
    """Compile `(state, its step, until) -> (state, report)`: the steps up to `until`, in one call or several.

    The function takes a recorder of snapshots as a further argument. A call is divided at its steps, which changes no
    bit of the state.
    """
    count, specs = steps_per_call(config, data), stored_specs(data)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    def stacked(step: int, until: int) -> StackedBatches | None:
        if isinstance(data, Generated):
            return None
        return data.batches(config.training.batch_size, config.training.seed).stacked(
            step, until, count, mesh.shape[DATA]
        )

    programs = build_step_programs(config, data, mesh)
    arguments = arguments_of(programs, config, data, mesh, shapes)
    with compiling() as pool:
        longest_first = "advance", "draw", "unpack", "pack"
        parts = {
            name: pool.submit(compiled, getattr(programs, name), *arguments[name], mesh=mesh) for name in longest_first
        }
        programs = StepPrograms(**{name: part.result() for name, part in parts.items()})

    def advance(
        state: State, step: int, until: int, recorder: snapshots.Recorder | None = None
    ) -> tuple[State, Report]:
        reports = []
        for first in range(step, until, count):
            last = min(first + count, until)
            batches = jax.device_put(stacked(first, last), shardings)
            ends = [*(end for end in (recorder.steps if recorder else ()) if first < end < last), last]
            parts = programs.in_parts(state, [replicate(np.int32(end), mesh) for end in ends], batches)
            for end, (state, report) in zip(ends, parts):
                reports.append(jax.device_get(report))
                if recorder:
                    recorder.record(end, state.kept)
        return state, jax.tree.map(lambda *values: sum(values), *reports)

    return advance


def compile_evaluate(
    config: Config, data: Generated | Stored, mesh: Mesh, params: nnx.State, beam_width: int
) -> Callable[[nnx.State, Questions], Evaluated]:
    """Compile an evaluation: a program for each width of sources, up to the longest of the data."""
    vocabulary, (graphdef, _) = data.vocabulary, model_structure(config, data.vocabulary)
    longest, most = data.longest_question, config.evaluation.batch_size
    sizes = batch_sizes(config, vocabulary, longest, most, mesh, beam_width)
    decode, loss = build_programs(vocabulary, graphdef, mesh, beam_width)
    decode_by_width = {
        width: compiled(decode, params, tokens_like(size, width, mesh), mesh=mesh) for width, size in sizes.items()
    }
    if loss is not None:
        widths = longest, vocabulary.capacity(longest - 1)
        batch = tuple(tokens_like(sizes[longest], width, mesh) for width in widths)
        loss = compiled(loss, params, batch, mesh=mesh)

    def decode_batch(params, sources):
        return decode_by_width[sources.shape[1]](params, sources)

    return Evaluator(vocabulary, mesh, sizes, decode_batch, loss).evaluate
