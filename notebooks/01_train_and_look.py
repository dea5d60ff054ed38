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
# # Train a Transformer, then look at what it looks at
#
# A recurrent network reads a sequence into one hidden state and has to answer from there. Attention lets every
# output look at every input directly, and what it looked at can be drawn. Here a small Transformer learns to
# reverse strings, and its cross-attention turns out to be the anti-diagonal: to write the first symbol it looks at
# the last one, and so on. It takes less than a minute on two cores.

# %%
import pathlib
import tempfile

import jax.numpy as jnp
import numpy as np
from IPython.display import Image

import attn
from attn import experiment

# The checkout, from the notebook's own folder or from the top.
ROOT = next(folder for folder in (pathlib.Path.cwd(), pathlib.Path.cwd().parent) if (folder / "configs").is_dir())

# %% [markdown]
# ## Attention itself
#
# One head of one sequence is $\mathrm{softmax}(QK^\top/\sqrt{d_k})\,V$. Masks and scores are functions of
# positions: of the query's `i`, of the key's `j`. They print as the matrix that they stand for.

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
# The same function as `python train.py --config=configs/reverse.py`, with shorter strings and fewer steps than the
# default, so that it is over sooner. What it is judged on at the end are strings that a hash has kept out of
# training.

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
# ## Ask

# %%
run = attn.load(run_folder)
run.predict(["3 1 4 1 5", "16 15 14 13", "2 7 1 8 2 8"])

# %% [markdown]
# ## Look
#
# Each small picture is one head. In the cross-attention, rows are the symbols being written and columns are the
# source: dark squares along the anti-diagonal say that the model reads the string from its end.

# %%
Image(str(run.inspect("3 1 4 1 5 9 2 6", run_folder / "attention.png")))

# %% [markdown]
# The same as numbers: for each symbol written, how much attention, summed over the source positions that a head
# could choose, falls on the true one. Chance is one in nine.

# %%
maps = run.look("3 1 4 1 5 9 2 6")
n = len(maps.source) - 1
cross = maps.weights["cross"][:, :, :n]  # [L N T S], without the row of the end token
on_target = cross[:, :, np.arange(n), n - 1 - np.arange(n)].mean(axis=-1)
print("attention on the true source symbol, by layer and head:", np.round(on_target, 2))

# %% [markdown]
# ## And longer strings?
#
# Up to its training length it is right; beyond, it meets positions that it has never seen.

# %%
for length, row in run.evaluate([1, 2, 4, 8, 12, 13, 14, 16], examples=50).by_length():
    print(f"length {length:2d}: exact match {row.exact_match.value():.2f}, tokens {row.token_accuracy.value():.2f}")

# %% [markdown]
# Next: `python train.py --config.task.name=copy`, `--config.model.mechanism=rotary`, `--config.model.num_heads=1`,
# or a mask of your own.
