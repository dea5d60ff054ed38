"""Loads foreign weights into our models, and writes them again."""

import contextlib
import fnmatch
import json
import os
import pathlib
import shutil
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn.pretrained import llama_gguf
from attn.pretrained.families import FAMILIES
from attn.pretrained.files import FileError, Tensor, open_tensors, read_json, save_tensors
from attn.pretrained.generation import greedy_settings
from attn.pretrained.loaded import Origin, Pretrained
from attn.pretrained.plan import Plan
from attn.pretrained.rules import Params, by_path, is_finite, read_all
from attn.pretrained.settings import Keys
from attn.settings import error_message, one_of

# Files beside the weights that `save` copies.
_BESIDE = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "preprocessor_config.json", "added_tokens.json"),
    *("spiece.model", "source.spm", "target.spm", "tokenizer.model", "chat_template.jinja"),
)
# Endings of names in files that TensorFlow's names were kept in, and the usual ones.
_OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}
_DTYPES = ("float32", "float64", "bfloat16")


def load(path: str | os.PathLike, *, dtype: str = "float32", ignore: Collection[str] = ()) -> Pretrained:
    """Load a model from a folder as the library transformers writes it, or from a GGUF file.

    Args:
      path: a folder with config.json and weights (safetensors, in several files too, or an old file of PyTorch, of
        which nothing is executed), a file of weights beside its config.json, or a file that ends with .gguf.
      dtype: of parameters and computation: float32, bfloat16, or float64 with jax_enable_x64.
      ignore: keys of config.json that are known not to matter.

    Returns:
      The model: `load(path)(input_ids=...)`.

    Raises:
      FileError: a file is missing or damaged; a tensor is missing, unknown, misshapen or not finite; or config.json
        has a key that is not understood.
      ValueError: another dtype.
    """
    if isinstance(ignore, str):
        raise ValueError(f"ignore: got {ignore!r}, must be a list of keys")
    if message := error_message(str, dtype, one_of(_DTYPES)):
        raise ValueError(f"dtype: {message}")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"dtype: got {dtype!r}, which needs jax.config.update('jax_enable_x64', True)")
    path = pathlib.Path(os.path.expanduser(path))
    if not path.exists():
        raise FileError(f"{path}: does not exist, must be a folder or a file on this machine; nothing is downloaded")
    if path.suffix == ".gguf":
        file, (config, tensors, metadata) = path, llama_gguf.read(path)
        greedy = greedy_settings(config, path)
    else:
        folder, metadata = path if path.is_dir() else path.parent, None
        file, config = folder / "config.json", read_json(folder / "config.json")
        tensors = _with_usual_names(open_tensors(path))
        generation = folder / "generation_config.json"
        greedy = (
            greedy_settings(read_json(generation), generation) if generation.exists() else greedy_settings(config, file)
        )
    plan, graphdef, shapes = _planned(Keys(config, file, ignore), tensors, dtype)
    tensors, copies, unused = _sorted(tensors, plan)
    params = filled(shapes, read_all(plan.rules, tensors, by_path(shapes), jnp.dtype(dtype)))
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    rules = tuple(plan.rules)
    origin = Origin(path, config, metadata, graphdef, rules, dtypes, copies, unused, jnp.dtype(dtype), greedy)
    return Pretrained(params, origin)


def save(model: Pretrained, folder: str | os.PathLike):
    """Write a folder that the library transformers, and `load`, read: the same tensors, in the dtypes of the file.

    What was loaded in float32 or wider is written bit for bit. Tensors that were not used are written as they were.

    Args:
      model: a loaded model, whose parameters may have changed.
      folder: is made if it does not exist; files in it that have the same names are replaced.

    Raises:
      FileError: the folder or a file cannot be written, or a parameter is not finite in the dtype of its tensor.
    """
    folder, origin = pathlib.Path(os.path.expanduser(folder)), model.origin
    try:
        folder.mkdir(parents=True, exist_ok=True)
        params = {path: np.asarray(jax.device_get(value)) for path, value in by_path(model.params).items()}
        arrays = {name: tensor.read() for name, tensor in origin.unused.items()}
        for rule in origin.rules:
            with np.errstate(over="ignore"):
                arrays[rule.theirs] = array = rule.write(params).astype(origin.dtypes[rule.theirs])
            if not is_finite(array):
                raise FileError(f"{folder}: tensor {rule.theirs!r}: holds NaN or infinity in {array.dtype}")
        save_tensors(folder / "model.safetensors", arrays)
        (folder / "config.json").write_text(json.dumps(dict(origin.config), indent=2) + "\n")
        source = origin.path if origin.path.is_dir() else origin.path.parent
        if origin.metadata is not None:
            with contextlib.suppress(FileError):  # the GGUF file has no tokenizer that can be read
                origin.tokens.save(folder / "tokenizer.json")
        for name in _BESIDE if origin.metadata is None else ():
            if (source / name).exists() and source.resolve() != folder.resolve():
                shutil.copyfile(source / name, folder / name)
    except OSError as error:
        raise FileError(f"{folder}: cannot be written ({error.strerror or error})") from None


def _planned(keys: Keys, tensors: Mapping[str, Tensor], dtype: str) -> tuple[Plan, nnx.GraphDef, nnx.State]:
    """Return the plan of the family that config.json names, and the structure and shapes of the model."""
    kind = keys.take("model_type", hint=str)
    if message := error_message(str, kind, one_of(FAMILIES)):
        raise keys.error(f"key 'model_type': {message}")
    try:
        plan = FAMILIES[kind](keys, tensors.keys(), dtype)
        keys.check_all_read()
        graphdef, shapes = nnx.split(nnx.eval_shape(lambda: plan.build(nnx.Rngs(0))), nnx.Param)
    except FileError:
        raise
    except (ValueError, TypeError, OverflowError) as error:  # sizes that no model can have
        raise keys.error(" ".join(str(error).split())[:300]) from None
    return plan, graphdef, shapes


def _with_usual_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by their usual names, for files that have older ones."""
    usual = {}
    for name, tensor in tensors.items():
        old = next((ending for ending in _OLD_NAMES if name.endswith(ending)), None)
        new = name if old is None else name.removesuffix(old) + _OLD_NAMES[old]
        if new in usual or (new != name and new in tensors):
            raise FileError(f"{tensor.file}: tensor {name!r}: is there twice, also as {new!r}")
        usual[new] = tensor
    return usual


def _sorted(tensors: Mapping[str, Tensor], plan: Plan) -> tuple[dict[str, Tensor], tuple[str, ...], dict[str, Tensor]]:
    """Return the tensors that are parameters, the names of copies of these, and the tensors that are not used."""
    names = {rule.theirs for rule in plan.rules}
    used, copies, unused = {}, [], {}
    for name, tensor in tensors.items():
        original = plan.copies.get(name)
        if name in names or (original is None and not any(fnmatch.fnmatch(name, each) for each in plan.ignored)):
            used[name] = tensor
        elif original is None:
            unused[name] = tensor
        else:
            copies.append(name)
            # If the file has only copies, the first takes the place of the original.
            first = used.setdefault(original, tensors.get(original, tensor))
            if first is not tensor:
                _check_copy(name, tensor, first, original)
    return used, tuple(copies), unused


def _check_copy(name: str, tensor: Tensor, original: Tensor, of: str):
    if tensor.shape != original.shape or not np.array_equal(tensor.read(), original.read(), equal_nan=True):
        raise FileError(f"{tensor.file}: tensor {name!r}: differs from {of!r}, of which it must be a copy")


def filled(shapes: nnx.State, params: Params) -> nnx.State:
    """Return a state with these arrays in the places of its shapes."""
    flat = nnx.to_flat_state(shapes)
    return nnx.from_flat_state([(path, each.replace(params[".".join(map(str, path))])) for path, each in flat])
