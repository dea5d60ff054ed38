"""Recurrent encoder-decoders: an LSTM or a GRU reads the source into a state, and another one writes from there.

Without attention this one state must carry the whole source. With attention, the decoder weighs all states of the
encoder at every step: before the cells with additive attention (Bahdanau), after them with multiplicative (Luong).

Reading order: a cell is one time step; `unroll` runs a cell over a sequence; a decoder reads the encoded source.
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

State = tuple[Float[Array, "D"], ...]  # carried from step to step; the hidden state, which is the output, comes first


class Cell(nnx.Module):
    """One time step: the next state, from the input's part of the gates and a state.

    Args:
      width: D of input and hidden state.
      dtype: of the computation; parameters are float32.
    """

    gates: int  # G, the number of gates

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        # Not the usual orthogonal W_h: its QR decomposition hangs with two JAX devices on one CPU (jaxlib 0.10).
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2))
        self.W_x = nnx.Param(init(rngs.params(), (width, self.gates, width)))
        self.W_h = nnx.Param(init(rngs.params(), (width, self.gates, width)))
        self.b = nnx.Param(jnp.zeros((self.gates, width)))
        self.dtype = dtype

    def start(self, x: Float[Array, "T D"]) -> State:
        """Return the state before the first input."""
        raise NotImplementedError

    def project(self, x: Float[Array, "T D"]) -> Float[Array, "T G D"]:
        """Compute the inputs' part of the gates, x W_x + b, for all steps at once, since it needs no state."""
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

    Source: Hochreiter and Schmidhuber 1997; the forget gate f: Gers et al. 2000, with bias 1 at first: Jozefowicz et
    al. 2015, section 2.2.
    """

    gates = 4

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(width, dtype=dtype, rngs=rngs)
        self.b[...] = self.b[...].at[1].set(1.0)

    def start(self, x: Float[Array, "T D"]) -> State:
        """Return zeros."""
        return jnp.zeros_like(x[0]), jnp.zeros_like(x[0])  # zeros_like also copies the mesh axes over which x varies

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
    """Return the hidden state after each step, and the last state; the state does not change where `real` is False."""
    real = jnp.ones(len(x), bool) if real is None else real

    def step(state, step_inputs):
        inputs, is_real = step_inputs
        state = jax.tree.map(lambda new, old: jnp.where(is_real, new, old), cell(inputs, state), state)
        return state, state[0]

    state, hidden = jax.lax.scan(step, state, (cell.project(x), real))
    return hidden, state


class PlainDecoder(nnx.Module):
    """A stack of cells without attention: all that they know of the source is in their first states.

    Args:
      make_cell: `() -> cell`.
      num_layers: L, the number of cells.
      width: D.
      dtype: of the computation; parameters are float32.

    Source: Sutskever et al. 2014, section 2.
    """

    def __init__(self, make_cell, num_layers: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.cells = nnx.List([make_cell() for _ in range(num_layers)])

    def read(self, memory: Float[Array, "S D"]) -> None:
        """Prepare the encoder's states for `__call__`, once per source; nothing to prepare without attention."""

    def __call__(self, x: Float[Array, "T D"], states: tuple[State, ...], memory: None, length, return_weights: bool):
        """Return the output `[T D]` at each step, the states after the last, and the weights `[T S]` or None."""
        last_states = []
        for cell, state in zip(self.cells, states):
            x, state = unroll(cell, x, state)
            last_states.append(state)
        return x, tuple(last_states), None


class MultiplicativeDecoder(PlainDecoder):
    """Attention after the cells: a = softmax(h W_a m_s); the output is tanh((a m, h) W_c + b_c). No input feeding.

    The cells do not read the context, so all steps attend at once. The arguments are those of `PlainDecoder`.

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
        """Return output, states and weights as `PlainDecoder` does."""
        hidden, states, _ = super().__call__(x, states, None, length, False)
        key, value = memory
        options = dict(mask=masks.padding(length), scale=1.0)
        context = attention(hidden, key, value, **options)
        weights = attention_weights(hidden, key, **options) if return_weights else None
        return jnp.tanh(self.W_c(jnp.concatenate([context, hidden], axis=-1))), states, weights


class AdditiveDecoder(PlainDecoder):
    """Attention before the cells: a = softmax(v tanh(h W_a + m_s U_a + b_a)), with the last state h.

    The cells read x and a m C. The output is tanh((a m, h') W_c + b_c), with the new state h'. The arguments are those
    of `PlainDecoder`.

    Source: Bahdanau et al. 2015, sections 3.1 and A.1.2, with a one-directional encoder and without maxout.
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
        """Return output, states and weights as `PlainDecoder` does."""
        key, value = memory

        def step(states, inputs):
            *_, (query, *_) = states  # the hidden state of the last layer
            weights = self._weights(query, key, length)
            context = weights @ value
            inputs += self.C(context).reshape(inputs.shape)
            new_states = []
            for layer, (cell, state) in enumerate(zip(self.cells, states)):
                state = cell(inputs if layer == 0 else cell.project(new_states[-1][0][None])[0], state)
                new_states.append(state)
            return tuple(new_states), (state[0], context, weights)

        states, (hidden, context, weights) = jax.lax.scan(step, states, self.cells[0].project(x))
        return jnp.tanh(self.W_c(jnp.concatenate([context, hidden], axis=-1))), states, weights

    def _weights(self, query: Float[Array, "D"], key: Float[Array, "S D"], length) -> Float[Array, "S"]:
        score = self.v(jnp.tanh(self.W_a(query) + key))[:, 0]
        # `attention_weights` adds the score to the product of query and key, so that product must be 0.
        zeros = jnp.zeros((len(key), 1), key.dtype)
        [weights] = attention_weights(zeros[:1], zeros, mask=masks.padding(length), score=scores.dense(score[None]))
        return weights.astype(key.dtype)


# A new way to read the source is one class and one line here; `config.model.attention` then accepts its name.
DECODERS = {"none": PlainDecoder, "additive": AdditiveDecoder, "multiplicative": MultiplicativeDecoder}


@dataclasses.dataclass(frozen=True)
class RecurrentSettings(ModelSettings):
    """Settings of the recurrent models; dropout is on embeddings and on the decoder's output.

    Attributes:
      num_layers: L, the number of stacked cells in the encoder, and in the decoder.
      attention: a key of `DECODERS`.
    """

    num_layers: int = setting(1, between(1, 1_000))
    attention: str = setting("none", one_of(DECODERS))


class Recurrent(Model):
    """A recurrent encoder-decoder, with or without attention.

    The decoder's cells start from the last states of the encoder's cells. Padding does not change a state.

    Attributes:
      cell: the class of its cells.

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
        options = dict(tied=settings.tied_embeddings, dtype=dtype, rngs=rngs)

        def make_cell():
            return self.cell(width, dtype=dtype, rngs=rngs)

        self.add_embeddings(vocabulary, width, **options)
        self.encoder = nnx.List([make_cell() for _ in range(num_layers)])
        self.decoder = DECODERS[settings.attention](make_cell, num_layers, width, dtype=dtype, rngs=rngs)
        self.add_output(vocabulary, width, **options)

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
        """Encode the source; `capacity` is not used, since a state has a fixed size."""
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
        """Read the next T tokens of the answer and predict the token after each.

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
