"""Which products of a trace follow the setting of matmul precision."""


def is_matrix_product(dot_general) -> bool:
    """Whether both factors have an axis of their own: a sum of products, one a row, is none."""
    contracted, batch = dot_general.params["dimension_numbers"]
    return all(x.aval.ndim > len(c) + len(b) for x, c, b in zip(dot_general.invars, contracted, batch))
