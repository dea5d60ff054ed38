"""Foreign weights in our blocks: BERT, ALBERT, GPT-2, Llama, T5, BART, Marian and ViT.

model = attn.pretrained.load(folder)
model(input_ids=...).logits
model.generate(input_ids, max_new_tokens=20)
attn.pretrained.save(model, another_folder)
"""

from attn.pretrained.files import FileError
from attn.pretrained.loaded import Output, Pretrained
from attn.pretrained.loading import load, save

__all__ = ["FileError", "Output", "Pretrained", "load", "save"]
