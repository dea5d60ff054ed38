"""Files of weights: the tensors that a file or a folder has, each described at once and read when it is needed.

A file is not trusted. Every size that it claims is compared with the size of the file before memory is allocated,
nothing in it is executed, and whatever is wrong with it is one `FileError`. Values are not checked: a tensor may hold
NaN or infinity.

safetensors files are parsed by the library of that name. It verifies that the tensors fill the file without holes or
overlaps, and that offsets, shapes and dtypes agree; names that occur twice, too many axes, and dtypes that NumPy does
not have are found here. `pickles` reads files of PyTorch, `gguf` those of llama.cpp.
"""

import contextlib
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

# File names of weights in a folder, in the order in which they are looked for.
FOLDER_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_DTYPES = {
    "BF16": BFLOAT16,
    "BOOL": np.dtype(bool),
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}
_POINTER = b"version https://git-lfs"  # the beginning of the text that Git LFS leaves in place of a file
_MOST_AXES = 64  # of an array of NumPy
_MOST_BYTES = 2**63 - 1  # of an array of NumPy
_LONGEST_QUOTE = 100  # characters of a name in a message
_LONGEST_REASON = 300  # characters of a library's message


class FileError(ValueError):
    """A file of weights that cannot be read; the message is one line that names the file and the tensor."""


class Tensor(NamedTuple):
    """A tensor of a file. Its values stay in the file until `read` is called.

    Attributes:
      file: the file that holds it.
      shape: its shape.
      dtype: the dtype of the array that `read` returns; `BFLOAT16` for bfloat16.
      read: returns its values in a new array, contiguous in C order; raises a FileError if the file has changed.
    """

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def open_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Return the tensors of a file or a folder by name, without reading their values.

    Args:
      path: a folder that has one of `FOLDER_NAMES`, an index of shards, or a file whose name ends with one of
        `SUFFIXES`.

    Raises:
      FileError: there are no weights, or they cannot be read.
    """
    path = pathlib.Path(os.path.expanduser(path))
    with os_errors(path):
        if path.is_dir():
            path = _weights_of(path)
    return _open_shards(path) if path.name.endswith(".index.json") else _open_file(path)


def save_tensors(path: str | os.PathLike, arrays: dict[str, np.ndarray]):
    """Write a safetensors file so that a reader never sees half of it.

    Args:
      path: the file; one that exists is replaced.
      arrays: by name; bfloat16 is allowed.

    Raises:
      FileError: an array has a dtype that cannot be written, or the file cannot be written.
    """
    path = pathlib.Path(os.path.expanduser(path))
    for name, array in arrays.items():
        if name == "__metadata__":
            raise FileError(f"{path}: a tensor must not be named '__metadata__', which safetensors uses otherwise")
        if array.dtype.newbyteorder("=") not in _DTYPES.values():
            raise tensor_error(path, name, f"has dtype {array.dtype}, must be {_listed(_DTYPES.values())}")
    arrays = {name: np.asarray(array, array.dtype.newbyteorder("="), order="C") for name, array in arrays.items()}
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        # transformers refuses files without a format; "pt" means the names and axes of PyTorch's modules.
        safetensors.numpy.save_file(arrays, partial, metadata={"format": "pt"})
        partial.chmod(mode)  # safetensors makes files that only their owner can read
        partial.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise FileError(f"{path}: cannot be written ({reason(error)})") from None


def read_json(path: str | os.PathLike) -> dict:
    """Return the object that a JSON file holds.

    Raises:
      FileError: the file does not exist, is not JSON in UTF-8, does not hold an object, or repeats a key.
    """
    path = pathlib.Path(os.path.expanduser(path))
    file_size(path)
    with os_errors(path):
        return parse_json(path, path.read_bytes())


def parse_json(path: pathlib.Path, text: bytes) -> dict:
    """Return the object that a JSON text holds.

    Raises:
      FileError: as `read_json`.
    """
    try:
        values = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: invalid UTF-8 at byte {error.start:,}") from None
    except RecursionError:
        raise FileError(f"{path}: cannot be read (objects or arrays are nested too deeply)") from None
    except ValueError as error:
        raise FileError(f"{path}: not valid JSON ({reason(error)})") from None
    if not isinstance(values, dict):
        raise FileError(f"{path}: holds a JSON {type(values).__name__}, must hold an object")
    return values


def file_size(path: pathlib.Path) -> int:
    """Return the size in bytes of a regular file that is not empty.

    Raises:
      FileError: the path does not exist or is something else, such as a pointer of Git LFS.
    """
    with os_errors(path):
        if not path.exists():
            raise FileError(f"{path}: does not exist")
        if not path.is_file():
            raise FileError(f"{path}: {'a folder' if path.is_dir() else 'not a regular file'}, must be a file")
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
        if not start:
            raise FileError(f"{path}: an empty file")
        if start == _POINTER:
            raise FileError(f"{path}: a pointer of Git LFS, not the file itself; get the file with `git lfs pull`")
        return path.stat().st_size


def read_array(path: pathlib.Path, name: str, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Read one array from a file.

    It is read into memory of its own, not mapped: a mapped file that is cut off later would end the process.

    Args:
      path: the file.
      name: of the tensor, for messages.
      offset: the first byte of the array.
      dtype, shape: of the array, which must lie in the file: as much memory is allocated as they need.

    Raises:
      FileError: the file ends before the array does, or cannot be read.
    """
    size = math.prod(shape) * dtype.itemsize
    with os_errors(path):
        data = np.fromfile(path, np.uint8, size, offset=offset)
    if data.size != size:
        raise tensor_error(path, name, "is cut off; the file has become shorter since it was opened")
    return data.view(dtype).reshape(shape)


def check_shape(path: pathlib.Path, name: str, shape: tuple[int, ...], dtype: np.dtype):
    """Check that NumPy can have an array of this shape; a size of zero along one axis does not excuse the others.

    Raises:
      FileError: it cannot.
    """
    if len(shape) > _MOST_AXES:
        raise tensor_error(path, name, f"has {len(shape):,} axes, at most {_MOST_AXES} are allowed")
    if math.prod(size or 1 for size in shape) * dtype.itemsize > _MOST_BYTES:
        raise tensor_error(path, name, "has a shape of more than 2^63 bytes")


def tensor_error(path: pathlib.Path, name: str, problem: str) -> FileError:
    """Return the error about a tensor of a file."""
    return FileError(f"{path}: tensor {quoted(name)}: {problem}")


def quoted(text: object) -> str:
    """Return text of a file in quotes, for a message: on one line and not too long."""
    if not isinstance(text, str):
        return f"a value of type {type(text).__name__}"
    return repr(text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}...")


@contextlib.contextmanager
def os_errors(path: pathlib.Path) -> Iterator[None]:
    """Turn an error of the operating system in the block into a FileError."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({reason(error)})") from None


def _weights_of(folder: pathlib.Path) -> pathlib.Path:
    """Return the file of weights in a folder, or the index of its shards."""
    for name in FOLDER_NAMES:
        if (folder / name).exists():
            return folder / name
    raise FileError(
        f"{folder}: has no weights; a folder must have {', '.join(FOLDER_NAMES[:-1])} or {FOLDER_NAMES[-1]}"
    )


def _open_file(path: pathlib.Path) -> dict[str, Tensor]:
    """Return the tensors of one file by name."""
    # These modules raise the errors of this one.
    from attn.pretrained import gguf, pickles

    file_size(path)  # a file that does not exist is the better message
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise FileError(f"{path}: the name ends with {quoted(suffix)}, must end with {', '.join(SUFFIXES)}")
    if suffix == ".safetensors":
        return _open_safetensors(path)
    return gguf.read(path)[1] if suffix == ".gguf" else pickles.read(path)


def _open_shards(index: pathlib.Path) -> dict[str, Tensor]:
    """Return the tensors of all shards that an index names."""
    shard_by_name = read_json(index).get("weight_map")
    if not isinstance(shard_by_name, dict) or not shard_by_name:
        raise FileError(f"{index}: 'weight_map' must be an object with the shard of each tensor")
    for name, shard in shard_by_name.items():
        if not _is_inside(shard):
            raise tensor_error(index, name, f"is placed in {quoted(shard)}, must be in a file of the same folder")
    tensors = {}
    for shard in dict.fromkeys(shard_by_name.values()):
        tensors |= _open_shard(index, shard, shard_by_name)
    return {name: tensors[name] for name in shard_by_name}


def _open_shard(index: pathlib.Path, shard: str, shard_by_name: dict[str, str]) -> dict[str, Tensor]:
    """Return the tensors of a shard, which must be those that the index places in it."""
    path = index.parent / shard
    with os_errors(path):
        if not path.exists():
            raise FileError(f"{index}: names the shard {quoted(shard)}, which does not exist")
    tensors = _open_file(path)
    for name in tensors:
        if name not in shard_by_name:
            raise tensor_error(path, name, f"is not named by {index.name}")
        if shard_by_name[name] != shard:
            raise tensor_error(path, name, f"is placed in {quoted(shard_by_name[name])} by {index.name}, not here")
    for name, place in shard_by_name.items():
        if place == shard and name not in tensors:
            raise tensor_error(path, name, f"is missing, but placed here by {index.name}")
    return tensors


def _is_inside(shard: object) -> bool:
    """Return whether a shard is named by a path that stays in the folder. A symbolic link there may lead elsewhere."""
    if not isinstance(shard, str) or not shard.isprintable() or "\\" in shard:
        return False
    path = pathlib.PurePosixPath(shard)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def _open_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name."""
    tensors = {}
    with _safetensors_errors(path):
        # Not mapped, for the reason given in `read_array`; reading is as fast.
        file = safetensors.safe_open(path, framework="np", backend="pread")
        _check_names(path)
        for name in file.keys():  # noqa: SIM118  not a dictionary
            entry = file.get_slice(name)
            dtype = _DTYPES.get(entry.get_dtype())
            if dtype is None:
                raise tensor_error(path, name, f"has dtype {entry.get_dtype()}, must be {_listed(_DTYPES)}")
            shape = tuple(entry.get_shape())
            check_shape(path, name, shape, dtype)
            tensors[name] = Tensor(path, shape, dtype, functools.partial(_read_safetensor, file, path, name))
    return tensors


def _check_names(path: pathlib.Path):
    """Check that no tensor of a valid safetensors file is named twice, of which the library takes one."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        parse_json(path, file.read(length))


def _read_safetensor(file, path: pathlib.Path, name: str) -> np.ndarray:
    with _safetensors_errors(path, name):
        return file.get_tensor(name)


@contextlib.contextmanager
def _safetensors_errors(path: pathlib.Path, name: str | None = None) -> Iterator[None]:
    """Turn an error of the safetensors library in the block into a FileError."""
    try:
        yield
    except (safetensors.SafetensorError, OSError) as error:
        problem = f"cannot be read ({reason(error)})"
        raise FileError(f"{path}: {problem}") if name is None else tensor_error(path, name, problem) from None


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    values = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{quoted(name)} occurs twice in an object")
        values[name] = value
    return values


def reason(error: Exception) -> str:
    """Return the cause of an error on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(text.split())[:_LONGEST_REASON]


def _listed(names) -> str:
    return ", ".join(map(str, names))
