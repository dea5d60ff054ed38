"""Files of PyTorch without PyTorch: as torch reads them, and nothing that a pickle asks for is executed.

The recorded files were written by torch 2.14.1.
"""

import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from pretrained import small_files as small
from pretrained.small_files import RECORDED, dict_of, integer, named, storage, tensor, text, tuple_of, zipped

from attn.pretrained import files, pickles


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w.bin"


@pytest.mark.parametrize("name", ["zip.bin", "zip_protocol_4.bin", "legacy.bin"])
def test_tensors_are_those_of_torch(name):
    """All dtypes, views with strides and offsets, shared storages and parameters."""
    arrays = small.read_all(RECORDED / name)
    with np.load(RECORDED / "values.npz") as values:
        assert list(arrays) == list(values)
        for key, expected in values.items():
            array = arrays[key]
            if key == "bf16":
                assert array.dtype == files.BFLOAT16
                array = array.view(np.uint16)
            assert array.dtype == expected.dtype and array.flags.c_contiguous
            np.testing.assert_array_equal(array, expected)


def test_the_weights_of_a_checkpoint_of_training_are_taken():
    assert list(small.read_all(RECORDED / "checkpoint.bin")) == ["f32"]


def test_a_module_is_refused_by_name():
    assert "asks for torch.nn.modules.linear.Linear, which is not executed" in small.refusal(RECORDED / "module.bin")


@pytest.mark.parametrize("make", [zipped, small.legacy])
def test_small_files_are_read(path, make):
    np.testing.assert_array_equal(small.read_all(small.write(path, make()))["w"], small.SIX.reshape(2, 3))


@pytest.mark.parametrize("make", [zipped, small.legacy])
@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_executed(path, tmp_path, make, protocol):
    """Whatever the protocol names the function by: GLOBAL, STACK_GLOBAL, or instructions of protocol 0."""

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    body = pickle.dumps({"w": Attack()}, protocol)
    small.write(path, make(body.removeprefix(b"\x80\x02")[: -1 if protocol == 2 else None]))
    assert "is not executed" in small.refusal(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "asked", ["os.system", "builtins.eval", "torch._utils._rebuild_tensor", "collections.OrderedDict.fromkeys"]
)
@pytest.mark.parametrize("stack", [False, True])
def test_a_global_is_refused_by_name(path, asked, stack):
    module, name = asked.split(".", 1) if asked.startswith("coll") else asked.rsplit(".", 1)
    body = text(module) + text(name) + b"\x93" if stack else named(module, name)
    message = small.refusal(small.write(path, zipped(body + tuple_of(text("echo")) + b"R")))
    assert message == f"its pickle asks for {asked}, which is not executed; only tensors are read"


ORDERED = named("collections", "OrderedDict")

REFUSED = {
    "EXT1": (b"\x82\x01", "EXT1"),
    "EXT4": (b"\x84\x01\0\0\0", "EXT4"),
    "NEWOBJ": (ORDERED + b")\x81", "NEWOBJ"),
    "INST": (b"(ios\nsystem\n", "INST"),
    "PERSID": (b"P0\n", "PERSID"),
    "OrderedDict of arguments": (ORDERED + tuple_of(integer(1)) + b"R", "calls collections.OrderedDict"),
    "call of no tuple": (ORDERED + b"]R", "calls collections.OrderedDict"),
    "call of a storage": (named("torch", "FloatStorage") + b")R", "calls torch.FloatStorage"),
    "call of a number": (integer(1) + b")R", "calls something"),
    "state of a list": (b"]" + dict_of(a=integer(1)) + b"b", "sets attributes"),
    "state of no dictionary": (b"}" + integer(1) + b"b", "sets attributes"),
    "parameter of no tensor": (
        named("torch._utils", "_rebuild_parameter") + tuple_of(integer(1), b"\x88", b"N") + b"R",
        "calls torch._utils._rebuild_parameter",
    ),
    "id of no storage": (tuple_of(text("module"), integer(1)) + b"Q", "not a storage"),
    "id of a number": (integer(1) + b"Q", "not a storage"),
    "complex storage": (dict_of(w=tensor(stored=storage("ComplexFloatStorage"))), "torch.ComplexFloatStorage"),
    "view of a storage": (dict_of(w=tensor(stored=storage(view=tuple_of(text("k"))))), "view of another"),
    "storage described twice": (
        dict_of(w=tensor(), v=tensor(stored=storage(count=5), shape=(), strides=())),
        "'0' in two ways",
    ),
    "negated view": (dict_of(w=tensor(more=dict_of(neg=b"\x88"))), "metadata"),
    "list": (b"]", "holds a value of type list"),
    "no tensors": (dict_of(a=integer(1)), "no tensors"),
    "two models": (dict_of(model=dict_of(w=tensor()), state_dict=dict_of(w=tensor())), "one model"),
    "list among tensors": (dict_of(w=tensor(), v=b"]"), "'v' is a value of type list"),
    "number as name": (b"}(" + integer(3) + tensor() + b"u", "key 3"),
    "tuple as key": (b"}()Nu", "a value of type tuple"),
    "name twice": (b"}(" + (text("w") + tensor()) * 2 + b"u", "'w' occurs twice"),
    "memo never filled": (b"h\x05", "damaged"),
    "empty stack": (b"\x86", "damaged"),
    "no mark": (b"t", "damaged"),
    "two values": (b"NN", "more than one value"),
    "unknown instruction": (b"\xff", "unknown"),
    "long integer": (b"\x8b" + struct.pack("<i", 1000) + b"\1" * 1000, "10 bytes"),
    "line in a name": (named("os\x1b[2J\r", "x"), "asks for os [2J .x"),
}


@pytest.mark.parametrize(("body", "problem"), REFUSED.values(), ids=REFUSED)
def test_instructions_that_files_of_weights_do_not_need_are_refused(path, body, problem):
    assert problem in small.refusal(small.write(path, zipped(body)))


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (tensor(offset=1), "ends at element 7 of a storage of 6"),
        (tensor(offset=-1), "at least 0"),
        (tensor(shape=(2, 4)), "ends at element 7"),
        (tensor(strides=(2**62, 1)), "ends at element"),
        (tensor(strides=(-3, 1)), "at least 0"),
        (tensor(strides=(3,)), "one stride per axis"),
        (tensor(shape=(2**63, 1)), "at least 0"),
        (tensor(shape=(2**62, 2**62), strides=(0, 0)), "2^63 bytes"),
        (tensor(shape=(0, 2**62, 2**62), strides=(1, 1, 1)), "2^63 bytes"),
        (tensor(shape=(2**40,), strides=(0,)), "has 1,099,511,627,776 elements, but its storage has 6"),
        (tensor(shape=(1,) * 65, strides=(1,) * 65), "65 axes"),
        (tensor(shape=(2, 3, 1), strides=(3, 1, 2**62)), None),  # the stride of one element means nothing
        (tensor(shape=(3, 2), strides=(1, 1)), None),  # overlapping rows
        (tensor(shape=(0,), strides=(2**62,)), None),
    ],
)
def test_views_lie_in_their_storage(path, body, problem):
    small.write(path, zipped(dict_of(w=body)))
    if problem:
        assert small.refusal(path).startswith("tensor 'w': ") and problem in small.refusal(path)
    else:
        small.read_all(path)


def test_overlapping_rows_are_read(path):
    small.write(path, zipped(dict_of(w=tensor(offset=1, shape=(3, 2), strides=(1, 1)))))
    np.testing.assert_array_equal(small.read_all(path)["w"], [[1, 2], [2, 3], [3, 4]])


NESTED = {
    "lists": b"]" * 100_000 + b"a" * 99_999,
    "tuples": b")" + b"\x85" * 100_000,
    "tuples as a key": b"})" + b"\x85" * 100_000 + b"Ns",
    "marks": b"(" * 100_000,
}


@pytest.mark.parametrize("body", NESTED.values(), ids=NESTED)
def test_deep_nesting_is_refused(path, body):
    """Python would hash, compare and print nested tuples recursively, and end the process."""
    small.refusal(small.write(path, zipped(body)))


LYING = {
    "a far place of the memo": b"Nr\xff\xff\xff\xff",
    "text": b"X\xff\xff\xff\xffabc",
    "text, 8 bytes": b"\x8d" + b"\xff" * 7 + b"\x7fabc",
    "bytes": b"B\xff\xff\xff\xffabc",
    "bytes, 8 bytes": b"\x96" + b"\xff" * 7 + b"\x7fabc",
    "integer": b"\x8b\xff\xff\xff\x7fabc",
    "frame": b"\x95" + b"\xff" * 8 + b"N",
    "digits": b"L" + b"9" * 10_000 + b"L\n",
}


@pytest.mark.parametrize("body", LYING.values(), ids=LYING)
@pytest.mark.parametrize("make", [zipped, small.legacy])
def test_lengths_that_lie_take_little_memory(path, make, body):
    small.refusal(small.write(path, make(body)))
    small.check_any(path, make(body))


def test_a_pickle_of_many_instructions_is_refused(path, monkeypatch):
    monkeypatch.setattr(pickles, "_MOST_INSTRUCTIONS", 1000)
    small.write(path, zipped(b"(" + b"N" * 1000 + b"t"))
    assert "more than 1,000 instructions" in small.refusal(path)


def test_a_large_pickle_is_refused(path, monkeypatch):
    monkeypatch.setattr(pickles, "_LARGEST_PICKLE", 1000)
    assert "more than 1,000 bytes" in small.refusal(small.write(path, zipped(text("a" * 1000))))
    assert "remain" in small.refusal(small.write(path, small.legacy(text("a" * 1000))))


def far_away(offset: int) -> bytes:
    """Return an archive whose directory says that an entry begins at `offset`."""
    content = zipped()
    place = content.index(b"PK\1\2")
    extra = struct.pack("<HHQ", 1, 8, offset)  # the field of large archives
    entry = bytearray(content[place:])
    entry[30:32], entry[42:46] = struct.pack("<H", len(extra)), b"\xff" * 4
    name_end = 46 + int.from_bytes(entry[28:30], "little")
    entry[name_end:name_end] = extra
    size = int.from_bytes(entry[-10:-6], "little") + len(extra)
    entry[-10:-6] = struct.pack("<I", size)
    return content[:place] + bytes(entry)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (zipped(compression=zipfile.ZIP_DEFLATED), "compressed"),
        (zipped(entries=[("archive/byteorder", b"big")]), "little-endian"),
        (zipped(entries=[("other/data.pkl", b"")]), "one entry data.pkl"),
        (zipped(data=b"\0" * 20), "another size"),
        (zipped(dict_of(w=tensor(stored=storage(key="../../0")))), "'../../0' is missing"),
        (zipped(dict_of(w=tensor(stored=storage(count=-1)))), "not a storage"),
        (zipped()[:-1], "not a valid zip archive"),
        (zipped().replace(b"\x80\x02", b"\x80\x03"), "checksum"),
        (zipped().replace(b"PK\3\4", b"PK\5\4").replace(b"PK\5\4", b"PK\3\4", 1), "not where"),
        (far_away(2**63 + 1), "not where"),
        (far_away(2**20), "not where"),
        (small.legacy(data=b"\0" * 20), "ends after the end of the file"),
        (small.legacy(data=b"\0" * 25), "1 bytes after"),
        (small.legacy(count=7), "another size"),
        (small.legacy(count=2**63), "another size"),
        (small.legacy(keys=()), "not those of its tensors"),
        (small.legacy(keys=("0", "0")), "not those of its tensors"),
        (small.legacy(keys=("1",)), "not those of its tensors"),
        (small.legacy(keys=(1,)), "list of texts"),
        (small.legacy(system={"little_endian": False}), "little-endian"),
        (small.legacy(system=[]), "little-endian"),
        (pickle.dumps({"a": 1}, 2), "not a file of PyTorch"),
        (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1000, 2), "not a file of PyTorch"),
        (b"\x93NUMPY", "must begin as"),
    ],
)
def test_archives_and_old_files_that_lie_are_refused(path, content, problem):
    assert problem in small.refusal(small.write(path, content))


def test_two_entries_of_one_name_are_refused(path):
    with pytest.warns(UserWarning):
        content = zipped(entries=[("archive/data/0", b"")])
    assert "same name" in small.refusal(small.write(path, content))


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin"])
def test_any_damage_is_one_line(path, name):
    for content in small.damaged((RECORDED / name).read_bytes(), 40):
        small.check_any(path, content)


def test_any_pickle_is_one_line(path):
    """Programs of random instructions, each with operands of its kind."""
    random = np.random.default_rng(0)
    parts = [integer(1), text("w"), ORDERED, tensor(), storage(), b"q\0", b"h\0", b"\x8c\1a"]
    parts += [bytes([value]) for value in b"()]}NteausRbQ\x85\x86\x87\x88\x93\x94\x810"]
    for _ in range(300):
        body = b"".join(parts[k] for k in random.integers(len(parts), size=random.integers(1, 40)))
        small.check_any(path, zipped(body))
