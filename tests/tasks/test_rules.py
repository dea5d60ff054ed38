"""Rules: right answers of every length and base, and tasks that are registered from outside of the package."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from right_answers import RIGHT, number

from attn import tasks
from attn.tasks.examples import DataError
from attn.tasks.rules import RULES, Rule, rearranged, register
from attn.tasks.sequences import Task
from attn.tasks.vocabulary import before


@pytest.fixture(autouse=True)
def only_here(monkeypatch):
    """Forget after a test what it has registered."""
    monkeypatch.setattr("attn.tasks.rules.RULES", RULES)
    before = dict(RULES)
    yield
    for name in RULES.keys() - before.keys():
        del RULES[name]


def parity(symbols, length, num_symbols):
    return 1 + jnp.sum(symbols - (symbols > 0), keepdims=True) % 2, 1


def strings_of_every_length(symbols: int, longest: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Random strings padded with 0, and those of the first and of the last symbol alone, whose sums carry most."""
    lengths = np.repeat(np.arange(1, longest + 1), each)
    strings = np.random.default_rng(symbols).integers(1, symbols + 1, (len(lengths), longest))
    strings[::each], strings[1::each] = 1, symbols
    return np.where(np.arange(longest) < lengths[:, None], strings, 0), lengths


@pytest.mark.parametrize("symbols", [2, 10, 16])
@pytest.mark.parametrize("name", [*RIGHT, "parity"])
def test_answers_are_right_for_every_length_and_number_of_symbols(name, symbols):
    register("parity", Rule(parity, lambda n: 1, fixed_length=True))
    right = RIGHT | {"parity": lambda s, v: [1 + sum(symbol - 1 for symbol in s) % 2]}
    task = Task(name, symbols)
    strings, lengths = strings_of_every_length(symbols, longest=40, each=20)
    questions = task.questions(strings, lengths)
    answers = [before(task.vocabulary.end, target) for target in questions.targets]
    given = [string[:length].tolist() for string, length in zip(strings, lengths)]
    assert answers == [right[name](string, symbols) for string in given]
    for string, answer in zip(given, answers):
        assert len(answer) + 1 <= task.vocabulary.capacity(len(string))
        assert task.vocabulary.answer_length(len(string)) in (None, len(answer) + 1)


def test_sums_are_those_of_numbers_as_people_write_them():
    """995 + 27, 5 + nothing, 0 + 0, and more digits than any integer of a machine has."""
    digits = {"99527": "1022", "5": "5", "00": "0", "9" * 99 + "0" * 98 + "1": "1" + "0" * 99}
    for source, total in digits.items():
        [target] = Task("add", symbols=10).questions(*as_string(source)).targets
        assert "".join(str(symbol - 1) for symbol in before(12, target)) == total
    assert number([1, 3, 2], 10) == 21


def as_string(digits: str) -> tuple[np.ndarray, np.ndarray]:
    return np.array([[int(digit) + 1 for digit in digits]]), np.array([len(digits)])


def test_an_answer_does_not_depend_on_padding():
    for name, rule in RULES.items():
        strings, lengths = strings_of_every_length(5, longest=9, each=4)
        for string, length in zip(strings.astype(np.int32), lengths):
            wide, wide_count = rule.answer(jnp.pad(string, (0, 7)), length, 5)
            answer, count = rule.answer(jnp.asarray(string[:length]), length, 5)
            assert count == wide_count, name
            np.testing.assert_array_equal(answer[:count], wide[:count], name)
            if rule.source is not None:
                given = jnp.asarray(string[:length]), jnp.pad(string, (0, 7))
                np.testing.assert_array_equal(*(rule.source(each, int(length), 5)[:length] for each in given), name)


def test_a_task_may_come_from_outside_of_the_package(repository):
    """The one of the docs, and a rearrangement."""
    blocks = re.findall("```python\n(.*?)```", (repository / "docs/data.md").read_text(), re.DOTALL)
    [block] = [block for block in blocks if "parity" in block]
    exec(block, {})
    register("swap", rearranged(lambda t, n: (t + n // 2) % n))
    for name, rewritten in (("parity", lambda s: [1 + sum(k - 1 for k in s) % 2]), ("swap", swapped)):
        data = tasks.load(name, symbols=4, max_length=6)
        _, examples = data.batches(32, 0).batch(3)
        for source, target in zip(*examples):
            assert before(7 - 1, target) == rewritten(before(7 - 1, source))
        assert len(data.questions("test", 50, 0).lengths) == 50


@pytest.mark.parametrize("name", RULES)
def test_examples_of_every_rule_are_drawn_on_a_mesh(name):
    task, axes = Task(name, symbols=4, max_length=5), jax.sharding.PartitionSpec("data")
    mesh, keys = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,)), jax.random.split(jax.random.key(0), 6)
    draw = jax.vmap(task.sample)
    on_mesh = jax.jit(jax.shard_map(draw, mesh=mesh, in_specs=axes, out_specs=axes))(keys)
    for drawn, alone in zip(on_mesh, jax.jit(draw)(keys)):
        np.testing.assert_array_equal(drawn, alone)


def swapped(symbols: list[int]) -> list[int]:
    return symbols[len(symbols) // 2 :] + symbols[: len(symbols) // 2]


def test_a_task_from_outside_has_a_tfds_data_set(tmp_path):
    register("parity", Rule(parity, lambda n: 1, fixed_length=True))
    data = tasks.load("parity", symbols=3, max_length=5, source="tfds", folder=tmp_path)
    questions = data.parts["test_long"]
    sums = (questions.sources - 1).clip(0).sum(1) - 4  # less the end token's
    np.testing.assert_array_equal(questions.targets[:, 0], 1 + sums % 2)


def broken(symbols, length, num_symbols):
    return symbols.undefined, length


def kept(symbols, length, num_symbols):
    return symbols


@pytest.mark.parametrize(
    ("name", "rule", "message"),
    [
        ("sort", Rule(parity), "name: got 'sort', which is taken; choose another one than copy, .*, pairs"),
        ("pairs", Rule(parity), "name: got 'pairs', which is taken"),
        ("my task", Rule(parity), "name: got 'my task', must be a Python identifier"),
        ("new", parity, "rule: got <function parity .*>, must be a Rule"),
        ("new", Rule(broken), r"rule 'new': answer\(symbols, length, num_symbols\): AttributeError: .*undefined"),
        ("new", Rule(lambda symbols: symbols), r"rule 'new': .*: TypeError: .*takes 1 positional argument"),
        ("new", Rule(lambda s, n, v: s), "rule 'new': .*: TypeError: cannot unpack"),
        ("new", Rule(lambda s, n, v: (s[0], n)), r"rule 'new': answer returns .*; must be \(\[m\] integers"),
        ("new", Rule(lambda s, n, v: (s / 2, n)), r"rule 'new': answer returns .*; must be \(\[m\] integers"),
        ("new", Rule(parity, lambda n: n / 2), r"rule 'new': most_symbols gives \[0.0, 0.5, 1.0, 1.5\] for n = 0 to 3"),
        ("new", Rule(parity, lambda n: -n), r"rule 'new': most_symbols gives \[0, -1, -2, -3\]"),
        ("new", Rule(parity, lambda n: {}[n]), r"rule 'new': most_symbols\(n\): KeyError: 0"),
        ("new", Rule(parity, source=broken), r"rule 'new': source\(symbols, length, num_symbols\): .*undefined"),
        (
            "new",
            Rule(parity, source=lambda s, n, v: (s, n)),
            r"rule 'new': source returns \(.*; must be \[m\] integers",
        ),
        ("new", Rule(parity, source=lambda s, n, v: s / 2), r"rule 'new': source returns .*; must be \[m\] integers"),
        ("new", Rule(parity, num_drawn=lambda n: 2 * n), "rule 'new': num_drawn has a meaning only with source"),
        (
            "new",
            Rule(parity, source=kept, num_drawn=lambda n: n // 2),
            r"rule 'new': num_drawn gives \[0, 1, 1, 2\] for",
        ),
        ("new", Rule(parity, source=kept, num_drawn=lambda n: n / 2), r"rule 'new': num_drawn gives \[0.5, 1.0, 1.5"),
        ("new", Rule(parity, alphabet=lambda v: -v), r"rule 'new': alphabet gives \[-2, -3, -4, -5\] for V = 2 to 5"),
        ("new", Rule(parity, alphabet=lambda v: v.size), r"rule 'new': alphabet\(V\): AttributeError"),
    ],
)
def test_a_rule_that_cannot_be_registered_is_named_in_one_line(untyped, name, rule, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        register(name, rule)
    assert "\n" not in str(error.value) and "new" not in RULES


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(lambda s, n, v: (s, n - s[0] % 2), fixed_length=True), "the answer to .* must have 3 symbols"),
        (Rule(lambda s, n, v: (s, n + 1)), "the answer to .*, of length 4; must have at most 3 symbols 1..4"),
        (Rule(lambda s, n, v: (s + 1, n)), r"the answer to .*5.*; must have at most 3 symbols 1..4"),
        (Rule(lambda s, n, v: (s - 1, n)), r"the answer to .*0.*; must have at most 3 symbols 1..4"),
    ],
)
def test_an_answer_that_the_rule_does_not_allow_is_named(rule, message):
    register("wrong", rule)
    with pytest.raises(DataError, match=f"^rule 'wrong': {message}"):
        tasks.load("wrong", symbols=4, min_length=3, max_length=3).questions("test", 50, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(source=lambda s, n, v: s + 1), r"a source is .*5.*; must have 3 symbols 1..4"),
        (dict(source=lambda s, n, v: s[:2]), r"a source is \[\d, \d, 0\]; must have 3 symbols 1..4"),
        (dict(source=lambda s, n, v: s, num_drawn=lambda n: 1), r"a source is \[\d, 0, 0\]; must have 3 symbols 1..4"),
        (dict(source=lambda s, n, v: s, alphabet=lambda v: v - 1), r"a source is .*4.*; must have 3 symbols 1..3"),
    ],
)
def test_a_source_that_the_rule_does_not_allow_is_named(settings, message):
    register("wrong", Rule(parity, lambda n: 1, **settings))
    with pytest.raises(DataError, match=f"^rule 'wrong': {message}"):
        tasks.load("wrong", symbols=4, min_length=3, max_length=3).questions("test", 50, 0)


def test_a_task_from_outside_may_make_its_source():
    """Twice each drawn symbol, in a larger alphabet: the answer undoes it."""

    def doubled(symbols, length, num_symbols):
        return jnp.repeat(2 * symbols, 2)

    register(
        "halve", Rule(kept_half, lambda n: (n + 1) // 2, True, False, doubled, lambda n: (n + 1) // 2, lambda v: 2 * v)
    )
    data = tasks.load("halve", symbols=4, max_length=7)
    _, examples = data.batches(64, 0).batch(3)
    questions = data.questions("test", 100, 0)
    assert data.vocabulary.count == 8
    for source, target in [*zip(*examples), *zip(questions.sources, questions.targets)]:
        source, target = before(10, source), before(10, target)
        assert set(source) <= {2, 4, 6, 8} and target == [symbol // 2 for symbol in source[::2]]
    assert set(questions.lengths) == set(range(1, 8))


def kept_half(symbols, length, num_symbols):
    return symbols, (length + 1) // 2


def test_registering_starts_no_backend():
    """So that a module of tasks may be imported before the number of devices is set."""
    script = (
        "import jax, jax.numpy as jnp; from attn import tasks;"
        "tasks.register('last', tasks.Rule(lambda s, n, v: (s[n - 1][None], 1), lambda n: 1));"
        "tasks.register('sorted', tasks.Rule(lambda s, n, v: (jnp.sort(s + jnp.array([0])), n)));"
        "jax.config.update('jax_num_cpu_devices', 3); print(jax.local_device_count())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "3\n", done.stderr
