"""GGUF: values as the package gguf 0.19.0 has them, and one line for whatever a file claims wrongly.

That package made the recorded blocks, with the values that it dequantises them to, and the recorded file.
"""

import struct

import numpy as np
import pytest
from pretrained import small_files as small
from pretrained.small_files import RECORDED, described, gguf_text, metadata

from attn.pretrained import files, gguf

QUANTISED = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w.gguf"


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("at_once", [1 << 13, 4])
def test_quantised_values_are_those_of_gguf(path, name, at_once, monkeypatch):
    monkeypatch.setattr(gguf, "_BLOCKS_AT_ONCE", at_once)
    with np.load(RECORDED / "blocks.npz") as recorded:
        blocks, values = recorded[f"{name}_blocks"], recorded[f"{name}_values"]
    rows, columns = values.shape
    tensor = described(dims=(columns, rows), type_=QUANTISED[name])
    array = small.read_all(small.write(path, small.gguf(tensors=[tensor], data=blocks.tobytes())))["w"]
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, values)


def test_infinite_scales_are_kept(path):
    block = np.array([np.inf], "<f2").tobytes() + bytes([0x80] * 16)  # integers -8 and 0
    content = small.gguf(tensors=[described(dims=(32,), type_=2)], data=block)
    np.testing.assert_array_equal(small.read_all(small.write(path, content))["w"], [-np.inf] * 16 + [np.nan] * 16)


def test_a_file_of_the_package_is_read():
    values, tensors = gguf.read(RECORDED / "written.gguf")
    scores = values.pop("tokenizer.ggml.scores")
    np.testing.assert_array_equal(scores, np.array([0.5, -1], np.float32))
    expected = {"general.architecture": "llama", "general.name": "ü", "llama.block_count": 2, "flag": True}
    assert values == expected | {"tokenizer.ggml.tokens": ["a", "ï", ""]}
    with np.load(RECORDED / "written.npz") as recorded:
        assert list(tensors) == list(recorded)
        for name, array in recorded.items():
            assert tensors[name].read().dtype == array.dtype
            np.testing.assert_array_equal(tensors[name].read(), array)


@pytest.mark.parametrize(
    ("type_", "dtype"),
    [(0, "f4"), (1, "f2"), (24, "i1"), (25, "i2"), (26, "i4"), (27, "i8"), (28, "f8"), (30, files.BFLOAT16)],
)
@pytest.mark.parametrize("version", [2, 3])
def test_plain_types_are_read(path, type_, dtype, version):
    """The fastest axis is the last of an array, and the first in the file."""
    values = np.arange(6).reshape(2, 3).astype(dtype)
    content = small.gguf(tensors=[described(dims=(3, 2), type_=type_)], data=values.tobytes(), version=version)
    array = small.read_all(small.write(path, content))["w"]
    assert array.dtype == values.dtype
    np.testing.assert_array_equal(array, values)


def test_metadata_of_each_type_are_read(path):
    numbers = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
    entries = [metadata(f"n{type_}", type_, struct.pack(f"<{code}", 7)) for type_, code in numbers.items()]
    arrays = [metadata(f"a{type_}", 9, struct.pack(f"<IQ2{code}", type_, 2, 7, 8)) for type_, code in numbers.items()]
    more = [
        metadata("t", 7, b"\1"),
        metadata("ts", 9, struct.pack("<IQ", 7, 2) + b"\1\0"),
        metadata("s", 8, gguf_text("é")),
    ]
    values, _ = gguf.read(small.write(path, small.gguf(entries + arrays + more)))
    for type_ in numbers:
        assert values[f"n{type_}"] == 7 and [*values[f"a{type_}"]] == [7, 8]
    assert values["t"] is True and [*values["ts"]] == [True, False] and values["s"] == "é"


def test_a_large_vocabulary_is_read(path):
    texts = [f"token {k}" for k in range(49_152)]
    entry = metadata("tokens", 9, struct.pack("<IQ", 8, len(texts)) + b"".join(map(gguf_text, texts)))
    small.write(path, small.gguf([entry]))
    assert gguf.read(path)[0] == {"tokens": texts}


def test_another_alignment(path):
    entry = metadata("general.alignment", 4, struct.pack("<I", 64))
    data = bytes(64) + small.DATA
    content = small.gguf([entry], [described(offset=64)], data, alignment=64)
    np.testing.assert_array_equal(small.read_all(small.write(path, content))["w"], small.SIX.reshape(2, 3))


def alignment(value: int) -> list[bytes]:
    return [metadata("general.alignment", 4, struct.pack("<I", value))]


HUGE = 2**64 - 1
REFUSED = {
    "magic": (small.gguf(magic=b"GGML"), "must begin with 'GGUF'"),
    "version 1": (small.gguf(version=1), "version 1;"),
    "big-endian": (small.gguf(version=3 << 24), "is big-endian"),
    "no counts": (b"GGUF\3\0\0\0", "the header ends"),
    "tensors": (small.gguf(counts=(HUGE, 0)), "more than fit"),
    "entries": (small.gguf(counts=(0, HUGE)), "more than fit"),
    "one tensor more": (small.gguf(counts=(2, 0), alignment=1), "the name of a tensor ends after"),
    "key": (small.gguf([struct.pack("<Q", HUGE)]), "a key of the metadata ends"),
    "key of bytes": (small.gguf([gguf_text(b"\xff") + bytes(12)]), "not valid UTF-8"),
    "key twice": (small.gguf([metadata("a", 0, b"1")] * 2), "'a' twice"),
    "text": (small.gguf([metadata("a", 8, struct.pack("<Q", HUGE))]), "'a' ends after"),
    "texts": (small.gguf([metadata("a", 9, struct.pack("<IQ", 8, HUGE))]), "more than fit"),
    "text of texts": (small.gguf([metadata("a", 9, struct.pack("<IQQ", 8, 1, HUGE))]), "'a' ends after"),
    "bytes of texts": (small.gguf([metadata("a", 9, struct.pack("<IQ", 8, 1) + gguf_text(b"\xff"))]), "UTF-8"),
    "array": (small.gguf([metadata("a", 9, struct.pack("<IQ", 12, HUGE))]), "'a' ends after"),
    "nested array": (small.gguf([metadata("a", 9, struct.pack("<IQIQ", 9, 1, 0, 0))]), "array of arrays"),
    "type of metadata": (small.gguf([metadata("a", 13, bytes(8))]), "unknown type 13"),
    "type of an array": (small.gguf([metadata("a", 9, struct.pack("<IQ", 99, 0))]), "unknown type 99"),
    "truth value": (small.gguf([metadata("a", 7, b"\2")]), "neither 0 nor 1"),
    "alignment 0": (small.gguf(alignment(0)), "is 0, must be a power of two"),
    "alignment 24": (small.gguf(alignment(24)), "is 24, must be"),
    "alignment 2^31": (small.gguf(alignment(2**31)), "must be a power of two"),
    "alignment of text": (small.gguf([metadata("general.alignment", 8, gguf_text("32"))]), "type str"),
    "name twice": (small.gguf(tensors=[described()] * 2), "tensor 'w': occurs twice"),
    "name": (small.gguf(tensors=[struct.pack("<Q", HUGE) + bytes(16)]), "the name of a tensor ends"),
    "axes": (small.gguf(tensors=[described(dims=(1,) * 5)]), "tensor 'w': has 5 axes"),
    "2^32 axes": (small.gguf(tensors=[gguf_text("w") + b"\xff" * 4 + bytes(12)]), "4,294,967,295 axes"),
    "shape": (small.gguf(tensors=[described(dims=(HUGE, HUGE))]), "tensor 'w': has a shape of more than"),
    "shape of zero": (small.gguf(tensors=[described(dims=(0, HUGE))]), "tensor 'w': has a shape of more than"),
    "longer than the file": (small.gguf(tensors=[described(dims=(7,))]), "of a file of"),
    "offset": (small.gguf(tensors=[described(offset=2**64 - 32)]), "tensor 'w': ends at byte"),
    "unaligned": (small.gguf(tensors=[described(offset=4)]), "must be at a multiple of 32"),
    "overlap": (small.gguf(tensors=[described("a"), described("b")]), "tensor 'b': overlaps"),
    "Q6_K": (small.gguf(tensors=[described(type_=14)]), "has type Q6_K, must be one of F32, F16, BF16"),
    "removed type": (small.gguf(tensors=[described(type_=4)]), "has type number 4"),
    "rows of 48": (small.gguf(tensors=[described(dims=(48, 2), type_=3)]), "rows of 48 elements"),
    "no rows": (small.gguf(tensors=[described(dims=(), type_=3)]), "no rows"),
}


@pytest.mark.parametrize(("content", "problem"), REFUSED.values(), ids=REFUSED)
def test_claims_that_are_wrong_are_refused(path, content, problem):
    assert problem in small.refusal(small.write(path, content))
    small.check_any(path, content)


@pytest.mark.parametrize("recorded", [True, False])
def test_any_damage_is_one_line(path, recorded):
    content = (RECORDED / "written.gguf").read_bytes() if recorded else small.gguf(alignment(32))
    for each in small.damaged(content, 150):
        small.check_any(path, each)
