"""The recordings of benchmarks/hugging_face.py: folders of tiny models, with what the library transformers computed.

They are in the checkout; an installed package does not have them, and `CASES` is then empty.
"""

import functools
import pathlib

import numpy as np

import attn

FOLDER = pathlib.Path(attn.__file__).parents[1] / "tests" / "pretrained" / "recorded"
CASES = sorted(path.parent.name for path in FOLDER.glob("*/recorded.npz"))


class Recording:
    """The recording of one case.

    Args:
      case: its name.
    """

    def __init__(self, case: str):
        self.path = FOLDER / case
        with np.load(self.path / "recorded.npz") as arrays:
            self.arrays = dict(arrays)

    def group(self, name: str) -> dict[str, np.ndarray]:
        """Return the arrays whose names begin with "NAME/", without it."""
        return {key.removeprefix(f"{name}/"): x for key, x in self.arrays.items() if key.startswith(f"{name}/")}

    def inputs(self, batch: str = "") -> dict[str, np.ndarray]:
        """Return the inputs of the first batch, or of the one named "second/"."""
        return self.group(f"{batch}inputs")

    def outputs(self, dtype: str, batch: str = "") -> dict[str, np.ndarray]:
        """Return the outputs, in the order in which they are computed, so that the first that differs tells where."""
        return dict(sorted(self.group(f"{batch}{dtype}").items(), key=_order))

    @property
    def batches(self) -> list[str]:
        """The batches of the case."""
        return [batch for batch in ("", "second/") if self.inputs(batch)]


@functools.cache
def recording(case: str) -> Recording:
    """Return what was recorded of a case."""
    return Recording(case)


def _order(item: tuple[str, np.ndarray]):
    """Order outputs: the encoder first, in a layer first the input, then the weights; logits last."""
    name, _, layer = item[0].partition("/")
    stack = 0 if name.startswith("encoder") else 1
    return stack, (int(layer), not name.endswith("hidden_states")) if layer else (1_000, name == "logits")


def real_rows(name: str, inputs: dict[str, np.ndarray], output: np.ndarray) -> np.ndarray:
    """Return which entries of an output belong to real tokens, in its shape; the rest is not compared.

    For a row that may attend to nothing, the library transformers returns a mean, and we return 0.
    """
    is_decoder = "decoder_input_ids" in inputs and not name.startswith("encoder")
    mask = inputs.get("decoder_attention_mask" if is_decoder else "attention_mask")
    if mask is None or output.ndim < 3:
        return np.ones(output.shape, bool)
    mask = mask.astype(bool)
    return np.broadcast_to(mask[:, None, :, None] if output.ndim == 4 else mask[:, :, None], output.shape)
