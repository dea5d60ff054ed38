"""Views of the attention maps of a model: alone, through its training, or beside those of a second model."""

import os
import pathlib
from collections.abc import Mapping

from attn.inspection.capture import Maps
from attn.tasks.vocabulary import InputError
from attn.viewer import View, view

_SHOWN = 12  # tokens of each model in a message


def view_frames(
    first: Mapping[str, Maps],
    second: Mapping[str, Maps] | None,
    paths: tuple[str | os.PathLike, str | os.PathLike | None],
    title: str,
    measures: Mapping[str, Mapping] | None = None,
    groups: int | None = None,
) -> View:
    """Return the view of the maps of one model or two, by the label of each frame.

    Args:
      first: maps of the model; a slider chooses a frame if there are several.
      second: those of the second model, with the same labels; None for one model.
      paths: of the models, which name them.
      title: of the page.
      measures: of the first model, as in `attn.view`.
      groups: number of key/value heads that heads share; None if each has its own.

    Raises:
      InputError: the tokens or the sizes of the maps differ, so that they cannot be compared.
    """
    if second is None:
        return view(**_argument(first), title=title, measures=measures, groups=groups)
    names = _names(*paths)
    check_same_tokens([*first.values()][-1], [*second.values()][-1], names)
    [compare] = _argument(second).values()
    try:
        return view(**_argument(first), compare=compare, names=names, title=title, measures=measures, groups=groups)
    except ValueError as error:
        raise InputError(str(error)) from None


def check_same_tokens(first: Maps, second: Maps, names: tuple[str, str]):
    """Check that two maps have the same rows and columns.

    Raises:
      InputError: a token differs.
    """
    for part in ("source", "read", "written"):
        ours, theirs = (getattr(maps, part) for maps in (first, second))
        if ours != theirs:
            word = {"source": "source", "read": "text that the decoder reads", "written": "answer"}[part]
            raise InputError(
                f"compare: the tokens must be the same, but the {word} is {_shown(ours)} for {names[0]} and "
                f"{_shown(theirs)} for {names[1]}"
            )


def _argument(frames: Mapping[str, Maps]) -> dict[str, Mapping[str, Maps] | Maps]:
    """Return the argument of `view` for these frames; a single one needs no slider."""
    return {"frames": frames} if len(frames) > 1 else {"weights": next(iter(frames.values()))}


def _names(first: str | os.PathLike, second: str | os.PathLike) -> tuple[str, str]:
    """Return a name for each model: the last part of its path, or the path if that is the same."""
    names = tuple(pathlib.Path(path).name for path in (first, second))
    if names[0] != names[1]:
        return names
    paths = str(first), str(second)
    return paths if paths[0] != paths[1] else (paths[0], f"{paths[1]} (2)")


def _shown(tokens: list[str]) -> str:
    return repr(" ".join(tokens[:_SHOWN]) + (" ..." if len(tokens) > _SHOWN else ""))
