"""A claim: a sentence with its source, a measurement, checks of the numbers, a figure and tables.

The numbers of a measurement are plain values, as in JSON. Checks, tables and figure are functions of the numbers only,
so that a page can be made again from its JSON files.
"""

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace as Sizes  # of a measurement, by name
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from attn.studies.jobs import Trainer
from attn.studies.report import Table, styled

Numbers = dict[str, Any]


class Check(NamedTuple):
    """One number of a measurement and its thresholds.

    Attributes:
      says: description of the number.
      measured: the number.
      least, most: bounds of the number if the claim holds; None for no bound.
      premise: whether the check is only a condition of a fair comparison; if it fails, the claim is undecided.
    """

    says: str
    measured: float
    least: float | None = None
    most: float | None = None
    premise: bool = False

    def holds(self) -> bool:
        """Return whether the number is within its thresholds; False for NaN."""
        above = self.least is None or self.measured >= self.least
        below = self.most is None or self.measured <= self.most
        return bool(above and below)  # every check has a threshold, and comparisons with NaN are false

    def must_be(self) -> str:
        """Return the thresholds in words."""
        bounds = [("at least", self.least), ("at most", self.most)]
        words = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
        return words + ", a premise" * self.premise


def verdict(checks: Sequence[Check]) -> str:
    """Return the verdict of all checks together."""
    if not all(check.holds() for check in checks if check.premise):
        return "undecided"
    decided = [check.holds() for check in checks if not check.premise]
    return "holds" if all(decided) else "holds in part" if any(decided) else "does not hold"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim about attention.

    Attributes:
      measure: `(sizes, trainer) -> numbers`; the first line of its docstring says what is measured.
      check: `numbers -> checks`; the claim holds if all checks hold.
      draw: `numbers -> figure`; the first line of its docstring is the figure's caption.
      tables: `numbers -> tables`.
      title: a few words.
      sentence: the claim.
      source, link: paper and section, and its address.
      equation: the equation of the claim, in TeX that matplotlib can read.
      method: paragraphs that describe the measurement.
      full, quick: the sizes of the measurement, such as `each`, the strings evaluated per length.
      missing: returns what it needs and is not installed; None if nothing is missing.
    """

    measure: Callable[[Sizes, Trainer], Numbers]
    check: Callable[[Numbers], list[Check]]
    draw: Callable[[Numbers], Figure]
    tables: Callable[[Numbers], list[Table]]
    title: str
    sentence: str
    source: str
    link: str
    equation: str
    method: Sequence[str]
    full: Sizes
    quick: Sizes
    missing: Callable[[], str | None] = lambda: None

    def sizes(self, quick: bool) -> Sizes:
        """Return the sizes of a quick or of a full measurement."""
        return self.quick if quick else self.full

    def figure(self, numbers: Numbers) -> Figure:
        """Return the figure in the common style of all claims."""
        return styled(lambda: self.draw(numbers))


class Measurement(NamedTuple):
    """The result of measuring a claim, as saved in its JSON file.

    Attributes:
      quick: whether the sizes were reduced.
      sizes: of the measurement.
      numbers: the measured values.
      seconds: time of this measurement, including trainings that had not been done before.
      machine: the machine, see `attn.studies.jobs.machine`.
    """

    quick: bool
    sizes: dict[str, Any]
    numbers: Numbers
    seconds: float
    machine: dict[str, Any]
