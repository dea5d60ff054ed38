"""Tokens of texts, and the maps of a text, by the library tokenizers."""

import json
import shutil

import numpy as np
import pytest

from attn import pretrained
from attn.cli import main
from attn.pretrained.tokens import load_tokens
from attn.studies.recordings import recording

tokenizers = pytest.importorskip("tokenizers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##like", "##ly", "words", ".", ","]


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a BERT whose vocabulary is made of WORDS and others."""
    folder = tmp_path / "model"
    shutil.copytree(recording("bert_masked").path, folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS + [f"word{n}" for n in range(61 - len(WORDS))]) + "\n")
    return folder


def test_words_become_pieces_with_the_ends_that_bert_expects(folder):
    tokens = load_tokens(folder)
    assert tokens.encode("Unlikely words.") == [2, 5, 6, 7, 8, 9, 3]
    assert tokens.encode("words", special=False) == [8]
    assert tokens.names([2, 5, 6, 8]) == ["[CLS]", "un", "##like", "words"]
    assert tokens.decode([2, 5, 6, 7, 8, 3]) == "unlikely words"


def test_a_vocabulary_of_symbols_is_read_symbol_by_symbol(tmp_path):
    symbols = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "C", "Cl", "[nH+]", "(", ")", "=", ">>"]
    (tmp_path / "vocab.txt").write_text("\n".join(symbols))
    tokens = load_tokens(tmp_path)
    assert tokens.encode("CCl(=C)>>[nH+]") == [2, 4, 5, 7, 9, 4, 8, 10, 6, 3]


def test_tokenizer_json_comes_first_and_its_padding_is_left_out(folder):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_padding(length=9, pad_id=0, pad_token="a")
    made.enable_truncation(2)
    made.save(str(folder / "tokenizer.json"))
    assert load_tokens(folder).encode("b a c b") == [1, 0, 2, 1]


def test_merges_of_bytes_are_read(tmp_path):
    pieces = ["a", "b", "Ġ", "ab", "Ġab", "Ċ"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: n for n, piece in enumerate(pieces)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n")
    tokens = load_tokens(tmp_path)
    assert tokens.encode("ab ab\n") == [3, 4, 5]
    assert tokens.names([3, 4, 5]) == ["ab", " ab", "\\n"] and tokens.decode([3, 4]) == "ab ab"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer that can be read, must have tokenizer.json"),
        ({"tokenizer.json": "{"}, "tokenizer.json"),
        ({"tokenizer.json": "{}"}, "the tokenizer cannot be read"),
        ({"vocab.txt": "a\nb\n"}, "vocab.txt: has no [CLS]"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_one_line(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(pretrained.FileError) as error:
        load_tokens(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_look_names_rows_and_columns_of_its_maps(folder):
    model = pretrained.load(folder)
    maps = model.look("unlikely words")
    assert maps.source == ["[CLS]", "un", "##like", "##ly", "words", "[SEP]"]
    expected = np.stack(model([[2, 5, 6, 7, 8, 3]]).attentions, axis=1)[0]
    np.testing.assert_array_equal(maps.weights["encoder"], expected)
    without = model.look("unlikely words", edit=lambda name, layer, weights: weights.at[0].set(0))
    assert (without.weights["encoder"][:, 0] == 0).all()


def test_inspect_draws_the_maps_of_a_folder(folder, tmp_path, capsys):
    picture = tmp_path / "maps.png"
    assert main(["inspect", str(folder), "unlikely words", "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "bert, " in told and "2 of 4 heads, width 24" in told
    for wrong in (["", "--output", str(picture)], ["words " * 30]):
        assert main(["inspect", str(folder), *wrong]) == 2 or wrong[0] == ""
        assert capsys.readouterr().err.count("\n") <= 1


def test_a_vision_model_shows_the_class_token_over_its_patches():
    model = pretrained.load(recording("vit_classes").path)
    pixels = recording("vit_classes").inputs()["pixel_values"][0]
    maps = model.look(pixels)
    assert maps.source == [f"{row},{column}" for row in range(2) for column in range(4)] + ["class"]
    of_class = np.stack(model(pixel_values=pixels[None]).attentions, axis=1)[0, :, :, 0]  # [L N 1 + patches]
    np.testing.assert_array_equal(maps.weights["encoder"][:, :, -1, :-1], of_class[..., 1:])


def test_an_encoder_decoder_shows_three_maps(folder):
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        shutil.copyfile(recording("bart").path / name, folder / name)
    model = pretrained.load(folder)
    maps = model.look("unlikely words", answer="words")
    assert {name: weights.shape for name, weights in maps.weights.items()} == {
        "cross": (1, 3, 3, 6),
        "decoder": (1, 3, 3, 3),
        "encoder": (2, 4, 6, 6),
    }
    assert maps.written == ["[CLS]", "words", "[SEP]"] and len(maps.read) == 3


def test_commands_of_runs_say_what_a_folder_of_weights_is_for(folder, capsys):
    assert main(["predict", str(folder), "words"]) == 2
    assert "holds pretrained weights, not a run: attn.pretrained.load opens it" in capsys.readouterr().err
    (folder / "model.safetensors").unlink()
    assert main(["inspect", str(folder), "words"]) == 2
    assert "has no weights" in capsys.readouterr().err


def test_inspect_draws_a_picture_from_a_file(tmp_path, capsys):
    vit = str(recording("vit_classes").path)
    pixels = tmp_path / "pixels.npy"
    np.save(pixels, recording("vit_classes").inputs()["pixel_values"][0])
    picture = tmp_path / "maps.png"
    assert main(["inspect", vit, str(pixels), "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", vit, "a text", "--output", str(picture)]) == 2
    assert "must be a .npy file with an array [C height width]" in capsys.readouterr().err
    assert main(["inspect", vit, "--output", str(picture)]) == 2
    assert "give an INPUT to draw" in capsys.readouterr().err
