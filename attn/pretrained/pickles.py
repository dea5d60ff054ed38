"""Files of PyTorch, read without PyTorch: zip archives, and the files that versions before 1.6 wrote.

Both hold a pickle, which is a program. It is not given to Python's unpickler: `_Machine` interprets the few
instructions that files of weights need. It calls nothing that a pickle names, so that a file can make it do no more
than build lists, dictionaries and descriptions of tensors.
"""

import dataclasses
import functools
import io
import math
import pathlib
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np

from attn.pretrained import files

_LARGEST_PICKLE = 1 << 24  # bytes; one of a model with 50,000 tensors is smaller
_MOST_INSTRUCTIONS = 1 << 20  # each may take some hundred bytes of memory
_LARGEST_INTEGER = 1 << 80  # the magic number of old files has 10 bytes; longer integers are slow to print

_ZIP = b"PK\3\4"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of an entry of a zip archive: its signature, the sizes of name and extra
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of an old file
_NESTED = ("state_dict", "model")  # keys under which checkpoints of training have the weights

_KINDS = {"Byte": "uint8", "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64", "Bool": "bool"}
_KINDS |= {"Half": "float16", "Float": "float32", "Double": "float64", "BFloat16": files.BFLOAT16}
_DTYPES = {f"torch.{kind}Storage": np.dtype(dtype) for kind, dtype in _KINDS.items()}
_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_GLOBALS = {*_DTYPES, _DICT, _TENSOR, _PARAMETER}


@dataclasses.dataclass(frozen=True)
class _Global:
    """A function or class that a pickle names, one of `_GLOBALS`."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A one-dimensional array that the file holds outside of its pickle."""

    key: str
    dtype: np.dtype
    count: int


@dataclasses.dataclass(frozen=True)
class _View:
    """A tensor as the pickle has it: a storage, and an offset, a shape and strides in elements, not checked yet."""

    storage: _Storage
    offset: object
    shape: object
    strides: object


def read(path: pathlib.Path) -> dict[str, files.Tensor]:
    """Return the tensors of a file of PyTorch by name, without reading their values.

    The file must hold a dictionary of tensors and parameters, or one that has such a dictionary under "state_dict" or
    "model". Numbers, texts and None among the tensors are ignored.

    Args:
      path: the file.

    Raises:
      files.FileError: the file is damaged, or its pickle names something that is not needed for tensors.
    """
    size = files.file_size(path)
    # Names with backslashes make `pickletools` warn.
    with files.os_errors(path), warnings.catch_warnings(action="ignore"):
        with path.open("rb") as file:
            start = file.read(len(_ZIP))
        try:
            if start == _ZIP:
                content, offsets = _read_zip(path, size)
            elif start[:1] == b"\x80":
                content, offsets = _read_legacy(path, size)
            else:
                raise ValueError("not a file of PyTorch; it must begin as a zip archive or as a pickle")
            views = _views(content)
        except ValueError as error:
            raise files.FileError(f"{path}: {files.reason(error)}") from None
    return {name: _tensor(path, name, view, offsets[view.storage.key]) for name, view in views.items()}


def _views(content: object) -> dict[str, _View]:
    """Return the tensors of what a pickle holds, by name."""
    if not isinstance(content, dict):
        raise ValueError(f"holds {files.quoted(content)}, must hold a dictionary of tensors")
    if not _has_tensors(content):
        nested = [key for key in _NESTED if _has_tensors(content.get(key))]
        if len(nested) > 1:
            raise ValueError(f"holds tensors under each of {', '.join(nested)}; it must hold one model")
        content = content[nested[0]] if nested else content
    views = {}
    for name, value in content.items():
        if isinstance(value, _View):
            if not isinstance(name, str):
                raise ValueError(f"has a tensor under the key {name}, must be a name")
            views[name] = value
        elif not isinstance(value, (int, float, str, type(None))):
            raise ValueError(f"{files.quoted(name)} is {files.quoted(value)}, must be a tensor, a number or text")
    if not views:
        raise ValueError("holds no tensors")
    return views


def _has_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(each, _View) for each in value.values())


def _tensor(path: pathlib.Path, name: str, view: _View, start: int) -> files.Tensor:
    """Return the description of a tensor; check that it lies in its storage, which begins at byte `start`."""
    shape, strides, storage = view.shape, view.strides, view.storage
    if not (_are_counts((view.offset,)) and _are_counts(shape) and _are_counts(strides) and len(shape) == len(strides)):
        problem = "its offset, shape and strides must be whole numbers of at least 0, and one stride per axis"
        raise files.tensor_error(path, name, problem)
    files.check_shape(path, name, shape, storage.dtype)
    elements = math.prod(shape)
    # Elements from the first to the last that the tensor has, with what is between them.
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides)) if elements else 0
    if (end := view.offset + extent) > storage.count:
        raise files.tensor_error(path, name, f"ends at element {end:,} of a storage of {storage.count:,}")
    if elements > storage.count:
        raise files.tensor_error(path, name, f"has {elements:,} elements, but its storage has {storage.count:,}")
    return files.Tensor(path, shape, storage.dtype, functools.partial(_read_view, path, name, view, start, extent))


def _read_view(path: pathlib.Path, name: str, view: _View, start: int, extent: int) -> np.ndarray:
    """Read a tensor: the elements from its first to its last, then those among them that it has."""
    dtype = view.storage.dtype
    flat = files.read_array(path, name, start + view.offset * dtype.itemsize, dtype, (extent,))
    # The stride of an axis of one element means nothing, and may be too large for NumPy.
    strides = [dtype.itemsize * stride * (extent > 0 and size > 1) for size, stride in zip(view.shape, view.strides)]
    return np.asarray(np.lib.stride_tricks.as_strided(flat, view.shape, strides), order="C")


def _are_counts(values: object) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _read_zip(path: pathlib.Path, size: int) -> tuple[object, dict[str, int]]:
    """Return what the pickle of a zip archive holds, and the byte at which each storage begins, by key."""
    with path.open("rb") as file:
        try:
            entries = zipfile.ZipFile(file).infolist()
        # What zipfile raises for a damaged directory, apart from errors of values.
        except (zipfile.BadZipFile, NotImplementedError, OverflowError, struct.error) as error:
            raise ValueError(f"not a valid zip archive ({error})") from None
        by_name = {entry.filename: entry for entry in entries}
        if len(by_name) < len(entries):
            raise ValueError("a zip archive that has two entries of the same name")
        folders = [name.removesuffix("/data.pkl") for name in by_name if name.endswith("/data.pkl")]
        if len(folders) != 1:
            raise ValueError("a zip archive that is not of PyTorch; it must have one entry data.pkl in a folder")
        byte_order = by_name.get(f"{folders[0]}/byteorder")
        if byte_order and _entry(file, byte_order, size, 16) != b"little":
            raise ValueError("the byte order is not little-endian, which is the only one that is read")
        machine = _Machine(_entry(file, by_name[f"{folders[0]}/data.pkl"], size, _LARGEST_PICKLE))
        content = machine.run()
        offsets = {}
        for key, storage in machine.storages.items():
            entry = by_name.get(f"{folders[0]}/data/{key}")
            if entry is None:
                raise ValueError(f"the storage {files.quoted(key)} is missing")
            if entry.file_size != storage.count * storage.dtype.itemsize:
                raise ValueError(f"the storage {files.quoted(key)} has another size than the pickle says")
            offsets[key] = _entry_offset(file, entry, size)
    return content, offsets


def _entry(file: io.BufferedReader, entry: zipfile.ZipInfo, size: int, largest: int) -> bytes:
    """Read a small entry of a zip archive."""
    if entry.file_size > largest:
        raise ValueError(f"the entry {files.quoted(entry.filename)} has more than {largest:,} bytes")
    file.seek(_entry_offset(file, entry, size))
    data = file.read(entry.file_size)
    if entry.CRC not in (0, zlib.crc32(data)):  # PyTorch can be told not to compute it; it is 0 then
        raise ValueError(f"the entry {files.quoted(entry.filename)} differs from its checksum")
    return data


def _entry_offset(file: io.BufferedReader, entry: zipfile.ZipInfo, size: int) -> int:
    """Return the byte at which the data of an entry begins, after checking that they lie in a file of `size` bytes."""
    name = files.quoted(entry.filename)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
        raise ValueError(f"the entry {name} is compressed or encrypted; PyTorch stores entries as they are")
    file.seek(entry.header_offset if 0 <= entry.header_offset < size else size)  # where no header is
    header = file.read(_LOCAL_HEADER.size)
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(header.ljust(_LOCAL_HEADER.size))
    if signature != _ZIP or file.read(name_length) != entry.orig_filename.encode():
        raise ValueError(f"the entry {name} is not where the archive's directory says")
    offset = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if offset + entry.file_size > size:
        raise ValueError(f"the entry {name} ends after the end of the file")
    return offset


def _read_legacy(path: pathlib.Path, size: int) -> tuple[object, dict[str, int]]:
    """Return what an old file holds, and the byte at which each storage begins, by key.

    It has five pickles: a magic number, a version, facts about the system, the content, and the keys of the storages
    in their order. Then each storage follows, after the number of its elements in 8 bytes.
    """
    with path.open("rb") as file:
        machine = _Machine(file.read(min(size, _LARGEST_PICKLE)))
        if machine.run() != _MAGIC or machine.run() != _VERSION:
            raise ValueError("a pickle, but not a file of PyTorch of a version that is read")
        system = machine.run()
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ValueError("the byte order is not little-endian, which is the only one that is read")
        content, keys = machine.run(), machine.run()
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError("the keys of its storages must be a list of texts")
        if len(keys) != len(machine.storages) or set(keys) != machine.storages.keys():
            raise ValueError("the storages that it lists are not those of its tensors")
        offsets, end = {}, machine.stream.tell()
        for key in keys:
            storage = machine.storages[key]
            file.seek(end)
            if int.from_bytes(file.read(8), "little") != storage.count:
                raise ValueError(f"the storage {files.quoted(key)} has another size than the pickle says")
            offsets[key] = end + 8
            end += 8 + storage.count * storage.dtype.itemsize
            if end > size:
                raise ValueError(f"the storage {files.quoted(key)} ends after the end of the file")
    if end < size:
        raise ValueError(f"has {size - end:,} bytes after its last storage")
    return content, offsets


def _instructions(stream: io.BytesIO) -> Iterator[tuple]:
    """Yield the instructions of the next pickle, each with its argument and its position."""
    try:
        yield from pickletools.genops(stream)
    except ValueError as error:
        raise ValueError(f"its pickle is damaged ({error})") from None


class _Machine:
    """An interpreter of pickles that calls nothing.

    Attributes:
      storages: those that the pickles have referred to, by key.
      stream: the bytes of the pickles; its position is after the last instruction.

    Args:
      program: the bytes, of one pickle or of several in a row.
    """

    def __init__(self, program: bytes):
        self.storages: dict[str, _Storage] = {}
        self.stream = io.BytesIO(program)  # reads no more than there is, whatever length an instruction has
        self._left = _MOST_INSTRUCTIONS
        self._stack, self._below, self._memo = [], [], {}  # `_below`: the stacks that MARKs have put away

    def run(self) -> object:
        """Return what the next pickle builds; raise a ValueError if it is damaged or not only of tensors."""
        self._memo = {}
        for instruction, argument, position in _instructions(self.stream):
            self._left -= 1
            if not self._left:
                raise ValueError(f"its pickle has more than {_MOST_INSTRUCTIONS:,} instructions")
            act = _INSTRUCTIONS.get(instruction.name)
            if act is None:
                raise ValueError(f"its pickle has the instruction {instruction.name}, which is not executed")
            try:
                act(self, argument)
            except LookupError:  # an empty stack, or a place of the memo that was never filled
                raise ValueError(f"its pickle is damaged: {instruction.name} at byte {position:,}") from None
        if len(self._stack) != 1 or self._below:
            raise ValueError("its pickle is damaged: it leaves more than one value")
        return self._stack.pop()

    def push(self, value: object):
        if type(value) is int and abs(value) > _LARGEST_INTEGER:
            raise ValueError("its pickle has an integer of more than 10 bytes")
        self._stack.append(value)

    def mark(self):
        self._below.append(self._stack)
        self._stack = []

    def pop(self, count: int) -> list:
        """Return the last values of the stack, in the order in which they were pushed."""
        return [self._stack.pop() for _ in range(count)][::-1]

    def pop_marked(self) -> list:
        """Return what was pushed since the last MARK."""
        values, self._stack = self._stack, self._below.pop()
        return values

    def put(self, place: int | None):
        # A dictionary, since a list would have to be as long as a place says.
        self._memo[len(self._memo) if place is None else place] = self._stack[-1]

    def get(self, place: int):
        self._stack.append(self._memo[place])

    def append(self, values: list):
        if not isinstance(self._stack[-1], list):
            raise ValueError("its pickle appends to something that is not a list")
        self._stack[-1].extend(values)

    def set_items(self, values: list):
        target = self._stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise ValueError("its pickle sets items of something that is not a dictionary")
        for key, value in zip(values[::2], values[1::2]):
            # A key of another type may be nested so deeply that hashing it ends the process.
            if type(key) not in (str, int):
                raise ValueError(f"a dictionary has as key {files.quoted(key)}, must be text or an integer")
            if key in target:
                raise ValueError(f"{files.quoted(str(key))} occurs twice in a dictionary")
            target[key] = value

    def name_global(self, module: object, name: object):
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "something without a name"
        if full not in _GLOBALS:
            raise ValueError(f"its pickle asks for {full}, which is not executed; only tensors are read")
        self._stack.append(_Global(full))

    def reduce(self):
        """Replace a function and its arguments by what PyTorch's function of this name would return."""
        function, arguments = self.pop(2)
        name = function.name if isinstance(function, _Global) else None
        count = len(arguments) if isinstance(arguments, tuple) else -1
        if name == _DICT and count == 0:
            self._stack.append({})
        elif name == _TENSOR and count in (6, 7) and isinstance(arguments[0], _Storage):
            if count == 7 and arguments[6]:
                raise ValueError("has a tensor with metadata, such as a negated view, which is not read")
            self._stack.append(_View(*arguments[:4]))
        elif name == _PARAMETER and count == 3 and isinstance(arguments[0], _View):
            self._stack.append(arguments[0])
        else:
            raise ValueError(f"its pickle calls {name or 'something'} in a way that is not known")

    def build(self):
        """Ignore the attributes of a dictionary, such as `_metadata`, the versions of PyTorch's modules."""
        target, attributes = self.pop(2)
        if not isinstance(target, dict) or not isinstance(attributes, dict):
            raise ValueError("its pickle sets attributes of something that is not a dictionary")
        self._stack.append(target)

    def refer(self):
        """Replace a persistent id by the storage that it describes."""
        match self.pop(1)[0]:
            case ("storage", _Global(name), str(key), str(), int(count), *view) if name in _DTYPES and count >= 0:
                if view not in ([], [None]):
                    raise ValueError(f"the storage {files.quoted(key)} is a view of another one, which is not read")
                storage = _Storage(key, _DTYPES[name], count)
            case _:
                raise ValueError("its pickle refers to something that is not a storage")
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"describes the storage {files.quoted(key)} in two ways")
        self._stack.append(storage)


_INSTRUCTIONS = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, argument: None),
    # Values. That of None, too, is the argument of its instruction.
    **dict.fromkeys(("NONE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("SHORT_BINSTRING", "BINSTRING", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _Machine.push),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "MARK": lambda machine, _: machine.mark(),
    # Containers.
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_marked())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop(3))),
    "APPEND": lambda machine, _: machine.append(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.append(machine.pop_marked()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_marked()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": lambda machine, _: machine.put(None),
    "GLOBAL": lambda machine, argument: machine.name_global(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name_global(*machine.pop(2)),
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.refer(),
}
