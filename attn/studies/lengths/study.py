"""A study of lengths: rows of models to train, tasks, alphabets, and the grid of strings they are evaluated on.

A study is a config file with `get_study()`, such as configs/lengths.py. Your own row is a `Row` in it; your own
mechanism is a class decorated with `attn.mechanisms.register`, in a module that `Study.imports` names.
"""

import dataclasses
import re
from typing import Any

from attn.mechanisms.rows import LengthUnknown
from attn.settings import Constraint, between, error_message, one_of
from attn.studies.lengths import priors
from attn.studies.mechanisms import PositionsUnknown
from attn.tasks.generated import Generated
from attn.training.checks import check_runs, longest_input, run_shapes
from attn.training.config import Config, ConfigError, from_mapping

ENDS = {
    "learned": "the model writes an end token of its own, which counts as a token",
    "given": "the length of the answer is given: the end token comes there and nowhere else, and does not count",
}

_FAR_SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Job:
    """One model of a study, which is trained and evaluated once."""

    row: str
    task: str
    symbols: int
    seed: int

    @property
    def name(self) -> str:
        """The name of its result."""
        return f"{self.row}-{self.task}-{self.symbols}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A kind of model, trained once for every task, alphabet and seed.

    Attributes:
      model: settings of the model, as of `config.model`.
      prior: the knowledge built into it, which others must learn; None to describe its mechanisms.
      tasks: names of tasks; None for those of the study.
      symbols: sizes of the alphabet; None for those of the study.
      seeds: number of seeds.
      budgets: steps of a training; None for those of the study.
      ends: keys of `ENDS`, the ends of its answers. The first one decides whether a training had enough steps.
      far: tasks that are also evaluated at the farthest length, for the first three seeds.
      group: rows of one group share a plot.
      config: further settings by section, such as {"optimizer": {...}}.
    """

    model: dict[str, Any]
    prior: str | None = None
    tasks: tuple[str, ...] | None = None
    symbols: tuple[int, ...] | None = None
    seeds: int = 3
    budgets: tuple[int, ...] | None = None
    ends: tuple[str, ...] = ("learned", "given")
    far: tuple = ()
    group: str = ""
    config: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The lengths at which a trained model is evaluated, and the numbers of strings.

    Attributes:
      within: lengths of training, for the figure.
      beyond: lengths over which the token accuracy is averaged.
      each: number of strings per length in `within` and `beyond`, decoded token by token.
      exact: lengths at which exact strings are counted.
      strings: number of strings per length in `exact`; if one of the first 50 is wrong, only these 50 are counted.
      structured: the length of the structured strings.
      far: the farthest length.
      far_strings: number of strings of that length.
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
class Study:
    """Rows, and the settings that they share.

    Attributes:
      rows: by name.
      config: settings of every training by section; those of a row replace them.
      budgets: ascending numbers of steps. A model that is not exact at the longest trained length after the first is
        trained again from the start with the second, and so on. The last training counts, exact or not.
      tasks, symbols: for rows that have none of their own.
      longest: the longest length of training, which has all lengths from 1 to this.
      grid: for the evaluation of the trained models.
      imports: modules that register models and mechanisms of the rows.
    """

    rows: dict[str, Row]
    config: dict[str, dict[str, Any]]
    budgets: tuple[int, ...] = (600, 2_400)
    tasks: tuple[str, ...] = ("copy", "reverse", "duplicate")
    symbols: tuple[int, ...] = (2,)
    longest: int = 40
    grid: Grid = Grid()
    imports: tuple[str, ...] = ("attn.studies.mechanisms",)

    @property
    def far(self) -> bool:
        """True if any row is evaluated at the farthest length."""
        return any(row.far for row in self.rows.values())

    def is_far(self, job: Job) -> bool:
        """Return whether a model is evaluated at the farthest length."""
        return job.task in self.rows[job.row].far and job.seed < _FAR_SEEDS

    def budgets_of(self, name: str) -> tuple[int, ...]:
        """Return the steps of a row's trainings."""
        return self.rows[name].budgets or self.budgets

    def jobs(self, name: str) -> list[Job]:
        """Return all models of a row, seed by seed."""
        row = self.rows[name]
        return [
            Job(name, task, symbols, seed)
            for seed in range(row.seeds)
            for symbols in row.symbols or self.symbols
            for task in row.tasks or self.tasks
        ]

    def settings(self, job: Job, steps: int) -> dict[str, Any]:
        """Return the settings of a training by section, and its imports; missing settings have their defaults."""
        row = self.rows[job.row]
        per_job = {
            "task": {"name": job.task, "symbols": job.symbols, "max_length": self.longest},
            "model": row.model,
            "training": {"seed": job.seed, "steps": steps},
        }
        groups = {*self.config, *row.config, *per_job}
        by_group = {g: self.config.get(g, {}) | row.config.get(g, {}) | per_job.get(g, {}) for g in groups}
        return {"imports": list(self.imports), **by_group}

    def configured(self, job: Job) -> Config:
        """Return the config of a model's first training.

        Raises:
          ConfigError: a setting is wrong.
        """
        return from_mapping(self.settings(job, self.budgets_of(job.row)[0]))

    def prior(self, name: str) -> str:
        """Return the knowledge built into a row, which others must learn."""
        if self.rows[name].prior is not None:
            return self.rows[name].prior
        mechanism = self.configured(self.jobs(name)[0]).model.mechanism
        kinds = {"encoder": mechanism} if isinstance(mechanism, str) else dataclasses.asdict(mechanism)
        words = {kind: priors.prior(text) for kind, text in kinds.items() if text != "none"}
        if len(set(words.values())) > 1:
            return "; ".join(f"{kind}: {text}" for kind, text in words.items())
        return next(iter(words.values()), priors.prior("none"))

    def check(self):
        """Check every row before anything is trained.

        Raises:
          ConfigError: a setting is wrong, or answers cannot end as a row says.
        """
        _check_fields("", self)
        _check("rows", self.rows, dict, Constraint("a dict with one row or more", bool))
        _check_fields("grid: ", self.grid)
        models_that_run = set()
        for name, row in self.rows.items():
            _check("a row's name", name, str, _FILE_NAME)
            _check(f"row {name!r}", row, Row)
            _check_fields(f"row {name!r}: ", row)
            for end in row.ends:
                _check(f"row {name!r}: ends", end, str, one_of(ENDS))
            for task in row.far:
                _check(f"row {name!r}: far", task, str, one_of(row.tasks or self.tasks))
            for job in self.jobs(name):
                try:
                    self._check_job(job, row, models_that_run)
                except ConfigError as error:
                    raise ConfigError(f"row {name!r}: {error}") from None

    def _check_job(self, job: Job, row: Row, models_that_run: set):
        """Check one job; models with the lengths of `models_that_run` are not traced again, and new ones are added."""
        config, grid = self.configured(job), self.grid
        farthest = (grid.far,) if self.is_far(job) else ()
        longest = max(self.longest, grid.structured, *grid.within, *grid.beyond, *grid.exact, *farthest)
        most = longest_input(config.model, config.task.vocabulary.capacity)
        if most is not None and longest > most:
            raise ConfigError(
                f"the grid has strings of {longest:,} symbols, but its mechanisms distinguish at most {most:,}"
            )
        data = Generated(config.task)
        source, vocabulary, ends_itself = data.longest_source, data.vocabulary, "learned" in row.ends
        lengths = source, vocabulary.capacity(source - 1), vocabulary.answer_length(source - 1)
        if (model := (config.model, lengths, ends_itself)) in models_that_run:  # whatever the seed and the alphabet
            return
        models_that_run.add(model)
        check_runs(config, data)
        if ends_itself:
            try:
                run_shapes(config, data, None)
            except PositionsUnknown:
                pass  # the length is only used to draw positions, which do not reveal where the answer ends
            except LengthUnknown as error:
                raise ConfigError(f"{error}: ends must be ('given',)") from None


def _tuple_of(kind: type, example: str) -> Constraint:
    """Make the constraint for a tuple of one or more texts, or of whole numbers from 1 on."""
    rule = between(1) if kind is int else None

    def accepts(values):
        return len(values) > 0 and all(error_message(kind, value, rule) is None for value in values)

    return Constraint(f"a tuple such as {example}", accepts)


_FILE_NAME = Constraint("of letters, digits, '_', '-' and '.'", lambda name: bool(re.fullmatch(r"\w[\w.-]*", name)))
_TEXTS, _NUMBERS = _tuple_of(str, "('one', 'two')"), _tuple_of(int, "(1, 2)")
# The type and constraint for an annotation of a field; other annotations are types without a constraint.
_ALLOWED = {
    int: (int, between(1)),
    tuple[str, ...]: (tuple, _TEXTS),
    tuple[int, ...]: (tuple, _NUMBERS),
    tuple[str, ...] | None: (tuple | None, _TEXTS),
    tuple[int, ...] | None: (tuple | None, _NUMBERS),
    dict[str, Any]: (dict, None),
    dict[str, Row]: (dict, None),
    dict[str, dict[str, Any]]: (dict, None),
}


def _check_fields(where: str, record: Study | Row | Grid):
    """Check the fields of a record against their annotations."""
    for field in dataclasses.fields(record):
        _check(f"{where}{field.name}", getattr(record, field.name), *_ALLOWED.get(field.type, (field.type, None)))


def _check(what: str, value: Any, hint: Any, rule: Constraint | None = None):
    if error := error_message(hint, value, rule):
        raise ConfigError(f"{what}: {error}")
