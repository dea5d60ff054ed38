"""The models by name, for `config.model.name`.

A new model is one class, an `EncoderDecoder`, and one line here. What its `__init__` takes by name are its settings,
each a field of `attn.training.config.Model`.
"""

import inspect

from attn.nn.recurrent import RecurrentGRU, RecurrentLSTM
from attn.nn.tape import Tape
from attn.nn.transformer import Transformer

MODELS = {
    "transformer": Transformer,
    "lstm": RecurrentLSTM,
    "gru": RecurrentGRU,
    "tape": Tape,
}


def settings_of(name: str) -> list[str]:
    """The names of a model's settings."""
    taken = inspect.signature(MODELS[name].__init__).parameters.values()
    return [each.name for each in taken if each.kind is each.KEYWORD_ONLY and each.name != "rngs"]
