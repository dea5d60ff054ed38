"""The registry of implementations: what each can do, and which one serves a call.

A new implementation is one function with the signature of `reference.attend` and one line in
`IMPLEMENTATIONS`. The shared test suite picks it up from there.
"""

import dataclasses
from collections.abc import Callable

import jax

from attn.functional import reference

FEATURES = ("mask", "score", "dropout", "logsumexp")
DERIVATIVES = ("reverse", "forward", "second")


class Unsupported(NotImplementedError):
    """A named implementation cannot serve a call; the message says which feature, and who can."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """What an implementation is.

    Attributes:
      attend: attention for one head of one sequence, as `reference.attend`.
      features: those of `FEATURES` that it serves.
      derivatives: those of `DERIVATIVES` that it has.
      backends: those of `jax.default_backend()` that it runs on; None for all.
    """

    attend: Callable
    features: frozenset[str] = frozenset(FEATURES)
    derivatives: frozenset[str] = frozenset(DERIVATIVES)
    backends: frozenset[str] | None = None

    def lacks(self, needs: frozenset[str], backend: str) -> list[str]:
        """What keeps this implementation from serving a call that needs these features on this backend."""
        elsewhere = [] if self.backends is None or backend in self.backends else [f"backend {backend!r}"]
        return sorted(needs - self.features) + elsewhere


# Which derivatives the unnamed choices insist on.
_WANTED = {"auto": DERIVATIVES, "fastest": ("reverse",)}

# In the order in which "auto" and "fastest" prefer them.
IMPLEMENTATIONS = {
    "reference": Implementation(reference.attend),
}


def choose(name: str, needs: frozenset[str]) -> Implementation:
    """The implementation that serves a call.

    Args:
      name: a key of `IMPLEMENTATIONS`; "auto", the first that serves with every derivative; or "fastest", the
        first that serves with reverse mode at least.
      needs: the features that the call uses.

    Raises:
      ValueError: an unknown name.
      Unsupported: the named implementation cannot serve the call.
    """
    backend = jax.default_backend()
    able = {key: found for key, found in IMPLEMENTATIONS.items() if not found.lacks(needs, backend)}
    if name in _WANTED:
        serving = [found for found in able.values() if found.derivatives.issuperset(_WANTED[name])]
        if not serving:
            raise Unsupported(f"no implementation on backend {backend!r} supports {', '.join(sorted(needs))} together")
        return serving[0]
    if name not in IMPLEMENTATIONS:
        known = ", ".join(repr(key) for key in (*_WANTED, *IMPLEMENTATIONS))
        raise ValueError(f"unknown implementation {name!r}; known: {known}")
    if name not in able:
        lacking = ", ".join(IMPLEMENTATIONS[name].lacks(needs, backend))
        raise Unsupported(f"implementation {name!r} does not support {lacking}; these do: {', '.join(able)}")
    return able[name]
