"""Small files of weights, right and wrong, put together byte by byte; and what must hold for every file."""

import io
import json
import pathlib
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from attn.pretrained import files

RECORDED = pathlib.Path(__file__).parent / "recorded_files"
MEMORY = 8 << 20  # bytes that opening and reading a file of a few KB may take


def write(path: pathlib.Path, content: bytes) -> pathlib.Path:
    path.write_bytes(content)
    return path


def refusal(path) -> str:
    """Return what is wrong with a file, without its name, after checking that the message is one line."""
    with pytest.raises(files.FileError) as caught:
        read_all(path)
    message = str(caught.value)
    assert message.isprintable() and message.startswith(str(path)), message
    return message.removeprefix(str(path)).removeprefix(": ")


def read_all(path) -> dict[str, np.ndarray]:
    tensors = files.open_tensors(path)
    arrays = {name: tensor.read() for name, tensor in tensors.items()}
    for name, array in arrays.items():
        assert (array.shape, array.dtype) == (tensors[name].shape, tensors[name].dtype)
    return arrays


def check_any(path: pathlib.Path, content: bytes):
    """Check that a file is read or refused in one line, and that little memory is taken in either case."""
    write(path, content)
    tracemalloc.start()
    try:
        read_all(path)
    except files.FileError as error:
        assert str(error).isprintable() and str(error).startswith(str(path))
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MEMORY


def damaged(content: bytes, count: int, seed: int = 0):
    """Yield a file cut off at some places, and with some bytes changed or inserted."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        yield content[: random.integers(len(content))]
        bytes_ = bytearray(content)
        for place in random.integers(len(content), size=random.integers(1, 4)):
            bytes_[place] = random.choice([0, 1, 0x7F, 0x80, 0xFF, bytes_[place] ^ 1 << random.integers(8)])
        yield bytes(bytes_)
        first, last = sorted(random.integers(len(content), size=2))
        yield content[:last] + content[first:]


# safetensors


def safetensors(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": [*shape], "data_offsets": [*offsets]}


# Pickles, with protocol 2 as PyTorch writes them


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def tuple_of(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def dict_of(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in values.items()) + b"u"


def storage(kind="FloatStorage", key="0", count=6, view=b"") -> bytes:
    return tuple_of(text("storage"), named("torch", kind), text(key), text("cpu"), integer(count), view) + b"Q"


def tensor(offset=0, shape=(2, 3), strides=(3, 1), stored=None, more=b"") -> bytes:
    axes = [tuple_of(*map(integer, sizes)) for sizes in (shape, strides)]
    hooks = named("collections", "OrderedDict") + b")R"
    arguments = (stored or storage(), integer(offset), *axes, b"\x89", hooks, more)
    return named("torch._utils", "_rebuild_tensor_v2") + tuple_of(*arguments) + b"R"


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


SIX = np.arange(6, dtype=np.float32)
DATA = SIX.tobytes()


def zipped(body: bytes | None = None, entries=(), compression=zipfile.ZIP_STORED, data=DATA) -> bytes:
    """Return a file of PyTorch: its pickle, one storage "0", and other entries."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program(dict_of(w=tensor()) if body is None else body))
        archive.writestr("archive/data/0", data)
        for name, content in entries:
            archive.writestr(name, content)
    return file.getvalue()


def legacy(body: bytes | None = None, keys=("0",), count=6, data=DATA, system=None) -> bytes:
    """Return a file of PyTorch as versions before 1.6 wrote it."""
    system = {"protocol_version": 1001, "little_endian": True} if system is None else system
    start = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, system)]
    content = [program(dict_of(w=tensor()) if body is None else body), pickle.dumps([*keys], 2)]
    return b"".join([*start, *content, struct.pack("<Q", count), data])


# GGUF


def gguf_text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def metadata(key: str, type_: int, content: bytes) -> bytes:
    return gguf_text(key) + struct.pack("<I", type_) + content


def described(name="w", dims=(3, 2), type_=0, offset=0) -> bytes:
    return gguf_text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_, offset)


def gguf(entries=(), tensors=None, data=DATA, magic=b"GGUF", version=3, counts=None, alignment=32) -> bytes:
    tensors = [described()] if tensors is None else tensors
    counts = (len(tensors), len(entries)) if counts is None else counts
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join([*entries, *tensors])
    return header + bytes(-len(header) % alignment) + data
