"""The cases of gpu.py, in the words of each contestant, and by NumPy.

Every case but "full" is causal: a query attends to keys from a first one, which depends on the case, to its own.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import numpy as np
from attention_checks import by_formula
from attention_contestants import ours
from attention_job import LeftOut

import attn

CASES = ("causal", "full", "window", "ALiBi", "softcap", "documents")
WITH_SCORE = ("ALiBi", "softcap")
CAP = 20.0
_PARTS = (5, 1, 8, 3, 2, 7, 4, 6)  # lengths of the documents, up to a factor


def window(T: int) -> int:
    """Return the number of keys of a window: 1,024, and fewer in a short sequence."""
    return min(1024, T // 4)


def documents(T: int) -> np.ndarray:
    """Return the number of the document of each token, `[T]`."""
    ends = [T * end // sum(_PARTS) for end in itertools.accumulate(_PARTS)]
    return np.searchsorted(ends, np.arange(T), side="right").astype(np.int32)


def slopes(heads: int) -> np.ndarray:
    """Return ALiBi's slope of each head, `[N]`."""
    return np.asarray(attn.positions.alibi_slopes(heads), np.float32)


# By NumPy


def spans(case: str, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and the last key that each query attends to, `[T]` each."""
    i = np.arange(T)
    first = np.zeros(T, int)
    if case == "window":
        first = np.maximum(0, i - window(T) + 1)
    elif case == "documents":
        ids = documents(T)
        first = np.searchsorted(ids, ids)  # the first token of the same document
    return first, np.full(T, T - 1) if case == "full" else i


def pairs(case: str, T: int) -> int:
    """Return the number of pairs of a query and a key that it attends to, of one head."""
    first, last = spans(case, T)
    return int((last - first + 1).sum())


def expected(case: str, arrays: list[np.ndarray], of_heads: np.ndarray) -> list[np.ndarray]:
    """Compute output and gradients to query, key and value by the formula in float64.

    Args:
      case: of `CASES`.
      arrays: query, key, value and the output's cotangent, `[B T N H]`.
      of_heads: ALiBi's slope of each of these heads, `[N]`.
    """
    j = np.arange(arrays[0].shape[1])
    first, last = spans(case, len(j))
    visible = (first[:, None] <= j) & (j <= last[:, None])
    distance = np.abs(j[:, None] - j)

    def alibi(s, n):
        return s - np.float64(of_heads[n]) * distance, 1.0

    def softcap(s, n):
        bounded = np.tanh(s / CAP)
        return CAP * bounded, 1 - bounded**2

    return by_formula(arrays, visible, {"ALiBi": alibi, "softcap": softcap}.get(case))


# By the contestants


def of_attn(implementation: str, case: str, T: int, heads: int) -> tuple[Callable, tuple]:
    """Return a function of query, key, value and operands, `[B T N H]`, and the operands, which are traced."""
    masks, scores = attn.masks, attn.scores
    mods = {
        "full": lambda: {},
        "causal": lambda: {"mask": masks.causal()},
        "window": lambda: {"mask": masks.sliding_window(window(T) - 1, 0)},
        "ALiBi": lambda slopes: {"mask": masks.causal(), "score": attn.per_head(scores.alibi(slopes))},
        "softcap": lambda: {"mask": masks.causal(), "score": scores.softcap(CAP)},
        "documents": lambda ids: {"mask": masks.causal() & masks.segments(ids, ids)},
    }[case]
    operands = {"ALiBi": (slopes(heads),), "documents": (documents(T),)}.get(case, ())

    def attend(query, key, value, *operands):
        return ours(implementation, **mods(*operands))(query, key, value)

    return attend, tuple(map(jax.numpy.asarray, operands))


def of_cudnn(case: str, T: int) -> Callable:
    """Return `jax.nn.dot_product_attention` by cuDNN.

    Raises:
      LeftOut: it cannot serve the case.
    """
    options = {
        "full": {},
        "causal": {"is_causal": True},
        "window": {"is_causal": True, "local_window_size": (window(T) - 1, 0)},
    }
    if case not in options:
        raise LeftOut("jax.nn has no argument for this that cuDNN serves without an array of T x S numbers")
    return functools.partial(jax.nn.dot_product_attention, implementation="cudnn", **options[case])


def of_torch(backend: str, case: str) -> Callable:
    """Return `(torch, device) -> function`: scaled_dot_product_attention by a backend of `torch.nn.attention`.

    Raises:
      LeftOut: it cannot serve the case.
    """
    if case not in ("full", "causal"):
        raise LeftOut("scaled_dot_product_attention takes this only as an array of T x S numbers")

    def factory(torch, device):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def attend(*arrays):
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return torch.nn.functional.scaled_dot_product_attention(*arrays, is_causal=case == "causal")

        return attend

    return factory


def of_flex(case: str, T: int, heads: int) -> Callable:
    """Return `(torch, device) -> function`: FlexAttention with a block mask, compiled on a GPU."""

    def factory(torch, device):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        ids, of_heads = (torch.as_tensor(x, device=device) for x in (documents(T), slopes(heads)))
        masks = {
            "window": lambda b, n, i, j: (i >= j) & (i - j < window(T)),
            "documents": lambda b, n, i, j: (i >= j) & (ids[i] == ids[j]),
        }
        scores = {
            "ALiBi": lambda s, b, n, i, j: s - of_heads[n] * (i - j),
            "softcap": lambda s, b, n, i, j: CAP * torch.tanh(s / CAP),
        }
        options = {"score_mod": scores.get(case)}
        if case != "full":
            mask = masks.get(case, lambda b, n, i, j: i >= j)
            options["block_mask"] = create_block_mask(mask, None, None, T, T, device=device)
        # `dynamic=False`: made for this shape. `fullgraph`: an error where it would run uncompiled.
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True) if device == "cuda" else flex_attention
        return functools.partial(compiled, **options)

    return factory
