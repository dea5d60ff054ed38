"""`attn.view`: shows anyone's attention weights in a notebook, and saves them as a page or a picture."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from attn.viewer import before, measures, packing, page
from attn.viewer.arrays import NO_WEIGHTS
from attn.viewer.files import write_whole
from attn.viewer.kinds import Kind, as_kinds, as_picture, is_whole

_ENDINGS = (".html", ".svg", ".png", ".pdf")


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class View:
    """Maps of one or two runs, through one or more frames; it shows itself in a notebook.

    Attributes:
      runs: by the name of each run, by the label of each frame, the kinds of maps.
      given: measures per head of the first run, by name, per frame, per kind.
      title: of the page.
      budget: bytes of packed maps in a notebook; beyond it they are pooled.
    """

    runs: Mapping[str, Mapping[str, Sequence[Kind]]]
    given: Mapping[str, list]
    title: str
    budget: int

    def __repr__(self) -> str:
        lines = [self.title or "Attention maps"]
        for kind in self.kinds:
            T, S = kind.sizes(kind.layers[0])
            lines.append(f"  {kind.title}: {len(kind.layers)} x {len(kind.layers[0])} heads of {T:,} x {S:,}")
        return "\n".join([*lines, '  .save("page.html"), or .svg, .png, .pdf'])

    @property
    def kinds(self) -> Sequence[Kind]:
        """The kinds of the first run's last frame."""
        return [*_first(self.runs).values()][-1]

    def _repr_html_(self) -> str:
        return page.frame(self.html(), self.title)

    def html(self, *, budget: int | None = None, exact: bool = False) -> str:
        """Return the page.

        Args:
          budget: bytes of packed maps; beyond it they are pooled. The view's own unless given.
          exact: keep every value as float32, no matter how long the page becomes.
        """
        runs = [[*frames.values()] for frames in self.runs.values()]
        kinds, repeats = runs[0][0], len(runs) * len(runs[0])
        plan = packing.planned(kinds, repeats, self.budget if budget is None else budget, exact)
        frames = [*_first(self.runs)]
        payload = {
            "version": 1,
            "title": self.title,
            "note": packing.note(kinds, plan),
            "encoding": plan.encoding,
            "runs": [*self.runs],
            "frames": frames,
            "kinds": [_described(kind, blocks) for kind, blocks in zip(self.kinds, plan.blocks)],
            "measures": self._measures(),
            **packing.packed(runs, plan),
        }
        return page.document(payload, self.title, self.kinds)

    def save(self, path: str | os.PathLike, *, exact: bool = False) -> pathlib.Path:
        """Write a page (.html) or a picture of the last frame (.svg, .png, .pdf) of each run, and return its path.

        Args:
          path: the file, in a folder that exists.
          exact: of a page: keep every value, instead of pooling above 8 MB.

        Raises:
          ValueError: another ending.
          OSError: the file cannot be written.
        """
        path = pathlib.Path(path)
        if path.suffix.lower() not in _ENDINGS:
            raise ValueError(f"save: got {str(path)!r}, the ending must be one of {', '.join(_ENDINGS)}")
        if path.suffix.lower() == ".html":
            text = self.html(budget=max(self.budget, packing.FILE_BUDGET), exact=exact)
            write_whole(path, text.encode("utf-8"))
        else:
            from attn.viewer import static_pictures  # imported here, since it imports matplotlib

            static_pictures.save(static_pictures.draw(self._pictured(), self.title), path)
        return path

    def _pictured(self) -> list[Kind]:
        """Return the kinds of the last frame; those of two runs below each other."""
        last = {name: [*frames.values()][-1] for name, frames in self.runs.items()}
        if len(last) == 1:
            return _first(last)
        titled = (
            [dataclasses.replace(kind, title=f"{kind.title}, {name}") for kind in kinds] for name, kinds in last.items()
        )
        return [kind for both in zip(*titled) for kind in both]

    def _measures(self) -> list[dict]:
        by_run = [[measures.computed(kinds) for kinds in frames.values()] for frames in self.runs.values()]
        described = [
            {
                "name": measure.name,
                "help": measure.help,
                "unit": measure.unit,
                "values": [[frame[measure.name] for frame in frames] for frames in by_run],
            }
            for measure in measures.MEASURES
        ]
        unknown = [[[None] * kind.num_heads() for kind in kinds] for kinds in [*self.runs.values()][-1].values()]
        described += [
            {"name": name, "help": "", "unit": "", "values": [values, unknown][: len(self.runs)]}
            for name, values in self.given.items()
        ]
        return [each for each in described if _has_values(each["values"])]


def view(
    weights=None,
    *,
    rows=None,
    columns=None,
    batch: int | None = None,
    frames: Mapping | None = None,
    compare=None,
    names: tuple[str, str] = ("first", "second"),
    measures: Mapping | None = None,
    groups: int | None = None,
    picture=None,
    pooled_from: tuple[int, int] | None = None,
    mask=None,
    score=None,
    query=None,
    key=None,
    scale=None,
    shape: tuple[int, int] | None = None,
    title: str = "",
    budget: int = packing.PAGE_BUDGET,
) -> View:
    """Show attention weights, or a mask and a score before anything has run, as one self-contained page.

    Args:
      weights: arrays of NumPy, JAX or torch `[T S]`, `[N T S]` or `[L N T S]`; lists of layers, also those of the
        library transformers, `[1 N T S]` each, and what its `generate` returns, a tuple per token; a dictionary of any
        of these by kind, such as "cross"; an output of a model with `attentions`; or `Maps` of a run. Masked arrays of
        NumPy show masked cells in their own colour.
      rows, columns: one name per query and per key; a dictionary by kind where kinds differ.
      batch: the number of the example, if arrays have a batch axis before the heads.
      frames: {label: weights}, such as by the step of training, in place of `weights`: a slider chooses one.
      compare: a second one of the same form and sizes as `weights` or `frames`, beside it; the difference is shown.
      names: of the two.
      measures: {name: {kind: [L N]}}, numbers per head to sort the heads by; with a leading axis for frames.
      groups: K, the number of key/value heads that the heads share, to bracket them.
      picture: `[height width]`, `[height width 3]` or `[3 height width]`, whose patches are the columns, row by row,
        with or without one class token before them; or an `attn.viewer.Picture`.
      pooled_from: (T, S), if `weights` are pooled, as by `attn.pooled_attention_weights`.
      mask, score: functions of positions as for `attn.multi_head_attention`, in place of `weights`.
      query, key, scale: queries and keys for these, `[T N H]` and `[S K H]`; without them products are 0.
      shape: (T, S) for a mask or a score, unless queries and keys or names say it.
      title: of the page.
      budget: bytes of packed maps in a notebook; above it maps are rounded and pooled, which the page says.

    Raises:
      TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    pooled_from = _checked_lengths(pooled_from)
    sources = {"weights": weights is not None, "frames": frames is not None}
    sources["mask or score"] = any(x is not None for x in (mask, score, query, key))
    if sum(sources.values()) != 1:
        given = ", ".join(name for name, is_given in sources.items() if is_given) or "none"
        hint = "" if any(sources.values()) else f" ({NO_WEIGHTS})"
        raise ValueError(f"view: give one of weights, frames, and mask or score (or query and key); got {given}{hint}")
    if sources["mask or score"]:
        if compare is not None:
            raise ValueError("compare: goes with weights or frames")
        if batch is not None:
            raise ValueError("batch: goes with weights or frames; query and key have no batch axis")
        kinds = before.kinds_of_functions(mask, score, query, key, scale, shape, rows, columns)
        runs = {"": {"": kinds}}
    else:
        if scale is not None or shape is not None:
            raise ValueError("scale and shape: go with mask, score, query and key")
        options = dict(rows=rows, columns=columns, batch=batch, pooled_from=pooled_from)
        runs = _runs(weights, frames, compare, _checked_names(names), options)
    _check_budget(budget)
    change = _changes(_first(_first(runs)), groups, picture, pooled_from)
    runs = {name: {label: change(kinds) for label, kinds in each.items()} for name, each in runs.items()}
    return View(runs, _given(measures, [*_first(runs).values()]), "" if title is None else str(title), budget)


def _checked_names(names) -> tuple[str, str]:
    """Return the names of two runs, as texts."""
    texts = tuple(map(str, names)) if isinstance(names, Sequence) and not isinstance(names, str) else ()
    if len(texts) != 2 or len(set(texts)) != 2 or not all(text.strip() for text in texts):
        raise ValueError(f"names: got {names!r}, must be two different texts, one per run")
    return texts


def _checked_lengths(pooled_from) -> tuple[int, int] | None:
    """Return (T, S), two whole numbers, or None."""
    if pooled_from is None:
        return None
    if not isinstance(pooled_from, Sequence) or len(pooled_from) != 2 or not all(map(is_whole, pooled_from)):
        raise ValueError(f"pooled_from: got {pooled_from!r}, must be (T, S), two positive whole numbers")
    return int(pooled_from[0]), int(pooled_from[1])


def _runs(weights, frames, compare, names: tuple[str, str], options) -> dict[str, dict[str, list[Kind]]]:
    """Return the maps of one run or two, by name and by frame."""
    runs = {names[0]: _frames(weights, frames, options)}
    if compare is not None:
        runs[names[1]] = _frames(compare, None, options) if frames is None else _frames(None, compare, options)
        _check_same(*runs.values(), names)
    return _of_one_quantity(runs)


def _frames(weights, frames, options) -> dict[str, list[Kind]]:
    if frames is None:
        return {"": as_kinds(weights, **options)}
    if not isinstance(frames, Mapping) or not frames:
        raise TypeError(f"frames: got {type(frames).__name__}, must be a dictionary {{label: weights}} with an entry")
    by_label = {str(label): as_kinds(each, **options) for label, each in frames.items()}
    if len(by_label) != len(frames):
        raise ValueError(f"frames: two labels of {', '.join(map(repr, frames))} are the same text")
    labels = [*by_label]
    for label in labels[1:]:
        _check_alike(by_label[labels[0]], by_label[label], f"frames: {labels[0]!r}", f"{label!r}")
    return by_label


def _check_same(first: Mapping[str, list[Kind]], second: Mapping[str, list[Kind]], names: tuple[str, str]):
    if [*first] != [*second]:
        raise ValueError(f"compare: its frames are {', '.join(second)}, must be {', '.join(first)}")
    _check_alike(_first(first), _first(second), f"compare: {names[0]!r}", f"{names[1]!r}")


def _check_alike(first: list[Kind], second: list[Kind], name: str, other: str):
    shapes = [{kind.name: [layer.shape for layer in kind.layers] for kind in kinds} for kinds in (first, second)]
    if shapes[0] != shapes[1]:
        shown = [", ".join(f"{kind} {_sizes(layers)}" for kind, layers in each.items()) for each in shapes]
        raise ValueError(f"{name} has {shown[0]}, but {other} has {shown[1]}: they must be of the same sizes")
    for ours, theirs in zip(first, second):
        for axis in ("rows", "columns"):
            if getattr(ours, axis).names != getattr(theirs, axis).names:
                raise ValueError(
                    f"{name} and {other} have other names of {axis} of {ours.name!r}: they must be the same"
                )


def _of_one_quantity(runs: Mapping[str, Mapping[str, list[Kind]]]) -> dict[str, dict[str, list[Kind]]]:
    """Return the maps with one quantity per kind: they are weights only if those of all runs and frames are."""
    every = [kinds for frames in runs.values() for kinds in frames.values()]
    others = {kind.name: kind.quantity for kinds in every for kind in kinds if kind.quantity != "weights"}

    def changed(kinds: list[Kind]) -> list[Kind]:
        return [dataclasses.replace(kind, quantity=others.get(kind.name, kind.quantity)) for kind in kinds]

    return {name: {label: changed(kinds) for label, kinds in frames.items()} for name, frames in runs.items()}


def _sizes(layers: Sequence[tuple[int, ...]]) -> str:
    sizes = list(dict.fromkeys(layers))
    return f"{len(layers)} layers of " + " and ".join(" x ".join(map(str, size)) for size in sizes[:3])


def _changes(kinds: Sequence[Kind], groups, picture, pooled_from):
    """Return the function that adds groups, a picture and sizes before pooling to the kinds of each frame."""
    changes = {}
    if groups is not None:
        for layer in (layer for kind in kinds for layer in kind.layers):
            if not is_whole(groups) or len(layer) % groups:
                raise ValueError(f"groups: got {groups!r}, must be a divisor of the {len(layer)} heads")
        changes["groups"] = int(groups)
    if pooled_from is not None:
        _check_blocks(pooled_from, kinds)
        changes["pooled_from"] = pooled_from
    pictures = {}
    if picture is not None:
        # Only the maps over the patches: of several kinds, those with the same number of columns as the first.
        of_first = as_picture(picture, kinds[0])
        columns = kinds[0].layers[0].shape[2]
        pictures = {kind.name: of_first for kind in kinds if kind.layers[0].shape[2] == columns}

    def changed(kinds):
        return [dataclasses.replace(kind, **changes, picture=pictures.get(kind.name, kind.picture)) for kind in kinds]

    return changed


def _check_blocks(pooled_from: tuple[int, int], kinds: Sequence[Kind]):
    """Check that blocks of equal length of (T, S) give maps of the sizes at hand."""
    for t, s in (layer.shape[1:] for kind in kinds for layer in kind.layers):
        for size, cells in zip(pooled_from, (t, s)):
            if size < cells or -(-size // -(-size // cells)) != cells:
                raise ValueError(
                    f"pooled_from: got {pooled_from}, must be (T, S), whose blocks of equal length give maps of "
                    f"{t} x {s}"
                )


def _given(values: Mapping | None, frames: Sequence[Sequence[Kind]]) -> dict[str, list]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise TypeError(f"measures: got {type(values).__name__}, must be a dictionary {{name: {{kind: [L N]}}}}")
    return measures.given(values, frames[0], len(frames))


def _check_budget(budget):
    if not is_whole(budget):
        raise ValueError(f"budget: got {budget!r}, must be a positive number of bytes")


def _first(by_name: Mapping):
    return next(iter(by_name.values()))


def _described(kind: Kind, blocks: Sequence[tuple[int, int]]) -> dict:
    """Return the payload of a kind, but for its values."""
    return {
        "name": kind.name,
        "title": kind.title,
        "rows": dataclasses.asdict(kind.rows),
        "columns": dataclasses.asdict(kind.columns),
        "layers": [_layer(kind, number, *each) for number, each in enumerate(zip(kind.layers, blocks))],
        "groups": kind.groups,
        "quantity": kind.quantity,
        "picture": page.picture_of(kind.picture),
    }


def _layer(kind: Kind, number: int, layer: np.ndarray, block: tuple[int, int]) -> dict:
    (N, t, s), (T, S) = layer.shape, kind.sizes(layer)
    reduce = "none"
    if block != (1, 1):
        reduce = "mass" if kind.quantity == "weights" else "max"
    shape = -(-t // block[0]), -(-s // block[1])
    if kind.pooled_from is not None:
        block, reduce = (block[0] * -(-T // t), block[1] * -(-S // s)), "mass"
    return {
        "name": f"layer {number}",
        "heads": N,
        "rows": T,
        "columns": S,
        "block": list(block),
        "shape": list(shape),
        "reduce": reduce,
    }


def _has_values(values) -> bool:
    return any(number is not None for run in values for frame in run for kind in frame for number in kind)
