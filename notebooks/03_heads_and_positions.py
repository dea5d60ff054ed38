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
# Sinusoids tell attention where a token stands, and each head may look somewhere else. First the positions alone: what
# they look like, and why a shift is a rotation. Then a small Transformer learns a task of two relations at once, and we
# look at which head does what, and take heads away. It trains for well under a minute on two cores.

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

meshes.use_cores(32)  # batches of 32 are shared out over the cores

# %% [markdown]
# ## Positions
#
# $$PE(t, 2m) = \sin(t / 10000^{2m/D}),\qquad PE(t, 2m+1) = \cos(t / 10000^{2m/D})$$
#
# Each pair of columns is a hand of a clock: the first ones turn fast, the last ones hardly move. The dot product of two
# positions depends on their distance alone, and is greatest at 0.

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
# Moving on by $k$ turns every hand by its own angle: $PE(t + k) = R(k)\,PE(t)$, with one matrix for all $t$. So a head
# can find "three places back" with a fixed $W_Q$ and $W_K$.

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
    moved = jnp.abs(encode(fresh, tokens)[order] - encode(untaught, tokens[order])).max()
    print(f"{mechanism:>10}: shuffling first or last differs by up to {moved:.1e}")

# %% [markdown]
# ## Heads
#
# A task that needs two relations: each output is the mirror image of its place if that symbol is odd, and else the
# symbol after its place. No single place tells which, so that one set of weights has to serve both.

# %%
trainer = Trainer(pathlib.Path(tempfile.mkdtemp()))
settings = {"task": {"name": "mirror_or_next", "max_length": 8}, "training": {"steps": 1_000}}
run = trainer.train(settings)
Image(str(run.inspect("3 1 4 1 5 9 2 6", run.folder / "attention.png")))

# %% [markdown]
# In the cross-attention some heads go down the anti-diagonal (the mirror image), others along the diagonal, one place
# off (the next symbol). What is each worth? Take a head away, by setting its part of $W_O$ to zero, and ask held-out
# strings.

# %%
lengths = range(4, 9)
whole = np.mean(exact_match(run, lengths, 50))
left_without = [np.mean(exact_match(without(run, inside="cross", matrix="W_O", head=n), lengths, 50)) for n in range(4)]
plt.figure(figsize=(5, 3), layout="constrained")
plt.bar(["all", *(f"without {n + 1}" for n in range(4))], [whole, *left_without])
plt.ylabel("exact match")
plt.show()

# %% [markdown]
# ## One wide head
#
# A single head as wide as the four together has as many parameters. Same task, same examples:

# %%
one = trainer.train({**settings, "model": {"num_heads": 1}})
print(f"four heads {whole:.2f}, one wide head {np.mean(exact_match(one, lengths, 50)):.2f}")

# %% [markdown]
# More of this, over several seeds: `attn walkthrough --only heads,positions`. Next: `04_recurrence_vs_attention`.
