"""Files and folders of weights: written as they are read, described without reading, refused in one line."""

import json
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from pretrained import small_files as small
from pretrained.small_files import entry

from attn.pretrained import files

DTYPES = ["bool", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ml_dtypes.bfloat16]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w.safetensors"


def test_what_is_written_is_read(path):
    arrays = {str(dtype): np.arange(6).reshape(2, 3).astype(dtype) for dtype in DTYPES}
    arrays |= {"scalar": np.float32(2.5).reshape(()), "empty": np.zeros((0, 3), "f4"), "": np.ones(1, "f4")}
    files.save_tensors(path, arrays | {"transposed": arrays["f4"].T, "big-endian": arrays["f4"].astype(">f4")})
    arrays |= {"transposed": arrays["f4"].T, "big-endian": arrays["f4"]}
    read = small.read_all(path)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype and read[name].flags.c_contiguous
        np.testing.assert_array_equal(read[name], array)


def test_the_library_reads_what_is_written(path):
    files.save_tensors(path, {"w": small.SIX})
    np.testing.assert_array_equal(safetensors.numpy.load_file(path)["w"], small.SIX)
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_written_file_has_the_usual_permissions(path):
    files.save_tensors(path, {"w": small.SIX})
    other = small.write(path.with_name("other"), b"")
    assert path.stat().st_mode == other.stat().st_mode
    assert sorted(each.name for each in path.parent.iterdir()) == ["other", path.name]


def test_a_file_is_replaced_whole(path, monkeypatch):
    files.save_tensors(path, {"w": small.SIX})

    def fail(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(files.FileError, match=r"cannot be written \(No space left on device\)"):
        files.save_tensors(path, {"w": small.SIX * 2})
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    np.testing.assert_array_equal(small.read_all(path)["w"], small.SIX)


@pytest.mark.parametrize(
    ("name", "array", "problem"),
    [
        ("w", np.zeros(2, complex), "tensor 'w': has dtype complex128, must be"),
        ("w", np.array(["a"]), "tensor 'w': has dtype <U1"),
        ("__metadata__", np.zeros(2), "'__metadata__'"),
    ],
)
def test_arrays_that_cannot_be_written_are_refused(path, name, array, problem):
    with pytest.raises(files.FileError) as caught:
        files.save_tensors(path, {name: array})
    assert problem in str(caught.value) and not path.exists()


def test_a_folder_that_does_not_exist_is_not_written(path):
    with pytest.raises(files.FileError, match="cannot be written"):
        files.save_tensors(path / "w.safetensors", {"w": small.SIX})


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".gguf"])
def test_a_large_file_is_described_without_reading_it(tmp_path, suffix):
    """The file has a hole of 1 GB."""
    size, path = 1 << 28, tmp_path / f"w{suffix}"
    storage = small.storage(count=size)
    start = {
        ".safetensors": small.safetensors({"w": entry((size,), (0, 4 * size))}),
        ".bin": small.legacy(small.dict_of(w=small.tensor(0, (size,), (1,), storage)), count=size, data=b""),
        ".gguf": small.gguf(tensors=[small.described(dims=(size,))], data=b""),
    }
    small.write(path, start[suffix])
    os.truncate(path, path.stat().st_size + 4 * size)
    tracemalloc.start()
    tensors = files.open_tensors(path)
    assert tensors["w"].shape == (size,) and tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".gguf"])
def test_a_file_that_was_cut_off_since_is_one_line(tmp_path, suffix):
    start = {".safetensors": small.safetensors({"w": entry((6,), (0, 24))}, small.DATA)}
    content = (start | {".bin": small.legacy(), ".gguf": small.gguf()})[suffix]
    path = small.write(tmp_path / f"w{suffix}", content)
    tensor = files.open_tensors(path)["w"]
    os.truncate(path, len(content) - 4)
    with pytest.raises(files.FileError, match="tensor 'w': "):
        tensor.read()


TWICE = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}'
EIGHT = bytes(8)
REFUSED = {
    "empty": (b"", "an empty file"),
    "seven bytes": (b"1234567", "header too small"),
    "header of 2^64": (small.safetensors({}, length=2**64 - 1), "header too large"),
    "header beyond the file": (small.safetensors({}, length=1000), "header"),
    "not JSON": (small.safetensors(b"{"), "JSON"),
    "not UTF-8": (small.safetensors(b'{"\xff":1}'), "UTF-8"),
    "nested": (small.safetensors(b'{"w":' + b"[" * 10_000 + b"]" * 10_000 + b"}"), "recursion"),
    "cut off": (small.safetensors({"w": entry()}, EIGHT[:4]), "not fully covered"),
    "too long": (small.safetensors({"w": entry()}, EIGHT + b"1"), "not fully covered"),
    "hole": (small.safetensors({"v": entry(), "w": entry(offsets=(12, 20))}, bytes(20)), "offset for tensor `w`"),
    "overlap": (small.safetensors({"v": entry(), "w": entry(offsets=(4, 12))}, bytes(12)), "offset for tensor `w`"),
    "backwards": (small.safetensors({"w": entry(offsets=(8, 0))}, EIGHT), "offset"),
    "another shape": (small.safetensors({"w": entry((3,))}, EIGHT), "invalid shape"),
    "negative": (small.safetensors({"w": entry((-2,))}, EIGHT), "-2"),
    "fraction": (small.safetensors({"w": entry((2.0,))}, EIGHT), "2.0"),
    "truth value": (small.safetensors({"w": entry((True, 2))}, EIGHT), "boolean"),
    "2^64": (small.safetensors({"w": entry((2**64,))}, EIGHT), "JSON"),
    "2^66 elements": (small.safetensors({"w": entry((2**33, 2**33))}, EIGHT), "overflow"),
    "2^63 times 0": (small.safetensors({"w": entry((0, 2**63), (0, 0))}), "tensor 'w': has a shape of more than 2^63"),
    "65 axes": (small.safetensors({"w": entry((1,) * 65, (0, 4))}, EIGHT[:4]), "tensor 'w': has 65 axes"),
    "name twice": (small.safetensors(TWICE, EIGHT), "'w' occurs twice"),
    "unknown dtype": (small.safetensors({"w": entry(dtype="F99")}, EIGHT), "F99"),
    "F8": (small.safetensors({"w": entry((8,), dtype="F8_E4M3")}, EIGHT), "has dtype F8_E4M3, must be BF16, BOOL"),
    "line in a name": (
        small.safetensors({"a\nb\x1b" + "c" * 999: entry(dtype="C64", offsets=(0, 16))}, bytes(16)),
        "...",
    ),
    "metadata": (small.safetensors({"__metadata__": {"a": 1}, "w": entry()}, EIGHT), "JSON"),
    "digits": (small.safetensors(b'{"w":{"shape":[' + b"9" * 10_000 + b"]}}"), "JSON"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS"),
}


@pytest.mark.parametrize(("content", "problem"), REFUSED.values(), ids=REFUSED)
def test_headers_that_lie_are_refused(path, content, problem):
    assert problem in small.refusal(small.write(path, content))
    small.check_any(path, content)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".pth", ".gguf"])
@pytest.mark.parametrize("content", [b"", REFUSED["pointer"][0], b"\0" * 100, b"<html>" * 10])
def test_what_is_not_weights_is_refused_whatever_the_name(tmp_path, suffix, content):
    small.refusal(small.write(tmp_path / f"w{suffix}", content))


def test_any_damage_is_one_line(path):
    files.save_tensors(path, {"a": small.SIX, "b": small.SIX.astype(ml_dtypes.bfloat16)})
    for content in small.damaged(path.read_bytes(), 150):
        small.check_any(path, content)


@settings(deadline=None)
@given(
    header=st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_any_header_is_one_line(tmp_path_factory, header):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    for value in (header, {"w": header}, {"w": entry() | {"shape": header}}, {"w": entry() | {"data_offsets": header}}):
        small.check_any(path, small.safetensors(json.dumps(value).encode(), EIGHT))


def test_a_path_that_has_no_weights(tmp_path):
    (tmp_path / "w.bin").mkdir()
    names = "model.safetensors, model.safetensors.index.json, pytorch_model.bin or pytorch_model.bin.index.json"
    assert small.refusal(tmp_path) == f"has no weights; a folder must have {names}"
    assert small.refusal(tmp_path / "no.safetensors") == "does not exist"
    assert "must end with .safetensors, .bin" in small.refusal(small.write(tmp_path / "w.onnx", b"1"))
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(files.FileError, match=r"model\.safetensors: a folder, must be a file"):
        files.open_tensors(tmp_path)
    assert "too long" in small.refusal(tmp_path / ("a" * 300))
    os.mkfifo(tmp_path / "pipe.bin")
    assert "not a regular file" in small.refusal(tmp_path / "pipe.bin")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_with_one_file(tmp_path, name):
    content = small.zipped() if name.endswith(".bin") else small.safetensors({"w": entry((6,), (0, 24))}, small.DATA)
    small.write(tmp_path / name, content)
    np.testing.assert_array_equal(small.read_all(tmp_path)["w"].ravel(), small.SIX)


@pytest.fixture
def folder(tmp_path):
    """Two shards of one tensor each, and their index."""
    folder = tmp_path / "model"
    folder.mkdir()
    for number, name in enumerate("ab", start=1):
        files.save_tensors(folder / f"{number}.safetensors", {name: small.SIX + number})
    place(folder, a="1.safetensors", b="2.safetensors")
    return folder


def place(folder, **shards):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def test_shards_are_read(folder):
    (folder / "2.safetensors").rename(folder.parent / "blob")
    (folder / "2.safetensors").symlink_to("../blob.safetensors")
    (folder.parent / "blob").rename(folder.parent / "blob.safetensors")
    for path in (folder, folder / "model.safetensors.index.json"):
        arrays = small.read_all(path)
        assert list(arrays) == ["a", "b"]
        np.testing.assert_array_equal(arrays["b"], small.SIX + 2)


@pytest.mark.parametrize(
    ("shards", "problem"),
    [
        ({"a": "1.safetensors"}, None),
        ({"a": "1.safetensors", "b": "3.safetensors"}, "names the shard '3.safetensors', which does not exist"),
        ({"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}, "tensor 'c': is missing, but placed here"),
        ({"a": "1.safetensors", "c": "2.safetensors"}, "tensor 'b': is not named by model.safetensors.index.json"),
        ({"a": "2.safetensors", "b": "1.safetensors"}, "tensor 'b': is placed in '1.safetensors' by"),
        ({"a": "1.safetensors", "b": "./1.safetensors"}, "tensor 'a': is placed in '1.safetensors' by"),
        (
            {"a": "../1.safetensors"},
            "tensor 'a': is placed in '../1.safetensors', must be in a file of the same folder",
        ),
        ({"a": "x/../../1.safetensors"}, "must be in a file of the same folder"),
        ({"a": "/etc/passwd"}, "must be in a file of the same folder"),
        ({"a": "..\\1.safetensors"}, "must be in a file of the same folder"),
        ({"a": "1\n.safetensors"}, "must be in a file of the same folder"),
        ({"a": ""}, "must be in a file of the same folder"),
        ({"a": "."}, "must be in a file of the same folder"),
        ({"a": 1}, "a value of type int"),
        ({"a": "a" * 300}, "too long"),
        ({"a": "model.safetensors.index.json"}, "must end with"),
        ({}, "'weight_map' must be an object"),
    ],
)
def test_an_index_that_lies_is_refused(folder, shards, problem):
    place(folder, **shards)
    if problem is None:
        assert list(small.read_all(folder)) == ["a"]  # a shard that is not named is not read
    else:
        with pytest.raises(files.FileError) as caught:
            files.open_tensors(folder)
        assert problem in str(caught.value) and str(caught.value).isprintable()


def test_a_tensor_in_two_shards_is_refused(folder):
    files.save_tensors(folder / "2.safetensors", {"a": small.SIX, "b": small.SIX})
    with pytest.raises(files.FileError, match=r"2\.safetensors: tensor 'a': is placed in '1\.safetensors' by"):
        files.open_tensors(folder)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "does not exist"),
        (b"", "an empty file"),
        (b'{"a": 1', "not valid JSON"),
        (b"[1]", "holds a JSON list, must hold an object"),
        (b'{"a": "\xff"}', "invalid UTF-8 at byte 7"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' occurs twice"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "invalid UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    ],
)
def test_read_json(tmp_path, text, problem):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(files.FileError) as caught:
        files.read_json(path)
    assert problem in str(caught.value) and str(caught.value).isprintable()
    path.write_text('{"a": {"b": 1}}')
    assert files.read_json(path) == {"a": {"b": 1}}
