"""Reads config.json: every key that decides what is computed must be understood."""

import fnmatch
import pathlib
from collections.abc import Collection

from attn.nn.style import ACTIVATIONS
from attn.pretrained.files import FileError
from attn.settings import error_message, nearest

# Keys that do not decide what is computed from weights and inputs: names, training, initial values, tokens, generation.
_IGNORED = """
    model_type transformers_version transformers.js* torch_dtype dtype _* auto_map name_or_path language license tags
    *dropout* *_pdrop *layerdrop initializer_* init_std gradient_checkpointing use_cache pruned_heads use_bfloat16
    torchscript pretraining_tp attn_implementation return_dict* output_* is_llama_config
    *_token_id *_token_ids vocab_file tokenizer_class model_max_length predict_special_tokens prefix
    id2label label2id num_labels problem_type finetuning_task task_specific_params directionality summary_*
    pooler_fc_* pooler_num_* pooler_size_* pooler_type classifier_activation
    save_step sbert_* sentence_transformers max_sequence_length unsloth_* num_classes
    do_sample early_stopping num_beams num_beam_groups max_length min_length length_penalty temperature top_k top_p
    typical_p repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences
    diversity_penalty remove_invalid_values exponential_decay_length_penalty bad_words_ids suppress_tokens
    begin_suppress_tokens forced_* force_bos_token_to_be_generated
    normalize_before normalize_embedding add_bias_logits add_final_layer_norm static_position_embeddings
    extra_pos_embeddings
"""
IGNORED = tuple(_IGNORED.split())
# Names of activations in config.json, and ours.
_ACTIVATIONS = {
    **{name: name for name in ACTIVATIONS},
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu",
    "swish": "silu",
}
_MISSING = object()


class Keys:
    """The keys of a config.json, which remember what has been read.

    Args:
      values: the object that the file holds.
      path: of the file, for messages.
      ignore: keys that the user wants to be ignored.
    """

    def __init__(self, values: dict, path: pathlib.Path, ignore: Collection[str] = ()):
        self.values, self.path, self._read, self._ignored = values, path, set(), tuple(ignore)

    def take(self, name: str, default=_MISSING, *, hint: type = int):
        """Return the value of a key; None counts as missing where there is a default.

        Args:
          name: the key.
          default: the value if there is none; without a default the key must be there.
          hint: its type; an int must be positive.

        Raises:
          FileError: the key is missing, or its value is of another type.
        """
        self._read.add(name)
        value = self.values.get(name)
        if value is None and default is not _MISSING:
            return default
        if value is None:
            raise self.error(f"key {name!r}: none given, must be {_WORDS[hint]}")
        if message := error_message(hint, value):
            raise self.error(f"key {name!r}: {message}")
        if hint is int and not 0 < value < 2**31:
            raise self.error(f"key {name!r}: got {value}, must be {_WORDS[int]}")
        return value

    def architecture(self, *known: str) -> str:
        """Return the name of the model, which decides which heads it has; "" if there is none.

        Raises:
          FileError: it is not one of the known names.
        """
        names = self.take("architectures", [], hint=list)
        if not names or "architectures" in self._ignored:
            return ""
        if names[0] not in known:
            raise self.error(
                f"key 'architectures': got {names[0]!r}, must be one of {', '.join(known)}{nearest(names[0], known)}"
            )
        return names[0]

    def num_labels(self) -> int:
        """Return the number of classes."""
        return len(self.take("id2label", {}, hint=dict)) or self.take("num_labels", 2)

    def layers(self, name: str, default=_MISSING, *, most: int) -> int:
        """Return a number of layers, which must be at most `most`, since each is built before tensors are compared."""
        count = self.take(name, default)
        if count > most:
            raise self.error(f"key {name!r}: got {count}, must be at most {most:,} for the tensors that are there")
        return count

    def heads(self, name: str, width: int, head_width: int | None = None) -> int:
        """Return a number of heads, which must divide the width unless the width of a head is given."""
        count = self.take(name)
        if head_width is None and width % count:
            raise self.error(f"key {name!r}: got {count}, must divide the width {width}")
        return count

    def skip(self, *names: str):
        """Mark keys as understood whose values do not matter here."""
        self._read |= {*names}

    def activation(self, name: str, default: str) -> str:
        """Return the name of an activation, as `attn.nn.style` calls it."""
        given = self.take(name, default, hint=str)
        if given not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise self.error(f"key {name!r}: got {given!r}, must be one of {known}{nearest(given, _ACTIVATIONS)}")
        return _ACTIVATIONS[given]

    def expect(self, **values):
        """Check that keys have these values, or are missing or None: nothing else is implemented."""
        for name, value in values.items():
            self._read.add(name)
            if self.values.get(name) not in (None, value):
                raise self.error(f"key {name!r}: got {self.values[name]!r}, must be {value!r}: no other is implemented")

    def check_all_read(self, *ignored: str):
        """Check that every key has been read, or is ignored by name, or switched off (null, false, 0 or empty).

        Args:
          ignored: further names or patterns.

        Raises:
          FileError: a key is not understood.
        """
        for name in self._ignored:
            if name not in self.values:
                raise self.error(f"ignore: has no key {name!r}{nearest(name, self.values)}")
        patterns = (*IGNORED, *ignored, *self._ignored)
        unknown = [
            name
            for name, value in self.values.items()
            if name not in self._read and not any(fnmatch.fnmatch(name, each) for each in patterns) and value
        ]
        if unknown:
            shown = ", ".join(f"{name!r} = {repr(self.values[name])[:80]}" for name in unknown[:5])
            raise self.error(
                f"key {shown} is not understood, and may decide what is computed; if it does not: "
                f"load(..., ignore={unknown[:5]})"
            )

    def error(self, message: str) -> FileError:
        """Return an error about the file."""
        return FileError(f"{self.path}: {message}")


_WORDS = {int: "a whole number from 1 to 2,147,483,647", float: "a number", bool: "true or false", str: "text"}
_WORDS |= {dict: "an object", list: "a list"}
