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
# # Train a Transformer, then see what it attends to
#
# A recurrent network reads a sequence into one hidden state and has to answer from that state alone. Attention lets
# every output attend to every input directly, and its weights can be drawn. Here a small Transformer learns to
# reverse strings. Its cross-attention then shows an anti-diagonal: to write the first symbol it attends to the last
# one, and so on. It takes less than a minute on two cores.

# %%
import pathlib
import tempfile

import jax.numpy as jnp
import numpy as np
from IPython.display import Image

import attn
from attn import experiment

# The root of the repository: a notebook may be started there or in its own folder.
ROOT = next(folder for folder in (pathlib.Path.cwd(), pathlib.Path.cwd().parent) if (folder / "configs").is_dir())

# %% [markdown]
# ## Attention itself
#
# One head of one sequence is $\mathrm{softmax}(QK^\top/\sqrt{d_k})\,V$. Masks and scores are functions of the
# query's position `i` and the key's position `j`. A mask prints as its matrix.

# %%
rng = np.random.default_rng(0)
query, key, value = (jnp.asarray(rng.normal(size=(6, 4)), jnp.float32) for _ in range(3))
window = attn.masks.causal() & (lambda i, j: i - j < 3)
window

# %%
weights = attn.attention_weights(query, key, mask=window)
np.testing.assert_allclose(weights @ value, attn.attention(query, key, value, mask=window), rtol=1e-5)
np.round(weights, 2)

# %% [markdown]
# ## Train
#
# This is the function that `python train.py --config=configs/reverse.py` calls, here with shorter strings and fewer
# steps to take less time. The final evaluation uses held-out strings: a hash decides which strings are never trained
# on.

# %%
run_folder = pathlib.Path(tempfile.mkdtemp()) / "reverse"
settings = {"task.max_length": "12", "training.steps": "1500", "evaluation.examples": "2000"}
status = experiment.run(
    experiment.Request(
        config=str(ROOT / "configs/reverse.py"),
        overrides=settings,
        workdir=str(run_folder),
        resume=False,
        distributed="off",
    )
)
assert status == 0

# %% [markdown]
# ## Predict

# %%
run = attn.load(run_folder)
run.predict(["3 1 4 1 5", "16 15 14 13", "2 7 1 8 2 8"])

# %% [markdown]
# ## Attention maps
#
# Each small picture is one head. In the cross-attention, rows are the symbols being written and columns are the
# source. Dark squares along the anti-diagonal mean that the model reads the string from its end.

# %%
Image(str(run.inspect("3 1 4 1 5 9 2 6", run_folder / "attention.png")))

# %% [markdown]
# The same as numbers: the weight of the true source symbol, averaged over the symbols written. Equal weights for the
# eight symbols and the end token would give one in nine.

# %%
maps = run.look("3 1 4 1 5 9 2 6")
n = len(maps.source) - 1
cross = maps.weights["cross"][:, :, :n]  # [L N T S], without the row of the end token
on_target = cross[:, :, np.arange(n), n - 1 - np.arange(n)].mean(axis=-1)
print("attention on the true source symbol, by layer and head:", np.round(on_target, 2))

# %% [markdown]
# ## Longer strings
#
# Up to the training length the answers are right. Longer strings have positions that the model has never seen.

# %%
for length, row in run.evaluate([1, 2, 4, 8, 12, 13, 14, 16], examples=50).by_length():
    print(f"length {length:2d}: exact match {row.exact_match.value():.2f}, tokens {row.token_accuracy.value():.2f}")

# %% [markdown]
# Next: `python train.py --config.task.name=copy`, `--config.model.mechanism=rotary`, `--config.model.num_heads=1`,
# or a mask of your own.
