"""The registry: unknown names, implementations that cannot serve, and what "auto" and "fastest" choose."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementation_suite import (  # noqa: F401  collected here for all that are registered
    test_declared_derivatives_are_right_and_others_are_right_or_refused,
    test_many_heads_equal_one_at_a_time,
    test_what_is_not_declared_is_refused_and_what_is_declared_is_served,
)
from jax import export

import attn
from attn.functional import implementations, reference
from attn.functional.contract import Call, Normalizer
from attn.functional.implementations import DERIVATIVES, FEATURES, IMPLEMENTATIONS, Implementation

ONE, MANY = [(3, 2), (5, 2), (5, 7)], [(3, 4, 2), (5, 2, 2), (5, 2, 7)]
CALLS = ((attn.attention, ONE), (attn.multi_head_attention, MANY))


def constant(number):
    """An implementation that is recognised by its output."""

    def attend(call):
        out, normalizer = reference.attend(call)
        return jnp.full_like(out, number), normalizer

    return attend


@pytest.fixture
def registry(monkeypatch):
    """An empty registry to fill."""
    for name in list(IMPLEMENTATIONS):
        monkeypatch.delitem(IMPLEMENTATIONS, name)

    def add(name, number, **what):
        monkeypatch.setitem(IMPLEMENTATIONS, name, Implementation(constant(number), **what))

    return add


def used(name, **options) -> float:
    return float(attn.attention(*cases.normal(*ONE), implementation=name, **options)[0, 0])


@pytest.mark.parametrize("call, shapes", CALLS, ids=["one", "many"])
@pytest.mark.parametrize("name", ["", "flash", "Reference", "auto "])
def test_an_unknown_name_is_answered_with_the_known(call, shapes, name):
    with pytest.raises(ValueError, match="unknown implementation") as caught:
        call(*cases.normal(*shapes), implementation=name)
    for known in ("auto", "fastest", *IMPLEMENTATIONS):
        assert repr(known) in str(caught.value)
    assert repr(name) in str(caught.value)


OPTIONS = {
    "mask": {"mask": lambda i, j: j <= i},
    "score": {"score": lambda s, i, j: s},
    "dropout": {"dropout": attn.Dropout(0.5, jax.random.key(0))},
    "logsumexp": {"return_logsumexp": True},
}


@pytest.mark.parametrize("call, shapes", CALLS, ids=["one", "many"])
@pytest.mark.parametrize("feature", FEATURES)
def test_a_limited_implementation_says_what_it_lacks_and_who_can(registry, call, shapes, feature):
    registry("limited", 1.0, features=frozenset(FEATURES) - {feature})
    registry("able", 2.0)
    registry("also able", 3.0, features=frozenset({feature}))
    with pytest.raises(attn.Unsupported, match=f"'limited' does not support {feature}") as caught:
        call(*cases.normal(*shapes), implementation="limited", **OPTIONS[feature])
    _, who = str(caught.value).split("these do:")
    assert "able" in who and "also able" in who and "limited" not in who
    assert isinstance(caught.value, NotImplementedError)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_limited_implementation_serves_what_it_can(registry, feature):
    registry("limited", 1.0, features=frozenset({feature}))
    registry("able", 2.0)
    out = attn.attention(*cases.normal(*ONE), implementation="limited", **OPTIONS[feature])
    assert np.all(np.asarray(out[0] if feature == "logsumexp" else out) == 1.0)
    assert used("limited", dropout=attn.Dropout(0.0)) == 1.0  # a rate of 0 asks for nothing
    assert used("limited") == 1.0


def test_an_implementation_of_another_backend_says_so(registry):
    registry("elsewhere", 1.0, backends=frozenset({"nowhere"}))
    registry("here", 2.0, backends=frozenset({jax.default_backend()}))
    with pytest.raises(attn.Unsupported, match=rf"'elsewhere' .*backend '{jax.default_backend()}'.*here"):
        used("elsewhere")
    assert used("here") == used("auto") == used("fastest") == 2.0


def test_auto_wants_every_derivative_and_fastest_reverse_mode(registry):
    registry("forward only", 1.0, derivatives=frozenset({"forward"}))
    registry("reverse only", 2.0, derivatives=frozenset({"reverse"}))
    registry("first order", 3.0, derivatives=frozenset({"reverse", "forward"}))
    registry("all", 4.0, derivatives=frozenset(DERIVATIVES))
    registry("all as well", 5.0)
    assert used("auto") == 4.0 and used("fastest") == 2.0 and used("all as well") == 5.0


@pytest.mark.parametrize("feature", ["mask", "score", "dropout"])
def test_auto_and_fastest_pass_over_what_cannot_serve(registry, feature):
    registry("limited", 1.0, features=frozenset(FEATURES) - {feature})
    registry("reverse only", 2.0, derivatives=frozenset({"reverse"}))
    registry("able", 3.0)
    assert used("auto") == used("fastest") == 1.0
    assert used("auto", **OPTIONS[feature]) == 3.0 and used("fastest", **OPTIONS[feature]) == 2.0


def test_a_name_is_a_string(untyped):
    with pytest.raises(TypeError, match=r"implementation must be a string.*\['auto'\]"):
        attn.attention(*cases.normal(*ONE), implementation=["auto"])


@pytest.mark.nightly
def test_lengths_may_be_symbols_where_nothing_is_in_blocks(untyped):
    (length,) = export.symbolic_shape("t")
    arrays = [jax.ShapeDtypeStruct((length, 4), jnp.float32)] * 3
    exported = lambda **options: export.export(jax.jit(lambda *a: attn.attention(*a, **options)))(*arrays)  # noqa: E731
    for query, key, value in (cases.normal((5, 4), (5, 4), (5, 4)), cases.normal((70, 4), (70, 4), (70, 4))):
        found = exported().call(query, key, value)
        np.testing.assert_allclose(found, attn.attention(query, key, value), rtol=1e-5, atol=1e-6)
        options = {"mask": attn.masks.causal(), "score": attn.scores.alibi(0.5)}
        found = exported(**options).call(query, key, value)
        np.testing.assert_allclose(found, attn.attention(query, key, value, **options), rtol=1e-5, atol=1e-6)
    with pytest.raises(attn.Unsupported, match=r"symbols.*T = t.*these do: reference"):
        exported(implementation="blockwise")


def test_auto_is_the_default(registry):
    registry("only", 6.0)
    assert attn.attention(*cases.normal(*ONE))[0, 0] == 6.0
    assert attn.multi_head_attention(*cases.normal(*MANY))[0, 0, 0] == 6.0


def test_the_registry_declares_known_features_and_derivatives():
    assert implementations.IMPLEMENTATIONS["reference"].features == set(FEATURES)
    for one in IMPLEMENTATIONS.values():
        assert one.features <= set(FEATURES) and one.derivatives <= set(DERIVATIVES)


@pytest.mark.parametrize(
    "attend",
    [
        lambda call: call.value[:1],  # one row instead of T
        lambda call: (call.value[:1], None),
        lambda call: (call.query, None),  # H instead of Hv
        lambda call: (call.value, Normalizer(call.query[:, :1], call.query[:, 0])),  # which would broadcast to T x T
    ],
)
def test_results_of_other_shapes_are_refused(registry, attend):
    registry("misshapen", 1.0)
    IMPLEMENTATIONS["misshapen"] = Implementation(attend)
    for call, shapes in (
        (attn.attention, [(3, 8), (3, 8), (3, 5)]),
        (attn.multi_head_attention, [(3, 4, 8)] * 2 + [(3, 4, 5)]),
    ):
        with pytest.raises(ValueError, match=r"^implementation 'misshapen': attend returned .*\(3, [58]\), and \(3,\)"):
            call(*cases.normal(*shapes), implementation="misshapen")


def test_mistakes_in_what_is_declared_are_named(untyped):
    with pytest.raises(ValueError, match="backends must be a set of names, got 'cpu'"):
        Implementation(reference.attend, backends="cpu")
    mistaken = Implementation(reference.attend, unsupported_reason=lambda call: True)
    call = Call(*cases.normal((3, 8), (3, 8), (3, 8)), None, None, 1.0)
    with pytest.raises(TypeError, match="unsupported_reason must return a text or None, got True"):
        mistaken.missing_features(call, "cpu")
