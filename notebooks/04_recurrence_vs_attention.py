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
# # Recurrence against attention
#
# An LSTM reads a string into one state of fixed size, and its decoder has to write from that state alone. A Transformer
# keeps all of the source and looks at it. In between is an LSTM whose decoder looks back
# (Bahdanau et al. 2015; here as in Luong et al. 2015).
# All three get as many parameters, the same examples and the same number of steps. It takes under a minute on two
# cores.

# %%
import pathlib
import tempfile

import matplotlib.pyplot as plt
from IPython.display import Image

from attn.studies.jobs import Trainer
from attn.studies.probes import count_parameters, exact_match, match_width, untrained
from attn.studies.walkthrough.bottleneck import gradient_by_distance
from attn.training import meshes

meshes.use_cores(32)  # batches of 32 are shared out over the cores

# %% [markdown]
# ## Train
#
# Each learns to reverse strings of up to 12 symbols.

# %%
MODELS = {
    "LSTM": {"name": "lstm"},
    "LSTM with attention": {"name": "lstm", "attention": "multiplicative"},
    "Transformer": {"name": "transformer"},
}
trainer = Trainer(pathlib.Path(tempfile.mkdtemp()))


def settings(model):
    return {"task": {"max_length": 12}, "model": {**model, "width": 64}, "training": {"steps": 600}}


count = count_parameters(settings(MODELS["Transformer"]))
of_model = {name: settings(model) for name, model in MODELS.items()}
for name in ("LSTM", "LSTM with attention"):
    of_model[name] = match_width(of_model[name], count)  # wider or narrower, until it has as many
runs = {name: trainer.train(given) for name, given in of_model.items()}
for name, given in of_model.items():
    print(f"{name:<20} {count_parameters(given):,} parameters")

# %% [markdown]
# ## How long a string gets through?

# %%
lengths = [1, 2, 4, 6, 8, 10, 12]
for name, run in runs.items():
    plt.plot(lengths, exact_match(run, lengths, 50), ".-", label=name)
plt.xlabel("length")
plt.ylabel("exact match")
plt.legend()
plt.show()

# %% [markdown]
# ## Why?
#
# The last symbol to write is the first that was read. How much does the answer move with each source token? The norm of
# $\partial\,\mathrm{logits}_T / \partial x_{T-k}$, by the distance $k$ from the last symbol of the source. Through a
# recurrent state the gradient has to come back one step at a time, and before training it fades with each. Attention
# has one step to every place.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True, layout="constrained")
for name, run in runs.items():
    axes[0].plot(gradient_by_distance(untrained(of_model[name]), 12), label=name)
    axes[1].plot(gradient_by_distance(run, 12), label=name)
for ax, when in zip(axes, ("before training", "after")):
    ax.set(yscale="log", xlabel="distance k from the last symbol", title=when)
axes[0].legend()
plt.show()

# %% [markdown]
# After training the gradient of the LSTM without attention need not be small, and its answers are wrong all the same:
# that a gradient arrives is needed to learn, and is not enough. At twelve symbols the fading is mild; the walkthrough
# follows it over 128.

# %% [markdown]
# ## What does each look at?
#
# A model without attention has no weights to draw. What can be drawn for it is the same norm, for each symbol that it
# writes and each symbol that it has read: its influence.

# %%
text = "3 1 4 1 5 9 2 6"
print("asked: ", text)
for name, run in runs.items():
    print(f"{name:<20}", *run.predict([text]))
Image(str(runs["LSTM"].inspect(text, trainer.folder / "lstm.png")))

# %%
Image(str(runs["LSTM with attention"].inspect(text, trainer.folder / "attention.png")))

# %% [markdown]
# The anti-diagonal again, in a recurrent model: it is attention that finds the alignment, not the Transformer around
# it. Up to length 128 and over several seeds: `attn walkthrough --only bottleneck`. As runs of their own:
# `python train.py --config=configs/lstm.py`, `gru.py`, `lstm_attention.py`. Next: `05_invent_a_variant`.
