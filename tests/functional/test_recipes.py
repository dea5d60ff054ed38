"""Every recipe of docs/attention.md is run as it stands and compared with NumPy, in every implementation."""

import functools
import pathlib
import re

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp as log_sum_exp

import attn

PAGE = (pathlib.Path(__file__).parent.parent.parent / "docs/attention.md").read_text()
T, N, H = 7, 4, 8
I, J = np.arange(T)[:, None], np.arange(T)[None, :]


def recipes() -> dict[str, str]:
    """The Python below each heading."""
    parts = re.split(r"^#+ (.*)\n", PAGE, flags=re.MULTILINE)
    found = {
        title: re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        for title, text in zip(parts[1::2], parts[2::2])
    }
    return {title: "\n".join(blocks) for title, blocks in found.items() if blocks}


RECIPES = recipes()
SETTING = RECIPES.pop("Recipes")


def attend(names, n: int, *, visible=True, change=lambda s: s, rows=slice(None)) -> np.ndarray:
    """Softmax attention of head n in NumPy."""
    query, key, value = (np.asarray(names[x][:, n], float) for x in ("query", "key", "value"))
    s = change(query @ key.T / np.sqrt(H))
    s = np.where(np.broadcast_to(visible, s.shape), s, -np.inf)
    p = np.exp(s - log_sum_exp(s, axis=1, keepdims=True))
    return (p @ value)[rows]


def buckets() -> np.ndarray:
    """T5's buckets for 32 of them, both directions: exact below 8; these distances go no further."""
    distance = J - I
    assert np.abs(distance).max() < 8
    return np.where(distance > 0, 16, 0) + np.abs(distance)


def alibi(names, n):
    slope = 2.0 ** (-8 * (n + 1) / N)
    return attend(names, n, visible=J <= I, change=lambda s: s - slope * np.abs(I - J))


def t5(names, n):
    table = np.asarray(names["table"], float)
    return attend(names, n, change=lambda s: s + table[n][buckets()])


def capped_after(names, n):
    bias = np.asarray(names["bias"].table, float)[J - I + T - 1]
    return attend(names, n, change=lambda s: 2 * np.tanh((s + bias) / 2))


def capped_before(names, n):
    bias = np.asarray(names["bias"].table, float)[J - I + T - 1]
    return attend(names, n, change=lambda s: 2 * np.tanh(s / 2) + bias)


def with_sink(names, n):
    """One more key with the sink's logit and a value of zeros."""
    query, key, value = (np.asarray(names[x][:, n], float) for x in ("query", "key", "value"))
    s = np.concatenate([query @ key.T / np.sqrt(H), np.full((T, 1), float(names["sink"][n]))], axis=1)
    e = np.exp(s - s.max(axis=1, keepdims=True))
    return (e / e.sum(axis=1, keepdims=True)) @ np.concatenate([value, np.zeros((1, H))])


def packed(names, n):
    document = np.array([0, 0, 0, 1, 1, 2, 2])
    return attend(names, n, visible=(document[:, None] == document[None, :]) & (J <= I))


def causal_over_devices(names, n):
    i, j = np.indices([len(names["query"])] * 2)
    return attend(names, n, visible=j <= i)


WINDOW = (I - 3 <= J) & (J <= I)
EXPECTED = {
    "ALiBi": {"out": alibi},
    "T5's relative bias": {"out": t5},
    "Soft-capping, before or after a bias": {"after": capped_after, "before": capped_before},
    "Sliding window": {
        "out": functools.partial(attend, visible=WINDOW),
        "with_first": functools.partial(attend, visible=WINDOW | (J == 0)),
    },
    "Packed documents": {"out": packed},
    "Prefix-LM": {"out": functools.partial(attend, visible=(J <= I) | (J < 3))},
    "Attention sinks, and softmax off by one": {"out": with_sink},
    "Decoding with a cache": {"out": functools.partial(attend, visible=J <= I, rows=slice(4, 5))},
    "Keys in parts": {"out": attend},
    "Ring attention": {"out": causal_over_devices},
}


def test_every_recipe_is_tested():
    assert set(RECIPES) == {*EXPECTED, "Drop-ins", "Pooled weights"}


@pytest.mark.served
@pytest.mark.some(4)
@pytest.mark.parametrize("title", EXPECTED)
def test_the_recipe_does_what_it_says(title, implementation, monkeypatch):
    of_many = functools.partial(attn.multi_head_attention, implementation=implementation)
    monkeypatch.setattr(attn, "multi_head_attention", of_many)
    names = {}
    exec(compile(SETTING + RECIPES[title], "docs/attention.md", "exec"), names)
    for name, expected in EXPECTED[title].items():
        for n in range(N):
            np.testing.assert_allclose(names[name][:, n], expected(names, n), rtol=1e-5, atol=1e-6)


@pytest.mark.served
@pytest.mark.some(1)
@pytest.mark.parametrize("title", [title for title in EXPECTED if title != "Ring attention"])  # it draws its own arrays
def test_the_recipe_has_the_derivative_of_what_it_says(title, implementation, monkeypatch):
    """Along a random direction of queries, keys and values, against differences of the NumPy form."""
    of_many = functools.partial(attn.multi_head_attention, implementation=implementation)
    monkeypatch.setattr(attn, "multi_head_attention", of_many)
    setting = {}
    exec(compile(SETTING, "docs/attention.md", "exec"), setting)
    names, rng = ("query", "key", "value"), np.random.default_rng(5)
    arrays, directions = [setting[name] for name in names], rng.normal(size=(3, T, N, H))

    def run(arrays) -> dict:
        inner = setting | dict(zip(names, arrays))
        exec(compile(RECIPES[title], "docs/attention.md", "exec"), inner)
        return inner

    results = run(arrays)
    weights = {name: rng.normal(size=results[name].shape) for name in EXPECTED[title]}
    gradients = jax.grad(lambda arrays: sum(jnp.vdot(run(arrays)[name], w) for name, w in weights.items()))(arrays)

    def exact(step: float) -> float:
        moved = results | {name: np.asarray(x, float) + step * d for name, x, d in zip(names, arrays, directions)}
        heads = [(name, n) for name in weights for n in range(N)]
        return sum((EXPECTED[title][name](moved, n) * weights[name][:, n]).sum() for name, n in heads)

    expected = (exact(1e-5) - exact(-1e-5)) / 2e-5
    found = sum(np.vdot(np.asarray(x, float), d) for x, d in zip(gradients, directions))
    size = np.sqrt(sum((np.asarray(x, float) ** 2).sum() for x in gradients))
    assert abs(found - expected) < 1e-5 * size


def test_the_drop_in_runs_as_shown():
    names = {}
    exec(compile(SETTING + RECIPES["Drop-ins"], "docs/attention.md", "exec"), names)
    assert names["out"].shape == (2, T, 16)


def test_pooled_weights_are_as_shown():
    names = {}
    exec(compile(SETTING + RECIPES["Pooled weights"], "docs/attention.md", "exec"), names)
    a, b = names["a"], names["b"]
    assert (a, b) == (3, 2) and names["weights"].shape == (N, 3, 4)
    for n in range(N):
        query, key = (np.asarray(names[x][:, n], float) for x in ("query", "key"))
        s = np.where(J <= I, query @ key.T / np.sqrt(H), -np.inf)
        p = np.exp(s - log_sum_exp(s, axis=1, keepdims=True))
        expected = [[p[m : m + a, k : k + b].sum(axis=1).mean() for k in range(0, T, b)] for m in range(0, T, a)]
        np.testing.assert_allclose(names["weights"][n], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.derivatives("forward")
def test_a_sink_is_differentiated(implementation):
    """d out / d sink = -out (1 - sigmoid(logsumexp - sink)), with out after the sink."""
    query, key, value = (jax.random.normal(k, (T, H)) for k in jax.random.split(jax.random.key(0), 3))

    def with_sink(sink):
        options = {"implementation": implementation, "return_logsumexp": True}
        out, logsumexp = attn.attention(query, key, value, **options)
        return out * jax.nn.sigmoid(logsumexp - sink)[:, None]

    out, logsumexp = oracle.forward(oracle.Head(query, key, value))
    kept = 1 / (1 + np.exp(0.5 - logsumexp.astype(float)))[:, None]
    expected = -out.astype(float) * kept * (1 - kept)
    np.testing.assert_allclose(jax.jacfwd(with_sink)(jnp.float32(0.5)), expected, rtol=1e-5, atol=1e-6)
