"""Folders that are not as they should be: one line that names the file and the key or the tensor, at once."""

import json
import shutil
import time

import jax
import numpy as np
import pytest

from attn import pretrained
from attn.pretrained.families import FAMILIES
from attn.pretrained.files import open_tensors, save_tensors
from attn.studies.recordings import recording

CASES = {"albert": "albert_masked", "llama": "llama_grouped", "bert": "bert_masked", "vit": "vit_classes"}


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes a recorded model with changes."""

    def write(case: str, *, tensors=lambda arrays: arrays, without=(), **keys):
        path = tmp_path / case
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        config = json.loads((recording(case).path / "config.json").read_text()) | keys
        (path / "config.json").write_text(json.dumps({k: x for k, x in config.items() if k not in without}))
        arrays = {name: tensor.read() for name, tensor in open_tensors(recording(case).path).items()}
        save_tensors(path / "model.safetensors", tensors(arrays))
        return path

    return write


def refusal(path, **options) -> str:
    """Return the message of a folder that is refused."""
    start = time.perf_counter()
    with pytest.raises(pretrained.FileError) as error:
        pretrained.load(path, **options)
    assert time.perf_counter() - start < 20
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_that_is_not_understood_is_one_line_unless_it_is_switched_off(folder, family):
    case = CASES.get(family, family)
    message = refusal(folder(case, use_my_trick=True, another=[1]))
    assert "key 'use_my_trick' = True, 'another' = [1] is not understood" in message
    assert "load(..., ignore=['use_my_trick', 'another'])" in message
    pretrained.load(folder(case, use_my_trick=False, another=None, hidden_dropout_prob=0.5, _name_or_path="x"))
    pretrained.load(folder(case, use_my_trick=True), ignore=["use_my_trick"])


@pytest.mark.parametrize(
    ("case", "keys", "expected"),
    [
        ("bert_masked", dict(position_embedding_type="relative_key"), "must be 'absolute': no other is implemented"),
        ("bert_masked", dict(hidden_act="gelu_10"), "key 'hidden_act': got 'gelu_10', must be one of relu, gelu"),
        ("bert_masked", dict(num_attention_heads=5), "key 'num_attention_heads': got 5, must divide the width 24"),
        ("bert_masked", dict(num_hidden_layers=10**9), "key 'num_hidden_layers': got 1000000000, must be at most"),
        ("bert_masked", dict(hidden_size=10**9), "must have"),
        ("bert_masked", dict(vocab_size=2**31 - 1), "must have [2147483647, 24]"),
        ("bert_masked", dict(max_position_embeddings=10**9), "at most 10,000,000"),
        ("bert_masked", dict(hidden_size="24"), "key 'hidden_size': got '24', must be a whole number"),
        ("bert_masked", dict(hidden_size=-1), "key 'hidden_size': got -1, must be a whole number from 1"),
        (
            "bert_masked",
            dict(architectures=["BertForMultipleChoice"]),
            "key 'architectures': got 'BertForMultipleChoice'",
        ),
        ("bert_masked", dict(architectures=5), "key 'architectures': got 5, must be"),
        ("bert_classes", dict(id2label=5), "key 'id2label': got 5, must be"),
        ("bert_masked", dict(model_type="bret"), "key 'model_type': got 'bret', must be one of albert, bart, bert"),
        ("albert_masked", dict(num_hidden_layers=10**9), "key 'num_hidden_layers': got 1000000000, must be at most"),
        ("albert_masked", dict(inner_group_num=2), "key 'inner_group_num': got 2, must be 1"),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "must be False: no other is implemented"),
        ("llama_grouped", dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "got 'yarn', must be default"),
        ("llama_grouped", dict(num_key_value_heads=4), "key 'num_key_value_heads': got 4, must divide"),
        (
            "llama_grouped",
            dict(rope_parameters={"rope_type": "default", "attention_factor": 2.0}),
            "'attention_factor'",
        ),
        ("t5", dict(feed_forward_proj="swish-gelu"), "key 'feed_forward_proj': got 'swish-gelu'"),
        ("vit_classes", dict(patch_size=[5, 3]), "key 'patch_size': got 5 x 3, must divide image_size = 8 x 12"),
        ("bart", dict(eos_token_id="x"), "key 'eos_token_id': got ['x'], must be a token or a list of tokens"),
    ],
)
def test_a_key_that_asks_for_something_else_is_one_line(folder, case, keys, expected):
    assert expected in refusal(folder(case, **keys))


def test_keys_that_are_needed_and_missing_are_named(folder):
    assert "key 'hidden_size': none given" in refusal(folder("bert_masked", without=["hidden_size"]))
    assert "key 'model_type': none given" in refusal(folder("bert_masked", without=["model_type"]))


def changed(name: str, change):
    return lambda arrays: arrays | {name: change(arrays[name])}


EMBEDDINGS, BIAS = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"


@pytest.mark.parametrize(
    ("tensors", "name", "expected"),
    [
        (changed(BIAS, lambda x: x * np.nan), BIAS, "holds NaN or infinity"),
        (changed(BIAS, lambda x: x + np.float32(np.inf)), BIAS, "holds NaN or infinity"),
        (changed(BIAS, lambda x: x.astype(np.int32)), BIAS, "got int32, must be floating-point numbers"),
        (changed(EMBEDDINGS, lambda x: x.T), EMBEDDINGS, "got shape [24, 61], must have [61, 24]"),
        (lambda a: a | {"extra.weight": np.ones(3)}, "extra.weight", "is not one of the model"),
        (lambda a: a | {"cls.predictions.decoder.weight": a[EMBEDDINGS] + 1}, "decoder.weight", "differs from"),
        (
            lambda a: a | {"bert.embeddings.LayerNorm.gamma": a["bert.embeddings.LayerNorm.weight"] + 1},
            "bert.embeddings.LayerNorm.gamma",
            "is there twice, also as 'bert.embeddings.LayerNorm.weight'",
        ),
    ],
)
def test_a_wrong_tensor_is_one_line(folder, tensors, name, expected):
    message = refusal(folder("bert_masked", tensors=tensors))
    assert name in message and expected in message


def test_copies_without_their_original_must_be_equal(folder):
    def moved(*factors):
        def tensors(arrays):
            table = arrays.pop("shared.weight")
            names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
            return arrays | {name: table * np.float32(factor) for name, factor in zip(names, factors)}

        return tensors

    model = pretrained.load(folder("t5", tensors=moved(1, 1)))
    inputs, expected = recording("t5").inputs(), recording("t5").outputs("float32")["logits"]
    rows = inputs["decoder_attention_mask"].astype(bool)
    np.testing.assert_allclose(np.asarray(model(**inputs).logits)[rows], expected[rows], atol=1e-5)
    assert "differs from 'shared.weight'" in refusal(folder("t5", tensors=moved(1, 2)))


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(pretrained.FileError, match="does not exist, must be a folder or a file on this machine"):
        pretrained.load(tmp_path / "bert-base-uncased")
    with pytest.raises(pretrained.FileError, match=r"config\.json"):
        pretrained.load(tmp_path)


def test_another_dtype_is_one_line(folder):
    path = folder("bert_masked")
    with pytest.raises(ValueError, match="dtype: got 'float16', must be one of float32, float64, bfloat16"):
        pretrained.load(path, dtype="float16")
    with pytest.raises(ValueError, match="dtype: got 'float64', which needs"):
        pretrained.load(path, dtype="float64")


def test_saving_keeps_dtypes_unused_tensors_and_the_files_beside(folder, tmp_path):
    half = np.float16
    path = folder(
        "bert_masked",
        tensors=lambda a: {name: x.astype(half) for name, x in a.items()} | {"cls.seq_relationship.bias": np.ones(2)},
    )
    (path / "tokenizer_config.json").write_text('{"a": 1}')
    model = pretrained.load(path)
    assert model.origin.ignored == ("cls.seq_relationship.bias",)
    target = tmp_path / "target"
    target.mkdir()
    (target / "tokenizer_config.json").write_text("{}")
    model.save(target)
    assert json.loads((target / "tokenizer_config.json").read_text()) == {"a": 1}
    before, after = open_tensors(path), open_tensors(target)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        np.testing.assert_array_equal(after[name].read(), tensor.read())
    large = pretrained.Pretrained(jax.tree.map(lambda x: x * 1e6, model.params), model.origin)
    with pytest.raises(pretrained.FileError, match="holds NaN or infinity in float16"):
        large.save(tmp_path / "large")
