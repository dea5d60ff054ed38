# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---


# %% [markdown]
# # Invent a variant of attention
#
# A new score and a new mask are two functions of positions. Write them, look at them, train with them, and see what
# the model looks at and how often it is right. Training takes some ten seconds on two cores.

# %%
import pathlib
import tempfile

import jax.numpy as jnp
import matplotlib.pyplot as plt
from IPython.display import Image

import attn
from attn.nn.variants import VARIANTS, Variant
from attn.training import meshes
from attn.walkthrough.bench import Bench, exact_match, losses

meshes.use_cores(32)  # batches of 32 are shared out over the cores

# %% [markdown]
# ## Write it
#
# `score` takes the scaled score `s` of the query at `i` and the key at `j`, and gives back another one. `mask` says who
# may be looked at. This score pushes weights towards places whose distance from the query is even, and this mask hides
# what is farther than three places away. Ready-made ones combine with yours: `attn.scores.softcap(20.0) >> score`,
# `attn.masks.causal() & mask`.


# %%
def score(s, i, j):
    return s + jnp.cos(jnp.pi * (i - j))


def mask(i, j):
    return jnp.abs(i - j) <= 3


# %% [markdown]
# What do they do to twelve tokens that know nothing yet? With queries of zero all that is left is your score and mask.

# %%
nothing = jnp.zeros((12, 4))
plt.imshow(attn.attention_weights(nothing, nothing, score=score, mask=mask), cmap="Blues")
plt.xlabel("key j")
plt.ylabel("query i")
plt.show()

# %% [markdown]
# ## Train with it
#
# A name in `VARIANTS` is all that a model needs; it then holds for all attention layers, besides what they hide anyway
# (padding, and the future from the decoder). Change the functions above, run this cell again, and it is trained anew.

# %%
VARIANTS["mine"] = Variant(score=score, mask=mask)
bench = Bench(pathlib.Path(tempfile.mkdtemp()))


def train(variant):
    settings = {"task": {"name": "copy", "max_length": 12}, "model": {"variant": variant}, "training": {"steps": 800}}
    return bench.trained(settings)


mine, plain = train("mine"), train("plain")

# %% [markdown]
# ## Look

# %%
Image(str(mine.inspect("3 1 4 1 5 9 2 6 5 3 5 8", mine.folder / "attention.png")))

# %% [markdown]
# ## Is it any good?

# %%
lengths = range(1, 13)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for (name, run), style in zip({"mine": mine, "plain": plain}.items(), (".-", "x--")):
    left.plot(*zip(*losses(run)), style, label=name)
    right.plot(lengths, exact_match(run, lengths, 50), style, label=name)
left.set(yscale="log", xlabel="step", ylabel="training loss")
right.set(xlabel="length", ylabel="exact match", ylim=(-0.03, 1.03))
left.legend()
plt.show()

# %% [markdown]
# Strings as short as these may all be right with both, and the two lines on the right are then one; how fast the loss
# fell still tells them apart, and so would a longer `max_length`.

# %% [markdown]
# Things to try: a mask that sees only keys at even places; a score that forgets with distance, `s - 0.3 *
# jnp.abs(i - j)`; `Variant(scale=1.0)`. To keep one, put its record into `attn/nn/variants.py`; the command line then
# takes `--config.model.variant=mine`. [`docs/attention.md`](../docs/attention.md) has more recipes.
