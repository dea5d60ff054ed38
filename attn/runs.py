"""A trained run: its config, model and parameters, with methods to predict, evaluate and draw attention maps."""

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn.inspection import pictures
from attn.inspection.capture import Maps, answer_inputs, answer_logits, capture
from attn.inspection.passes import Pass
from attn.settings import LENGTHS, Constraint, between, checked
from attn.tasks.examples import Questions, padded
from attn.tasks.generated import Generated
from attn.tasks.stored import Stored
from attn.tasks.vocabulary import InputError, Pieces, Vocabulary
from attn.training import checkpoints, data, meshes
from attn.training.checks import longest_input
from attn.training.evaluation import Evaluator, Metrics, Track, batch_sizes, build_programs
from attn.training.folders import Folder, RunError
from attn.training.groups import BEAM_WIDTH, Config, ConfigError
from attn.training.history import saved_parameters
from attn.training.identity import digest_of
from attn.training.progress import shortened
from attn.training.state import initial_state, model_structure
from attn.viewer import View


def _are_texts(values: object) -> bool:
    return isinstance(values, Collection) and not isinstance(values, str) and all(isinstance(v, str) for v in values)


_TEXTS = Constraint("a list of texts", _are_texts)
_EXAMPLES_PER_LENGTH = 100  # default number of held-out examples


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """A trained model with the parameters of a checkpoint.

    Attributes:
      folder: the run's folder.
      config: the run's config.
      vocabulary: converts between text and tokens.
      graphdef, params: the model's structure and parameters, as `flax.nnx.split` gives them.
      step: of the checkpoint.
    """

    folder: pathlib.Path
    config: Config
    vocabulary: Vocabulary
    graphdef: nnx.GraphDef
    params: nnx.State
    step: int

    def __repr__(self) -> str:
        return "\n".join(self.about())

    @property
    def model(self) -> nnx.Module:
        """The model with its parameters: `model(source, target) -> logits`, for one example."""
        return nnx.merge(self.graphdef, self.params)

    @checked(texts=_TEXTS, beam_width=BEAM_WIDTH)
    def predict(self, texts: Sequence[str], *, beam_width: int = 1) -> list[str]:
        """Return the answers to inputs such as "3 1 4 1 5", in order. Unknown pieces are read as the unknown token.

        Args:
          texts: the inputs.
          beam_width: 1 for greedy decoding, more for a beam.

        Raises:
          InputError: an input is empty, has a symbol that is not one of the task's, or is longer than the positions can
            encode.
        """
        sources = [self.read(text, number) for number, text in enumerate(texts, start=1)]
        return [self.vocabulary.write(answer) for answer in self.answers(sources, beam_width)]

    def answers(self, sources: list[list[int]], beam_width: int = 1) -> list[np.ndarray]:
        """Return the answers as tokens to sources without end tokens."""
        if not sources:
            return []
        # Lengths and batch sizes are powers of two, so that few shapes are compiled.
        longest = _power_of_two(max(len(source) for source in sources))
        longest = min(longest, self.longest_input() or longest)
        batch_size = min(256, _power_of_two(len(sources)))
        lengths = np.array([len(source) for source in sources])
        with_ends = padded([[*source, self.vocabulary.source_end] for source in sources])
        evaluator, params = self._evaluator(longest, batch_size, beam_width)
        return [*evaluator.answers(params, with_ends, lengths)]

    def _evaluator(self, longest: int, batch_size: int, beam_width: int) -> tuple[Evaluator, nnx.State]:
        """Make an evaluator for sources of up to `longest` tokens in batches of at most `batch_size` rows.

        Also return the parameters, on its devices.
        """
        mesh = meshes.data_mesh(batch_size)
        sizes = batch_sizes(self.config, self.vocabulary, longest + 1, batch_size, mesh, beam_width)
        evaluator = Evaluator(self.vocabulary, mesh, sizes, *self._programs(mesh, beam_width))
        return evaluator, meshes.replicate(self.params, mesh)

    @functools.cached_property
    def _programs(self) -> Callable:
        """The cached function `(mesh, beam width) -> programs of an evaluator`."""
        return functools.cache(lambda mesh, beam: build_programs(self.vocabulary, self.graphdef, mesh, beam))

    @checked(lengths=LENGTHS, examples=between(1), beam_width=BEAM_WIDTH)
    def evaluate(
        self,
        lengths: Sequence[int] | None = None,
        examples: int | None = None,
        *,
        part: str | None = None,
        beam_width: int = 1,
        track: Track = iter,
    ) -> Metrics:
        """Return exact match, token accuracy and error rate by length, on held-out examples decoded autoregressively.

        Args:
          lengths: lengths of the sources in tokens; None for those of training, or for all lengths of a part.
          examples: largest number per length; None for 100, or, without lengths, for all examples of a part.
          part: of stored data: "test", "validation" and, from TFDS, "test_long"; None for "test", or, for lengths of a
            synthetic task, for newly generated strings, which may have other lengths than the stored ones.
          beam_width: 1 for greedy decoding, more for a beam.
          track: wraps the sequence of batches, to show progress.

        Raises:
          InputError: a length that the positions cannot encode or that the part lacks, or an unknown part.
          attn.tasks.examples.DataError: the data cannot be read any more.
          RunError: the data have changed since the run began, so that they may include what it was trained on.
        """
        questions = self.questions(lengths, examples, part)
        longest = int(questions.lengths.max())
        evaluator, params = self._evaluator(longest, self.config.evaluation.batch_size, beam_width)
        return evaluator.evaluate(params, questions, track).metrics

    @checked(lengths=LENGTHS, examples=between(1))
    def questions(
        self, lengths: Sequence[int] | None = None, examples: int | None = None, part: str | None = None
    ) -> Questions:
        """Return the questions of `evaluate`; arguments and errors as there."""
        questions = self._questions(lengths, examples, part)
        self.check_length(int(questions.lengths.max()))
        return questions

    def _questions(self, lengths: Sequence[int] | None, examples: int | None, part: str | None) -> Questions:
        config, seed, per_length = self.config, self.config.evaluation.seed, examples or _EXAMPLES_PER_LENGTH
        is_stored = config.data.source in ("pairs", "tfds")
        if part is None and config.data.source != "pairs" and (lengths is not None or not is_stored):
            task = config.task
            lengths = range(task.min_length, task.max_length + 1) if lengths is None else lengths
            return Generated(task).questions_of_each_length("test", lengths, per_length, seed)
        if not is_stored:
            raise InputError(f"part {part!r}: the examples of this run are generated; give lengths")
        stored, part = self._data, "test" if part is None else part
        if lengths is None and examples is None:
            return stored.part(part)
        lengths = np.unique(stored.part(part).lengths).tolist() if lengths is None else lengths
        return stored.questions_of_each_length(part, lengths, per_length, seed)

    @functools.cached_property
    def _data(self) -> Stored:
        stored = data.load(self.config, self.vocabulary)
        Folder(self.folder).check_data(stored)
        return stored

    def look(self, text: str) -> Maps:
        """Return the attention weights of every layer and head while the model answers `text`.

        Raises:
          InputError: as in `predict`.
        """
        source = self.read(text)
        return capture(self.model, self.vocabulary, source, *self.answers([source]))

    def with_graphdef(self, graphdef: nnx.GraphDef) -> "Run":
        """Return the run with another structure of the model for the same parameters; see `attn.interventions`."""
        return dataclasses.replace(self, graphdef=graphdef)

    def full_pass(self, text: str, answer: str | None = None) -> Pass:
        """Return the pass over a text and the answer to it, None for the model's own; see `attn.interventions`.

        Raises:
          InputError: as in `predict`.
        """
        source = self.read(text)
        if answer is None:
            [tokens] = self.answers([source])
        else:
            tokens = np.array([*self.vocabulary.read(answer, "target"), self.vocabulary.end])
        inputs, tokens = answer_inputs(self.vocabulary, source, tokens)
        return Pass(answer_logits, inputs, tokens)

    def history(self, warn: Callable[[str], None] = warnings.warn) -> list[tuple[int, "Run"]]:
        """Return the run as it was at earlier steps, by ascending step, and as it is, last.

        The steps are those of the snapshots (`config.training.snapshots`) and of the checkpoints that are kept.

        Args:
          warn: called with one line for each damaged file, which is left out.
        """
        saved = saved_parameters(Folder(self.folder), self.config, self.vocabulary, self.step, warn)
        runs = [
            (step, dataclasses.replace(self, params=jax.tree.map(jnp.asarray, params), step=step))
            for step, params in saved.items()
        ]
        return [*runs, (self.step, self)]

    def look_through_training(self, text: str, warn: Callable[[str], None] = warnings.warn) -> dict[int, Maps]:
        """Return the attention weights of every layer and head at each step of `history`.

        At every step the decoder reads the answer of this run, so that the rows are the same; the last is `look`.

        Args:
          text: the input.
          warn: as in `history`.

        Raises:
          InputError: as in `predict`.
        """
        source = self.read(text)
        from attn.viewing import frames

        return frames(self, source, *self.answers([source]), warn)

    def view(
        self,
        text: str,
        *,
        compare=None,
        training: bool = False,
        effects: bool = False,
        warn: Callable[[str], None] = warnings.warn,
    ) -> View:
        """Return a page of the attention weights while the model answers `text`, as `attn.view` makes it.

        Heads can be sorted by their mass on the true source as well, if the task says what that is.

        Args:
          text: the input.
          compare: a second run or pretrained model, beside it. A run with the same tokens reads the answer of this one.
          training: with a slider through training; see `history`. Of two runs, the steps that both have kept, and their
            ends.
          effects: also measure how exact match on held-out strings changes when each head is removed.
          warn: as in `history`.

        Raises:
          InputError: as in `predict`, or the second model has other tokens or maps of other sizes.
        """
        from attn.viewing import view_run  # imported here, since that module needs runs

        return view_run(self, text, compare=compare, training=training, effects=effects, warn=warn)

    @property
    def path(self) -> pathlib.Path:
        """The run's folder, under the name that pretrained models have for theirs."""
        return self.folder

    def token_names(self) -> list[str]:
        """Return the name of each token of the vocabulary."""
        return self.vocabulary.names(np.arange(self.vocabulary.size))

    def inspect(self, text: str, output: str | os.PathLike) -> pathlib.Path:
        """Draw the attention weights of every layer and head into a picture file, and return its path.

        Raises:
          InputError: as in `predict`.
        """
        return self.draw(self.look(text), output)

    def draw(self, maps: Maps, output: str | os.PathLike) -> pathlib.Path:
        """Draw captured attention weights into a picture file, and return its path."""
        pictures.save(pictures.draw_maps(maps, self.title(maps)), pathlib.Path(output))
        return pathlib.Path(output)

    def title(self, maps: Maps) -> str:
        """Return the title of maps: the run's name, the source and the answer, shortened."""
        length = len(maps.written) - (maps.written[-1] == "end")  # of the answer without its end token
        title = f"{self.name}: {' '.join(maps.source[:-1])}  →  {' '.join(maps.written[:length])}"
        return shortened(title, 90)

    @property
    def name(self) -> str:
        """The name of the run's task, or of its file of pairs."""
        return self.config.task.name if self.config.data.path is None else pathlib.Path(self.config.data.path).name

    def about(self) -> list[str]:
        """Describe the run in lines: its data, vocabulary, model and test metrics."""
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        summary = Folder(self.folder).summary()
        lines = [f"run         {self.folder}, step {self.step:,} of {self.config.training.steps:,}"]
        lines += [f"data        {line}" for line in Folder(self.folder).data()["about"]]
        lines += [f"vocabulary  {self.vocabulary.describe()}"]
        lines += [f"model       {self.config.model.name}, {count:,} parameters"]
        if summary:
            match = f"exact match {summary['exact_match']:.4f} of {summary['examples_evaluated']:,} held-out sources"
            test = f"test        {match}, error rate {summary['error_rate']:.4f}"
            lines += [test if summary["steps"] == self.step else f"{test} (of step {summary['steps']:,}, not this one)"]
        return lines

    def trained_lengths(self) -> tuple[int, int]:
        """Return the numbers of tokens of the shortest and the longest source of training."""
        if isinstance(self.vocabulary, Pieces):
            (shortest, _), *_ = self.vocabulary.longest_targets
            return shortest, self.vocabulary.longest_source
        return self.config.task.min_length, self.config.task.max_length

    def longest_input(self) -> int | None:
        """Return the number of tokens of the longest source that the model can encode; None for any number."""
        return longest_input(self.config.model, self.vocabulary.capacity)

    def read(self, text: str, number: int = 1) -> list[int]:
        """Return the tokens of an input; messages call it input number `number`.

        Raises:
          InputError: as in `predict`.
        """
        try:
            tokens = self.vocabulary.read(text)
            self.check_length(len(tokens))
            return tokens
        except InputError as error:
            raise InputError(f"input {number}: {error}") from None

    def check_length(self, length: int):
        """Check that the positions can encode a source of `length` tokens.

        Raises:
          InputError: the source is too long.
        """
        longest = self.longest_input()
        if longest is not None and length > longest:
            raise InputError(f"{length} tokens are more than the positions can encode, at most {longest}")


def load(run: str | os.PathLike, warn: Callable[[str], None] = warnings.warn) -> Run:
    """Load a run from its newest checkpoint that verifies, without changing anything in its folder.

    Args:
      run: the folder.
      warn: called with one line if newer checkpoints are damaged.

    Raises:
      RunError: not a run's folder, or it has no checkpoint yet, or none that can be used.
    """
    folder = Folder(run)
    try:
        config = folder.config()
    except (ConfigError, RunError):
        from attn.pretrained import is_foreign  # imported here, since runs do not need it

        if is_foreign(run):
            opens = "attn.pretrained.load opens it, attn inspect draws its maps"
            raise RunError(f"{run}: holds pretrained weights, not a run: {opens}") from None
        raise
    vocabulary = folder.vocabulary(config)
    graphdef, _ = model_structure(config, vocabulary)
    like = jax.eval_shape(lambda: initial_state(config, vocabulary))
    try:
        state = checkpoints.restore_newest(folder.checkpoints, like, digest_of(config), warn, set_aside=False)
    except checkpoints.CheckpointError as error:
        raise RunError(str(error)) from None
    if state is None:
        first = min(config.training.checkpoint_every, config.training.steps)
        raise RunError(f"{folder.path}: has no checkpoint yet (the first comes at step {first:,})")
    return Run(folder.path, config, vocabulary, graphdef, jax.tree.map(jnp.asarray, state.kept), int(state.step))


def load_history(run: str | os.PathLike, warn: Callable[[str], None] = warnings.warn) -> list[tuple[int, Run]]:
    """Load a run as it was at each step that was kept, by ascending step: `load(run).history()`.

    Raises:
      RunError: as in `load`.
    """
    return load(run, warn).history(warn)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
