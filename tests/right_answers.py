"""The answers of every rule of the package, in plain Python: (symbols, V) -> symbols."""

import itertools


def number(symbols: list[int], base: int) -> int:
    """The number whose digits are the symbols less one."""
    value = 0
    for symbol in symbols:
        value = value * base + symbol - 1
    return value


def added(symbols: list[int], base: int) -> list[int]:
    """The digits of the sum of both halves, each plus one."""
    middle = len(symbols) - len(symbols) // 2
    total, digits = number(symbols[:middle], base) + number(symbols[middle:], base), []
    while total or not digits:
        total, digit = divmod(total, base)
        digits.insert(0, digit + 1)
    return digits


def interleaved(symbols: list[int], base: int) -> list[int]:
    """Each symbol, then the sum of it and the next, of which only the last digit in base V counts; V stands for 0."""
    pairs = [[a, (a + b) % base or base] for a, b in itertools.pairwise(symbols)]
    return [symbol for pair in pairs for symbol in pair] + symbols[-1:]


def restored(source: list[int], base: int) -> list[int]:
    """The string, in which a symbol V + 1 hides the sum of its neighbours."""
    sums = [0, *((a + b) % base or base for a, b in zip(source, source[2:])), 0]
    return [total if symbol == base + 1 else symbol for symbol, total in zip(source, sums)]


RIGHT = {
    "copy": lambda s, v: s,
    "reverse": lambda s, v: s[::-1],
    "duplicate": lambda s, v: s + s,
    "mirror_or_next": lambda s, v: [a if a % 2 else b for a, b in zip(s[::-1], s[1:] + s[:1])],
    "sort": lambda s, v: sorted(s),
    "add": added,
    "palindrome": lambda s, v: s[::-1],
}
