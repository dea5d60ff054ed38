import jax.numpy as jnp

from attn import tasks


@tasks.register("ascending", fixed_length=True)
def ascending(symbols, length, num_symbols):
    return jnp.sort(jnp.where(symbols > 0, symbols, num_symbols + 1)), length


@tasks.register("parity", most_symbols=lambda n: 1, fixed_length=True)
def parity(symbols, length, num_symbols):
    return 1 + jnp.sum(jnp.maximum(symbols - 1, 0))[None] % 2, 1


@tasks.register("plus", most_symbols=lambda n: n)
def plus(symbols, length, num_symbols):  # the first digit and the last: one digit, or two
    low = symbols[0] + symbols[length - 1] - 2
    digits = jnp.where(low < num_symbols, jnp.array([low, 0]), jnp.array([1, low - num_symbols]))
    return 1 + digits, jnp.where(length < 2, 1, 1 + (low >= num_symbols))
