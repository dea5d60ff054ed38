"""An encoder that writes its answer in one pass: the source on a tape, empty cells after it, no decoder.

Source: Deletang et al. 2023, section 4; Ruoss et al. 2023, section 4.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attn.functional import masks
from attn.nn.encoder_decoder import PAD, Cache, EncoderDecoder, split
from attn.nn.encodings import ENCODINGS, Encoding, Positions, draw, make_table
from attn.nn.layers import dropout
from attn.nn.places import Places, Side
from attn.nn.transformer import EncoderLayer
from attn.nn.variants import VARIANTS

_SURE = 30.0  # logit of the end token where the answer's length says that it comes


class Tape(EncoderDecoder):
    """A Transformer's encoder over x_1 ... x_n and as many empty cells as the answer has symbols.

    What stands in the empty cells after the last layer are the logits of the answer's symbols, all at once: none of
    them reads another as it was written. The length of the answer is given, so that its end is no question.

    Args:
      vocabulary: V, the number of tokens; token 0 is padding, the last two are begin, which marks an empty cell, and
        end.
      width: D.
      num_heads: N.
      head_width: H; None for width / num_heads, which must then be whole.
      num_layers: L.
      feed_forward_width: F.
      positions: as of `Transformer`; those of the encoder are used.
      max_length: rows of the learned table.
      variant: a name in `variants.VARIANTS`.
      norm: "pre" or "post".
      dropout: rate, on embeddings, attention weights and the output of every block.
      dtype: of the computation; parameters are float32.
      rngs: keys for the initial parameters.
    """

    needs_length = True
    reads_target = False

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int,
        num_heads: int,
        head_width: int | None = None,
        num_layers: int,
        feed_forward_width: int,
        positions: str | Positions = "sinusoidal",
        max_length: int = 512,
        variant: str = "plain",
        norm: str = "post",
        dropout: float = 0.0,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(dtype)
        self.positions = Positions.named(positions) if isinstance(positions, str) else positions
        self.width, self.dropout, self.norm, self.dtype, self.vocabulary = width, dropout, norm, dtype, vocabulary
        encoding = ENCODINGS[self.positions.encoder]
        self.add_embeddings(vocabulary, width, tied=True, dtype=dtype, rngs=rngs)
        self.table = make_table([encoding], max_length, width, rngs)
        heads = dict(width=width, num_heads=num_heads, head_width=head_width or width // num_heads)
        attention = heads | dict(encoding=encoding, variant=VARIANTS[variant], dtype=dtype, rngs=rngs)
        feed_forward = dict(width=width, hidden=feed_forward_width, dtype=dtype, rngs=rngs)
        residual = dict(width=width, norm=norm, dropout=dropout, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([EncoderLayer(attention, feed_forward, residual) for _ in range(num_layers)])
        if norm == "pre":
            self.last_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.add_output(vocabulary, width, tied=False, dtype=dtype, rngs=rngs)

    @staticmethod
    def places(source: int, target: int) -> int:
        """How many places source and answer take together, ends included."""
        return source + target

    def encode(
        self,
        source: Int[Array, "S"],
        *,
        target_length: int | Int[Array, ""] | None = None,
        key: Array | None = None,
        return_weights: bool = False,
        shift: Float[Array, "S D"] | None = None,
    ) -> tuple[tuple[Int[Array, "S"], Float[Array, "S D"]], Float[Array, "0 1 S S"] | None]:
        """The source as it is: the pass needs the answer's cells, too."""
        shift = jnp.zeros((len(source), self.width), self.dtype) if shift is None else shift
        return (source, shift), jnp.zeros((0, 1, len(source), len(source))) if return_weights else None

    def start(
        self,
        memory: tuple[Int[Array, "S"], Float[Array, "S D"]],
        source_length: Int[Array, ""],
        room: int,
        *,
        target_length: int | Int[Array, ""] | None = None,
        key: Array | None = None,
    ) -> Cache:
        """The pass: a cache that holds the logits of every place of the answer.

        Raises:
          ValueError: the answer's length is not given.
        """
        if target_length is None:
            raise ValueError("a tape has a cell for each symbol of the answer: target_length must be given")
        source, shift = memory
        symbols, cells = source_length - 1, target_length - 1  # without the end tokens
        place = jnp.arange(len(source) + room)
        wide = jnp.pad(source, (0, room))
        tape = jnp.where(place < symbols, wide, jnp.where(place < symbols + cells, self.vocabulary - 2, PAD))
        shift = jnp.where((place < symbols)[:, None], jnp.pad(shift, ((0, room), (0, 0))), 0)
        out = self._pass(tape, shift, symbols, cells, key)
        logits = self.logits(out[jnp.minimum(symbols + jnp.arange(room), len(tape) - 1)])
        sure = _SURE * jax.nn.one_hot(self.vocabulary - 1, self.vocabulary)
        logits = jnp.where((jnp.arange(room) < cells)[:, None], logits, sure)
        return Cache(position=0, own=logits, memory=(), source_length=source_length, target_length=target_length)

    def _pass(
        self, tape: Int[Array, "R"], shift: Float[Array, "R D"], symbols, cells, key: Array | None
    ) -> Float[Array, "R D"]:
        """What stands on the tape after the last layer."""
        length = symbols + cells
        keys = split(key, len(self.layers) + 1)
        encoding = ENCODINGS[self.positions.encoder]
        drawn = draw(self.positions, length, key)
        side = self._side(encoding, len(tape), symbols, cells, drawn)
        places = Places(side, side, jnp.broadcast_to(length, len(tape)))
        x = self.source_embed(tape) + encoding.added(side, self.width, self.table) + shift
        x = dropout(x.astype(self.dtype), self.dropout, keys[-1])
        for layer, layer_key in zip(self.layers, keys):
            x, _ = layer(x, masks.padding(length), places, layer_key, False)
        return self.last_norm(x) if self.norm == "pre" else x

    @staticmethod
    def _side(encoding: Encoding, room: int, symbols, cells, drawn: Int[Array, "P"] | None) -> Side:
        """Where the tape's places stand: counted through it, or symbols and cells each by itself."""
        index, length = jnp.arange(room), symbols + cells
        if encoding.by_part:
            among_cells = index >= symbols
            index, length = index - symbols * among_cells, jnp.where(among_cells, cells, symbols)
        return encoding.side(index, length, drawn, end_tokens=0)

    def decode(
        self, target: Int[Array, "T"], cache: Cache, *, key: Array | None = None, return_weights: bool = False
    ) -> tuple[Float[Array, "T V"], Cache, tuple[Float[Array, "0 1 T T"], Float[Array, "0 1 T S"]] | None]:
        """Look up the next T rows; the tokens written so far are not read."""
        logits = jax.lax.dynamic_slice_in_dim(cache.own, cache.position, len(target))
        none = jnp.zeros((0, 1, len(target), len(target)))
        return logits, cache._replace(position=cache.position + len(target)), (none, none) if return_weights else None
