"""Recurrent encoder-decoders: an LSTM or a GRU reads the source into a state, and another one writes from there.

Without attention that one state must carry the whole source. With it, the decoder weighs all states of the encoder at
every step: additive attention (Bahdanau) before it goes on, multiplicative attention (Luong) after.

Reading order: a cell is one step of time; `unroll` is a sequence of them; a decoder tells how the source is read.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attn.functional import attention, attention_weights, masks, scores
from attn.mechanisms.rows import Count, Example
from attn.nn.block import dropout
from attn.nn.model import PAD, Cache, Model, ModelSettings, Weights, split
from attn.settings import between, one_of, setting

State = tuple[Float[Array, "D"], ...]  # what a cell carries from step to step; its output, the hidden state, first


class Cell(nnx.Module):
    """One step of time: from what the input contributes to the gates, and a state, to the next state.

    Args:
      width: D of input and hidden state.
      dtype: of the computation; parameters are float32.
    """

    gates: int  # G

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        # Not the usual orthogonal W_h: its QR stands still where JAX has two devices on one CPU (jaxlib 0.10).
        into = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2))
        self.W_x = nnx.Param(into(rngs.params(), (width, self.gates, width)))
        self.W_h = nnx.Param(into(rngs.params(), (width, self.gates, width)))
        self.b = nnx.Param(jnp.zeros((self.gates, width)))
        self.dtype = dtype

    def start(self, x: Float[Array, "T D"]) -> State:
        """Return the state before the first of these inputs."""
        raise NotImplementedError

    def project(self, x: Float[Array, "T D"]) -> Float[Array, "T G D"]:
        """Compute the inputs' part of the gates, x W_x + b, which needs no state, for all steps at once."""
        return jnp.einsum("td,dge->tge", x, self.W_x[...].astype(self.dtype)) + self.b[...].astype(self.dtype)

    def __call__(self, inputs: Float[Array, "G D"], state: State) -> State:
        """Return the state after one step."""
        raise NotImplementedError

    def _from_state(self, hidden: Float[Array, "D"]) -> Float[Array, "G D"]:
        return jnp.einsum("d,dge->ge", hidden, self.W_h[...].astype(self.dtype))


class LSTM(Cell):
    """Long short-term memory; its state is the hidden state h and the cell c.

        i, f, g, o = x W_x + h W_h + b
        c' = sigmoid(f) c + sigmoid(i) tanh(g)
        h' = sigmoid(o) tanh(c')

    Source: Hochreiter and Schmidhuber 1997; the forget gate f: Gers et al. 2000, begun at sigmoid(1): Jozefowicz et
    al. 2015, section 2.2.
    """

    gates = 4

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(width, dtype=dtype, rngs=rngs)
        self.b[...] = self.b[...].at[1].set(1.0)

    def start(self, x: Float[Array, "T D"]) -> State:
        """Return zeros."""
        return jnp.zeros_like(x[0]), jnp.zeros_like(x[0])  # like x also in the mesh axes that it differs over

    def __call__(self, inputs: Float[Array, "G D"], state: State) -> State:
        """Return h' and c'."""
        hidden, cell = state
        i, f, g, o = inputs + self._from_state(hidden)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


class GRU(Cell):
    """Gated recurrent unit; its state is the hidden state h.

        r, z = sigmoid(x W_x + h W_h + b)
        h' = z h + (1 - z) tanh(x W + b + r (h U + b_h))

    The reset gate r multiplies h U, not h itself, so that a step is one product of matrices, as in cuDNN.

    Source: Cho et al. 2014, equations 5 to 8.
    """

    gates = 3

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(width, dtype=dtype, rngs=rngs)
        self.b_h = nnx.Param(jnp.zeros(width))

    def start(self, x: Float[Array, "T D"]) -> State:
        """Return zeros."""
        return (jnp.zeros_like(x[0]),)

    def __call__(self, inputs: Float[Array, "G D"], state: State) -> State:
        """Return h'."""
        (hidden,) = state
        from_state = self._from_state(hidden)
        reset, keep = jax.nn.sigmoid(inputs[:2] + from_state[:2])
        new = jnp.tanh(inputs[2] + reset * (from_state[2] + self.b_h[...].astype(self.dtype)))
        return (keep * hidden + (1 - keep) * new,)


def unroll(
    cell: Cell, x: Float[Array, "T D"], state: State, real: Bool[Array, "T"] | None = None
) -> tuple[Float[Array, "T D"], State]:
    """Return the hidden state after each step, and the last state; where `real` is False the state does not change."""
    real = jnp.ones(len(x), bool) if real is None else real

    def step(state, now):
        inputs, is_real = now
        moved = cell(inputs, state)
        state = jax.tree.map(lambda new, old: jnp.where(is_real, new, old), moved, state)
        return state, state[0]

    state, hidden = jax.lax.scan(step, state, (cell.project(x), real))
    return hidden, state


class PlainDecoder(nnx.Module):
    """Cells on top of each other, which know of the source what their first states hold.

    Args:
      make_cell: `() -> cell`.
      num_layers: L.
      width: D.
      dtype: of the computation; parameters are float32.

    Source: Sutskever et al. 2014, section 2.
    """

    def __init__(self, make_cell, num_layers: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.cells = nnx.List([make_cell() for _ in range(num_layers)])

    def read(self, memory: Float[Array, "S D"]) -> None:
        """Compute what is needed of the encoder's states once, before the first token: here nothing."""

    def __call__(self, x: Float[Array, "T D"], states: tuple[State, ...], memory: None, length, return_weights: bool):
        """Return the output `[T D]` at each step, the states after the last, and the weights `[T S]` or None."""
        after = []
        for cell, state in zip(self.cells, states):
            x, state = unroll(cell, x, state)
            after.append(state)
        return x, tuple(after), None


class MultiplicativeDecoder(PlainDecoder):
    """Attention after the cells: a = softmax(h W_a m_s), and tanh((a m, h) W_c + b_c) goes out. Without input feeding.

    No step needs what an earlier one has read, so that all of them attend at once.

    Args:
      as of `PlainDecoder`.

    Source: Luong et al. 2015, sections 3 and 3.1, the score "general".
    """

    def __init__(self, make_cell, num_layers: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(make_cell, num_layers, width, dtype=dtype, rngs=rngs)
        self.W_a = nnx.Linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.W_c = nnx.Linear(2 * width, width, dtype=dtype, rngs=rngs)

    def read(self, memory: Float[Array, "S D"]) -> tuple[Float[Array, "S D"], Float[Array, "S D"]]:
        """Return keys and values."""
        return self.W_a(memory), memory

    def __call__(self, x: Float[Array, "T D"], states: tuple[State, ...], memory, length, return_weights: bool):
        """Run as `PlainDecoder` does."""
        hidden, states, _ = super().__call__(x, states, None, length, False)
        key, value = memory
        look = dict(mask=masks.padding(length), scale=1.0)
        context = attention(hidden, key, value, **look, implementation="fastest")
        weights = attention_weights(hidden, key, **look) if return_weights else None
        return jnp.tanh(self.W_c(jnp.concatenate([context, hidden], axis=-1))), states, weights


class AdditiveDecoder(PlainDecoder):
    """Attention before the cells: a = softmax(v tanh(h W_a + m_s U_a + b_a)) of the last state h; x and a m C go in.

    What goes out is tanh((a m, h') W_c + b_c), of the new state h'.

    Args:
      as of `PlainDecoder`.

    Source: Bahdanau et al. 2015, sections 3.1 and A.1.2, over an encoder of one direction and without maxout.
    """

    def __init__(self, make_cell, num_layers: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(make_cell, num_layers, width, dtype=dtype, rngs=rngs)
        self.W_a = nnx.Linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.U_a = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.v = nnx.Linear(width, 1, use_bias=False, dtype=dtype, rngs=rngs)
        self.C = nnx.Linear(width, self.cells[0].gates * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.W_c = nnx.Linear(2 * width, width, dtype=dtype, rngs=rngs)

    def read(self, memory: Float[Array, "S D"]) -> tuple[Float[Array, "S D"], Float[Array, "S D"]]:
        """Return the source's part of the scores, and values."""
        return self.U_a(memory), memory

    def __call__(self, x: Float[Array, "T D"], states: tuple[State, ...], memory, length, return_weights: bool):
        """Run as `PlainDecoder` does."""
        key, value = memory

        def step(states, inputs):
            *_, (query, *_) = states
            weights = self._weights(query, key, length)
            context = weights @ value
            inputs += self.C(context).reshape(inputs.shape)
            after = []
            for layer, (cell, state) in enumerate(zip(self.cells, states)):
                state = cell(inputs if layer == 0 else cell.project(after[-1][0][None])[0], state)
                after.append(state)
            return tuple(after), (state[0], context, weights)

        states, (hidden, context, weights) = jax.lax.scan(step, states, self.cells[0].project(x))
        return jnp.tanh(self.W_c(jnp.concatenate([context, hidden], axis=-1))), states, weights

    def _weights(self, query: Float[Array, "D"], key: Float[Array, "S D"], length) -> Float[Array, "S"]:
        score = self.v(jnp.tanh(self.W_a(query) + key))[:, 0]
        # A score that is no product of query and key is one that is added to a product of zeros.
        nothing = jnp.zeros((len(key), 1), key.dtype)
        [weights] = attention_weights(nothing[:1], nothing, mask=masks.padding(length), score=scores.dense(score[None]))
        return weights.astype(key.dtype)


# A new way to read the source is one class and one line here; `config.model.attention` then accepts its name.
DECODERS = {"none": PlainDecoder, "additive": AdditiveDecoder, "multiplicative": MultiplicativeDecoder}


@dataclasses.dataclass(frozen=True)
class RecurrentSettings(ModelSettings):
    """Settings of the recurrent models; dropout is on embeddings and on the decoder's output.

    Attributes:
      num_layers: L, of cells on top of each other, in encoder and decoder alike.
      attention: a name in `DECODERS`.
    """

    num_layers: int = setting(1, between(1, 1_000))
    attention: str = setting("none", one_of(DECODERS))


class Recurrent(Model):
    """A recurrent encoder-decoder, with or without attention.

    The decoder's cells start from the last states of the encoder's. Padding does not change a state.

    Attributes:
      cell: the kind of its cells.

    Args:
      vocabulary: V, the number of tokens; token 0 is padding.
      settings: sizes and kinds.
      rngs: keys for the initial parameters.

    Source: Sutskever et al. 2014; Cho et al. 2014; Bahdanau et al. 2015; Luong et al. 2015.
    """

    cell: type[Cell]
    settings = RecurrentSettings
    maps = (("cross", "answer", "source"),)

    def __init__(self, vocabulary: int, settings: RecurrentSettings, rngs: nnx.Rngs):
        dtype, width, num_layers = jnp.dtype(settings.dtype), settings.width, settings.num_layers
        self.rate = settings.dropout
        ends = dict(tied=settings.tied_embeddings, dtype=dtype, rngs=rngs)

        def make_cell():
            return self.cell(width, dtype=dtype, rngs=rngs)

        self.add_embeddings(vocabulary, width, **ends)
        self.encoder = nnx.List([make_cell() for _ in range(num_layers)])
        self.decoder = DECODERS[settings.attention](make_cell, num_layers, width, dtype=dtype, rngs=rngs)
        self.add_output(vocabulary, width, **ends)

    def start(
        self,
        source: Int[Array, "S"],
        capacity: int,
        *,
        answer_length: Count | None = None,
        key: Array | None = None,
        return_weights: bool = False,
        shift: Float[Array, "S D"] | None = None,
    ) -> tuple[Cache, Weights | None]:
        """Encode the source; states need no capacity."""
        x = dropout(self.source_embed(source), self.rate, key)
        x = x if shift is None else x + shift
        states = []
        for cell in self.encoder:
            x, state = unroll(cell, x, cell.start(x), source != PAD)
            states.append(state)
        example = Example(jnp.sum(source != PAD), answer_length, key=key)
        return Cache(0, tuple(states), self.decoder.read(x), example), {} if return_weights else None

    def extend(
        self, tokens: Int[Array, "T"], cache: Cache, *, key: Array | None = None, return_weights: bool = False
    ) -> tuple[Float[Array, "T V"], Cache, Weights | None]:
        """Read the next T tokens of the answer and predict what comes after each.

        The weights are those of the cross-attention, `[1 1 T S]`, if there is one.
        """
        keys = split(key, 2)
        x = dropout(self.embedding_of_answer()(tokens), self.rate, keys[0])
        x, states, cross = self.decoder(x, cache.own, cache.memory, cache.example.source_length, return_weights)
        x = dropout(x, self.rate, keys[1])
        cache = cache._replace(index=cache.index + len(tokens), own=states)
        weights = {} if cross is None else {"cross": cross[None, None]}
        return self.logits(x), cache, weights if return_weights else None


class RecurrentLSTM(Recurrent):
    """`Recurrent` with LSTM cells."""

    cell = LSTM


class RecurrentGRU(Recurrent):
    """`Recurrent` with GRU cells."""

    cell = GRU
