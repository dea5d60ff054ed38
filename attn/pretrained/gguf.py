"""GGUF files, as llama.cpp writes them: metadata and tensors, quantised ones among them.

A quantised tensor has blocks of 32 weights: small integers `q`, a scale `d` and, for some types, a minimum `m`. A
weight is `d * q + m`.
"""

import functools
import math
import pathlib
import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from attn.pretrained import files

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_AXES = 4  # of a tensor of this format
_ALIGNMENT = 32  # of the tensors, unless the metadata have another one
_LARGEST_ALIGNMENT = 1 << 20
_BLOCK = 32  # weights of a quantised block
_BLOCKS_AT_ONCE = 1 << 13  # dequantised in one step, so that what is between stays in the processor's cache

# Types of a value of the metadata, by number.
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9

# Types of tensors that are stored as arrays, by number.
_PLAIN = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    24: np.dtype(np.int8),
    25: np.dtype(np.int16),
    26: np.dtype(np.int32),
    27: np.dtype(np.int64),
    28: np.dtype(np.float64),
    30: files.BFLOAT16,
}


class _Quantised(NamedTuple):
    """A type of quantised tensor.

    Attributes:
      name: of the type.
      block: the dtype of a block, with its scale `d` and, for some types, its minimum `m`.
      unpack: writes the integers of blocks [N] into an array [N 32].
    """

    name: str
    block: np.dtype
    unpack: Callable[[np.ndarray, np.ndarray], None]


def _unpack_4_bits(blocks: np.ndarray, out: np.ndarray, *, shift: int = 0):
    """Write integers of 4 bits: the low halves of the bytes are the first 16, the high halves the last 16."""
    out[:, :16] = blocks["low"] & 15
    out[:, 16:] = blocks["low"] >> 4
    if shift:
        out -= shift


def _unpack_5_bits(blocks: np.ndarray, out: np.ndarray, *, shift: int = 0):
    """Write integers of 5 bits, whose highest bits are stored apart."""
    _unpack_4_bits(blocks, out)
    out += np.unpackbits(blocks["high"], axis=1, bitorder="little") << 4
    if shift:
        out -= shift


def _unpack_8_bits(blocks: np.ndarray, out: np.ndarray):
    out[:] = blocks["q"]


_D, _M, _LOW, _HIGH = ("d", "<f2"), ("m", "<f2"), ("low", "u1", 16), ("high", "u1", 4)
_QUANTISED = {
    2: _Quantised("Q4_0", np.dtype([_D, _LOW]), functools.partial(_unpack_4_bits, shift=8)),
    3: _Quantised("Q4_1", np.dtype([_D, _M, _LOW]), _unpack_4_bits),
    6: _Quantised("Q5_0", np.dtype([_D, _HIGH, _LOW]), functools.partial(_unpack_5_bits, shift=16)),
    7: _Quantised("Q5_1", np.dtype([_D, _M, _HIGH, _LOW]), _unpack_5_bits),
    8: _Quantised("Q8_0", np.dtype([_D, ("q", "i1", 32)]), _unpack_8_bits),
}
# Those that are not read, for messages.
_OTHERS = {9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS"}
_OTHERS |= {17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS"}
_OTHERS |= {29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"}


def read(path: pathlib.Path) -> tuple[dict[str, object], dict[str, files.Tensor]]:
    """Return the metadata of a GGUF file and its tensors by name, without reading their values.

    Args:
      path: the file, little-endian and of version 2 or 3.

    Returns:
      The metadata: numbers, truth values, texts, lists of texts, and arrays of the others. The tensors: shapes are in
      the order of NumPy, the fastest axis last; quantised tensors are read as float32.

    Raises:
      files.FileError: the file is damaged, or a tensor has a type that is not read.
    """
    size = files.file_size(path)
    with files.os_errors(path), path.open("rb") as file:
        header = _Header(path, file, size)
        tensor_count, entry_count = header.begin()
        metadata = {}
        for _ in range(entry_count):
            key = header.text("a key of the metadata")
            if key in metadata:
                raise files.FileError(f"{path}: the metadata have {files.quoted(key)} twice")
            metadata[key] = header.value(key)
        entries = {}
        for _ in range(tensor_count):
            name = header.text("the name of a tensor")
            if name in entries:
                raise files.tensor_error(path, name, "occurs twice")
            entries[name] = header.tensor(name)
        alignment = _alignment(path, metadata)
        start = -(-file.tell() // alignment) * alignment
    _check_places(path, entries, start, alignment, size)
    return metadata, {name: _tensor(path, name, entry, start) for name, entry in entries.items()}


class _Entry(NamedTuple):
    """A tensor as the header has it; the offset counts from the first tensor."""

    shape: tuple[int, ...]
    type: int
    offset: int

    @property
    def nbytes(self) -> int:
        if self.type in _PLAIN:
            return math.prod(self.shape) * _PLAIN[self.type].itemsize
        return math.prod(self.shape) // _BLOCK * _QUANTISED[self.type].block.itemsize


class _Header:
    """The part of a GGUF file before its tensors, read piece by piece and never beyond the end of the file."""

    def __init__(self, path: pathlib.Path, file, size: int):
        self._path, self._file, self._size = path, file, size

    def begin(self) -> tuple[int, int]:
        """Return the number of tensors and the number of entries of the metadata."""
        if self._bytes(4, "the header") != _MAGIC:
            raise self._error("not a GGUF file; it must begin with 'GGUF'")
        version = self._number("<u4", "the header")
        if version not in _VERSIONS:
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            given = "is big-endian" if big_endian else f"has version {version:,}"
            raise self._error(f"{given}; a GGUF file must be little-endian and of version 2 or 3")
        tensors, entries = (self._number("<u8", "the header") for _ in range(2))
        # The shortest tensor has 24 bytes in the header, the shortest entry 13.
        if tensors * 24 + entries * 13 > self._left():
            counts = f"{tensors:,} tensors and {entries:,} entries of metadata"
            raise self._error(f"claims to have {counts}, more than fit into the file")
        return tensors, entries

    def text(self, part: str) -> str:
        """Read a text: its length in 8 bytes, then UTF-8."""
        data = self._bytes(self._number("<u8", part), part)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self._error(f"{part} is not valid UTF-8") from None

    def value(self, key: str) -> object:
        """Read a value of the metadata."""
        part = f"the metadata {files.quoted(key)}"
        type_ = self._number("<u4", part)
        if type_ == _STRING:
            return self.text(part)
        if type_ != _ARRAY:
            return self._array(type_, 1, part)[0].item()
        type_, count = self._number("<u4", part), self._number("<u8", part)
        return self._texts(count, part) if type_ == _STRING else self._array(type_, count, part)

    def tensor(self, name: str) -> _Entry:
        """Read what the header says about a tensor."""
        part = f"tensor {files.quoted(name)}"
        axes = self._number("<u4", part)
        if axes > _MOST_AXES:
            raise files.tensor_error(self._path, name, f"has {axes:,} axes, at most {_MOST_AXES} are allowed")
        shape = tuple(self._number("<u8", part) for _ in range(axes))[::-1]
        entry = _Entry(shape, self._number("<u4", part), self._number("<u8", part))
        if entry.type in _PLAIN:
            files.check_shape(self._path, name, shape, _PLAIN[entry.type])
        elif entry.type in _QUANTISED:
            files.check_shape(self._path, name, shape, np.dtype(np.float32))
            if not shape or shape[-1] % _BLOCK:
                given = f"rows of {shape[-1]:,} elements" if shape else "no rows"
                limit = f"a quantised tensor must have rows of a multiple of {_BLOCK}"
                raise files.tensor_error(self._path, name, f"has {given}; {limit}")
        else:
            type_ = _OTHERS.get(entry.type, f"number {entry.type:,}")
            plain = "F32, F16, BF16, F64, I8, I16, I32, I64"
            names = ", ".join(quantised.name for quantised in _QUANTISED.values())
            raise files.tensor_error(self._path, name, f"has type {type_}, must be one of {plain}, {names}")
        return entry

    def _array(self, type_: int, count: int, part: str) -> np.ndarray:
        """Read an array of numbers or truth values."""
        if type_ == _ARRAY:
            raise self._error(f"{part} is an array of arrays, which is not read")
        if type_ not in _NUMBERS and type_ != _BOOL:
            raise self._error(f"{part} has the unknown type {type_:,}")
        dtype = np.dtype(_NUMBERS.get(type_, "u1"))
        values = np.frombuffer(self._bytes(count * dtype.itemsize, part), dtype)
        if type_ != _BOOL:
            return values
        if (values > 1).any():
            raise self._error(f"{part} has a truth value that is neither 0 nor 1")
        return values.astype(bool)

    def _texts(self, count: int, part: str) -> list[str]:
        """Read an array of texts. A vocabulary has many, so that the loop is kept small."""
        if count * 8 > self._left():
            raise self._error(f"{part} has {count:,} texts, more than fit into the file")
        read, length_of, texts = self._file.read, struct.Struct("<Q").unpack, []
        left = self._left()
        try:
            for _ in range(count):
                (length,) = length_of(read(8))
                left -= 8 + length
                if left < 0:
                    raise self._error(f"{part} ends after the end of the file")
                texts.append(read(length).decode())
        except (struct.error, UnicodeDecodeError):
            raise self._error(f"{part} has a text that is cut off or not valid UTF-8") from None
        return texts

    def _number(self, dtype: str, part: str) -> int:
        return int.from_bytes(self._bytes(int(dtype[-1]), part), "little")

    def _bytes(self, count: int, part: str) -> bytes:
        # Checked first, since a file's `read` allocates as much as it is told to.
        if count > self._left():
            raise self._error(f"{part} ends after the end of the file")
        return self._file.read(count)

    def _left(self) -> int:
        return self._size - self._file.tell()

    def _error(self, problem: str) -> files.FileError:
        return files.FileError(f"{self._path}: {problem}")


def _alignment(path: pathlib.Path, metadata: dict[str, object]) -> int:
    """Return the alignment of the tensors in bytes."""
    value = metadata.get("general.alignment", _ALIGNMENT)
    if type(value) is not int or not 1 <= value <= _LARGEST_ALIGNMENT or value & (value - 1):
        given = f"{value:,}" if type(value) is int else f"a value of type {type(value).__name__}"
        limit = f"a power of two, at most {_LARGEST_ALIGNMENT:,}"
        raise files.FileError(f"{path}: the metadata 'general.alignment' is {given}, must be {limit}")
    return value


def _check_places(path: pathlib.Path, entries: dict[str, _Entry], start: int, alignment: int, size: int):
    """Check that the tensors are aligned, lie in the file and do not overlap.

    Args:
      path: the file.
      entries: the tensors by name.
      start: the byte from which their offsets count.
      alignment: of their offsets, in bytes.
      size: of the file.
    """
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset % alignment:
            raise files.tensor_error(path, name, f"is at byte {entry.offset:,}, must be at a multiple of {alignment:,}")
        if entry.offset < end:
            raise files.tensor_error(path, name, "overlaps another tensor")
        end = entry.offset + entry.nbytes
        if start + end > size:
            raise files.tensor_error(path, name, f"ends at byte {start + end:,} of a file of {size:,} bytes")


def _tensor(path: pathlib.Path, name: str, entry: _Entry, start: int) -> files.Tensor:
    """Return the description of a tensor; its offset counts from the byte `start`."""
    shape, offset = entry.shape, start + entry.offset
    if entry.type in _PLAIN:
        dtype = _PLAIN[entry.type]
        return files.Tensor(path, shape, dtype, functools.partial(files.read_array, path, name, offset, dtype, shape))
    read_weights = functools.partial(_read_quantised, path, name, offset, _QUANTISED[entry.type], shape)
    return files.Tensor(path, shape, np.dtype(np.float32), read_weights)


def _read_quantised(
    path: pathlib.Path, name: str, offset: int, quantised: _Quantised, shape: tuple[int, ...]
) -> np.ndarray:
    """Read a quantised tensor as float32."""
    blocks = files.read_array(path, name, offset, quantised.block, (math.prod(shape) // _BLOCK,))
    weights = np.empty((len(blocks), _BLOCK), np.float32)
    for first in range(0, len(blocks), _BLOCKS_AT_ONCE):
        some, out = (array[first : first + _BLOCKS_AT_ONCE] for array in (blocks, weights))
        quantised.unpack(some, out)
        with np.errstate(all="ignore"):  # a scale may be NaN or infinity
            out *= some["d"].astype(np.float32)[:, None]
            if "m" in quantised.block.names:
                out += some["m"].astype(np.float32)[:, None]
    return weights.reshape(shape)
