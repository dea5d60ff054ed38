"""Checks of settings: a type and a constraint each; messages say what was given and what is allowed."""

import ast
import dataclasses
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
_ABSTRACT = {int: numbers.Integral, float: numbers.Real}  # so that NumPy's numbers are accepted


class Constraint(NamedTuple):
    """A constraint on the value of a setting.

    Attributes:
      allowed: the constraint in words, for messages; `names` are appended.
      accepts: the test of a value; it may raise a ValueError whose message says what is wrong.
      names: names that the value may be, if any, for suggesting the nearest.
    """

    allowed: str
    accepts: Callable[[object], bool]
    names: Collection[str] = ()


def one_of(names: Collection[str]) -> Constraint:
    """Return the constraint to the names of a collection, which may get more names later."""
    return Constraint("one of ", lambda value: value in [*names], names)


def between(low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False) -> Constraint:
    """Return the constraint to an interval, which includes its ends unless they are open."""
    text = f"{'greater than' if open_low else 'at least'} {low:,}"
    if high < math.inf:
        text += f" and {'less than' if open_high else 'at most'} {high:,}"

    def accepts(value):
        above = value > low if open_low else value >= low
        return above and (value < high if open_high else value <= high)

    return Constraint(text, accepts)


def setting(default=dataclasses.MISSING, constraint: Constraint | None = None):
    """Return the field of a record of settings, with its default, if it has one, and the constraint on its values."""
    return dataclasses.field(default=default, metadata={"constraint": constraint})


def error_message(hint, value, constraint: Constraint | None = None) -> str | None:
    """Return "got ..., must be ..." for a value that is not allowed, None for one that is.

    Args:
      hint: its type: int, float, bool, str, a class, or a union of them, with None for an optional value. With any
        other hint only the constraint is checked.
      value: the value that was given.
      constraint: what must hold in addition.
    """
    alternatives, optional = types_of(hint)
    if value is None and optional:
        return None
    checkable = all(isinstance(each, type) for each in alternatives)
    valid = not checkable or isinstance(value, tuple(_ABSTRACT.get(each, each) for each in alternatives))
    valid &= bool in alternatives or not isinstance(value, bool)  # Python's bool is an int
    # An int may be too large for `isfinite`.
    valid &= isinstance(value, numbers.Integral) or not isinstance(value, numbers.Real) or math.isfinite(value)
    shown = " ".join(repr(value).split("\n"))  # the repr of an array has several lines
    shown = f"got {shown[:200]}{'…' if len(shown) > 200 else ''}"
    try:
        if valid and (constraint is None or constraint.accepts(value)):
            return None
    except ValueError as error:  # raised by `accepts`
        return f"{shown}: {error}"
    suggestion = nearest(value, constraint.names) if constraint else ""
    return f"{shown}, must be {description(hint, constraint)}{suggestion}"


def types_of(hint) -> tuple[tuple, bool]:
    """Return the types of a hint, and whether None is allowed in addition."""
    alternatives = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(each for each in alternatives if each is not types.NoneType), types.NoneType in alternatives


def description(hint, constraint: Constraint | None) -> str:
    """Return what is allowed, in words."""
    (first, *_), optional = types_of(hint)
    words = _WORDS.get(first, getattr(first, "__name__", ""))
    if constraint:
        allowed = constraint.allowed + ", ".join(constraint.names)
        words = f"{words} {allowed}" if first in _ABSTRACT else allowed
    return words + (" or None" if optional else "")


def nearest(name: object, known: Iterable[str]) -> str:
    """Return " (did you mean ...?)" with the known name most similar to `name`, or "" if none is similar."""
    close = difflib.get_close_matches(name, list(known), n=1) if isinstance(name, str) else ()
    return f" (did you mean {close[0]!r}?)" if close else ""


def checked(**constraints: Constraint) -> Callable[[Callable], Callable]:
    """Decorate a function to check its arguments against their types and these constraints before each call.

    Raises:
      ValueError: by the decorated function: an argument that is unknown, missing, or not allowed.
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
                constraint, hint = constraints.get(name), parameter.annotation
                if hint is parameter.empty:  # self
                    continue
                if name not in given and parameter.default is parameter.empty:
                    raise ValueError(f"{name}: none given, must be {description(hint, constraint)}")
                if name in given and (message := error_message(hint, given[name], constraint)):
                    raise ValueError(f"{name}: {message}")
            return function(*positional, **named)

        return call

    return decorate


def read_settings(what: str, record: type, call: ast.Call, value: Callable[[ast.expr, object], object]) -> dict:
    """Return the settings that a call such as `rotary(base=500)`, read from text, gives to a dataclass of settings.

    Args:
      what: the thing that is made, for messages: "mechanism 'rotary'".
      record: the dataclass.
      call: the call.
      value: `(expression, type) -> value`, of one setting.

    Raises:
      ValueError: a setting is unknown, missing, given twice, or not allowed.
    """
    fields = {field.name: field for field in dataclasses.fields(record)}
    try:
        named = {argument.arg: argument.value for argument in call.keywords}
        given = inspect.signature(record.__init__).bind(None, *call.args, **named).arguments
    except TypeError as error:  # an argument too many, too few or unknown
        has = f"its settings are {', '.join(fields)}" if fields else "it has no settings"
        raise ValueError(f"{what}: {error}; {has}") from None
    hints, settings = typing.get_type_hints(record), {}
    for name, argument in list(given.items())[1:]:  # after self
        settings[name] = value(argument, hints[name])
        if message := error_message(hints[name], settings[name], fields[name].metadata.get("constraint")):
            raise ValueError(f"{what}: {name}: {message}")
    return settings


def literal(node: ast.expr, hint) -> object:
    """Return the value of an expression read from text: a literal, or the expression's text."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _is_path(path: str | os.PathLike) -> bool:
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        return False
    return not os.path.expanduser(text).startswith("~")  # the ~ of a user who does not exist is not expanded


def _is_url(path: str | os.PathLike) -> bool:
    """Return whether a path has or begins with a scheme such as gs: with a slash after it; C: of Windows is a drive."""
    return re.search(r"://|^\s*[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)) is not None


def _are_lengths(values: object) -> bool:
    if not isinstance(values, Collection) or len(values) == 0:
        return False
    return all(error_message(int, value, between(1, LONGEST)) is None for value in values)


PATH = Constraint("a path", _is_path)
LOCAL_PATH = Constraint("a path on this machine, not a URL", lambda path: _is_path(path) and not _is_url(path))
SEED = between(0, 2**32 - 1)
POSITIVE = between(0, open_low=True)
LONGEST = 100_000  # tokens that any source or target may have
LENGTHS = Constraint(f"one or more whole numbers from 1 to {LONGEST:,}", _are_lengths)
