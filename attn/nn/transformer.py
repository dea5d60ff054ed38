"""The encoder-decoder Transformer, written for one example; batches come from `jax.vmap`.

Reading order: a call is `encode`, then `decode`. Decoding token by token runs the same `decode`
with a cache that has room for more; a full pass is the case in which all tokens come at once.

Source: Vaswani et al. 2017, section 3.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attn.functional import masks
from attn.nn.encoder_decoder import PAD, Cache, EncoderDecoder, split
from attn.nn.encodings import ENCODINGS, Encoding, Positions, draw, make_table
from attn.nn.layers import Attention, FeedForward, KeysValues, Residual, dropout, weights_dropout
from attn.nn.places import Places
from attn.nn.variants import VARIANTS


class EncoderLayer(nnx.Module):
    """Self-attention, then feed-forward. Source: Vaswani et al. 2017, section 3.1."""

    def __init__(self, attention: dict, feed_forward: dict, residual: dict):
        self.attention, self.attention_residual = Attention(**attention), Residual(**residual)
        self.feed_forward, self.feed_forward_residual = FeedForward(**feed_forward), Residual(**residual)

    def __call__(self, x, mask, places: Places, key, return_weights):
        """`x [S D]` after the layer, and the weights `[N S S]` or None."""
        keys, rate = split(key, 3), self.attention_residual.dropout
        seen = self.attention_residual.enter(x)
        read, weights = self.attention(
            seen,
            self.attention.keys_values(seen, places.keys),
            places=places,
            mask=mask,
            dropout=weights_dropout(rate, keys[0]),
            return_weights=return_weights,
        )
        x = self.attention_residual.leave(x, read, keys[1])
        out = self.feed_forward(self.feed_forward_residual.enter(x))
        return self.feed_forward_residual.leave(x, out, keys[2]), weights


class DecoderLayer(nnx.Module):
    """Masked self-attention, cross-attention, feed-forward. Source: Vaswani et al. 2017, section 3.1."""

    def __init__(self, attention: dict, cross: dict, feed_forward: dict, residual: dict):
        self.attention, self.attention_residual = Attention(**attention), Residual(**residual)
        self.cross, self.cross_residual = Attention(**cross), Residual(**residual)
        self.feed_forward, self.feed_forward_residual = FeedForward(**feed_forward), Residual(**residual)

    def __call__(
        self, x, own: KeysValues, memory: KeysValues, position, own_places, cross_places, added, key, return_weights
    ):
        """`x [T D]` after the layer, `own` with the new keys and values, and both weights `[N T .]` or None."""
        keys, rate = split(key, 5), self.attention_residual.dropout

        seen = self.attention_residual.enter(x)
        new = self.attention.keys_values(seen, own_places.queries)
        own = jax.tree.map(lambda room, some: jax.lax.dynamic_update_slice(room, some, (position, 0, 0)), own, new)
        read, weights = self.attention(
            seen,
            own,
            places=own_places,
            mask=masks.causal(offset=position),
            dropout=weights_dropout(rate, keys[0]),
            return_weights=return_weights,
        )
        x = self.attention_residual.leave(x, read, keys[1])

        read, cross_weights = self.cross(
            self.cross_residual.enter(x),
            memory,
            places=cross_places,
            mask=masks.padding(cross_places.keys.length),
            added=added,
            dropout=weights_dropout(rate, keys[2]),
            return_weights=return_weights,
        )
        x = self.cross_residual.leave(x, read, keys[3])

        out = self.feed_forward(self.feed_forward_residual.enter(x))
        return self.feed_forward_residual.leave(x, out, keys[4]), own, (weights, cross_weights)


class Transformer(EncoderDecoder):
    """The encoder-decoder Transformer.

    Args:
      vocabulary: V, the number of tokens; token 0 is padding.
      width: D.
      num_heads: N, in every attention layer.
      head_width: H; None for width / num_heads, which must then be whole.
      num_encoder_layers, num_decoder_layers: L of each stack.
      feed_forward_width: F.
      positions: a name in `encodings.ENCODINGS` for all attention, or `Positions` for each kind of it.
      max_length: rows of the learned table.
      variant: a name in `variants.VARIANTS`, of every attention layer.
      norm: "pre" or "post".
      dropout: rate, on embeddings, attention weights and the output of every block.
      tied_embeddings: one matrix for source, target and output.
      dtype: of the computation; parameters are float32.
      rngs: keys for the initial parameters.

    Source: Vaswani et al. 2017, section 3.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int,
        num_heads: int,
        head_width: int | None = None,
        num_encoder_layers: int,
        num_decoder_layers: int,
        feed_forward_width: int,
        positions: str | Positions = "sinusoidal",
        max_length: int = 512,
        variant: str = "plain",
        norm: str = "pre",
        dropout: float = 0.0,
        tied_embeddings: bool = False,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(dtype)
        self.positions = Positions.named(positions) if isinstance(positions, str) else positions
        self.width, self.dropout, self.norm, self.dtype = width, dropout, norm, dtype
        head_width = head_width or width // num_heads
        self.cache_shape = (num_heads, head_width)

        ends = dict(tied=tied_embeddings, dtype=dtype, rngs=rngs)
        self.add_embeddings(vocabulary, width, **ends)
        self.table = make_table(self.encodings, max_length, width, rngs)

        def attention(encoding: Encoding) -> dict:
            heads = dict(width=width, num_heads=num_heads, head_width=head_width)
            return heads | dict(encoding=encoding, variant=VARIANTS[variant], dtype=dtype, rngs=rngs)

        rest = {
            "feed_forward": dict(width=width, hidden=feed_forward_width, dtype=dtype, rngs=rngs),
            "residual": dict(width=width, norm=norm, dropout=dropout, dtype=dtype, rngs=rngs),
        }
        of_encoder, of_decoder, of_cross = map(attention, self.encodings)
        self.encoder = nnx.List([EncoderLayer(of_encoder, **rest) for _ in range(num_encoder_layers)])
        self.decoder = nnx.List([DecoderLayer(of_decoder, of_cross, **rest) for _ in range(num_decoder_layers)])
        if norm == "pre":
            self.encoder_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
            self.decoder_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.add_output(vocabulary, width, **ends)

    @property
    def encodings(self) -> tuple[Encoding, Encoding, Encoding]:
        """Those of the encoder, of the decoder's own attention and of the cross-attention."""
        return tuple(ENCODINGS[name] for name in self.positions.by_kind().values())

    def encode(
        self,
        source: Int[Array, "S"],
        *,
        target_length: int | Int[Array, ""] | None = None,
        key: Array | None = None,
        return_weights: bool = False,
        shift: Float[Array, "S D"] | None = None,
    ) -> tuple[Float[Array, "S D"], Float[Array, "L N S S"] | None]:
        """The source as the decoder will see it, and, if asked for, the encoder's attention weights.

        A `shift`, added to the embeddings, is something to differentiate by.
        """
        keys = split(key, len(self.encoder) + 1)
        encoding, *_ = self.encodings
        length = jnp.sum(source != PAD)
        side = encoding.side(jnp.arange(len(source)), length, self._drawn(length, target_length, key))
        places, mask = Places(side, side, jnp.broadcast_to(length, len(source))), masks.padding(length)
        x = self._embed(self.source_embed, source, encoding.added(side, self.width, self.table), keys[-1])
        x = x if shift is None else x + shift
        weights = []
        for layer, layer_key in zip(self.encoder, keys):
            x, layer_weights = layer(x, mask, places, layer_key, return_weights)
            weights.append(layer_weights)
        x = self.encoder_norm(x) if self.norm == "pre" else x
        return x, jnp.stack(weights) if return_weights else None

    def start(
        self,
        memory: Float[Array, "S D"],
        source_length: Int[Array, ""],
        room: int,
        *,
        target_length: int | Int[Array, ""] | None = None,
        key: Array | None = None,
    ) -> Cache:
        """A cache for decoding up to `room` target tokens from an encoded source.

        Raises:
          ValueError: an encoding counts from the end of the target, and its length is not given.
        """
        if target_length is None and (needing := self.positions.needing_length()):
            raise ValueError(f"positions {needing} count from the end of the target: target_length must be given")
        *_, encoding = self.encodings
        drawn = self._drawn(source_length, target_length, key)
        side = encoding.side(jnp.arange(memory.shape[0]), source_length, drawn)
        added = encoding.added(side, self.width, self.table)
        empty = jnp.zeros((room, *self.cache_shape), self.dtype)
        return Cache(
            position=0,
            own=tuple(KeysValues(empty, empty) for _ in self.decoder),
            memory=tuple(layer.cross.keys_values(memory, side, added) for layer in self.decoder),
            source_length=source_length,
            target_length=target_length,
            drawn=drawn,
        )

    def decode(
        self, target: Int[Array, "T"], cache: Cache, *, key: Array | None = None, return_weights: bool = False
    ) -> tuple[Float[Array, "T V"], Cache, tuple[Float[Array, "L N T R"], Float[Array, "L N T S"]] | None]:
        """Read the next T target tokens.

        Returns:
          (logits of the token after each, the cache with them in it, and, if asked for, the decoder's own weights
          over the R places of the cache and the cross weights).
        """
        keys = split(key, len(self.decoder) + 1)
        _, of_own, of_cross = self.encodings
        index = cache.position + jnp.arange(len(target))
        (room, *_), (among, *_) = cache.own[0].key.shape, cache.memory[0].key.shape
        of_target, of_source = (cache.target_length, cache.drawn), (cache.source_length, cache.drawn)
        here, written = of_own.side(index, *of_target), of_own.side(jnp.arange(room), *of_target)
        asking, asked = of_cross.side(index, *of_target), of_cross.side(jnp.arange(among), *of_source)
        own_places = Places(here, written, index + 1)
        cross_places = Places(asking, asked, jnp.broadcast_to(cache.source_length, len(target)))
        added = of_cross.added(asking, self.width, self.table)

        x = self._embed(self.written_embed, target, of_own.added(here, self.width, self.table), keys[-1])
        own, weights = [], []
        for layer, layer_own, memory, layer_key in zip(self.decoder, cache.own, cache.memory, keys):
            x, layer_own, layer_weights = layer(
                x, layer_own, memory, cache.position, own_places, cross_places, added, layer_key, return_weights
            )
            own.append(layer_own)
            weights.append(layer_weights)
        x = self.decoder_norm(x) if self.norm == "pre" else x
        logits = self.logits(x)
        cache = cache._replace(position=cache.position + len(target), own=tuple(own))
        return logits, cache, jax.tree.map(lambda *w: jnp.stack(w), *weights) if return_weights else None

    def _drawn(self, source_length, target_length, key: Array | None) -> Int[Array, "range"] | None:
        """Positions for places of source and target alike, where some attention reads drawn ones."""
        if not any(encoding.randomized for encoding in self.encodings):
            return None
        length = source_length if target_length is None else jnp.maximum(source_length, target_length)
        return draw(self.positions, length, key)

    def _embed(self, embed: nnx.Embed, tokens, added, key) -> Float[Array, "T D"]:
        # Not multiplied by sqrt(D), unlike section 3.4 of the source: next to small embeddings positions stand out.
        return dropout((embed(tokens) + added).astype(self.dtype), self.dropout, key)
