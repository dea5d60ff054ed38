"""A Llama in a GGUF file computes what it computes in a folder, from which the file is made here."""

import json
import struct

import numpy as np
import pytest
from pretrained import small_files as small

from attn import pretrained
from attn.pretrained.files import open_tensors
from attn.studies.recordings import recording

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}
KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "vocab_size": "vocab_size",
}


def entries(config: dict, **more: bytes) -> list[bytes]:
    """Return the metadata of a file."""
    values = [small.metadata(f"llama.{key}", 4, struct.pack("<I", config[theirs])) for key, theirs in KEYS.items()]
    base = config["rope_parameters"]["rope_theta"]
    return [
        small.metadata("general.architecture", 8, small.gguf_text("llama")),
        *values,
        small.metadata("llama.rope.freq_base", 6, struct.pack("<f", base)),
        small.metadata("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", config["rms_norm_eps"])),
        *more.values(),
    ]


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """Move the rows of rotated pairs (m, m + H/2) to (2 m, 2 m + 1), one head after the other."""
    rows = []
    for head in np.split(array, heads):
        first, second = np.split(head, 2)
        for pair in zip(first, second):
            rows += pair
    return np.array(rows)


def write(path, case: str, **more: bytes):
    """Write the recorded model of a case as a GGUF file."""
    config = json.loads((recording(case).path / "config.json").read_text())
    tensors, data = [], b""
    for name, tensor in open_tensors(recording(case).path).items():
        array = tensor.read()
        for part, count in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if part in name:
                array = interleaved(array, config[count])
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        tensors.append(small.described(name, array.shape[::-1], 0, len(data)))
        data += array.tobytes() + b"\0" * (-array.nbytes % 32)
    small.write(path, small.gguf(entries(config, **more), tensors, data))


def test_it_computes_what_the_folder_computes(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, "llama_grouped")
    recorded = recording("llama_grouped")
    expected = recorded.outputs("float32")["logits"]
    model = pretrained.load(path)
    rows = recorded.inputs()["attention_mask"].astype(bool)
    np.testing.assert_allclose(np.asarray(model(**recorded.inputs()).logits)[rows], expected[rows], atol=1e-5)
    # Saved, it is a folder as any other.
    model.save(tmp_path / "folder")
    again = pretrained.load(tmp_path / "folder")
    np.testing.assert_array_equal(again(**recorded.inputs()).logits, model(**recorded.inputs()).logits)


@pytest.mark.parametrize(
    ("key", "type_", "content", "expected"),
    [
        (
            "llama.rope.scaling.type",
            8,
            small.gguf_text("yarn"),
            "'llama.rope.scaling.type': got 'yarn', must be 'none'",
        ),
        ("llama.expert_count", 4, struct.pack("<I", 8), "'llama.expert_count' = 8 is not understood"),
        ("llama.rope.dimension_count", 4, struct.pack("<I", 2), "'llama.rope.dimension_count': got 2, must be 4"),
    ],
)
def test_metadata_that_decide_something_else_are_one_line(tmp_path, key, type_, content, expected):
    path = tmp_path / "model.gguf"
    write(path, "llama_grouped", more=small.metadata(key, type_, content))
    with pytest.raises(pretrained.FileError) as error:
        pretrained.load(path)
    assert expected in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_another_architecture_is_one_line(tmp_path):
    content = small.gguf([small.metadata("general.architecture", 8, small.gguf_text("qwen2"))])
    path = small.write(tmp_path / "model.gguf", content)
    with pytest.raises(pretrained.FileError, match=r"general\.architecture: got 'qwen2', must be 'llama'"):
        pretrained.load(path)
