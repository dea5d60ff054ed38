"""A trained run to ask: its config, model and parameters, and what the command line does with them."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from attn.inspection import pictures
from attn.inspection.capture import Maps, capture
from attn.nn.encodings import ENCODINGS
from attn.tasks.evaluation import strings_of_each_length
from attn.tasks.vocabulary import InputError, answer_text, parse
from attn.training import checkpoints, meshes
from attn.training.config import Config
from attn.training.decoding import greedy
from attn.training.folders import Folder, RunError
from attn.training.judging import Scores, Strings, build_judge, judge_all
from attn.training.state import initial_state, model_structure

_SCORES_IN_MEMORY = 1 << 24  # attention scores of one layer that a batch may hold at once


@dataclasses.dataclass(frozen=True)
class Run:
    """A model as some checkpoint left it.

    Attributes:
      folder: the run's.
      config: the run's.
      graphdef, params: the model's structure and parameters, as `flax.nnx.split` gives them.
      step: of the checkpoint.
    """

    folder: pathlib.Path
    config: Config
    graphdef: nnx.GraphDef
    params: nnx.State
    step: int

    @property
    def model(self) -> nnx.Module:
        """The model with its parameters: `model(source, target) -> logits`, for one example."""
        return nnx.merge(self.graphdef, self.params)

    def predict(self, texts: Sequence[str]) -> list[str]:
        """Answers to inputs such as "3 1 4 1 5", in order.

        Raises:
          InputError: an input that is empty, names an unknown symbol or is longer than the positions can encode.
        """
        strings = [self.parse(text, number) for number, text in enumerate(texts, start=1)]
        return [answer_text(self.config.task, answer) for answer in self._answers(strings)]

    def _answers(self, strings: list[np.ndarray]) -> list[np.ndarray]:
        """The answers to strings of symbols, as tokens."""
        # Few shapes, so that little is compiled: lengths and batches in powers of two.
        longest = _power_of_two(max(len(symbols) for symbols in strings))
        longest = min(longest, self.longest_input()) if self.longest_input() else longest
        batch_size = min(256, _power_of_two(len(strings)))
        answers = []
        for start in range(0, len(strings), batch_size):
            batch = np.zeros((batch_size, longest), np.int32)
            lengths = np.zeros(batch_size, np.int32)
            for row, symbols in enumerate(strings[start : start + batch_size]):
                batch[row, : len(symbols)], lengths[row] = symbols, len(symbols)
            answers.extend(jax.device_get(self._answer(self.params, batch, lengths)))
        return answers[: len(strings)]

    def evaluate(
        self, lengths: Sequence[int], examples: int = 100, *, track: Callable[[Sequence], Iterable] = iter
    ) -> Scores:
        """Exact match and token accuracy by length, on held-out strings answered freely.

        Args:
          lengths: of the sources, in symbols.
          examples: how many strings of each length; short lengths have fewer.
          track: wraps the sequence of batches, to show progress.

        Raises:
          InputError: a length that the positions cannot encode.
        """
        task, longest = self.config.task, max(lengths)
        self.check_length(longest)
        strings = Strings(*strings_of_each_length(task, lengths, examples, self.config.evaluation.seed))
        heads = self.config.model.num_heads
        batch_size = min(self.config.evaluation.batch_size, max(1, _SCORES_IN_MEMORY // (heads * (longest + 1) ** 2)))
        mesh = meshes.data_mesh(batch_size)
        judge = build_judge(task, self.graphdef, mesh, longest)
        params = meshes.replicate(self.params, mesh)
        return judge_all(judge, params, strings, batch_size, mesh, track=track).scores

    def look(self, text: str) -> Maps:
        """The attention weights of every layer and head while the model answers `text`.

        Raises:
          InputError: as `predict`.
        """
        symbols = self.parse(text)
        return capture(self.model, self.config.task, symbols, *self._answers([symbols]))

    def inspect(self, text: str, output: str | os.PathLike) -> pathlib.Path:
        """Draw the attention weights of every layer and head into a picture file.

        Raises:
          InputError: as `predict`.
        """
        return self.draw(self.look(text), output)

    def draw(self, maps: Maps, output: str | os.PathLike) -> pathlib.Path:
        """Draw captured attention weights into a picture file."""
        answer = " ".join(name for name in maps.written if name != "end")
        title = f"{self.config.task.name}: {' '.join(maps.source[:-1])}  →  {answer}"
        pictures.save(pictures.draw_maps(maps, title if len(title) < 90 else title[:89] + "…"), pathlib.Path(output))
        return pathlib.Path(output)

    def longest_input(self) -> int | None:
        """How many symbols the positions can encode; None for any number."""
        model = self.config.model
        return (model.max_length - 1) // self.config.task.kind.times if ENCODINGS[model.positions].learned else None

    def parse(self, text: str, number: int = 1) -> Int[np.ndarray, "n"]:
        """The symbols of input number `number`.

        Raises:
          InputError: as `predict`.
        """
        try:
            symbols = parse(self.config.task, text)
            self.check_length(len(symbols))
            return symbols
        except InputError as error:
            raise InputError(f"input {number}: {error}") from None

    def check_length(self, length: int):
        """Check that the positions can encode a source of `length` symbols.

        Raises:
          InputError: they cannot.
        """
        longest = self.longest_input()
        if longest is not None and length > longest:
            raise InputError(f"{length} symbols are more than the learned positions can encode, at most {longest}")

    @functools.cached_property
    def _answer(self) -> Callable:
        task, graphdef = self.config.task, self.graphdef

        def answer(params, symbols, length):
            source = task.source(symbols, length, len(symbols) + 1)
            return greedy(nnx.merge(graphdef, params), task, source, task.kind.times * len(symbols) + 1)

        return jax.jit(jax.vmap(answer, in_axes=(None, 0, 0)))


def load(run: str | os.PathLike) -> Run:
    """Open a run's folder at its newest checkpoint.

    Raises:
      RunError: not a run's folder, no checkpoint in it yet, or one that does not fit its config.
    """
    folder = Folder(run)
    config, step = folder.config(), folder.newest_step()
    if step is None:
        first = min(config.training.checkpoint_every, config.training.steps)
        raise RunError(f"{folder.path}: has no checkpoint yet (the first comes at step {first:,})")
    graphdef, _ = model_structure(config)
    try:
        state = checkpoints.restore(folder.checkpoints, step, jax.eval_shape(lambda: initial_state(config)))
    except checkpoints.CheckpointError as error:
        raise RunError(str(error)) from None
    return Run(folder.path, config, graphdef, jax.tree.map(jnp.asarray, state.params), step)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
