"""The models by name, for `config.model.name`.

A new model is one class, a `Model` with a dataclass of settings, and one line here; outside of the package, one class
with the decorator `@register("name")`.
"""

from collections.abc import Callable

from attn.nn.decoder_only import DecoderOnly
from attn.nn.encoder_only import EncoderOnly
from attn.nn.model import Model
from attn.nn.recurrent import RecurrentGRU, RecurrentLSTM
from attn.nn.transformer import Transformer
from attn.nn.vision_transformer import VisionTransformer

MODELS: dict[str, type[Model]] = {
    "transformer": Transformer,
    "decoder_only": DecoderOnly,
    "encoder_only": EncoderOnly,
    "vision_transformer": VisionTransformer,
    "lstm": RecurrentLSTM,
    "gru": RecurrentGRU,
}


def register(name: str) -> Callable[[type[Model]], type[Model]]:
    """Register a model under a name; a decorator of its class.

    Raises:
      TypeError: the name is not a Python name, the class is not a model with `settings`, `start` and `extend`, or its
        `maps` are not as documented.
      ValueError: another model has the name.
    """

    if not isinstance(name, str) or not name.isidentifier():
        raise TypeError(f"register: got {name!r}, must be a name: @register('my_model')")

    def add(model: type[Model]) -> type[Model]:
        is_model = isinstance(model, type) and issubclass(model, Model)
        if not is_model or not all(hasattr(model, part) for part in ("settings", "start", "extend")):
            raise TypeError(f"model {name!r}: got {model!r}, must be a Model with settings, start and extend")
        for each in model.maps:
            if not isinstance(each, tuple) or len(each) != 3 or not {*each[1:]} <= {"source", "answer", "both"}:
                raise TypeError(
                    f"model {name!r}: maps: got {each!r}, must be (name, rows, columns), the last two of 'source', "
                    "'answer' and 'both'"
                )
        if MODELS.setdefault(name, model) is not model:
            raise ValueError(f"model {name!r}: is known already; choose another name")
        return model

    return add
