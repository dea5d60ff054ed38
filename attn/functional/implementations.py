"""The registry of implementations: the features and derivatives of each, and the choice of one for a call.

To add an implementation, write a function `attend(call)` and register it, from any file:

    register("tiled", Implementation(attend, features={"mask"}, derivatives={"reverse"}))

1. `attend(call)` takes a `contract.Call` of one head and returns (out `[T Hv]`, `contract.Normalizer` of `[T]`). With
   `all_heads=True` it takes all heads, `[T N H]`, `[S K H]` and `[S K Hv]`, masks and scores still marked by
   `attn.per_head` (`mods.unwrap_per_head` takes the marks off), and returns (out `[T N Hv]`, normaliser of `[T N]`).
2. It may assume that arguments are checked, offsets are resolved (inside marks: call `resolve(T, S)` on the mod of one
   head), scores made from vectors are replaced, and the call uses only features and a backend that it declares.
   `out` may have any float dtype. With all heads, head n uses the dropout `call.dropout.for_head(n)`. Where "logsumexp"
   is not declared, the normaliser is None.
3. It must keep the semantics of docs/attention.md. `contract` has them as functions: `prepare` for one head,
   `zero_nonfinite_rows`, `zero_hidden_values`; `Head.visible` of a tile, or `Head.apply_mask` of all queries and keys
   at once. Sum in float32 or wider.
4. Pieces for kernels: `blocks` (axes in blocks of any size), `survey` (the blocks that a mask needs), `closures`
   (captured arrays as arguments), `sharding` (varying axes under `shard_map`, in which models are trained:
   `vary_alike` for the inputs of a kernel, `shape_like` for its results).
5. If it cannot serve a call for another reason (a kind of mask, a dtype, a width, arrays that are sharded on an
   explicit mesh: `sharding.is_sharded`), `unsupported_reason` returns that reason in words.
6. The shared tests in tests/functional run on everything that is registered before they are collected: all tests of
   values, gradients and semantics for declared features; for other features it must raise `Unsupported`. In the
   package, its line below registers it; from outside, `python -m pytest -p my_kernel tests/functional`, with its folder
   in PYTHONPATH. tests/extending/test_implementation.py does this with a kernel from outside.
"""

import collections
import dataclasses
import functools
import importlib
from collections.abc import Callable, Set

from attn.functional import blockwise, checked, cudnn, mods, reference, sharding
from attn.functional.contract import Call
from attn.functional.contract import Unsupported as Unsupported
from attn.functional.masks import as_mask
from attn.functional.scores import as_score

FEATURES = ("mask", "score", "dropout", "logsumexp")
DERIVATIVES = ("reverse", "forward", "second")


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A way to compute attention, with its features and derivatives.

    Attributes:
      attend: `(call) -> (out, normaliser)`; see the checklist above.
      all_heads: True if `attend` takes all heads at once, False if one head.
      tile: (r, c), the shape of the tiles at which an `attend` of all heads evaluates scores. In scores made from
        vectors, as those of mechanisms, functions that capture arrays are converted for this shape.
      features: subset of `FEATURES` that it serves.
      derivatives: subset of `DERIVATIVES` that it has.
      backends: names as of `sharding.platform()` that it runs on; None for all.
      unsupported_reason: `(call) -> str | None`, the part of a call that it cannot serve for another reason, in words.
        The call is that of `attention` or `multi_head_attention`, without marks of `attn.per_head`.
      attends_parts: `attend(call, known=...)` of all heads also computes the derivative of some of the keys alone, as
        `fused.attend` does; `ring_attention` needs it.
      reads_marks: `unsupported_reason` gets the call with its marks, and an `attend` of all heads makes scores from
        vectors itself.
      is_checked: `(device_kind) -> bool`, False on kinds of devices on which it has not been found right and faster
        than others. There "auto" and "fastest" do not choose it.
      is_worthwhile: `(call) -> bool`, True if "auto" and "fastest" should choose it for a call that it serves.
      heads_at_once: `(N) -> int`, the number of heads to run together, in a loop over such groups; a divisor of N.

    Raises:
      ValueError: an unknown feature or derivative, or a text in place of a set of backends.
    """

    attend: Callable
    all_heads: bool = False
    tile: tuple[int, int] | None = None
    features: Set[str] = frozenset(FEATURES)
    derivatives: Set[str] = frozenset(DERIVATIVES)
    backends: Set[str] | None = None
    unsupported_reason: Callable[[Call], str | None] = lambda call: None
    attends_parts: bool = False
    reads_marks: bool = False
    is_checked: Callable[[str], bool] = lambda device_kind: True
    is_worthwhile: Callable[[Call], bool] = lambda call: True
    heads_at_once: Callable[[int], int] = lambda heads: heads

    def __post_init__(self):
        for name, known in (("features", FEATURES), ("derivatives", DERIVATIVES), ("backends", None)):
            given = getattr(self, name)
            if isinstance(given, str):
                raise ValueError(f"Implementation: {name} must be a set of names, got {given!r}")
            if known and (unknown := set(given).difference(known)):
                raise ValueError(f"Implementation: {name} must be among {', '.join(known)}, got {sorted(unknown)}")
            object.__setattr__(self, name, None if given is None else frozenset(given))

    def missing_features(self, call: Call, backend: str, *, return_logsumexp: bool = False) -> list[str]:
        """Return the reasons why this implementation cannot serve a call on a backend; empty if it can."""
        missing = sorted(used_features(call, return_logsumexp) - self.features)
        if self.backends is not None and backend not in self.backends:
            missing.append(f"backend {backend!r}")
        reason = None if missing else self.unsupported_reason(call if self.reads_marks else _without_marks(call))
        if not isinstance(reason, str | None):
            raise TypeError(f"implementation: unsupported_reason must return a text or None, got {reason!r}")
        return missing if reason is None else [reason]


def _without_marks(call: Call) -> Call:
    """Take the marks of `per_head` off masks and scores."""
    marked, of_head = mods.unwrap_per_head((call.mask, call.score), call.query.shape[1])
    mask, score = of_head(marked)
    return call._replace(mask=as_mask(mask), score=as_score(score))


def used_features(call: Call, return_logsumexp: bool = False) -> frozenset[str]:
    """Return the subset of `FEATURES` that a call uses."""
    used = {"mask": call.mask is not None, "score": call.score is not None, "logsumexp": return_logsumexp}
    used["dropout"] = call.dropout is not None and call.dropout.rate > 0
    return frozenset(feature for feature, is_used in used.items() if is_used)


# The derivatives that an implementation needs to be chosen by these names.
_REQUIRED = {"auto": DERIVATIVES, "fastest": ("reverse",)}


def _later(module: str, name: str) -> Callable:
    """Return a function of a module that is imported when the function is called, since Pallas takes time to import."""

    def function(*arguments, **options):
        return getattr(importlib.import_module(f"attn.functional.{module}"), name)(*arguments, **options)

    return function


def _kernel(name: str, backend: str) -> Implementation:
    """Return the fused kernels of a module of this name."""
    return Implementation(
        _later(name, "attend"),
        all_heads=True,
        backends={backend},
        unsupported_reason=_later(name, "unsupported_reason"),
        attends_parts=True,
        reads_marks=True,
        is_checked=lambda device_kind: name in checked.preferred(device_kind),
    )


# "auto" and "fastest" prefer earlier entries; `register` appends.
IMPLEMENTATIONS = {
    "pallas_tpu": _kernel("pallas_tpu", "tpu"),
    "pallas_gpu": _kernel("pallas_gpu", "gpu"),
    "cudnn": Implementation(
        cudnn.attend,
        features={"mask"},
        derivatives={"reverse"},
        backends={"gpu"},
        unsupported_reason=cudnn.unsupported_reason,
        is_checked=lambda device_kind: "cudnn" in checked.preferred(device_kind),
    ),
    "blockwise": Implementation(
        blockwise.attend,
        unsupported_reason=blockwise.unsupported_reason,
        is_worthwhile=blockwise.is_worthwhile,
        heads_at_once=blockwise.heads_at_once,
    ),
    "reference": Implementation(reference.attend),
}


NAMES = collections.ChainMap(IMPLEMENTATIONS, _REQUIRED)  # everything that `implementation=` may be


def register(name: str, implementation: Implementation):
    """Add an implementation, to be chosen by `implementation=name`.

    Raises:
      TypeError: it is not an `Implementation`, or the name is not text.
      ValueError: the name is taken.
    """
    if not isinstance(name, str) or not isinstance(implementation, Implementation):
        raise TypeError(f"register takes a name and an Implementation, got {name!r} and {implementation!r}")
    if name in NAMES:
        raise ValueError(f"an implementation {name!r} exists already: choose another name")
    IMPLEMENTATIONS[name] = implementation


def name_of(implementation: Implementation) -> str:
    """Return the name of an implementation in the registry, "" if it has none."""
    return next((name for name, each in IMPLEMENTATIONS.items() if each is implementation), "")


def choose(name: str, call: Call, *, return_logsumexp: bool = False) -> Implementation:
    """Return the implementation that serves a call.

    Args:
      name: a name in the registry; "auto": the first that serves the call and has every derivative; "fastest": the
        first that serves the call and has reverse mode. Both skip those that are not worthwhile for the call, and those
        that have not been checked on the kind of device.
      call: the arguments of `attention` or `multi_head_attention`.
      return_logsumexp: the call needs the normaliser.

    Raises:
      TypeError: the name is not a string.
      ValueError: an unknown name.
      Unsupported: the named implementation cannot serve the call.
    """
    if not isinstance(name, str):
        raise TypeError(f"implementation must be a string, got {name!r}")
    if name not in NAMES:
        known = ", ".join(map(repr, NAMES))
        raise ValueError(f"unknown implementation {name!r}; known: {known}")
    backend = sharding.platform()

    @functools.cache  # only what is looked at is asked: the answer may take a trace of the user's functions
    def missing(key: str) -> list[str]:
        return IMPLEMENTATIONS[key].missing_features(call, backend, return_logsumexp=return_logsumexp)

    if name in _REQUIRED:
        return _choose_by_itself(name, call, backend, lambda key: not missing(key), return_logsumexp)
    if missing(name):
        serving = ", ".join(key for key in IMPLEMENTATIONS if not missing(key))
        raise Unsupported(f"implementation {name!r} does not support {', '.join(missing(name))}; these do: {serving}")
    return IMPLEMENTATIONS[name]


def _choose_by_itself(name: str, call: Call, backend: str, serves: Callable[[str], bool], return_logsumexp: bool):
    """Return the implementation for "auto" or "fastest"."""
    kind, last = sharding.device_kind(), None
    for key, each in IMPLEMENTATIONS.items():
        if each.derivatives.issuperset(_REQUIRED[name]) and each.is_checked(kind) and serves(key):
            last = each
            if each.is_worthwhile(call):
                break
    if last is None:
        used = ", ".join(sorted(used_features(call, return_logsumexp))) or "such a call"
        raise Unsupported(f"no implementation on backend {backend!r} supports {used}")
    return last
