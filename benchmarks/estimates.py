"""Add up the cycles that XLA's compilers estimate for a program, from its text (`Compiled.as_text()`).

    estimate(program.as_text())

A device runs the operations of such a text one after another: a TPU has one core, and on a GPU they are kernels of one
stream. XLA writes its estimate of each into the text, and counts a loop's body once. Here a loop counts as often as it
runs, a called computation where it is called, and of a `conditional` the branch with the most cycles.

TPU: `estimated_cycles` of fusions, products and copies. Most include a fixed number of cycles for starting an
operation, 1,824 on a v5e, also where its arrays are in the core's own memory and its whole schedule is shorter. Copies
between memories that run beside operations have no estimate.

GPU: `end_to_end_cycles` of every kernel, by the model by which XLA decides what to fuse, if the program was compiled
with the options `GPU`. The launch of a kernel is not in it, and products are priced as on cores without tensor units.
"""

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["GPU", "Estimate", "estimate"]

GPU = {"xla_gpu_collect_cost_model_stats": True}  # options of `Lowered.compile`

# Operations that are names of values and compute nothing.
_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_NOTHING |= {"AllocateBuffer", "ConcatBitcast"}  # custom calls of a TPU, by their target
# Operations that cannot be left out of a sum.
_SUBSTANTIAL = {"dot", "convolution", "custom-call", "sort", "reduce", "scatter", "gather", "rng-bit-generator"}
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .*\{$")
_NAME = re.compile(r"%([\w.\-]+)")


class Estimate(NamedTuple):
    """The estimate of a program.

    Attributes:
      cycles: of all operations together.
      inside: the same without the cycles for starting operations.
      operations: number of operations that have an estimate, which run one after another.
      without: number of operations without an estimate, by their name, such as "copy".
    """

    cycles: float
    inside: float
    operations: int
    without: dict[str, int]


@dataclasses.dataclass(frozen=True)
class _Operation:
    """One line of a program.

    Attributes:
      name: of its result.
      code: such as "fusion".
      operands: names of results.
      literal: what stands between the parentheses, such as the value of a constant.
      attributes: what stands behind them.
      is_root: whether its result is that of the computation.
    """

    name: str
    code: str
    operands: list[str]
    literal: str
    attributes: str
    is_root: bool

    def called(self, *keys: str) -> list[str]:
        """Return the computations that an attribute names, such as `body`; of several attributes in their order."""
        found = [re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes) for key in keys]
        return [name for match in found if match for name in re.findall(r"[\w.\-]+", match[1])]

    @functools.cached_property
    def config(self) -> dict:
        """The `backend_config`; empty if there is none."""
        _, found, text = self.attributes.partition("backend_config=")
        value = json.JSONDecoder().raw_decode(text)[0] if found else {}
        return value if isinstance(value, dict) else {}


def estimate(text: str, start: float = 0.0) -> Estimate:
    """Return the estimate of a compiled program.

    Args:
      text: of the program.
      start: cycles that the compiler adds for starting an operation. An operation whose estimate is about that or more
        has them, others, such as most matrix products of a TPU, have not.

    Raises:
      ValueError: a loop whose number of iterations is unknown, a product or a call without an estimate, no estimate at
        all, or a line that is not understood.
    """
    sums = _Program(text, start).sums()
    if not sums["operations"]:
        raise ValueError("the compiler gives no estimate for any operation of the program")
    known = [sums.pop(name) for name in ("cycles", "inside", "operations")]
    return Estimate(*known, dict(sorted(sums.items())))


class _Program:
    """The computations of a program."""

    def __init__(self, text: str, start: float):
        self._start, self._computations, self._entry, self._known = start, {}, None, {}
        inside = None
        for line in text.splitlines():
            if not line.startswith(" ") and (match := _COMPUTATION.match(line)) is not None:
                inside = self._computations[match["name"]] = {}
                self._entry = match["name"] if match["entry"] else self._entry
            elif line.startswith("}"):
                inside = None
            elif inside is not None and line.strip():
                operation = _read(line)
                inside[operation.name] = operation
        if self._entry is None:
            raise ValueError("not the text of a program: it has no ENTRY")

    def sums(self) -> Counter:
        """Return the sums over the whole program: fields of `Estimate`, and others by their operation."""
        return Counter(self._of_computation(self._entry))

    def _of_computation(self, name: str) -> Counter:
        if name not in self._known:
            operations = self._computations[name]
            self._known[name] = sum((self._of(each, operations) for each in operations.values()), Counter())
        return self._known[name]

    def _of(self, operation: _Operation, around: Mapping[str, _Operation]) -> Counter:
        code = operation.code
        if code in _NOTHING:
            return Counter()
        if code == "while":
            body, condition = (self._of_computation(name) for name in operation.called("body", "condition"))
            times = self._iterations(operation, around)
            return Counter({key: times * value for key, value in (body + condition).items()})
        if code == "conditional":
            names = operation.called("branch_computations", "true_computation", "false_computation")
            return max((self._of_computation(name) for name in names), key=lambda branch: branch["cycles"])
        if code in ("call", "async-start"):
            (name,) = operation.called("to_apply", "calls")
            return self._of_computation(name)
        cycles = _cycles(operation)
        if cycles is not None:
            has_start = cycles >= 0.95 * self._start
            inside = max(0.0, cycles - self._start) if has_start else cycles
            return Counter(cycles=cycles, inside=inside, operations=1)
        if code in _SUBSTANTIAL:
            raise ValueError(f"{operation.name}: the compiler gives no estimate for this {code}")
        return Counter({code: 1})

    def _iterations(self, loop: _Operation, around: Mapping[str, _Operation]) -> int:
        """Return how often a loop runs.

        XLA for GPUs says it. For TPUs it is read from loops that count in steps of 1 from one constant to another, as
        those of `jax.lax.scan` do; other loops are refused.
        """
        if (known := loop.config.get("known_trip_count")) is not None:
            return int(known["n"])
        try:
            condition, body = (self._computations[name] for name in loop.called("condition", "body"))
            root = _root(condition)
            if root.code != "compare" or "direction=LT" not in root.attributes:
                raise ValueError
            counter, end = (_source(name, condition) for name in root.operands)
            index = _index(counter)
            step = _source(_root(body).operands[index], body)
            # A constant and the old number, in either order.
            one, old = sorted((_source(name, body) for name in step.operands), key=lambda each: each.code)
            state = around[loop.operands[0]]
            if step.code != "add" or state.code != "tuple" or _value(one) != 1 or _index(old) != index:
                raise ValueError
            start = _source(state.operands[index], around)
            return _value(end) - _value(start)
        except (ValueError, KeyError, IndexError):
            raise ValueError(f"{loop.name}: a loop whose number of iterations is unknown") from None


def _root(computation: Mapping[str, _Operation]) -> _Operation:
    """Return the operation whose result is that of the computation."""
    return next(each for each in computation.values() if each.is_root)


def _source(name: str, computation: Mapping[str, _Operation]) -> _Operation:
    """Return the operation that a value comes from, through copies."""
    operation = computation[name]
    return _source(operation.operands[0], computation) if operation.code in ("copy", "bitcast") else operation


def _index(operation: _Operation) -> int:
    """Return which element of a loop's state an operation is."""
    if operation.code != "get-tuple-element":
        raise ValueError
    return int(re.search(r"index=(\d+)", operation.attributes)[1])


def _value(operation: _Operation) -> int:
    """Return the value of a constant."""
    if operation.code != "constant":
        raise ValueError
    return int(operation.literal)


def _cycles(operation: _Operation) -> float | None:
    """Return the compiler's estimate of an operation; None if it gives none."""
    window = operation.config.get("window_config", {})
    if "estimated_cycles" in window:
        return float(window["estimated_cycles"])
    # A GPU's kernels have estimates of several models; the one without a name estimates all of them.
    costs = operation.config.get("reification_cost", ())
    return next((float(cost["end_to_end_cycles"]) for cost in costs if not cost["name"]), None)


def _read(line: str) -> _Operation:
    """Read a line: `ROOT %name = type code(operands), attributes`."""
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        raise ValueError(f"not an operation: {line.strip()[:80]!r}")
    rest = line[match.end() :]
    kind = rest[: _closing(rest) + 1] if rest.startswith("(") else rest.split(" ", 1)[0]
    rest = rest[len(kind) :].lstrip()
    code, _, _ = rest.partition("(")
    end = _closing(rest[len(code) :]) + len(code)
    literal, attributes = rest[len(code) + 1 : end], rest[end + 1 :]
    target = re.search(r'custom_call_target="([^"]+)"', attributes)
    code = target[1] if code == "custom-call" and target and target[1] in _NOTHING else code
    return _Operation(match[2], code, _NAME.findall(literal), literal, attributes, match[1] is not None)


def _closing(text: str) -> int:
    """Return where the first parenthesis of a text is closed."""
    depth = 0
    for place, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0 and character == ")":
            return place
    raise ValueError(f"not an operation: {text.strip()[:80]!r}")
