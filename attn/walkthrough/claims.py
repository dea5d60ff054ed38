"""What a claim is: a sentence with its source, a measurement, a figure, and checks that the numbers decide.

The numbers of a measurement are plain values, as JSON keeps them: checks, tables and figure are functions of them
alone, so that all of a page can be made again from its JSON files.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

Numbers = dict[str, Any]


class Check(NamedTuple):
    """One number of a measurement, held against its thresholds.

    Attributes:
      says: what the number is.
      measured: the number.
      least, most: what it must lie between for the claim to hold; None for no bound.
      premise: whether it only makes the comparison fair: then it speaks neither for the claim nor, held, against it.
    """

    says: str
    measured: float
    least: float | None = None
    most: float | None = None
    premise: bool = False

    def holds(self) -> bool:
        """Whether the number is within its thresholds; NaN is not."""
        above = self.least is None or self.measured >= self.least
        below = self.most is None or self.measured <= self.most
        return bool(above and below)  # comparisons with NaN are false, and every check has a threshold

    def must_be(self) -> str:
        """The thresholds in words."""
        bounds = [("at least", self.least), ("at most", self.most)]
        said = " and ".join(f"{words} {bound:g}" for words, bound in bounds if bound is not None)
        return said + ", a premise" * self.premise


class Table(NamedTuple):
    """Numbers to show as they are: a caption, names of the columns or none, and rows."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim about attention.

    Attributes:
      title: a few words.
      sentence: the claim.
      source: paper and section; link: where it can be read.
      equation: what it is about, in TeX as matplotlib reads it.
      method: how it is measured, in paragraphs.
      full, quick: the sizes of the measurement, two instances of one dataclass.
      measure: `(sizes, bench) -> numbers`.
      check: `numbers -> checks`; the claim holds if all of them do.
      draw: `numbers -> figure`; the first line of its docstring is the figure's caption.
      tables: `numbers -> tables`.
    """

    title: str
    sentence: str
    source: str
    link: str
    equation: str
    method: Sequence[str]
    full: Any
    quick: Any
    measure: Callable[[Any, Any], Numbers]
    check: Callable[[Numbers], list[Check]]
    draw: Callable[[Numbers], Figure]
    tables: Callable[[Numbers], list[Table]] = lambda numbers: []


def verdict(checks: Sequence[Check]) -> str:
    """What the checks decide together: nothing where a premise fails."""
    if not all(check.holds() for check in checks if check.premise):
        return "undecided"
    held = [check.holds() for check in checks if not check.premise]
    return "holds" if all(held) else "holds in part" if any(held) else "does not hold"


class Measured(NamedTuple):
    """What came of a claim, as its JSON keeps it.

    Attributes:
      quick: whether the sizes were reduced.
      sizes: of the measurement.
      numbers: what was measured.
      seconds: how long it took this time: trainings that had to be done included, those found in the folder not.
      machine: on what.
    """

    quick: bool
    sizes: dict[str, Any]
    numbers: Numbers
    seconds: float
    machine: dict[str, Any]
