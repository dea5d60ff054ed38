"""What a table of lengths holds: rows to train, tasks, alphabets, and what each trained model is asked.

A table is a config file with `get_table()`, such as configs/lengths.py. A row of one's own is a `Row` in it; an
encoding of one's own is put into `attn.nn.encodings.ENCODINGS` there as well.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from attn.nn.encodings import ENCODINGS
from attn.nn.models import MODELS
from attn.tasks.settings import Rule, between, fault, one_of
from attn.training.config import Config, ConfigError, from_mapping, longest_input

ENDS = {
    "learned": "the model writes an end token of its own, which counts as a token",
    "given": "the length of the answer is given: the end token comes there and nowhere else, and does not count",
}

_FAR_SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """A kind of model, trained anew for every task, alphabet and seed.

    Attributes:
      model: its settings, as of `config.model`.
      builds_in: what it is told that others must learn; None to say what its encodings build in.
      tasks: names of tasks; None for those of the table.
      symbols: sizes of the alphabet; None for those of the table.
      seeds: how many.
      budgets: steps of a training, as of the table; None for those of the table.
      ends: keys of `ENDS`, how its answers may end; whether it is exact at the longest trained length is asked with the
        first.
      far: tasks at which it is asked the farthest length, in the first three seeds.
      group: rows of one name are drawn together.
      config: further settings by section, such as {"optimizer": {...}}.
    """

    model: dict[str, Any]
    builds_in: str | None = None
    tasks: tuple[str, ...] | None = None
    symbols: tuple[int, ...] | None = None
    seeds: int = 3
    budgets: tuple[int, ...] | None = None
    ends: tuple[str, ...] = ("learned", "given")
    far: tuple[str, ...] = ()
    group: str = ""
    config: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What each trained model is asked.

    Attributes:
      within: lengths of training, for the figure.
      beyond: lengths over which the accuracy per token is averaged.
      each: strings of each of these lengths, answered token by token.
      exact: lengths at which whole strings are counted.
      strings: how many of each of those; where one of the first 50 is wrong, these alone.
      structured: the length of the structured strings.
      far: the farthest length.
      far_strings: how many strings of it.
    """

    within: tuple[int, ...] = (4, 8, 16, 24, 32, 40)
    beyond: tuple[int, ...] = tuple(range(41, 501, 51))
    each: int = 32
    exact: tuple[int, ...] = (500, 1_000)
    strings: int = 1_000
    structured: int = 1_000
    far: int = 10_000
    far_strings: int = 20


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows, and what they share.

    Attributes:
      rows: by name.
      config: settings of every training by section; the model's are those of every row before its own.
      budgets: steps of a training, ascending: a model that is not exact at the longest trained length after the first
        is trained anew for the second, and so on. The last one counts, exact or not.
      tasks, symbols: for rows that do not say.
      longest: of the strings of training; all lengths from 1 on occur.
      asked: what the trained models are asked.
    """

    rows: dict[str, Row]
    config: dict[str, dict[str, Any]]
    budgets: tuple[int, ...] = (600, 2_400)
    tasks: tuple[str, ...] = ("copy", "reverse", "duplicate")
    symbols: tuple[int, ...] = (2,)
    longest: int = 40
    asked: Asked = Asked()

    @property
    def far(self) -> bool:
        """Whether any row is asked the farthest length."""
        return any(row.far for row in self.rows.values())

    def check(self):
        """Check every row before anything is trained.

        Raises:
          ConfigError: settings that cannot be, or ends that cannot be had.
        """
        _check_fields("", self, _TABLE)
        _check_fields("asked: ", self.asked, _ASKED)
        for name, row in self.rows.items():
            _check("a row's name", name, str, _NAME)
            _check(f"row {name!r}", row, Row)
            _check_fields(f"row {name!r}: ", row, _ROW)
            for end in row.ends:
                _check(f"row {name!r}: ends", end, str, one_of(ENDS))
            for task in row.far:
                _check(f"row {name!r}: far", task, str, one_of(row.tasks or self.tasks))
            for training in self.trainings(name):
                try:
                    config = self.configured(training, self.budgets[0])
                except ConfigError as error:
                    raise ConfigError(f"row {name!r}: {error}") from None
                longest, most = self.longest_asked(training), longest_input(config.model, config.task.vocabulary.room)
                if most is not None and longest > most:
                    raise ConfigError(
                        f"row {name!r}: strings of {longest:,} symbols are asked, but its positions can encode at most "
                        f"{most:,}: see max_length and positions.range of its model"
                    )
                needing = config.model.positions.needing_length()
                if "learned" in row.ends and (needing or MODELS[config.model.name].needs_length):
                    what = next(iter(needing.values()), config.model.name)
                    raise ConfigError(
                        f"row {name!r}: {what!r} must be told the length of the answer: ends must be ('given',)"
                    )

    def longest_asked(self, training: "Training") -> int:
        """Symbols of the longest string that a model is asked."""
        asked = self.asked
        farthest = (asked.far,) * self.is_far(training)
        return max(self.longest, asked.structured, *asked.within, *asked.beyond, *asked.exact, *farthest)

    def is_far(self, training: "Training") -> bool:
        """Whether a model is asked the farthest length."""
        return training.task in self.rows[training.row].far and training.seed < _FAR_SEEDS

    def budgets_of(self, name: str) -> tuple[int, ...]:
        """The steps of a row's trainings."""
        return self.rows[name].budgets or self.budgets

    def trainings(self, name: str) -> list["Training"]:
        """Everything that a row trains, seed by seed."""
        row = self.rows[name]
        return [
            Training(name, task, symbols, seed)
            for seed in range(row.seeds)
            for symbols in row.symbols or self.symbols
            for task in row.tasks or self.tasks
        ]

    def settings(self, training: "Training", steps: int) -> dict[str, dict[str, Any]]:
        """The settings of a training by section; what they leave out has its usual value."""
        row = self.rows[training.row]
        own = {
            "task": {"name": training.task, "symbols": training.symbols, "max_length": self.longest},
            "model": row.model,
            "training": {"seed": training.seed, "steps": steps},
        }
        groups = {*self.config, *row.config, *own}
        return {group: self.config.get(group, {}) | row.config.get(group, {}) | own.get(group, {}) for group in groups}

    def configured(self, training: "Training", steps: int) -> Config:
        """The config of a training.

        Raises:
          ConfigError: settings that cannot be.
        """
        return from_mapping(self.settings(training, steps))

    def builds_in(self, name: str) -> str:
        """What a row is told that others must learn."""
        row = self.rows[name]
        if row.builds_in is not None:
            return row.builds_in
        names = self.configured(self.trainings(name)[0], self.budgets[0]).model.positions.by_kind()
        said = {kind: ENCODINGS[each].builds_in for kind, each in names.items() if each != "none"}
        if len(set(said.values())) > 1:
            return "; ".join(f"{kind}: {text}" for kind, text in said.items())
        return next(iter(said.values()), ENCODINGS["none"].builds_in)


@dataclasses.dataclass(frozen=True)
class Training:
    """One model of a table."""

    row: str
    task: str
    symbols: int
    seed: int

    @property
    def name(self) -> str:
        """For files and lines."""
        return f"{self.row}-{self.task}-{self.symbols}-seed{self.seed}"


def _tuple_of(kind: type, example: str) -> Rule:
    """One or more texts, or whole numbers from 1 on."""
    rule = between(1) if kind is int else None

    def accepts(values):
        return len(values) > 0 and all(fault(kind, value, rule) is None for value in values)

    return Rule(f"a tuple such as {example}", accepts)


_NAME = Rule("of letters, digits, '_', '-' and '.'", lambda name: bool(re.fullmatch(r"\w[\w.-]*", name)))  # of a file
_TEXTS, _NUMBERS, _COUNT = _tuple_of(str, "('one', 'two')"), _tuple_of(int, "(1, 2)"), (int, between(1))
_TABLE = {
    "rows": (dict, Rule("a dict with one row or more", bool)),
    "config": (dict, None),
    "budgets": (tuple, _NUMBERS),
    "tasks": (tuple, _TEXTS),
    "symbols": (tuple, _NUMBERS),
    "longest": _COUNT,
    "asked": (Asked, None),
}
_ROW = {
    "model": (dict, None),
    "builds_in": (str | None, None),
    "tasks": (tuple | None, _TEXTS),
    "symbols": (tuple | None, _NUMBERS),
    "seeds": _COUNT,
    "budgets": (tuple | None, _NUMBERS),
    "ends": (tuple, _TEXTS),
    "far": (tuple, None),
    "group": (str, None),
    "config": (dict, None),
}
_ASKED = {name: (tuple, _NUMBERS) for name in ("within", "beyond", "exact")} | dict.fromkeys(
    ("each", "strings", "structured", "far", "far_strings"), _COUNT
)


def _check_fields(where: str, given: Any, rules: Mapping[str, tuple]):
    """Hold the fields of what was given against types and rules, by name."""
    for name, (hint, rule) in rules.items():
        _check(f"{where}{name}", getattr(given, name), hint, rule)


def _check(what: str, value: Any, hint: Any, rule: Rule | None = None):
    if said := fault(hint, value, rule):
        raise ConfigError(f"{what}: {said}")
