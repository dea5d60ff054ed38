"""Rules that map the tensors of foreign files to our parameters, one per tensor, read in both directions.

A rule names the tensor, our parameter, and the order of the axes in both, in the notation of einops:

    Rule("encoder.layer.0.attention.self.query.weight", "stack.blocks.0.attention.W_Q", "(n h) d -> d n h")

A tensor that holds several parameters is divided over a tuple of them; `p` is its axis: "d (p n h) -> p d n h".
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from attn.pretrained.files import FileError, Tensor
from attn.settings import nearest

Params = Mapping[str, Array | np.ndarray | jax.ShapeDtypeStruct]  # by their paths; shapes are enough for some


class Rule(NamedTuple):
    """A rule of one tensor.

    Attributes:
      theirs: name of the tensor in the file.
      ours: path of the parameter, or of several.
      axes: "their axes -> our axes".
      sizes: sizes of axes that the shape of our parameter does not tell.
    """

    theirs: str
    ours: str | tuple[str, ...]
    axes: str
    sizes: Mapping[str, int] = {}

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the parameters."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def shape(self, params: Params) -> tuple[int, ...]:
        """Return the shape that the tensor must have."""
        theirs, _ = self._sides()
        letters = self._letters(params)
        return tuple(int(np.prod([_size(letters, each) for each in group])) for group in theirs)

    def read(self, tensor: np.ndarray, params: Params) -> dict[str, np.ndarray]:
        """Return the parameters that a tensor holds, by their paths."""
        array = einops.rearrange(tensor, self.axes, **self._letters(params))
        return {self.ours: array} if isinstance(self.ours, str) else dict(zip(self.ours, array))

    def write(self, params: Params) -> np.ndarray:
        """Return the tensor that holds the parameters."""
        arrays = [np.asarray(params[path]) for path in self.paths]
        array = arrays[0] if isinstance(self.ours, str) else np.stack(arrays)
        theirs, ours = self.axes.split("->")
        return np.ascontiguousarray(einops.rearrange(array, f"{ours} -> {theirs}", **self._letters(params)))

    def _sides(self) -> list[list[list[str]]]:
        """Return the groups of axes of both sides."""
        return [
            [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", side)]
            for side in self.axes.split("->")
        ]

    def _letters(self, params: Params) -> dict[str, int]:
        """Return the size of each axis, from the shapes of our parameters."""
        _, ours = self._sides()
        shape = params[self.paths[0]].shape
        shape = shape if isinstance(self.ours, str) else (len(self.ours), *shape)
        letters = dict(self.sizes)
        for group, size in zip(ours, shape, strict=True):
            unknown = [each for each in group if each not in letters]
            if unknown:  # at most one, or the rule is wrong
                [name] = unknown
                letters[name] = size // int(np.prod([letters[each] for each in group if each != name]))
        return letters


def _size(letters: Mapping[str, int], axis: str) -> int:
    return int(axis) if axis.isdecimal() else letters[axis]


def linear(theirs: str, ours: str, *, bias: bool = True) -> list[Rule]:
    """Return the rules of a linear layer, whose matrix PyTorch stores as [out, in]."""
    rules = [Rule(f"{theirs}.weight", f"{ours}.kernel", "o i -> i o")]
    return [*rules, Rule(f"{theirs}.bias", f"{ours}.bias", "o -> o")] if bias else rules


def norm(theirs: str, ours: str, *, bias: bool = True) -> list[Rule]:
    """Return the rules of a norm."""
    rules = [Rule(f"{theirs}.weight", f"{ours}.scale", "d -> d")]
    return [*rules, Rule(f"{theirs}.bias", f"{ours}.bias", "d -> d")] if bias else rules


def attention(
    theirs: str, ours: str, names: Iterable[str], *, bias: bool = True, output_bias: bool = True
) -> list[Rule]:
    """Return the rules of attention whose four linear layers, query, key, value and output, have these names."""
    query, key, value, output = names
    rules = []
    for name, letter in ((query, "Q"), (key, "K"), (value, "V")):
        rules.append(Rule(f"{theirs}.{name}.weight", f"{ours}.W_{letter}", "(n h) d -> d n h"))
        if bias:
            rules.append(Rule(f"{theirs}.{name}.bias", f"{ours}.b_{letter}", "(n h) -> n h"))
    rules.append(Rule(f"{theirs}.{output}.weight", f"{ours}.W_O", "d (n h) -> n h d"))
    return [*rules, Rule(f"{theirs}.{output}.bias", f"{ours}.b_O", "d -> d")] if output_bias else rules


def by_path(params: nnx.State) -> dict:
    """Return parameters, or their shapes, by their paths, such as "model.stack.blocks.0.attention.W_Q"."""
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(params)}


def read_all(
    rules: Iterable[Rule], tensors: Mapping[str, Tensor], shapes: Params, dtype: jnp.dtype
) -> dict[str, Array]:
    """Read the parameters from the tensors of a file: shapes and names first, values only if all of these are right.

    Args:
      rules: of all parameters.
      tensors: of the file, by name; each is used by a rule.
      shapes: of the parameters, by path.
      dtype: of the parameters.

    Raises:
      FileError: a tensor is missing, has another shape, or holds NaN or infinity; or no rule has its name.
    """
    rules = list(rules)
    check_names(rules, tensors, shapes)
    params = {}
    for rule in rules:
        tensor = tensors[rule.theirs]
        values = tensor.read()
        if not is_finite(values):
            raise FileError(f"{tensor.file}: tensor {rule.theirs!r}: holds NaN or infinity")
        params |= {path: jnp.asarray(each, dtype) for path, each in rule.read(values, shapes).items()}
    return params


def is_finite(array: np.ndarray) -> bool:
    """Return whether all numbers are finite; bfloat16 is widened, since NumPy cannot test it."""
    return bool(np.isfinite(array if array.dtype.kind == "f" else array.astype(np.float32)).all())


def check_names(rules: Iterable[Rule], tensors: Mapping[str, Tensor], shapes: Params):
    """Check that rules, tensors and parameters belong together, one to one, and that the shapes are right."""
    filled = [path for rule in rules for path in rule.paths]
    if sorted(filled) != sorted(shapes):  # a mistake of ours, not of the file
        twice = {path for path in filled if filled.count(path) > 1}
        raise AssertionError(
            f"rules: filled twice {twice}, not filled {shapes.keys() - set(filled)}, unknown "
            f"{set(filled) - shapes.keys()}"
        )
    file = next((each.file for each in tensors.values()), None)
    for rule in rules:
        if rule.theirs not in tensors:
            raise FileError(f"{file}: tensor {rule.theirs!r}: is missing, must have shape {[*rule.shape(shapes)]}")
    known = {rule.theirs for rule in rules}
    for name, tensor in tensors.items():
        if name not in known:
            raise FileError(f"{tensor.file}: tensor {name!r}: is not one of the model{nearest(name, known)}")
    for rule in rules:
        tensor, expected = tensors[rule.theirs], rule.shape(shapes)
        if tuple(tensor.shape) != expected:
            raise FileError(
                f"{tensor.file}: tensor {rule.theirs!r}: got shape {[*tensor.shape]}, must have {[*expected]}"
            )
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise FileError(
                f"{tensor.file}: tensor {rule.theirs!r}: got {tensor.dtype}, must be floating-point numbers"
            )
