"""Checks of a config against its data, and of its model by tracing it: nothing is computed or written."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn.mechanisms.rows import LengthUnknown
from attn.nn.model import ModelSettings
from attn.nn.models import MODELS
from attn.settings import LONGEST
from attn.tasks.generated import Generated
from attn.tasks.stored import Stored
from attn.training.groups import Config, ConfigError
from attn.training.imports import line_of


def longest_input(model: ModelSettings, capacity: Callable[[int], int]) -> int | None:
    """Return the number of tokens of the longest source that the model can encode with its answer; None without limit.

    Args:
      model: settings of the model.
      capacity: from the number of tokens of a source to the largest number of tokens of its answer.
    """
    model_class = MODELS[model.name]
    limit = model_class.max_positions(model)
    return limit and max(n for n in range(limit) if model_class.num_positions(n + 1, capacity(n)) <= limit)


def check_fits(config: Config, data: Generated | Stored):
    """Check that the model can encode the longest source with its answer, and that early stopping has validation data.

    Raises:
      ConfigError: one of them does not hold.
    """
    _check_answers(config, data)
    model_class, longest = MODELS[config.model.name], data.longest_source
    limit, capacity = model_class.max_positions(config.model), data.vocabulary.capacity(longest - 1)
    needed = model_class.num_positions(longest, capacity)
    if limit is not None and limit < needed:
        raise ConfigError(
            f"config.model.mechanism: tells {limit} positions apart, must tell {needed} apart for {data.name} with "
            f"sources of {longest - 1} tokens"
        )
    count = config.training.stop_when_exact
    if count and isinstance(data, Generated):
        longest = data.task.max_length
        if not data.has_validation(longest):
            raise ConfigError(
                f"config.training.stop_when_exact: got {count}, must be 0 for {data.name} with strings of up to "
                f"{longest} symbols: too few of them are held out for a validation part"
            )


def _check_answers(config: Config, data: Generated | Stored):
    """Check that the model can write answers as long as those of the task."""
    if (needed := data.vocabulary.capacity(data.longest_source - 1)) > LONGEST + 1:
        raise ConfigError(f"config.task: an answer of {data.name} may have {needed - 1:,} tokens, at most {LONGEST:,}")
    if MODELS[config.model.name].max_answer(1) is None:
        return
    shortest = config.task.min_length if config.data.source != "pairs" else 1
    for length in range(shortest, data.longest_source):
        longest, needed = MODELS[config.model.name].max_answer(length + 1), data.vocabulary.capacity(length)
        if longest < needed:
            raise ConfigError(
                f"config.model.name: got {config.model.name!r}, whose answer to {length} tokens has at most "
                f"{longest - 1}, but that of {data.name} may have {needed - 1}"
            )


def check_runs(config: Config, data: Generated | Stored):
    """Check that the model runs on the longest source and its answer.

    Raises:
      ConfigError: a mechanism rejects its settings, or needs the length of the answer, which is not known; or code of
        the user raises an error.
    """
    try:
        run_shapes(config, data, data.vocabulary.answer_length(data.longest_source - 1))
    except Exception as error:  # a user's mechanism or model may raise anything
        for_data = f" for {data.name}" if isinstance(error, LengthUnknown) else ""
        is_refusal = isinstance(error, (LengthUnknown, ValueError, TypeError, NotImplementedError))
        if (message := in_one_line(error, config.imports, always=is_refusal)) is None:
            raise
        raise ConfigError(f"config.model: {message}{for_data}") from None


def in_one_line(error: Exception, imports: Sequence[str], *, always: bool = False) -> str | None:
    """Return the message of an error that tracing a model has raised, with the line of the user's file if it has one.

    Args:
      error: the error.
      imports: names of the user's modules.
      always: False to return None for an error that no line of these modules has raised.
    """
    line = "".join(line_of(error, name) for name in imports)
    if not line and not always:
        return None
    kind = "" if always else f"{type(error).__name__}: "
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith("in ")]  # not those of JAX
    return " ".join(", ".join([f"{kind}{error}", *notes]).split()) + line


def run_shapes(config: Config, data: Generated | Stored, answer_length: int | None):
    """Trace the model on the longest source and its answer, without computing; `answer_length` is None if unknown.

    This starts JAX's backend, so several hosts must have been joined before.

    Raises:
      TypeError, ValueError: attributes of the model, its logits or its attention weights are not as they must be.
    """
    source, vocabulary, name = data.longest_source, data.vocabulary, config.model.name

    def run():
        model = MODELS[name](vocabulary.size, config.model, nnx.Rngs(0))
        _check_attributes(model)
        tokens = [jnp.ones(length, int) for length in (source, vocabulary.capacity(source - 1))]
        key = jax.random.key(0) if config.model.dropout > 0 else None  # as in training
        logits, weights = model(*tokens, answer_length=answer_length, key=key, return_weights=True)
        if jnp.shape(logits) != (len(tokens[1]), vocabulary.size) or logits.dtype != jnp.float32:
            raise ValueError(
                f"{name!r} returns logits {jax.typeof(logits)}, must be float32[{len(tokens[1])},{vocabulary.size}]"
            )
        if unknown := sorted(weights.keys() - {name for name, *_ in model.maps}):
            raise ValueError(f"{name!r} returns attention weights {unknown}, which its maps do not name")
        for each, x in weights.items():
            if jnp.ndim(x) != 4:
                raise ValueError(
                    f"{name!r} returns attention weights {each!r} {jax.typeof(x)}, must be [L N rows columns]"
                )

    nnx.eval_shape(run)


def _check_attributes(model: nnx.Module):
    """Check that arrays in a model are parameters in float32, which are trained and saved."""
    for _, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            where = f"{type(module).__name__}.{name}"
            if isinstance(value, nnx.Param):
                if value.dtype != jnp.float32:
                    raise TypeError(f"{where}: got a parameter of {value.dtype}, must be float32")
            elif isinstance(value, jax.Array | np.ndarray | nnx.Variable | nnx.Rngs):
                kind = "an array of JAX" if isinstance(value, jax.Array) else type(value).__name__
                raise TypeError(
                    f"{where}: got {kind}, must be a HeadParam, an nnx.Param or a Python value: make "
                    "constant arrays in the function that uses them, or with NumPy at the top of the file"
                )
