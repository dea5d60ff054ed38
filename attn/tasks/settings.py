"""What a setting may be: its type and a rule. What is wrong is said in words: what was given and what is allowed."""

import difflib
import functools
import inspect
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_ABSTRACT = {int: numbers.Integral, float: numbers.Real}  # NumPy's numbers are numbers as well


class Rule(NamedTuple):
    """What a setting may be.

    Attributes:
      allowed: the same in words for people; the names follow.
      accepts: the test of a value.
      names: that the value may have, if it is a name, to tell which one was meant.
    """

    allowed: str
    accepts: Callable[[object], bool]
    names: Collection[str] = ()


def one_of(names: Collection[str]) -> Rule:
    """One of some names; those of a registry may become more."""
    return Rule("one of ", lambda value: value in [*names], names)


def between(low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False) -> Rule:
    """A number of an interval, its ends included unless they are open."""
    text = f"{'greater than' if open_low else 'at least'} {low:,}"
    if high < math.inf:
        text += f" and {'less than' if open_high else 'at most'} {high:,}"

    def accepts(value):
        above = value > low if open_low else value >= low
        return above and (value < high if open_high else value <= high)

    return Rule(text, accepts)


def fault(hint, value, rule: Rule | None = None) -> str | None:
    """What is wrong with a value: "got ..., must be ...", or None if nothing is.

    Args:
      hint: the type: int, float, bool, str or a class, or a union of them, with None for what may be left out. Of other
        hints the rule alone is checked.
      value: that was given.
      rule: what else must hold.
    """
    kinds, optional = kinds_of(hint)
    if value is None and optional:
        return None
    plain = all(isinstance(kind, type) for kind in kinds)
    right = not plain or isinstance(value, tuple(_ABSTRACT.get(kind, kind) for kind in kinds))
    right &= bool in kinds or not isinstance(value, bool)  # which Python takes for a whole number
    right &= isinstance(value, numbers.Integral) or not isinstance(value, numbers.Real) or math.isfinite(value)
    if right and (rule is None or rule.accepts(value)):
        return None
    near = nearest(value, rule.names) if rule else ""
    shown = " ".join(repr(value).split("\n"))  # of an array, several lines
    return f"got {shown[:200]}{'…' if len(shown) > 200 else ''}, must be {described(hint, rule)}{near}"


def kinds_of(hint) -> tuple[tuple, bool]:
    """The types of a hint, and whether None is allowed besides."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(kind for kind in kinds if kind is not types.NoneType), types.NoneType in kinds


def described(hint, rule: Rule | None) -> str:
    """What a setting may be, in words."""
    (kind, *_), optional = kinds_of(hint)
    words = _WORDS.get(kind, getattr(kind, "__name__", ""))
    if rule:
        allowed = rule.allowed + ", ".join(rule.names)
        words = f"{words} {allowed}" if kind in _ABSTRACT else allowed
    return words + (" or None" if optional else "")


def nearest(name: object, known: Iterable[str]) -> str:
    """ " (did you mean ...?)" with the known name most like `name`, or nothing if none is."""
    close = difflib.get_close_matches(name, list(known), n=1) if isinstance(name, str) else ()
    return f" (did you mean {close[0]!r}?)" if close else ""


def checked(**rules: Rule) -> Callable[[Callable], Callable]:
    """A decorator: arguments are held against their types and these rules before the function is called.

    Raises:
      ValueError: by the function that it decorates: an argument that is unknown, missing, or not what it must be.
    """

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*positional, **named):
            given = dict(zip(signature.parameters, positional)) | named
            for name in given:
                if name not in signature.parameters:
                    known = [name for name in signature.parameters if name != "self"]
                    raise ValueError(f"{name}: unknown{nearest(name, known)}; known are {', '.join(known)}")
            for name, parameter in signature.parameters.items():
                rule, hint = rules.get(name), parameter.annotation
                if hint is parameter.empty:  # self
                    continue
                if name not in given and parameter.default is parameter.empty:
                    raise ValueError(f"{name}: none given, must be {described(hint, rule)}")
                if name in given and (said := fault(hint, given[name], rule)):
                    raise ValueError(f"{name}: {said}")
            return function(*positional, **named)

        return call

    return decorate


def _is_path(path: str | os.PathLike) -> bool:
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        return False
    return not os.path.expanduser(text).startswith("~")  # of a user who does not exist


def _is_url(path: str | os.PathLike) -> bool:
    """Return whether a path has or begins with a scheme such as gs: with a slash after it; C: of Windows is a drive."""
    return re.search(r"://|^\s*[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)) is not None


def _are_lengths(values: object) -> bool:
    if not isinstance(values, Collection) or len(values) == 0:
        return False
    return all(fault(int, value, between(1, LONGEST)) is None for value in values)


PATH = Rule("a path", _is_path)
LOCAL_PATH = Rule("a path on this machine, not a URL", lambda path: _is_path(path) and not _is_url(path))
SEED = between(0, 2**32 - 1)
LONGEST = 100_000  # tokens that any source or target may have
LENGTHS = Rule(f"one or more whole numbers from 1 to {LONGEST:,}", _are_lengths)
