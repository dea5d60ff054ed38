"""The page of a run's attention maps: its frames through training, a second run beside it, and numbers per head."""

import warnings
from collections.abc import Callable, Mapping

import numpy as np

from attn.inspection.capture import Maps, capture_each
from attn.inspection.interventions import head_effects
from attn.inspection.source_mass import source_mass
from attn.inspection.views import view_frames
from attn.tasks.vocabulary import InputError
from attn.viewer import View

SOURCE_MASS, EFFECT = "mass on the true source", "effect on exact match"


def frames(run, source: list[int], answer: np.ndarray, warn: Callable[[str], None] | None) -> dict[int, Maps]:
    """Return the maps of an answer to a source, by step of `run.history(warn)`; for None only those of this step."""
    steps, runs = zip(*[(run.step, run)] if warn is None else run.history(warn))
    maps = capture_each(run.model, [each.params for each in runs], run.vocabulary, source, answer)
    return dict(zip(steps, maps))


def view_run(
    run,
    text: str,
    *,
    compare=None,
    training: bool = False,
    effects: bool = False,
    warn: Callable[[str], None] = warnings.warn,
) -> View:
    """Return the page of a run's maps of a text: see `attn.runs.Run.view`."""
    source = run.read(text)
    [answer] = run.answers([source])
    history = warn if training else None
    first, second = frames(run, source, answer, history), None
    if compare is not None and not hasattr(compare, "look"):
        raise InputError(f"compare: got {type(compare).__name__}, must be a run or a pretrained model")
    if compare is not None and _same_tokens(run, compare):
        second = frames(compare, compare.read(text), answer, history)
    elif compare is not None:
        try:
            second = {run.step: compare.look(text)}
        except ValueError as error:
            raise InputError(f"{compare.path}: {error}") from None
    first, second = _labelled(first, second)
    if training and len(first) == 1:
        whose = " of both" if compare else ""
        warn(f"no slider: no earlier step was kept{whose} (config.training.snapshots)")
    paths = run.path, None if compare is None else compare.path
    groups = getattr(run.config.model, "num_groups", None)
    title = run.title([*first.values()][-1])
    return view_frames(first, second, paths, title, _measures(run, first, effects), groups)


def _same_tokens(run, other) -> bool:
    """Return whether the other is a run with the same tokens, which then reads the answer of this one."""
    return isinstance(other, type(run)) and other.token_names() == run.token_names()


def _measures(run, by_label: Mapping[str, Maps], effects: bool) -> dict[str, dict[str, np.ndarray]]:
    """Return numbers per head, `[frames L N]` by kind; effects only of the last frame, which is the run."""
    is_of_task = run.config.data.source != "pairs"
    each = [source_mass(maps, run.config.task) if is_of_task else {} for maps in by_label.values()]
    measures = {SOURCE_MASS: {kind: np.stack([masses[kind] for masses in each]) for kind in each[0]}}
    if effects:
        try:
            found = head_effects(run)
        except ValueError as error:  # of a model without attention
            raise InputError(f"effects: {error}") from None
        unknown = {kind: np.full((len(each) - 1, *effect.shape), np.nan) for kind, effect in found.items()}
        measures[EFFECT] = {kind: np.concatenate([unknown[kind], found[kind][None]]) for kind in found}
    return {name: by_kind for name, by_kind in measures.items() if by_kind}


def _labelled(first: dict[int, Maps], second: dict[int, Maps] | None) -> tuple[dict[str, Maps], dict[str, Maps] | None]:
    """Return frames by label; of two runs only those of steps that both have, and the last of each as one frame."""
    if second is None:
        return {f"step {step:,}": maps for step, maps in first.items()}, None
    *earlier, last = first
    *others, end = second
    both = [step for step in earlier if step in others]
    ends = f"step {last:,}" if last == end else f"steps {last:,} and {end:,}"
    labels = [*(f"step {step:,}" for step in both), ends]
    shown = (
        dict(zip(labels, [*(each[step] for step in both), each[key]])) for each, key in ((first, last), (second, end))
    )
    return tuple(shown)
