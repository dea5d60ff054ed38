"""Foreign weights in our blocks: BERT, ALBERT, GPT-2, Llama, T5, BART, Marian and ViT.

model = attn.pretrained.load(folder)
model(input_ids=...).logits
model.generate(input_ids, max_new_tokens=20)
attn.pretrained.save(model, another_folder)
"""

import os
import pathlib

from attn.pretrained.files import FOLDER_NAMES, SUFFIXES, FileError, read_json
from attn.pretrained.loaded import Output, Pretrained
from attn.pretrained.loading import load, save


def is_foreign(path: str | os.PathLike) -> bool:
    """Return whether a path is a file or a folder of foreign weights, by names and by the model_type in config.json."""
    path = pathlib.Path(os.path.expanduser(path))
    if path.suffix in SUFFIXES or any((path / name).exists() for name in FOLDER_NAMES):
        return True
    try:
        return "model_type" in read_json(path / "config.json")
    except FileError:
        return False


__all__ = ["FileError", "Output", "Pretrained", "is_foreign", "load", "save"]
