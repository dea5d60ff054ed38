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
# # Attention by hand
#
# Attention is a few matrix products and one softmax. Here every number of a small example is computed in NumPy, drawn,
# and compared with `attn`: queries, keys and values, the scores, the weights, the output; then a mask, several heads,
# and the gradient by finite differences. It takes a few seconds.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import attn

np.set_printoptions(precision=3, suppress=True)

# %% [markdown]
# ## Queries, keys and values
#
# Four tokens, each a row of width $D = 3$. In a model the rows are embeddings plus positions, and the three matrices
# are learned; here all are random. A query says what a token looks for, a key what it offers, a value what it
# contributes.

# %%
tokens = ["the", "cat", "sat", "down"]
rng = np.random.default_rng(0)
x = rng.normal(size=(4, 3))  # [T D]
W_Q, W_K, W_V = rng.normal(size=(3, 3, 2))  # [D H] each
Q, K, V = x @ W_Q, x @ W_K, x @ W_V  # [T H]
for name, matrix in {"Q": Q, "K": K, "V": V}.items():
    print(f"{name} =\n{matrix}\n")

# %% [markdown]
# ## Scores, weights, output
#
# $$p = \mathrm{softmax}\left(\frac{QK^\top}{\sqrt{d_k}}\right),\qquad \mathrm{out} = pV$$
#
# First a single number: the score of the last token's query and the first token's key.

# %%
score = (Q[3, 0] * K[0, 0] + Q[3, 1] * K[0, 1]) / np.sqrt(2)
print(f"({Q[3, 0]:.3f} · {K[0, 0]:.3f} + {Q[3, 1]:.3f} · {K[0, 1]:.3f}) / √2 = {score:.3f}")


# %%
def softmax(s):
    e = np.exp(s - s.max(axis=-1, keepdims=True))  # subtracting the maximum avoids overflow and changes no weight
    return e / e.sum(axis=-1, keepdims=True)


scores = Q @ K.T / np.sqrt(2)  # [T S]
p = softmax(scores)  # each row sums to 1
out = p @ V  # [T H]

figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
for ax, matrix, title in zip(axes, (scores, p, out), ("scores", "weights", "output")):
    ax.imshow(matrix, cmap="Blues")
    ax.set(title=title, yticks=range(4), yticklabels=tokens)
    for (row, column), number in np.ndenumerate(matrix):
        ax.text(column, row, f"{number:.2f}", ha="center", va="center", color="tab:orange")
for ax in axes[:2]:
    ax.set_xticks(range(4), tokens)
plt.show()

# %% [markdown]
# The library computes the same, in float32.

# %%
q, k, v = (jnp.asarray(each, jnp.float32) for each in (Q, K, V))
np.testing.assert_allclose(attn.attention_weights(q, k), p, atol=1e-6)
np.testing.assert_allclose(attn.attention(q, k, v), out, atol=1e-6)

# %% [markdown]
# ## A mask
#
# A decoder must not see symbols that it has not written yet. The score of a masked key becomes $-\infty$, its weight
# $e^{-\infty} = 0$. In `attn` a mask is a function of the two positions, and it prints as its matrix.

# %%
masked_scores = np.where(np.tri(4, dtype=bool), scores, -np.inf)
np.testing.assert_allclose(attn.attention_weights(q, k, mask=attn.masks.causal()), softmax(masked_scores), atol=1e-6)
print(softmax(masked_scores))
attn.masks.causal()

# %% [markdown]
# ## Attention does not know the order
#
# Nothing above depends on where a token stands. If keys and values are shuffled together, the output stays the same;
# if queries are shuffled, the output is shuffled in the same way. So a Transformer adds positions to its embeddings.

# %%
order = np.array([2, 0, 3, 1])
np.testing.assert_allclose(attn.attention(q, k[order], v[order]), out, atol=1e-6)
np.testing.assert_allclose(attn.attention(q[order], k, v), out[order], atol=1e-6)

# %% [markdown]
# ## Several heads
#
# One head has one set of weights per query. Two heads, each with its own matrices, attend to two things at once. Their
# outputs are concatenated and multiplied by $W_O$. The equation stays that of one head: `attn` maps it over the heads.

# %%
W_Q, W_K, W_V = rng.normal(size=(3, 3, 2, 2))  # [D N H] each
W_O = rng.normal(size=(2, 2, 3))  # [N H D]
heads = [softmax((x @ W_Q[:, n]) @ (x @ W_K[:, n]).T / np.sqrt(2)) @ (x @ W_V[:, n]) for n in range(2)]
by_hand = np.concatenate(heads, axis=-1) @ W_O.reshape(4, 3)  # [T NH] @ [NH D]

q2, k2, v2 = (jnp.asarray(np.einsum("td,dnh->tnh", x, W), jnp.float32) for W in (W_Q, W_K, W_V))
library = jnp.einsum("tnh,nhd->td", attn.multi_head_attention(q2, k2, v2), W_O)
np.testing.assert_allclose(library, by_hand, rtol=1e-5, atol=1e-5)
print(by_hand)

# %% [markdown]
# ## The gradient
#
# How does the output of the last token change with the first key? The softmax's derivative is
# $\partial p / \partial s = \mathrm{diag}(p) - pp^\top$, so that
#
# $$\frac{\partial\,\mathrm{out}_3}{\partial k_0} = p_{30}\,(v_0 - \mathrm{out}_3)\,\frac{q_3^\top}{\sqrt{d_k}}$$
#
# The gradient is small if the weight is near 0 or if the output is already near the value. Computed by the formula, by
# JAX, and by finite differences:

# %%
formula = np.outer(p[3, 0] * (V[0] - out[3]), Q[3]) / np.sqrt(2)
by_jax = jax.jacobian(lambda key: attn.attention(q, key, v)[3])(k)[:, 0]


def last_output(feature, step):
    key = K.copy()
    key[0, feature] += step
    return softmax(Q @ key.T / np.sqrt(2))[3] @ V


differences = np.stack([(last_output(h, 1e-5) - last_output(h, -1e-5)) / 2e-5 for h in range(2)], axis=-1)
np.testing.assert_allclose(by_jax, formula, atol=1e-5)
np.testing.assert_allclose(differences, formula, atol=1e-8)
print(formula)

# %% [markdown]
# Next: `03_heads_and_positions`, about the heads of a trained model and the positions that are added to its embeddings.
