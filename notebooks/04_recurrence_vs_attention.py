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
# # Recurrence and attention
#
# An LSTM reads a string into one state of fixed size, and its decoder has to write from that state alone. A Transformer
# keeps an encoding of every source token and attends to them. In between is an LSTM whose decoder attends to the
# encoder's states (Bahdanau et al. 2015; here as in Luong et al. 2015). All three get about as many parameters, the
# same examples and the same number of steps. It takes under a minute on two cores.

# %%
import pathlib
import tempfile

import matplotlib.pyplot as plt
from IPython.display import Image

from attn.studies.jobs import Trainer
from attn.studies.probes import count_parameters, exact_match, match_width, untrained
from attn.studies.walkthrough.bottleneck import gradient_by_distance
from attn.training import meshes

meshes.use_cores(32)  # batches of 32 are sharded over the cores

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
all_settings = {name: settings(model) for name, model in MODELS.items()}
for name in ("LSTM", "LSTM with attention"):
    all_settings[name] = match_width(all_settings[name], count)  # the width with about as many parameters
runs = {name: trainer.train(model_settings) for name, model_settings in all_settings.items()}
for name, model_settings in all_settings.items():
    print(f"{name:<20} {count_parameters(model_settings):,} parameters")

# %% [markdown]
# ## Exact match by length

# %%
lengths = [1, 2, 4, 6, 8, 10, 12]
for name, run in runs.items():
    plt.plot(lengths, exact_match(run, lengths, 50), ".-", label=name)
plt.xlabel("length")
plt.ylabel("exact match")
plt.legend()
plt.show()

# %% [markdown]
# ## Gradients by distance
#
# The last symbol to write is the first that was read. How much does it depend on each source token? This draws the norm
# of $\partial\,\mathrm{logits}_T / \partial x_{T-k}$, by the distance $k$ from the last symbol of the source. Through a
# recurrent state the gradient goes back one step at a time, and before training it fades with each step. Attention
# reaches every position in one step.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True, layout="constrained")
for name, run in runs.items():
    axes[0].plot(gradient_by_distance(untrained(all_settings[name]), 12), label=name)
    axes[1].plot(gradient_by_distance(run, 12), label=name)
for ax, when in zip(axes, ("before training", "after")):
    ax.set(yscale="log", xlabel="distance k from the last symbol", title=when)
axes[0].legend()
plt.show()

# %% [markdown]
# After training, the gradient of the LSTM without attention need not be small, but its answers are still wrong: a
# gradient that arrives is necessary, and not sufficient. Over twelve symbols it fades little; the walkthrough measures
# it over 40.

# %% [markdown]
# ## Attention maps and influence
#
# A model without attention has no weights to draw. Its picture shows the influence instead: the same norm, for each
# symbol that it writes and each symbol that it has read.

# %%
text = "3 1 4 1 5 9 2 6"
print("source:", text)
for name, run in runs.items():
    print(f"{name:<20}", *run.predict([text]))
Image(str(runs["LSTM"].inspect(text, trainer.folder / "lstm.png")))

# %%
Image(str(runs["LSTM with attention"].inspect(text, trainer.folder / "attention.png")))

# %% [markdown]
# The anti-diagonal appears in a recurrent model too: attention finds the alignment, not the Transformer around it.
# `attn walkthrough --only bottleneck` measures this for several widths and seeds, and the bits that the states hold.
# To train such models as runs: `python train.py --config=configs/lstm.py`, `gru.py`, `lstm_attention.py`. Next:
# `05_invent_a_variant`.
