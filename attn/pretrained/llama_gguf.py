"""Llama in GGUF files: the settings and tensors, under the names of the library transformers.

Source: the specification of the format, in the repository of ggml.
"""

import functools
import pathlib
from collections.abc import Mapping

import einops
import numpy as np

from attn.pretrained import gguf
from attn.pretrained.files import FileError, Tensor
from attn.pretrained.settings import Keys

# Names of tensors outside of the layers, and in layer {}.
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}


def read(path: pathlib.Path) -> tuple[dict, dict[str, Tensor], dict]:
    """Return what config.json would hold, the tensors by their other names, and the metadata.

    Raises:
      FileError: the file cannot be read, holds another model than a Llama, or metadata that are not understood.
    """
    metadata, tensors = gguf.read(path)
    kind = metadata.get("general.architecture")
    if kind != "llama":
        raise FileError(f"{path}: general.architecture: got {kind!r}, must be 'llama'")
    config = _config(Keys(metadata, path), tensors)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    return config, {_name(name): _ordered(name, each, heads) for name, each in tensors.items()}, metadata


def _config(keys: Keys, tensors: Mapping[str, Tensor]) -> dict:
    heads, width = keys.take("llama.attention.head_count"), keys.take("llama.embedding_length")
    head_width = keys.take("llama.attention.key_length", width // heads)
    keys.expect(
        **{
            "llama.attention.value_length": head_width,
            "llama.rope.dimension_count": head_width,
            "llama.rope.scaling.type": "none",
        }
    )
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise keys.error("tensor 'token_embd.weight': is missing")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": keys.take("llama.vocab_size", embedding.shape[0]),
        "hidden_size": width,
        "intermediate_size": keys.take("llama.feed_forward_length"),
        "num_hidden_layers": keys.take("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.take("llama.attention.head_count_kv", heads),
        "head_dim": head_width,
        "hidden_act": "silu",
        "rms_norm_eps": keys.take("llama.attention.layer_norm_rms_epsilon", hint=float),
        "rope_theta": keys.take("llama.rope.freq_base", 10_000.0, hint=float),
        "max_position_embeddings": keys.take("llama.context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    for name in ("bos", "eos", "padding"):
        token = keys.values.get(f"tokenizer.ggml.{name}_token_id")
        config[f"{name.removesuffix('ding')}_token_id"] = None if token is None else int(token)
    keys.check_all_read("general.*", "tokenizer.*")
    return config


def _name(name: str) -> str:
    """Return the other name of a tensor; one that is not known keeps its own, and is refused later."""
    if name in _NAMES:
        return _NAMES[name]
    match name.split("."):
        case ["blk", number, part, kind] if part in _IN_LAYER:
            return f"model.layers.{number}.{_IN_LAYER[part]}.{kind}"
    return name


def _ordered(name: str, tensor: Tensor, heads: Mapping[str, int]) -> Tensor:
    """Return a tensor whose rotated pairs (2 m, 2 m + 1) of queries and keys are moved to (m, m + H/2)."""
    part = name.split(".")[-2]
    if part not in heads or tensor.shape[0] % (2 * heads[part]):
        return tensor
    return tensor._replace(read=functools.partial(_unpermuted, tensor, heads[part]))


def _unpermuted(tensor: Tensor, heads: int) -> np.ndarray:
    return einops.rearrange(tensor.read(), "(n m two) ... -> (n two m) ...", n=heads, two=2)
