"""The arguments of the softmax: the scores of all pairs of positions and which are visible, for many heads."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attn.functional import checks, contract, dtypes, heads, mods
from attn.functional.attention import call_of_heads
from attn.functional.contract import Call


def scores_and_visibility(
    query: Float[Array, "T N H"], key: Float[Array, "S K H"], *, mask=None, score=None, scale=None
) -> tuple[Float[Array, "N T S"], Bool[Array, "N T S"]]:
    """Compute score(scale q_i . k_j, i, j) and mask(i, j) as `multi_head_attention` composes them.

    Args:
      query, key, mask, score, scale: as for `attn.multi_head_attention_weights`.

    Returns:
      (scores, visible), both `[N T S]`. A pair whose score is -inf counts as masked.

    Raises:
      TypeError, ValueError: as `attn.multi_head_attention_weights`.
    """
    query, key = checks.check_arrays(("T N H", query), ("S K H", key))
    call = call_of_heads(query, key, key[..., :0], mask, score, scale)

    def one_head(query, mask, score, dropout, key):
        head = contract.prepare(contract.resolve(Call(query, key, key[:, :0], mask, score, call.scale)))
        i, j = (jnp.arange(length, dtype=jnp.int32) for length in (call.T, call.S))
        s = head.scale * jnp.matmul(head.query, head.key.T, preferred_element_type=head.scale.dtype)
        s, visible = head.apply_mask(head.apply_score(s, i[:, None], j[None, :]), i[:, None], j[None, :])
        return s, jnp.ones(s.shape, bool) if visible is None else visible

    return heads.map_heads(one_head, call, (key,), axis=0)


def marked_heads(*changes) -> int | None:
    """Return N of the masks and scores that `attn.per_head` marks; None if none is marked."""
    marked = (part for change in changes for part in mods.parts(change) if isinstance(part, mods.PerHead))
    arrays = (leaf for part in marked for leaf in jax.tree.leaves(part) if dtypes.is_array(leaf) and leaf.shape)
    return max((array.shape[0] for array in arrays), default=None)
