"""attn: attention to study, as pure functions of arrays, and Transformers built on them.

The axes, in every signature and docstring:

    B  examples of a batch         N  query heads             D  width of the model
    T  query (target) positions    K  key/value heads         F  width of the feed-forward layers
    S  key (source) positions      H  width of a head         V  vocabulary
    R  chosen query positions      Hv width of a value        L  layers
    P  rows of a position table    Hr rotated part of H       G  gates of a recurrent cell
    A  accepted answers            q  blocks of r queries     k  blocks of c keys
    E  width of the embeddings     C  capacity of a cache, or channels of a picture
    U  devices of a mesh axis      n  queries of a chunk, whose keys are c
    t  pooled blocks of queries    s  pooled blocks of keys

`B` appears in tasks, training, decoding and metrics; the functions and the model are written for one example.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from attn import interop, mechanisms, pretrained, tasks, viewer
    from attn.functional import (
        Dropout,
        Unsupported,
        attention,
        attention_weights,
        masks,
        multi_head_attention,
        multi_head_attention_weights,
        per_head,
        pooled_attention_weights,
        positions,
        scores,
    )
    from attn.inspection import interventions
    from attn.viewer import view

__version__ = "0.1.0"


def load(run):
    """Open a finished or running training run: `attn.load("runs/...")`.

    Args:
      run: path of the run's folder.

    Returns:
      `attn.runs.Run`: its config, model and parameters, and the commands of the command line as methods.

    Raises:
      attn.training.folders.RunError: the folder is not a run's, or has no checkpoint.
    """
    from attn.runs import load  # imported here: `import attn` must not import Flax

    return load(run)


def __getattr__(name: str):
    """Import a public name at its first use: commands set up their process first, and `tasks` imports TFDS."""
    if name == "interventions":
        return importlib.import_module("attn.inspection.interventions")
    if name in ("functional", "interop", "mechanisms", "pretrained", "tasks", "viewer"):
        return importlib.import_module(f"attn.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'attn' has no attribute {name!r}")
    module = "attn.viewer" if name == "view" else "attn.functional"
    value = globals()[name] = getattr(importlib.import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Dropout",
    "Unsupported",
    "attention",
    "attention_weights",
    "interop",
    "interventions",
    "load",
    "masks",
    "mechanisms",
    "multi_head_attention",
    "multi_head_attention_weights",
    "per_head",
    "pooled_attention_weights",
    "positions",
    "pretrained",
    "scores",
    "tasks",
    "view",
    "viewer",
]
