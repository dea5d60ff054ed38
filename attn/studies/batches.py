"""Training batches whose examples have one length each, so that batches of short strings take little time.

Importing this registers two sources of data, for `config.data.source`:

- "one_length": every length of the task is equally likely, as in Deletang et al. 2023, section 4;
- "short_strings": shorter lengths are more likely, so that models see many short strings and still some long ones.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from attn import tasks
from attn.tasks.examples import Bucket, Example
from attn.tasks.generated import DrawnBatches, Generated, bucket_of

_LENGTHS = 2  # folded into a run's key to draw the lengths of batches
_WIDTHS = 4  # number of widths that batches are padded to


@dataclasses.dataclass(frozen=True)
class OneLengthBatches(DrawnBatches):
    """Batches whose examples have one length, drawn per step, and are padded to one of a few widths."""

    @functools.cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """The shapes of batches."""
        task, parts = self.data.task, range(1, _WIDTHS + 1)
        longest = sorted({max(task.min_length, -(-task.max_length * part // _WIDTHS)) for part in parts})
        tasks = [dataclasses.replace(task, max_length=length) for length in longest]
        return tuple(bucket_of(task.sample, self.batch_size) for task in tasks)

    def draw(self, step: int | Int[Array, ""]) -> tuple[Int[Array, ""], Callable[[Array], Example]]:
        """Return the number of a step's bucket, and the function that draws an example of the step's length."""
        key = jax.random.fold_in(jax.random.key(self.seed), _LENGTHS)
        length = self.data.draw_length(jax.random.fold_in(key, step))
        longest = jnp.array([bucket.source - 1 for bucket in self.buckets])  # less the end token
        return jnp.searchsorted(longest, length), functools.partial(self.data.task.sample, length=length)


@dataclasses.dataclass(frozen=True, repr=False)
class OneLength(Generated):
    """The data of a task, drawn in batches of one length."""

    def batches(self, batch_size: int, seed: int) -> OneLengthBatches:
        """Return the training batches."""
        return OneLengthBatches(self, batch_size, seed)

    def draw_length(self, key: Array) -> Int[Array, ""]:
        """Draw the length of a batch, uniformly."""
        return self.task.draw_length(key)


@dataclasses.dataclass(frozen=True, repr=False)
class ShortStrings(OneLength):
    """The data of a task, drawn in batches of one length n with a probability of about 1/sqrt(n)."""

    def draw_length(self, key: Array) -> Int[Array, ""]:
        """Draw the length of a batch: sqrt(n) is uniform, and n is rounded down."""
        low, high = self.task.min_length**0.5, (self.task.max_length + 1) ** 0.5
        length = jax.random.uniform(key, minval=low, maxval=high) ** 2
        return jnp.clip(length.astype(jnp.int32), self.task.min_length, self.task.max_length)  # rounding may leave it


tasks.SOURCES["one_length"] = OneLength
tasks.SOURCES["short_strings"] = ShortStrings
