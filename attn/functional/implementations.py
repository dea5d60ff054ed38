"""The registry of implementations: what each can do, and which one serves a call.

A new implementation is one function with the signature of `reference.attend` and one line in
`IMPLEMENTATIONS`. The shared test suite picks it up from there.
"""

import dataclasses
from collections.abc import Callable

import jax
from jaxtyping import Array

from attn.functional import blockwise, cudnn, reference
from attn.functional.dropout import Dropout
from attn.functional.masks import Mask
from attn.functional.scores import Score

FEATURES = ("mask", "score", "dropout", "logsumexp")
DERIVATIVES = ("reverse", "forward", "second")


class Unsupported(NotImplementedError):
    """A named implementation cannot serve a call; the message says which feature, and who can."""


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """What decides who can serve: the arguments of `attention`, or those of `multi_head_attention` without marks."""

    query: Array
    key: Array
    value: Array
    mask: Mask | None
    score: Score | None
    scale: object
    dropout: Dropout | None
    return_logsumexp: bool

    @property
    def T(self) -> int:
        return self.query.shape[0]

    @property
    def S(self) -> int:
        return self.key.shape[0]

    @property
    def features(self) -> frozenset[str]:
        """Those of `FEATURES` that the call uses."""
        used = {"mask": self.mask is not None, "score": self.score is not None, "logsumexp": self.return_logsumexp}
        used["dropout"] = self.dropout is not None and self.dropout.rate > 0
        return frozenset(feature for feature, is_used in used.items() if is_used)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """What an implementation is.

    Attributes:
      attend: attention for one head of one sequence, as `reference.attend`; None for the normaliser where
        "logsumexp" is not among the features.
      features: those of `FEATURES` that it serves.
      derivatives: those of `DERIVATIVES` that it has.
      backends: those of `jax.default_backend()` that it runs on; None for all.
      refuses: what of a call it does not serve for another reason, in words; None if nothing.
      pays: whether the unnamed choices should take it for a call, where it serves.
      heads_at_once: how many of so many heads should run together, the others after them; a divisor.
    """

    attend: Callable
    features: frozenset[str] = frozenset(FEATURES)
    derivatives: frozenset[str] = frozenset(DERIVATIVES)
    backends: frozenset[str] | None = None
    refuses: Callable[[Call], str | None] = lambda call: None
    pays: Callable[[Call], bool] = lambda call: True
    heads_at_once: Callable[[int], int] = lambda heads: heads

    def lacks(self, call: Call, backend: str) -> list[str]:
        """What keeps this implementation from serving a call on a backend."""
        missing = sorted(call.features - self.features)
        if self.backends is not None and backend not in self.backends:
            missing.append(f"backend {backend!r}")
        refused = None if missing else self.refuses(call)
        return missing if refused is None else [refused]


# Which derivatives the unnamed choices insist on.
_WANTED = {"auto": DERIVATIVES, "fastest": ("reverse",)}

# In the order in which "auto" and "fastest" prefer them.
IMPLEMENTATIONS = {
    "cudnn": Implementation(
        cudnn.attend, frozenset({"mask"}), frozenset({"reverse"}), frozenset({"gpu"}), refuses=cudnn.refuses
    ),
    "blockwise": Implementation(
        blockwise.attend, refuses=blockwise.refuses, pays=blockwise.pays, heads_at_once=blockwise.heads_at_once
    ),
    "reference": Implementation(reference.attend),
}


def choose(name: str, call: Call) -> Implementation:
    """The implementation that serves a call.

    Args:
      name: a key of `IMPLEMENTATIONS`; "auto", the first that serves with every derivative; or "fastest", the
        first that serves with reverse mode at least.

    Raises:
      TypeError: no string.
      ValueError: an unknown name.
      Unsupported: the named implementation cannot serve the call.
    """
    if not isinstance(name, str):
        raise TypeError(f"implementation must be a string, got {name!r}")
    backend = jax.default_backend()
    able = {key: found for key, found in IMPLEMENTATIONS.items() if not found.lacks(call, backend)}
    if name in _WANTED:
        serving = [found for found in able.values() if found.derivatives.issuperset(_WANTED[name])]
        if not serving:
            used = ", ".join(sorted(call.features)) or "such a call"
            raise Unsupported(f"no implementation on backend {backend!r} supports {used}")
        return next((found for found in serving if found.pays(call)), serving[-1])
    if name not in IMPLEMENTATIONS:
        known = ", ".join(repr(key) for key in (*_WANTED, *IMPLEMENTATIONS))
        raise ValueError(f"unknown implementation {name!r}; known: {known}")
    if name not in able:
        lacking = ", ".join(IMPLEMENTATIONS[name].lacks(call, backend))
        raise Unsupported(f"implementation {name!r} does not support {lacking}; these do: {', '.join(able)}")
    return able[name]
