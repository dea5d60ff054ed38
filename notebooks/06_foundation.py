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
# # The foundation
#
# Attention is the foundation of nearly all of today's models. BERT, GPT-2 and ViT side by side: what differs in one
# table, one map of each, trained by the same program. Then a real pretrained model, whose attention can be checked.

# %%
import dataclasses
import pathlib
import tempfile

import matplotlib.pyplot as plt
import numpy as np

import attn
from attn.nn.style import STYLES
from attn.studies import reactions
from attn.studies.jobs import Trainer
from attn.training import meshes

meshes.use_cores(32)  # batches of 32 are sharded over the cores

# %% [markdown]
# ## What differs
#
# A *style* is a record of choices: the norm and its place, biases, the activation, what stands at both ends of the
# stack. These are all the differences between the blocks of five families; sizes, positions and masks are settings.

# %%
names = ["bert", "gpt2", "vit", "t5", "llama"]
print(f"{'':<22}" + "".join(f"{name:>12}" for name in names))
for field in dataclasses.fields(STYLES["plain"]):
    values = [getattr(STYLES[name], field.name) for name in names]
    if len(set(values)) > 1:
        print(f"{field.name:<22}" + "".join(f"{value!s:>12}" for value in values))

# %% [markdown]
# ## Three models
#
# - BERT, an encoder, restores masked symbols of a string in which every other symbol is the sum of its neighbours.
# - GPT-2, a decoder, reads a string and continues it with its mirror image.
# - ViT, an encoder of patches, says which digit is in a noisy picture of 12 x 12 pixels.

# %%
MODELS = {
    "bert": dict(name="encoder_only", style="bert", mechanism="learned(16)", tied_embeddings=True),
    "gpt2": dict(name="decoder_only", style="gpt2", mechanism="learned(32)", tied_embeddings=True),
    "vit": dict(name="vision_transformer", style="vit", mechanism="learned_grid(4, 4)"),
}
TASKS = {
    "bert": dict(name="fill", symbols=5, max_length=9),
    "gpt2": dict(name="reverse", symbols=8, max_length=8),
    "vit": dict(name="digit", min_length=16, max_length=16),
}
trainer = Trainer(pathlib.Path(tempfile.mkdtemp()), say=lambda line: None)
runs = {
    name: trainer.train({"task": TASKS[name], "model": model, "training": {"steps": 1_500}})
    for name, model in MODELS.items()
}
for name, run in runs.items():
    print(name, run.about()[-1])

# %% [markdown]
# A masked symbol (6) attends to both of its neighbours; the decoder attends to the mirror image of what it writes; the
# class token attends to the patches, drawn over the picture.

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
example = {"bert": "1 6 2 6 4 4 5", "gpt2": "3 1 4 1 5"}
for ax, name in zip(axes, example):
    maps = runs[name].look(example[name])
    [(kind, weights)] = maps.weights.items()
    ax.imshow(weights[-1].mean(axis=0), cmap="Blues", vmin=0, vmax=1)  # the mean of the last layer's heads
    ax.set_xticks(range(weights.shape[-1]), maps.columns(kind)[1], rotation=90)
    ax.set_yticks(range(weights.shape[-2]), maps.rows(kind)[1])
    ax.set_title(f"{name}: {example[name]} → {runs[name].predict([example[name]])[0]}")
question = attn.tasks.load(**TASKS["vit"]).questions("test", 1, 0)
text = " ".join(map(str, question.sources[0, :16]))
maps = runs["vit"].look(text)
over = maps.weights["encoder"][-1, :, -1, :16].mean(axis=0).reshape(4, 4)  # from the class token to the patches
axes[2].imshow(over, cmap="Blues", vmin=0, extent=(-0.5, 11.5, 11.5, -0.5))
axes[2].imshow(np.ma.masked_equal(maps.picture, 0), cmap="gray_r", vmin=0, vmax=1, alpha=0.5)
axes[2].set_title(f"vit: digit {int(runs['vit'].predict([text])[0]) - 1}")
plt.show()

# %% [markdown]
# ## A head that can be checked
#
# The wheel `rxnmapper` on PyPI holds an ALBERT that learned to restore hidden symbols of chemical reactions. It was not
# told which atom of the product was which atom before, but one of its heads points there. Each atom can be checked.

# %%
try:
    wheel = reactions.find()
except ModuleNotFoundError as missing:
    print(missing)
else:
    model = attn.pretrained.load(wheel.model)
    print(model)
    case = reactions.read_cases(wheel)[0]
    reaction = reactions.read_reaction(case.reaction)
    [maps] = reactions.attention_maps(model, [reaction])
    weights = reactions.between(maps[reactions.LAYER, reactions.HEAD], reaction, direction="both")  # [P R]
    expected = reactions.expected_atoms(reaction, case.mapped)
    atoms = [atom.kind for atom in reaction.graph.atoms]
    figure, ax = plt.subplots(figsize=(9, 4), layout="constrained")
    ax.imshow(weights, cmap="Blues")
    right = expected[np.arange(len(weights)), weights.argmax(axis=1)]
    for row, column in enumerate(weights.argmax(axis=1)):
        ax.plot(column, row, "o", color="tab:green" if right[row] else "tab:red", markersize=4)
    ax.set(xlabel="atoms of the reactants", ylabel="atoms of the product")
    ax.set_title(f"{right.sum()} of {len(right)} atoms right")
    plt.show()

# %% [markdown]
# ## Your turn
#
# `attn.pretrained.load(folder)` reads any folder of these families. `edit=` changes attention weights before they are
# used: remove a head of the model above, and see which mappings are lost.
