"""Rules of the synthetic tasks: functions from a string of symbols to its answer."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from attn.tasks import structured

Answer = tuple[Int[Array, "m"], Int[Array, ""] | int]


@dataclasses.dataclass(frozen=True)
class Rule:
    """The rule of a task: pure functions of one string of symbols.

    The string is drawn. It is the source, unless the rule makes the source of it.

    Attributes:
      answer: `(symbols [n], length, num_symbols) -> (answer [m], its length)`, in JAX. The symbols are 1..num_symbols,
        of which the first `length` count; the rest is 0. The answer may have any width m: symbols beyond its length
        are ignored.
      most_symbols: `n -> int`, the greatest number of symbols of an answer to n symbols; must not decrease with n.
      fixed_length: every answer to n symbols has exactly `most_symbols(n)`. Otherwise the length depends on the data,
        and a model gets it neither in training nor in decoding.
      continues: the answer continues its source. A model then learns source and answer as one string, as a language
        model does, and is evaluated on continuing the source. See `Task.example`.
      source: `(symbols [d], length, num_symbols) -> source [m]`, in JAX; None if the source is the string. `length` is
        that of the source; symbols beyond it are ignored. Different strings should have different sources, since
        strings are held out, not sources.
      num_drawn: `n -> int`, the number of symbols drawn for a source of n; only with `source`, which together with
        `answer` then gets so many. At least 1, and it must not decrease with n.
      alphabet: `num_symbols -> int`, the number of symbols that sources and answers may have, from 1 on.
      true_sources: `(symbols [n], length, num_symbols) -> [m]`, in JAX: per symbol of the answer, the position of the
        source's symbol that it is; None if an answer's symbols are not symbols of the source.
    """

    answer: Callable[[Int[Array, "n"], Int[Array, ""], int], Answer]
    most_symbols: Callable[[int], int] = lambda n: n
    fixed_length: bool = False
    continues: bool = False
    source: Callable[[Int[Array, "d"], Int[Array, ""], int], Int[Array, "m"]] | None = None
    num_drawn: Callable[[int], int] = lambda n: n
    alphabet: Callable[[int], int] = lambda num_symbols: num_symbols
    true_sources: Callable[[Int[Array, "n"], Int[Array, ""], int], Int[Array, "m"]] | None = None


def rearranged(index: Callable, times: int = 1) -> Rule:
    """Return the rule whose answer has `times` n symbols, of which symbol t is symbol `index(t, n)` of the source."""

    def true_sources(symbols, length, num_symbols):
        # One symbol too many: the end token replaces it, without an additional operation to pad the answer.
        return index(jnp.arange(times * len(symbols) + 1), length)

    def answer(symbols, length, num_symbols):
        return _take(symbols, true_sources(symbols, length, num_symbols)), times * length

    return Rule(answer, lambda n: times * n, fixed_length=True, true_sources=true_sources)


def _take(symbols: Int[Array, "n"], index: Int[Array, "m"]) -> Int[Array, "m"]:
    return jnp.take(symbols, index, mode="clip")


def _mirror_or_next(symbols, length, num_symbols):
    """Answer with the mirror image of a symbol if that is odd, else with the next symbol: two relations at once."""
    return _take(symbols, _mirror_or_next_sources(symbols, length, num_symbols)), length


def _mirror_or_next_sources(symbols, length, num_symbols):
    t = jnp.arange(len(symbols) + 1)
    return jnp.where(_take(symbols, length - 1 - t) % 2 == 1, length - 1 - t, (t + 1) % length)


def _sort(symbols, length, num_symbols):
    """Answer with the symbols in ascending order."""
    return jnp.sort(_padding_last(symbols, num_symbols)), length


def _sort_sources(symbols, length, num_symbols):
    return jnp.argsort(_padding_last(symbols, num_symbols), stable=True)  # the first of equal symbols comes first


def _padding_last(symbols, num_symbols):
    return jnp.where(symbols > 0, symbols, num_symbols + 1)


def _add(symbols, length, num_symbols):
    """Answer with the sum of two numbers in base V, without leading zeros; a sum of zero is one digit 0.

    Symbol s is the digit s - 1. The first ceil(n / 2) symbols are one number and the rest is the other, the most
    significant digit first, as usual. There is no plus sign, so that every string is a question.
    """
    middle = (length + 1) // 2
    power = jnp.arange((len(symbols) + 1) // 2 + 1)  # exponents of V, and one more for the last carry

    def digits(start, stop):
        index = stop - 1 - power
        return jnp.where(index >= start, _take(symbols, index) - 1, 0)

    def add_column(carry, column):
        return (carry + column) // num_symbols, (carry + column) % num_symbols

    carry = 0 * symbols[0]  # zero with the mesh axes of the symbols, as a scan under `shard_map` requires
    _, total = jax.lax.scan(add_column, carry, digits(0, middle) + digits(middle, length))
    count = jnp.max(jnp.where(total > 0, power + 1, 1))
    return _take(total, count - 1 - power) + 1, count


def _fill(symbols, length, num_symbols):
    """Answer with the whole string, in which some symbols were masked."""
    return structured.interleaved(symbols, num_symbols), length


def _digit(symbols, length, num_symbols):
    """Answer with the digit in the picture, plus 1."""
    return 1 + structured.digit(symbols).astype(symbols.dtype)[None], 1


_reverse = rearranged(lambda t, n: n - 1 - t)

# A new task of the package is one line.
RULES = {
    "copy": rearranged(lambda t, n: t),
    "reverse": _reverse,
    "duplicate": rearranged(lambda t, n: t % n, times=2),
    "mirror_or_next": Rule(_mirror_or_next, fixed_length=True, true_sources=_mirror_or_next_sources),
    "sort": Rule(_sort, fixed_length=True, true_sources=_sort_sources),
    "add": Rule(_add, lambda n: (n + 1) // 2 + 1),
    "palindrome": dataclasses.replace(_reverse, continues=True),  # the symbols, then their mirror image
    "fill": Rule(
        _fill,
        fixed_length=True,
        source=structured.with_masks,
        num_drawn=lambda n: n // 2 + 1,
        alphabet=lambda num_symbols: num_symbols + 1,  # the last is the mask
    ),
    "digit": Rule(
        _digit,
        lambda n: 1,
        fixed_length=True,
        source=lambda symbols, length, num_symbols: structured.patches(symbols),
        alphabet=lambda num_symbols: structured.NUM_PATCHES,
    ),
}


def register(name: str, rule: Rule | None = None, **settings) -> Callable | None:
    """Add a task from outside of the package: its name is then known to `load`, `Task` and `--config.task.name`.

    It takes a rule, or it decorates the function `answer` of a rule:

        register("swap", rearranged(lambda t, n: (t + n // 2) % n))

        @register("last", most_symbols=lambda n: 1, fixed_length=True)
        def last(symbols, length, num_symbols):
            return symbols[length - 1][None], 1

    Args:
      name: its name, a Python identifier.
      rule: its rule; None to decorate a function.
      settings: the other fields of `Rule`, to decorate a function.

    Raises:
      ValueError: the name is taken or not an identifier, or the rule is not one.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name: got {name!r}, must be a Python identifier, as in @register('my_task')")
    if rule is None:
        return lambda answer: register(name, Rule(answer, **settings)) or answer
    if name in (*RULES, "pairs"):
        raise ValueError(f"name: got {name!r}, which is taken; choose another one than {', '.join(RULES)}, pairs")
    if not isinstance(rule, Rule) or settings:
        raise ValueError(f"rule: got {rule!r}, must be a Rule; settings are only for a decorated function")
    _check(name, rule)
    RULES[name] = rule


def _check(name: str, rule: Rule):
    """Check the results of a rule's functions by tracing, so that no backend is started."""
    _check_counts(name, rule)
    symbols = jax.ShapeDtypeStruct((rule.num_drawn(5),), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    try:
        function = "answer"
        answer, count = jax.eval_shape(lambda *string: rule.answer(*string, 2), *symbols)
        function = "source"
        source = (
            symbols[0] if rule.source is None else jax.eval_shape(lambda *string: rule.source(*string, 2), *symbols)
        )
        function = "true_sources"
        true = rule.true_sources and jax.eval_shape(lambda *string: rule.true_sources(*string, 2), *symbols)
    except Exception as error:  # whatever the functions raise
        raise ValueError(f"rule {name!r}: {function}(symbols, length, num_symbols): {_cause(error)}") from error
    if _axes(answer, count) != [1, 0]:
        raise ValueError(f"rule {name!r}: answer returns {answer}, {count}; must be ([m] integers, their number)")
    if _axes(source) != [1]:
        raise ValueError(f"rule {name!r}: source returns {source}; must be [m] integers")
    if true is not None and _axes(true) != [1]:
        raise ValueError(f"rule {name!r}: true_sources returns {true}; must be [m] integers")


def _check_counts(name: str, rule: Rule):
    """Check the results of a rule's functions of lengths and of numbers of symbols."""
    for function, first, least in (("most_symbols", 0, 0), ("num_drawn", 1, 1), ("alphabet", 2, 1)):
        variable = "V" if function == "alphabet" else "n"
        try:
            counts = [getattr(rule, function)(number) for number in range(first, 65)]
        except Exception as error:  # whatever the function raises
            raise ValueError(f"rule {name!r}: {function}({variable}): {_cause(error)}") from error
        if not all(isinstance(each, int) for each in counts) or counts[0] < least or counts != sorted(counts):
            given = f"{counts[:4]} for {variable} = {first} to {first + 3}"
            raise ValueError(f"rule {name!r}: {function} gives {given}, must be ints from {least} on that never fall")
    if rule.source is None and any(rule.num_drawn(n) != n for n in range(1, 65)):
        raise ValueError(
            f"rule {name!r}: num_drawn has a meaning only with source; without it the string is the source"
        )


def _cause(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _axes(*arrays) -> list[int | None]:
    """Return the number of axes of each array of integers; None for anything else."""
    shapes = [each if isinstance(each, jax.ShapeDtypeStruct) else None for each in arrays]
    return [each.ndim if each is not None and jnp.issubdtype(each.dtype, jnp.integer) else None for each in shapes]
