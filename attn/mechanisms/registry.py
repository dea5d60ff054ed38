"""The mechanisms by name, and their parser, which reads texts such as "rotary + softcap(20)".

A new mechanism is one class and one line here; outside of the package, one class with the decorator `@register`.
"""

import ast
import inspect
import typing

from attn.mechanisms import added, changes, relative
from attn.mechanisms.mechanism import FUNCTIONS, Chain, Mechanism
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
    """Register a mechanism under its name, as a decorator of its class or by `register(of(mask=...), "lean")`.

    Raises:
      TypeError: it is not a mechanism, or changes nothing.
      ValueError: another mechanism has the name, or it is not a Python name.
    """
    is_class = isinstance(mechanism, type) and issubclass(mechanism, Mechanism)
    if not is_class and not isinstance(mechanism, Mechanism | Chain):
        raise TypeError(f"mechanism: got {mechanism!r}, must be a subclass of Mechanism, or made by `of`")
    if is_class and not any(getattr(mechanism, each) is not getattr(Mechanism, each) for each in (*FUNCTIONS, "scale")):
        raise TypeError(f"mechanism {mechanism.__name__!r}: overrides none of {', '.join(FUNCTIONS)}, and has no scale")
    name = mechanism.__name__ if name is None else name
    if not name.isidentifier():
        raise ValueError(f"mechanism {name!r}: must be a Python name")
    if MECHANISMS.setdefault(name, mechanism) is not mechanism:
        raise ValueError(f"mechanism {name!r}: is known already; choose another name")
    return mechanism


def parse(text: str) -> Mechanism | Chain:
    """Read a mechanism: names of `MECHANISMS` joined by +, with settings in parentheses if they have any.

    Raises:
      ValueError: the text is not a mechanism, or a name or a setting is unknown or wrong.
    """
    try:
        return _build(ast.parse(text.strip(), mode="eval").body, text)
    except SyntaxError:
        raise ValueError(f"got {text!r}, must be names joined by +, such as 'rotary + softcap(20)'") from None


def terms(text: str) -> list[str]:
    """Return the terms that are joined by + in a text that `parse` reads."""

    def terms_of(node: ast.expr) -> list[str]:
        return [*terms_of(node.left), *terms_of(node.right)] if isinstance(node, ast.BinOp) else [ast.unparse(node)]

    return terms_of(ast.parse(text.strip(), mode="eval").body)


def _is_mechanism(text: str) -> bool:
    return parse(text) is not None


TEXT = Constraint("a mechanism such as 'rotary + softcap(20)', of ", _is_mechanism, MECHANISMS)  # as a setting


def _build(node: ast.expr, text: str) -> Mechanism | Chain:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _build(node.left, text) + _build(node.right, text)
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name):
        raise SyntaxError
    name = call.func.id
    if name not in MECHANISMS:
        raise ValueError(f"unknown mechanism {name!r}{nearest(name, MECHANISMS)}; known: {', '.join(MECHANISMS)}")
    mechanism = MECHANISMS[name]
    if not isinstance(mechanism, type):  # registered as an object, made by `of`
        if node is call:
            raise ValueError(f"mechanism {name!r}: has no settings; leave the parentheses out")
        return mechanism
    settings = [_value(argument, text) for argument in call.args]
    named = {argument.arg: _value(argument.value, text) for argument in call.keywords}
    try:
        arguments = inspect.signature(mechanism.__init__).bind(None, *settings, **named).arguments
    except TypeError as error:  # an argument too many, too few or unknown
        has = f"its settings are {', '.join(mechanism.__dataclass_fields__)}"
        raise ValueError(
            f"mechanism {name!r}: {error}; {has if mechanism.__dataclass_fields__ else 'it has no settings'}"
        ) from None
    hints, fields = typing.get_type_hints(mechanism), mechanism.__dataclass_fields__
    for setting, value in list(arguments.items())[1:]:  # after self
        if message := error_message(hints[setting], value, fields[setting].metadata.get("constraint")):
            raise ValueError(f"mechanism {name!r}: {setting}: {message}")
    return mechanism(*settings, **named)


def _value(node: ast.expr, text: str):
    """Return a setting: a number, text or a mechanism."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return _build(node, text)
