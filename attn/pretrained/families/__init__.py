"""The families of foreign models, by `model_type` of config.json: a function each, which returns the plan of a model.

A new family is one file and one line here.
"""

from collections.abc import Callable

from attn.pretrained.families.bart import bart, marian
from attn.pretrained.families.bert import albert, bert
from attn.pretrained.families.gpt2 import gpt2
from attn.pretrained.families.llama import llama
from attn.pretrained.families.t5 import t5
from attn.pretrained.families.vit import vit
from attn.pretrained.plan import Plan

FAMILIES: dict[str, Callable[..., Plan]] = {
    "albert": albert,
    "bart": bart,
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "marian": marian,
    "t5": t5,
    "vit": vit,
}
