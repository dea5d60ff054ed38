"""The mechanisms by name, and how they are written: "rotary + softcap(20)".

A new mechanism is one class and one line here; outside of the package, one class under `@register`.
"""

import ast
import inspect
import typing

from attn.mechanisms import added, changes, relative
from attn.mechanisms.mechanism import Chain, Mechanism
from attn.settings import Constraint, error_message, nearest

MECHANISMS: dict[str, type[Mechanism] | Mechanism | Chain] = {
    each.__name__: each
    for each in (
        *(changes.none, changes.scaled, changes.unscaled, changes.softcap, changes.window, changes.qk_norm),
        *(added.sinusoidal, added.learned),
        *(relative.rotary, relative.alibi, relative.t5, relative.shaw, relative.transformer_xl),
    )
}


def register(mechanism: type[Mechanism] | Mechanism | Chain, name: str | None = None):
    """Make a mechanism known by its name, as a decorator of its class or by `register(of(mask=...), "lean")`.

    Raises:
      ValueError: another mechanism has the name, or it is not a Python name.
    """
    name = mechanism.__name__ if name is None else name
    if not name.isidentifier():
        raise ValueError(f"mechanism {name!r}: must be a Python name")
    if MECHANISMS.setdefault(name, mechanism) is not mechanism:
        raise ValueError(f"mechanism {name!r}: is known already; choose another name")
    return mechanism


def parse(text: str) -> Mechanism | Chain:
    """Read a mechanism: names of `MECHANISMS` joined by +, with settings in parentheses where they have any.

    Raises:
      ValueError: it cannot be read, or a name or a setting is unknown or wrong.
    """
    try:
        return _built(ast.parse(text.strip(), mode="eval").body, text)
    except SyntaxError:
        raise ValueError(f"got {text!r}, must be names joined by +, such as 'rotary + softcap(20)'") from None


def terms(text: str) -> list[str]:
    """Return what is joined by + in a text that `parse` reads."""

    def of(node: ast.expr) -> list[str]:
        return [*of(node.left), *of(node.right)] if isinstance(node, ast.BinOp) else [ast.unparse(node)]

    return of(ast.parse(text.strip(), mode="eval").body)


def _is_mechanism(text: str) -> bool:
    return parse(text) is not None


TEXT = Constraint("a mechanism such as 'rotary + softcap(20)', of ", _is_mechanism, MECHANISMS)  # as a setting


def _built(node: ast.expr, text: str) -> Mechanism | Chain:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _built(node.left, text) + _built(node.right, text)
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name):
        raise SyntaxError
    name = call.func.id
    if name not in MECHANISMS:
        raise ValueError(f"unknown mechanism {name!r}{nearest(name, MECHANISMS)}; known: {', '.join(MECHANISMS)}")
    known = MECHANISMS[name]
    if not isinstance(known, type):
        if node is call:
            raise ValueError(f"mechanism {name!r}: has no settings; leave the parentheses out")
        return known
    settings = [_value(each, text) for each in call.args]
    named = {each.arg: _value(each.value, text) for each in call.keywords}
    try:
        given = inspect.signature(known.__init__).bind(None, *settings, **named).arguments
    except TypeError as error:  # an argument too many, too few or unknown
        raise ValueError(f"mechanism {name!r}: {error}") from None
    hints = typing.get_type_hints(known)
    for setting, value in list(given.items())[1:]:  # after self
        if message := error_message(hints[setting], value):
            raise ValueError(f"mechanism {name!r}: {setting}: {message}")
    return known(*settings, **named)


def _value(node: ast.expr, text: str):
    """A setting: a number, text or a mechanism."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return _built(node, text)
