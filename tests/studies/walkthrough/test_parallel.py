"""The counts that decide "parallel": of the models that are timed, of all devices and lengths, and told as counts."""

import copy
import json
import pathlib

import pytest

from attn.studies.walkthrough import parallel
from attn.studies.walkthrough.claims import verdict
from attn.studies.walkthrough.running import read

ROOT = pathlib.Path(__file__).parents[3]
COUNTS = json.loads(parallel.COUNTS.read_text())


@pytest.fixture
def numbers() -> dict:
    """The recorded numbers, to be changed."""
    return copy.deepcopy(read(ROOT / "benchmarks/results/walkthrough", "parallel").numbers)


def test_the_counts_in_the_package_are_of_the_models_that_are_timed():
    for name, settings in parallel.models().items():
        assert COUNTS["models"][name] == parallel.described(settings)


def test_every_model_is_counted_on_every_device_at_every_length_with_as_many_tokens():
    for tokens in (parallel.TOKENS, 16_384):
        for device in parallel.DEVICES:
            for model in parallel.models():
                for length in (64, 128, 256, 512, 1_024, 2_048):
                    row = parallel.counted({"counts": COUNTS}, device, model, length, tokens)
                    assert row["batch"] * length == tokens
                    assert 0 < row["inside"] <= row["cycles"] and row["operations"] > 0
    assert {"jax", "libtpu", "jax-cuda13-plugin"} <= set(COUNTS["versions"])


def test_operations_without_an_estimate_are_few_but_for_copies_and_numbers():
    """Of fusions, few and outside of loops: as many at every length, so they are not what grows."""
    for row in COUNTS["rows"]:
        assert not set(row["without"]) & {"dot", "convolution", "custom-call", "while"}
        assert row["without"].get("fusion", 0) <= 10 or "blocks" in row["model"]


def test_the_recorded_numbers_hold_these_counts(numbers):
    assert numbers["counts"] == COUNTS


def test_counts_of_other_models_decide_nothing(numbers):
    assert verdict(parallel.check(numbers)) != "undecided"
    for name, value in (("width", 96), ("num_layers", 3), ("parameters", 1), ("implementation", "blockwise")):
        changed = copy.deepcopy(numbers)
        changed["counts"]["models"]["Transformer"][name] = value
        assert verdict(parallel.check(changed)) == "undecided", name
    del numbers["counts"]["models"]["LSTM"]
    assert verdict(parallel.check(numbers)) == "undecided"


def test_seconds_are_a_check_only_on_an_accelerator(numbers):
    on_cpu, on_gpu = (parallel.check(numbers | {"backend": backend}) for backend in ("cpu", "gpu"))
    assert not any("time" in check.says for check in on_cpu)
    (added,) = on_gpu[len(on_cpu) :]
    assert "time of a training step" in added.says and added.least == 1.5
    numbers["backend"] = "gpu"
    numbers["rows"][-1]["seconds"] = {"LSTM": 3.0, "Transformer": 2.0}
    assert parallel.check(numbers)[-1].measured == 1.5


@pytest.mark.parametrize("device", parallel.DEVICES)
@pytest.mark.parametrize(
    ("model", "name", "what"),
    [
        ("LSTM", "operations", "growth over that of T, LSTM"),
        ("Transformer", "operations", "growth over that of T, Transformer"),
        ("LSTM", "inside", "cycles inside"),
    ],
)
def test_the_checks_follow_the_counts(numbers, device, model, name, what):
    """Each check fails if the count that it is about is another one."""
    words = parallel.DEVICES[device]
    row = parallel.counted(numbers, device, model, 512 if name == "inside" else 2_048)
    row[name] = 1 if model == "LSTM" else 10**9
    (found,) = [check for check in parallel.check(numbers) if check.says.startswith(words) and what in check.says]
    assert not found.holds()


def test_the_figure_and_the_tables_say_what_is_a_count(numbers):
    axes = parallel.draw(numbers).axes
    assert [ax.get_ylabel() for ax in axes] == [
        "matrix products in series", "operations in series", "estimated cycles, millions", "time of a step, ms",
    ]  # fmt: skip
    assert all("count" in ax.get_title("left") + ax.get_title() for ax in axes[1:3])
    assert all(ax.get_xlabel() == "length T, symbols" for ax in axes)
    _, *counts = parallel.tables(numbers)
    assert len(counts) == len(parallel.DEVICES)
    for table in counts:
        assert "counted and not timed" in table.caption and f"jax {COUNTS['versions']['jax']}" in table.caption
        assert "Transformer in blocks" in {row[2] for row in table.rows}


def test_the_document_shows_the_counts():
    text = (ROOT / "docs/walkthrough.md").read_text()

    def cells(device, length, tokens):
        lstm, transformer = (parallel.counted({"counts": COUNTS}, device, name, length, tokens)
                             for name in ("LSTM", "Transformer"))  # fmt: skip
        operations = f"{lstm['operations']:,} : {transformer['operations']:,}"
        cycles = [each["inside"] / 1e6 for each in (lstm, transformer)]
        return [operations, f"{cycles[0]:.2f} : {cycles[1]:.2f} = {cycles[0] / cycles[1]:.2f}"]

    for length in (64, 128, 256, 512, 1_024, 2_048):
        row = [cell for device in parallel.DEVICES for cell in cells(device, length, parallel.TOKENS)]
        assert f"| {length:,} | {' | '.join(row)} |" in text
    for length in (64, 512, 2_048):
        row = [cells(device, length, 16_384)[1] for device in parallel.DEVICES]
        assert f"| {length:,} | {' | '.join(row)} |" in text
    blocks = [
        parallel.counted({"counts": COUNTS}, device, "Transformer in blocks", 2_048) for device in parallel.DEVICES
    ]
    for row in blocks:
        assert f"{row['operations']:,}" in text
    assert f"({COUNTS['start']['v5e-1']:,.0f} on a v5e)" in text
