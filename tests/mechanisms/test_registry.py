"""Mechanisms as text: what is read, what is refused in one line, and that nothing else is done with it."""

import dataclasses

import pytest

import attn.studies.mechanisms  # noqa: F401  registers `randomized`
from attn import mechanisms
from attn.mechanisms import MECHANISMS, of, parse, register
from attn.mechanisms.mechanism import parts
from attn.nn.transformer import Mechanisms

T5 = dict(num_buckets=32, max_distance=128, bidirectional=True, per_stack=False)


def told(text):
    """Names and settings of what is read from a text."""
    return [(type(part).__name__, {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}) for part in text]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", [("none", {})]),
        ("softcap(20)", [("softcap", {"cap": 20})]),
        (" shaw + softcap(cap=2.5) ", [("shaw", {"clip": 16}), ("softcap", {"cap": 2.5})]),
        ("rotary(500, fraction=0.5)", [("rotary", dict(base=500, fraction=0.5, factor=1.0))]),
        ("(shaw(3)+ t5()) + window(2, right=0)", [
            ("shaw", {"clip": 3}), ("t5", T5), ("window", dict(left=2, right=0))
        ]),
    ],
)  # fmt: skip
def test_names_with_settings_are_joined_by_a_plus(text, expected):
    assert told(parts(parse(text))) == expected


def test_a_mechanism_may_be_a_setting_of_another():
    drawn = parse("randomized(learned(9), 9)")
    assert told([drawn.inner]) == [("learned", dict(max_length=9, first=0, per_stack=False))] and drawn.range == 9
    assert told([parse("randomized(inner=rotary, at_test='random')").inner])[0][0] == "rotary"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rotry", "unknown mechanism 'rotry' (did you mean 'rotary'?); known: none, "),
        ("rotary + sofcap(2)", "unknown mechanism 'sofcap' (did you mean 'softcap'?); known: none, "),
        ("__import__('os')", "unknown mechanism '__import__'; known: none, "),
        ("softcap", "mechanism 'softcap': missing a required argument: 'cap'"),
        ("softcap()", "mechanism 'softcap': missing a required argument: 'cap'"),
        ("softcap(1, 2)", "mechanism 'softcap': too many positional arguments"),
        ("softcap(1, top=2)", "mechanism 'softcap': got an unexpected keyword argument 'top'"),
        ("rotary(1, base=2)", "mechanism 'rotary': multiple values for argument 'base'"),
        ("none(1)", "mechanism 'none': too many positional arguments"),
        ("rotary('x')", "mechanism 'rotary': base: got 'x', must be a number"),
        ("rotary(base=abc)", "mechanism 'rotary': base: got 'abc', must be a number"),
        ("rotary(base=learned(9))", "mechanism 'rotary': base: got 'learned(9)', must be a number"),
        ("randomized(rotry)", "unknown mechanism 'rotry' (did you mean 'rotary'?); known: none, "),
        ("window(1.5, 0)", "mechanism 'window': left: got 1.5, must be a whole number"),
        ("softcap(True)", "mechanism 'softcap': cap: got True, must be a number"),
        ("softcap(1e999)", "mechanism 'softcap': cap: got inf, must be a number"),
        ("softcap([1])", "mechanism 'softcap': cap: got [1], must be a number"),
        ("randomized(3)", "mechanism 'randomized': inner: got 3, must be Mechanism"),
        (
            "randomized(learned(9))",
            "randomized: learned(max_length=9) distinguishes 9 positions, must distinguish range = 2048",
        ),
        ("randomized(rotary, 1)", "randomized: range must lie in 2..40,000, got 1"),
    ],
)
def test_a_wrong_name_or_setting_is_one_line(text, message):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["", "+", "1", "1+2", "'rotary'", "rotary - none", "rotary none", "rotary; none", "[rotary]", "lambda: rotary",
     "rotary.base", "rotary.__class__()", "rotary()()", "softcap(*[2])", "rotary + 2", "none if rotary else none",
     "rotary(base=print('executed'))", "(" * 300, "none(none + 1)", "x := none"],
)  # fmt: skip
def test_what_is_not_a_mechanism_is_refused_and_not_executed(text, capfd):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert "\n" not in str(error.value).replace(text, "")
    assert capfd.readouterr().out == ""


def test_nothing_is_executed(tmp_path):
    opened = f"open({str(tmp_path / 'x')!r}, 'w')"
    for text in (opened, f"rotary(base={opened})", f"randomized({opened})"):
        with pytest.raises(ValueError, match=r"^unknown mechanism 'open'|: base: got .open"):
            parse(text)
    assert not (tmp_path / "x").exists()


@pytest.fixture
def fresh():
    """Names that are registered are forgotten after the test."""
    before = dict(MECHANISMS)
    yield
    for name in MECHANISMS.keys() - before.keys():
        del MECHANISMS[name]


def test_a_class_and_a_mechanism_made_of_functions_are_registered(fresh):
    @register
    class mine(mechanisms.Mechanism):
        size: int = 3

        def query(self, x, q):
            return self.size * x

    assert isinstance(parse("mine(size=4)"), mine) and parse("mine(4)").size == 4
    lean = of(mask=lambda i, j: i < j, scale=0.5)  # two mechanisms in one
    assert register(lean, "lean") is lean and register(lean, "lean") is lean
    assert parts(parse("rotary + lean"))[1:] == parts(lean)
    with pytest.raises(ValueError, match="mechanism 'lean': has no settings; leave the parentheses out"):
        parse("lean(2)")
    assert Mechanisms.named("learned(9) + lean + mine(2)").cross == "lean + mine(2)"


def test_a_name_that_is_taken_or_not_a_name_is_refused(fresh):
    class rotary(mechanisms.Mechanism):
        def query(self, x, q):
            return 2 * x

    with pytest.raises(ValueError, match="mechanism 'rotary': is known already; choose another name"):
        register(rotary)
    assert MECHANISMS["rotary"] is mechanisms.rotary
    with pytest.raises(ValueError, match="mechanism 'my-own': must be a Python name"):
        register(of(scale=2.0), "my-own")
    register(rotary, "turned")
    assert isinstance(parse("turned"), rotary)


def test_something_that_is_not_a_mechanism_or_changes_nothing_is_refused(fresh):
    class misspelt(mechanisms.Mechanism):
        def qery(self, x, q):
            return 2 * x

    with pytest.raises(TypeError, match="mechanism 'misspelt': overrides none of embedding, query, key"):
        register(misspelt)
    with pytest.raises(TypeError):
        register(lambda s, i, j: s)
