"""Priors, in a few words: the knowledge that a mechanism builds into a model, which others must learn."""

from attn.mechanisms.mechanism import Mechanism, parts
from attn.mechanisms.registry import parse
from attn.studies.mechanisms import NEAR, anchored, log_length, randomized

_PRIORS = {
    "none": "nothing",
    "sinusoidal": "places, as sines and cosines",
    "learned": "nothing but that places differ",
    "rotary": "distances, as angles",
    "shaw": "distances up to 16",
    "t5": "distances in buckets, the far ones together",
    "transformer_xl": "distances, as sines and cosines",
    "alibi": "near keys count more than far ones",
    "anchored_t5": f"distances up to {NEAR}, counted from both ends; no head prefers any",
    "anchored_rotary": "distances between places, counted from both ends; no head prefers any",
    "line": "that each head attends to one position, which moves evenly",
}


def prior(text: str) -> str:
    """Return the prior of a mechanism; one that is not listed here is described by its docstring."""
    known = [_prior(part) for part in parts(parse(text)) if not isinstance(part, log_length)]
    sharper = ["sharper scores among more keys"] * any(isinstance(part, log_length) for part in parts(parse(text)))
    return "; ".join([*(known or [_PRIORS["none"]]), *sharper])


def _prior(part: Mechanism) -> str:
    if isinstance(part, randomized):
        return f"{_prior(part.inner)}; how many places there are"
    if isinstance(part, anchored):
        counted = {(False, False): "the start", (True, False): "the source's ends", (True, True): "all ends"}
        sharp = f"{'soft' if part.soft else 'sharp'} {'for good' if part.frozen else 'at first'}"
        shift = "" if part.shift else ", without a shift"
        return f"the pointer, counted from {counted[part.keys, part.queries]}, {sharp}{shift}"
    documented = (type(part).__doc__ or part.expression()).splitlines()[0].rstrip(".")
    return _PRIORS.get(type(part).__name__, documented)
