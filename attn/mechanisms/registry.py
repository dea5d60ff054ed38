"""The mechanisms by name, and their parser, which reads texts such as "rotary + softcap(20)".

A new mechanism is one class and one line here; outside of the package, one class with the decorator `@register`.
"""

import ast

from attn.mechanisms import added, changes, relative
from attn.mechanisms.mechanism import FUNCTIONS, Chain, Mechanism
from attn.settings import Constraint, literal, nearest, read_settings, types_of

MECHANISMS: dict[str, type[Mechanism] | Mechanism | Chain] = {
    each.__name__: each
    for each in (
        *(changes.none, changes.scaled, changes.unscaled, changes.softcap, changes.window, changes.qk_norm),
        *(added.sinusoidal, added.learned, added.learned_grid),
        *(relative.rotary, relative.llama3_rotary, relative.alibi),
        *(relative.t5, relative.shaw, relative.transformer_xl),
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
    if name is None and not is_class:
        raise TypeError(f"mechanism {mechanism!r}: has no name of its own: register(mechanism, 'my_name')")
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
        return _build(ast.parse(text.strip(), mode="eval").body)
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


def _build(node: ast.expr) -> Mechanism | Chain:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _build(node.left) + _build(node.right)
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
    return mechanism(**read_settings(f"mechanism {name!r}", mechanism, call, _value))


def _value(node: ast.expr, hint):
    """Return a setting: a mechanism where its type is one, else a number or text."""
    is_mechanism = any(isinstance(each, type) and issubclass(each, Mechanism) for each in types_of(hint)[0])
    return _build(node) if is_mechanism and isinstance(node, ast.Name | ast.Call | ast.BinOp) else literal(node, hint)
