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
# A new score and a new mask are two functions of positions. Write them, draw them, train with them, and see what the
# model attends to and how often it is right. Training takes about ten seconds on two cores.

# %%
import pathlib
import tempfile

import jax.numpy as jnp
import matplotlib.pyplot as plt
from IPython.display import Image

import attn
from attn import mechanisms
from attn.studies.jobs import Trainer, losses
from attn.studies.probes import exact_match
from attn.training import meshes

meshes.use_cores(32)  # batches of 32 are sharded over the cores

# %% [markdown]
# ## Write it
#
# `score` takes the scaled score `s` of the query at `i` and the key at `j`, and returns a new one. `mask` returns True
# for visible keys. This score shifts weight to positions at an even distance from the query, and this mask hides keys
# more than three positions away. The library's own combine with yours: `attn.scores.softcap(20.0) >> score`,
# `attn.masks.causal() & mask`.


# %%
def score(s, i, j):
    return s + jnp.cos(jnp.pi * (i - j))


def mask(i, j):
    return jnp.abs(i - j) <= 3


# %% [markdown]
# If queries and keys are zero, only your score and mask decide the weights, here for twelve tokens:

# %%
zeros = jnp.zeros((12, 4))  # [T H]
plt.imshow(attn.attention_weights(zeros, zeros, score=score, mask=mask), cmap="Blues")
plt.xlabel("key j")
plt.ylabel("query i")
plt.show()

# %% [markdown]
# ## Train with it
#
# Together they are a mechanism. A model uses it by its name, in every attention layer, here in addition to sinusoidal
# positions. Padding, and later symbols in the decoder, stay hidden. To train with other functions, change those above,
# run their cell, and run this one again.

# %%
mechanisms.MECHANISMS["mine"] = mechanisms.of(score=score, mask=mask)
trainer = Trainer(pathlib.Path(tempfile.mkdtemp()))


def train(mechanism):
    task, model = {"name": "copy", "max_length": 12}, {"mechanism": mechanism}
    return trainer.train({"task": task, "model": model, "training": {"steps": 800}})


mine, plain = train("sinusoidal + mine"), train("sinusoidal")

# %% [markdown]
# ## Attention maps

# %%
Image(str(mine.inspect("3 1 4 1 5 9 2 6 5 3 5 8", mine.folder / "attention.png")))

# %% [markdown]
# ## Loss and exact match

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
# With strings this short both models may be exact, so that the two lines on the right coincide. The loss still shows
# which learned faster, and a longer `max_length` would show more.

# %% [markdown]
# Things to try: a mask that shows only keys at even positions; a score that falls with distance, `s - 0.3 *
# jnp.abs(i - j)`; `mechanisms.of(scale=1.0)`; `train("rotary + softcap(20)")`. To keep a mechanism, put it into its
# own file, such as `my_mechanism.py`, with `mechanisms.register(mechanisms.of(...), "mine")`; the command line then
# takes `--imports=my_mechanism --config.model.mechanism="sinusoidal + mine"`. One with parameters is a class, as in the
# README; [`docs/attention.md`](../docs/attention.md) has more recipes.
