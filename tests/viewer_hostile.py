"""Arrays and token texts that break viewers."""

import jax.numpy as jnp
import numpy as np

TOKENS = {
    "end of script": "</script><script>attacked = 1</script>",
    "comment": "<!--",
    "script": "<script>attacked = 1</script>",
    "image": "<img src=x onerror='attacked = 1'>",
    "image double": '"><img src=x onerror="attacked = 1">',
    "style": "</style><style>*{display:none}</style>",
    "entity": "&amp;&lt;",
    "cdata": "]]>",
    "quotes": "\"'`",
    "backslash": "\\u003c\\",
    "template": "${attacked=1}{{attacked=1}}",
    "sentence end": "<s>",
    "line separators": "a\u2028b\u2029c",
    "nul": "a\x00b",
    "lone surrogate": "\udc80",
    "lone high surrogate": "\ud800x",
    "override": "abc\u202edcba",
    "arabic": "مرحبا",
    "combining": "z̴͚̈́a̷l̵g̶o̵",
    "emoji": "👩‍👩‍👧‍👦",
    "long": "x" * 10_000,
    "empty": "",
    "spaces": "   ",
    "newline": "a\nb\r\n",
    "tab": "\t",
    "url": "javascript:attacked=1",
}


def _softmax(*shape):
    x = np.exp(np.random.default_rng(0).normal(size=shape))
    return x / x.sum(-1, keepdims=True)


ARRAYS = {
    "nan": np.full((3, 3), np.nan),
    "some nan": np.array([[np.nan, 1.0], [0.5, 0.5]]),
    "infinities": np.array([[np.inf, -np.inf], [0.5, 0.5]]),
    "negative": np.array([[-1.0, 0.5], [0.25, -0.25]]),
    "above 1": np.array([[3.0, 0.0], [0.0, 100.0]]),
    "tiny": np.array([[1e-30, 1e-38], [1e-45, 0]]),
    "huge": np.array([[1e38, -1e38], [0.0, 1.0]]),
    "all-zero rows": np.array([[0.0, 0.0], [0.5, 0.5]]),
    "all zero": np.zeros((3, 4)),
    "not summing to 1": np.array([[0.1, 0.1], [0.9, 0.9]]),
    "constant": np.full((4, 4), 0.25),
    "bool": np.eye(3, dtype=bool),
    "int": np.eye(3, dtype=np.int64),
    "float16": np.eye(3, dtype=np.float16),
    "bfloat16": jnp.eye(3, dtype=jnp.bfloat16),
    "float64": np.eye(3),
    "fortran": np.asfortranarray(_softmax(2, 3, 5, 7)),
    "negative strides": _softmax(2, 3, 5, 7)[::-1, :, ::-1],
    "masked": np.ma.masked_array(np.eye(3), np.tri(3) == 0),
    "all masked": np.ma.masked_all((3, 3)),
    "1 x 1": np.ones((1, 1)),
    "1 x 10,000": _softmax(1, 10_000),
    "10,000 x 1": np.ones((10_000, 1)),
    "wide": _softmax(2, 3, 5, 130),
    "96 x 96 heads": _softmax(96, 96, 6, 6),
    "many rows": _softmax(2, 2_048, 2_048),
    "layers that differ": [_softmax(2, 3, 4), _softmax(5, 9, 7)],
}
