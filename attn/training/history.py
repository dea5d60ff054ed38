"""The parameters of a run at all steps that were kept: of its snapshots, and of checkpoints between them."""

from collections.abc import Callable

import jax
from flax import nnx

from attn.tasks.vocabulary import Vocabulary
from attn.training import checkpoints, snapshots
from attn.training.config import Config
from attn.training.folders import Folder
from attn.training.identity import digest_of
from attn.training.state import initial_state


def saved_parameters(
    folder: Folder, config: Config, vocabulary: Vocabulary, until: int, warn: Callable[[str], None]
) -> dict[int, nnx.State]:
    """Return the parameters before a step, by ascending step, of all snapshots and checkpoints that verify.

    Args:
      folder: of the run.
      config: of the run.
      vocabulary: of the run.
      until: the first step that is left out.
      warn: called with one line for each file that is skipped.
    """
    like, digest = jax.eval_shape(lambda: initial_state(config, vocabulary)), digest_of(config)

    def of_snapshot(step: int) -> nnx.State:
        return snapshots.read(folder.snapshots, step, like.kept, digest)

    def of_checkpoint(step: int) -> nnx.State:
        return checkpoints.restore(folder.checkpoints, step, like, digest).kept

    found = {}
    sources = [(snapshots.steps(folder.snapshots), of_snapshot), (checkpoints.steps(folder.checkpoints), of_checkpoint)]
    for steps, read in sources:
        for step in steps:
            if step < until and step not in found:
                try:
                    found[step] = read(step)
                except (snapshots.SnapshotError, checkpoints.CheckpointError) as error:
                    warn(f"{error}; it is left out")
    return {step: found[step] for step in sorted(found)}
