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
# # Heads and positions
#
# Sinusoids tell attention where a token stands, and each head may attend to a different position. First the positions
# alone: their values, and why a shift is a rotation. Then a small Transformer learns a task that needs two relations at
# once. Its attention maps, and removing heads, show which head does what. Training takes well under a minute on two
# cores.

# %%
import pathlib
import tempfile

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

import attn
from attn.studies.jobs import Trainer
from attn.studies.probes import encode, exact_match, untrained, without
from attn.studies.walkthrough.positions import rotation
from attn.training import meshes

meshes.use_cores(32)  # batches of 32 are sharded over the cores

# %% [markdown]
# ## Positions
#
# $$PE(t, 2m) = \sin(t / 10000^{2m/D}),\qquad PE(t, 2m+1) = \cos(t / 10000^{2m/D})$$
#
# Each pair of columns turns like the hand of a clock: the first pairs turn fast, the last ones hardly move. The dot
# product of two positions depends only on their distance, and is greatest at distance 0.

# %%
wave = np.asarray(attn.positions.sinusoidal(jnp.arange(64), 32))  # [T D]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
left.imshow(wave.T, cmap="RdBu", aspect="auto")
left.set(xlabel="position t", ylabel="feature", title="PE(t)")
for t in (8, 24, 40):
    right.plot(wave @ wave[t], label=f"t = {t}")
right.set(xlabel="position u", title="PE(t) · PE(u)")
right.legend()
plt.show()

# %% [markdown]
# A shift by $k$ turns each hand by a fixed angle: $PE(t + k) = R(k)\,PE(t)$, with the same matrix for all $t$. So a
# head can find "three positions back" with fixed $W_Q$ and $W_K$.

# %%
for k in (1, 3, 10):
    print(f"k = {k:2d}: largest |PE(t+k) - R(k) PE(t)| = {np.abs(wave[k:] - wave[:-k] @ rotation(k, 32).T).max():.1e}")
rotation(3, 4).round(3)

# %% [markdown]
# ## Without positions
#
# An encoder without them maps a shuffled source to the shuffled encoding: it sees a set. With sinusoids it does not.

# %%
tokens, order = jnp.asarray([3, 1, 4, 1, 5, 9, 2, 6]), np.array([5, 2, 7, 0, 3, 6, 1, 4])
for mechanism in ("none", "sinusoidal"):
    fresh = untrained({"model": {"mechanism": mechanism}})
    moved = jnp.abs(encode(fresh, tokens)[order] - encode(fresh, tokens[order])).max()
    print(f"{mechanism:>10}: shuffling before or after encoding differs by up to {moved:.1e}")

# %% [markdown]
# ## Heads
#
# The task needs two relations: each output is the mirror image of its position if that symbol is odd, and otherwise the
# symbol after its position. No single position tells which of the two applies, so one set of weights has to serve both.

# %%
trainer = Trainer(pathlib.Path(tempfile.mkdtemp()))
settings = {"task": {"name": "mirror_or_next", "max_length": 8}, "training": {"steps": 1_000}}
run = trainer.train(settings)
Image(str(run.inspect("3 1 4 1 5 9 2 6", run.folder / "attention.png")))

# %% [markdown]
# In the cross-attention some heads follow the anti-diagonal (the mirror image), others the diagonal shifted by one (the
# next symbol). How much does each head matter? Remove one by setting its slice of $W_O$ to zero, and evaluate on
# held-out strings.

# %%
lengths = range(4, 9)
all_heads = np.mean(exact_match(run, lengths, 50))
without_one = [np.mean(exact_match(without(run, inside="cross", matrix="W_O", head=n), lengths, 50)) for n in range(4)]
plt.figure(figsize=(5, 3), layout="constrained")
plt.bar(["all", *(f"without {n + 1}" for n in range(4))], [all_heads, *without_one])
plt.ylabel("exact match")
plt.show()

# %% [markdown]
# ## One wide head
#
# A single head as wide as the four together has as many parameters. With the same task and the same examples:

# %%
wide = trainer.train({**settings, "model": {"num_heads": 1}})
print(f"four heads {all_heads:.2f}, one wide head {np.mean(exact_match(wide, lengths, 50)):.2f}")

# %% [markdown]
# `attn walkthrough --only heads,positions` measures this over several seeds. Next: `04_recurrence_vs_attention`.
