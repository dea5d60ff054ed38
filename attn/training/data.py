"""Loads the data that a config describes."""

from attn import tasks
from attn.tasks.generated import Generated
from attn.tasks.stored import Stored
from attn.tasks.vocabulary import Vocabulary
from attn.training.config import Config, ConfigError
from attn.training.progress import waiting


def load(config: Config, vocabulary: Vocabulary | None = None) -> Generated | Stored:
    """Load the data of a config.

    Args:
      config: of a run.
      vocabulary: the vocabulary of a run of pairs that is resumed; None to make one from the pairs.

    Raises:
      ConfigError: pairs without a file.
      attn.tasks.examples.DataError: files that cannot be used for training.
    """
    data = config.data
    if data.source == "pairs":
        if data.path is None:
            raise ConfigError("config.data.path: none given; name a file of pairs, --config.data.path=FILE")
        settings = {name: getattr(data, name) for name in ("path", "tokens", "validation", "test", "longest")}
        with waiting(f"reading {data.path}"):
            return tasks.load("pairs", **settings, vocabulary=vocabulary)
    return tasks.load(**vars(config.task), source=data.source, folder=data.folder)
