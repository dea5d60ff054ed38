import jax
import jax.numpy as jnp

from attn import tasks


@tasks.register("ascending", fixed_length=True)
def ascending(symbols, length, num_symbols):
    return jnp.sort(jnp.where(symbols > 0, symbols, num_symbols + 1)), length


@tasks.register("parity", most_symbols=lambda n: 1, fixed_length=True)
def parity(symbols, length, num_symbols):
    return 1 + jnp.sum(jnp.maximum(symbols - 1, 0))[None] % 2, 1


@tasks.register("plus", most_symbols=lambda n: (n + 1) // 2 + 1)
def plus(symbols, length, base):  # the sum of two numbers, the first and the second half of the string
    middle, t = (length + 1) // 2, jnp.arange(len(symbols) // 2 + 2)
    index = jnp.stack([middle, length])[:, None] - 1 - t  # of the digits of both numbers, the lowest first
    columns = jnp.where(index >= jnp.stack([0, middle])[:, None], symbols[index] - 1, 0).sum(axis=0)
    _, total = jax.lax.scan(lambda carry, x: ((carry + x) // base, (carry + x) % base), 0 * symbols[0], columns)
    count = jnp.max(jnp.where(total > 0, t + 1, 1))
    return 1 + total[count - 1 - t], count
