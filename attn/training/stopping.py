"""Intermediate evaluations, and the end of training once enough validation sources are all answered exactly."""

from collections.abc import Callable

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from attn.tasks.examples import Questions
from attn.tasks.generated import Generated
from attn.tasks.stored import Stored
from attn.training.config import Config
from attn.training.judging import Judgement
from attn.training.meshes import replicate
from attn.training.state import State

# Exact once may be luck: the error rate falls from one evaluation to the next, but a few wrong of 10,000 can be missed.
_IN_A_ROW = 2


class Watch:
    """The intermediate evaluations of a run, on validation sources, of which none is in the test.

    Whether to stop follows from the state alone, which counts the exact evaluations: a run that resumes stops where an
    unbroken one does.

    Args:
      config: of the run.
      data: for its validation part.
      evaluate: `(params, questions) -> Judgement`.
      mesh: of the state.
    """

    def __init__(
        self,
        config: Config,
        data: Generated | Stored,
        evaluate: Callable[[nnx.State, Questions], Judgement],
        mesh: Mesh,
    ):
        settings, many = config.evaluation, config.training.stop_when_exact
        self._few = data.questions("validation", settings.examples_on_the_way, settings.seed)
        self._many = data.questions("validation", many, settings.seed) if many else None
        self._evaluate, self._at_a_time, self._mesh = evaluate, settings.batch_size, mesh

    def look(self, state: State) -> tuple[State, dict[str, float]]:
        """Evaluate on a few sources and, where those are exact and it may end training, on many.

        Returns:
          The state, which counts exact evaluations, and the metrics of the few by name; none without such sources.
        """
        if not len(self._few.lengths):
            return state, {}
        values = self._evaluate(state.kept, self._few).scores.overall().values()
        if self._many is not None:
            exact = values["exact_match"] == 1.0 and self._all_exact(state.kept, self._many)
            in_a_row = int(state.exact) + 1 if exact else 0
            state = state._replace(exact=replicate(np.int32(in_a_row), self._mesh))
        return state, values

    def is_over(self, state: State) -> bool:
        """Whether training has become exact."""
        return self._many is not None and int(state.exact) >= _IN_A_ROW

    def exact_on(self, state: State) -> int | None:
        """How many validation sources were all answered exactly, if that has ended training."""
        return len(self._many.lengths) if self.is_over(state) else None

    def describe(self, state: State) -> list[str]:
        """How training ended, in lines for people."""
        if self._many is None:
            return []
        many, step = f"{len(self._many.lengths):,} validation sources", f"step {int(state.step):,}"
        if self.is_over(state):
            return [f"exact on {many} {_IN_A_ROW} times in a row, at {step}: stopped"]
        return [f"not exact on {many} {_IN_A_ROW} times in a row by {step}, the last that config.training.steps allows"]

    def _all_exact(self, params: nnx.State, questions: Questions) -> bool:
        """Whether all are answered exactly; the first batch with a wrong answer ends it."""
        total = len(questions.lengths)
        parts = -(-total // self._at_a_time)
        # Sources come in ascending order of length: every part has them of all lengths.
        some = (questions.chosen(np.arange(first, total, parts)) for first in range(parts))
        return all(self._evaluate(params, part).scores.overall().exact_match.value() == 1.0 for part in some)
