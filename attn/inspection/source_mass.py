"""The mass of each head on the true source: the symbol of the source that a symbol of the answer is."""

import numpy as np
from jaxtyping import Float

from attn.inspection.capture import Maps
from attn.tasks.sequences import Task


def source_mass(maps: Maps, task: Task) -> dict[str, Float[np.ndarray, "L N"]]:
    """Compute the weight of each head on the true source position, the mean over the symbols of the right answer.

    mass = 1/m sum_t p[t, j(t)], where the rule of the task says that symbol t of the answer is symbol j(t) of the
    source. Equal weights would give one over the number of keys.

    Args:
      maps: of one answer, as `Run.look` returns them.
      task: of the run.

    Returns:
      By kind of the maps whose rows are the answer and whose columns begin with the source: cross-attention, or that of
      a decoder-only model. Nothing for a task whose answers are not symbols of their sources, such as addition.
    """
    symbols = [int(name) for name in maps.source if name.isdecimal()]
    true = task.true_sources(np.array(symbols, np.int32))
    if true is None:
        return {}
    columns = true + maps.source.index(str(symbols[0]))  # a begin token may come before the symbols
    masses = {}
    for kind, axes in maps.axes.items():
        if tuple(axes) in (("answer", "source"), ("answer", "both")) and kind in maps.weights:
            rows = np.arange(min(len(columns), maps.weights[kind].shape[-2]))
            masses[kind] = maps.weights[kind][:, :, rows, columns[rows]].mean(axis=-1)
    return masses
