"""The end of training as soon as its answers are exact, with a margin."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from attn.tasks.examples import Questions
from attn.tasks.generated import Generated
from attn.tasks.stored import Stored
from attn.training.config import Config
from attn.training.decoding import margins
from attn.training.evaluation import batch_sizes, data_parallel, in_batches
from attn.training.meshes import tokens_like
from attn.training.programs import compiled
from attn.training.state import model_structure

# How far the logit of every right token must be above all others, on every validation source. That answers are right
# would not do: with 0 errors in 10,000, one or two of 10,000 others were still wrong, and the least margins of two such
# sets, mostly alike, were once 2.2 apart.
_MARGIN = 3.0


class Exactness(NamedTuple):
    """The condition for stopping: `holds(params)` says whether `count` validation sources are answered exactly."""

    count: int
    holds: Callable[[nnx.State], bool]


def compile_exactness(config: Config, data: Generated | Stored, mesh: Mesh, params: nnx.State) -> Exactness:
    """Make the condition that up to `stop_when_exact` validation sources are all answered right, with a margin.

    It hangs on the parameters alone, so that a run that resumes stops where an unbroken one does.

    Args:
      config: of the run.
      data: for its validation part, of which no source is in the test.
      mesh: over which batches are shared out.
      params: shapes of the parameters.
    """
    vocabulary, graphdef = data.vocabulary, model_structure(config, data.vocabulary)[0]
    questions = data.questions("validation", config.training.stop_when_exact, config.evaluation.seed)
    widths = questions.sources.shape[1], questions.targets.shape[1]
    size = batch_sizes(config, vocabulary, max(widths), config.evaluation.batch_size, mesh)[max(widths)]
    program = data_parallel(lambda model, batch: margins(model, vocabulary, *batch), graphdef, mesh)
    program = compiled(program, params, tuple(tokens_like(size, width, mesh) for width in widths), mesh=mesh)

    def lowest(params: nnx.State, part: Questions) -> float:
        """The lowest margin of some sources; of one that has several accepted answers, the surest counts."""
        arrays = part.sources[part.source_rows], part.targets
        found = in_batches(lambda batch: program(params, batch), arrays, widths, size, mesh)
        best = np.full(len(part.lengths), -np.inf)
        np.maximum.at(best, part.source_rows, found)
        return float(best.min())

    # Sources come in ascending order of length: every part has them of all lengths, and the first low one ends it.
    total = len(questions.lengths)
    parts = [questions.chosen(np.arange(k, total, -(-total // size))) for k in range(-(-total // size))]
    return Exactness(total, lambda params: all(lowest(params, part) >= _MARGIN for part in parts))
