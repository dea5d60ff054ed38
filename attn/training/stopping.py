"""Early stopping: training ends as soon as its answers are exact, with a margin."""

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

# The logit of every right token must lead all others by this much, on every validation source. Right answers alone are
# not enough: with 0 errors in 10,000, one or two of 10,000 others were still wrong, and the least margins of two such
# sets, mostly alike, were once 2.2 apart.
_MARGIN = 3.0


class Exactness(NamedTuple):
    """The condition for stopping: `holds(params)` says whether `count` validation sources are answered exactly."""

    count: int
    holds: Callable[[nnx.State], bool]


def compile_exactness(config: Config, data: Generated | Stored, mesh: Mesh, params: nnx.State) -> Exactness:
    """Make the condition that up to `stop_when_exact` validation sources are all answered right, with a margin.

    It depends only on the parameters, so a run that resumes stops at the same step as one that was not interrupted.

    Args:
      config: of the run.
      data: gives the validation part, of which no source is in the test part.
      mesh: over which batches are sharded.
      params: shapes of the parameters.
    """
    vocabulary, graphdef = data.vocabulary, model_structure(config, data.vocabulary)[0]
    questions = data.questions("validation", config.training.stop_when_exact, config.evaluation.seed)
    widths = questions.sources.shape[1], questions.targets.shape[1]
    size = batch_sizes(config, vocabulary, max(widths), config.evaluation.batch_size, mesh)[max(widths)]
    program = data_parallel(lambda model, batch: margins(model, vocabulary, *batch), graphdef, mesh)
    program = compiled(program, params, tuple(tokens_like(size, width, mesh) for width in widths), mesh=mesh)

    def lowest(params: nnx.State, part: Questions) -> float:
        """Return the lowest margin of some sources. A source has the largest margin of its accepted answers."""
        arrays = part.sources[part.source_rows], part.targets
        answer_margins = in_batches(lambda batch: program(params, batch), arrays, widths, size, mesh)
        source_margins = np.full(len(part.lengths), -np.inf)
        np.maximum.at(source_margins, part.source_rows, answer_margins)
        return float(source_margins.min())

    # Sources are sorted by length. A part takes every k-th, so it has all lengths, and a low margin is found early.
    total = len(questions.lengths)
    parts = [questions.chosen(np.arange(k, total, -(-total // size))) for k in range(-(-total // size))]
    return Exactness(total, lambda params: all(lowest(params, part) >= _MARGIN for part in parts))
