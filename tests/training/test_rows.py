"""The metrics of a run: both files hold the same rows, each once; damaged rows are named."""

import json

import pytest
from event_rows import in_float32, rows_of_events

from attn.training.folders import Folder, RunError
from attn.training.rows import RowFiles, read

ROWS = [{"step": 10 * k, "loss": 1 / k, "learning_rate": 0.1 * k} for k in range(1, 6)]


def write(folder, rows, last=0):
    files = RowFiles(folder, last)
    for row in rows:
        files.write(row)
    return files


def same_in_both(folder) -> list[dict]:
    rows = read(folder.metrics)
    assert rows_of_events(folder.path) == in_float32(rows)
    return rows


def test_every_row_is_in_both_files_at_once(tmp_path):
    folder = Folder(tmp_path)
    files = RowFiles(folder, 0)
    for count, row in enumerate(ROWS, start=1):
        files.write(row)
        assert same_in_both(folder) == ROWS[:count]
    files.close()


@pytest.mark.parametrize("last", [0, 20, 50])
def test_a_resumed_run_has_each_row_once(tmp_path, last):
    folder = Folder(tmp_path)
    write(folder, ROWS)  # and is killed
    rest = [row | {"loss": 7.0} for row in ROWS if row["step"] > last]
    write(folder, rest, last)
    assert same_in_both(folder) == [row for row in ROWS if row["step"] <= last] + rest
    assert len(list(tmp_path.glob("events.*"))) == 1


def test_what_a_kill_leaves_out_of_either_file_is_mended(tmp_path):
    folder = Folder(tmp_path)
    write(folder, ROWS).close()
    (events,) = tmp_path.glob("events.*")
    for damaged in (events.read_bytes()[:-40], b""):  # its last rows, or all
        events.write_bytes(damaged)
        with folder.metrics.open("a") as file:
            file.write('{"step": 60, "lo')
        events.with_name("events.out.tfevents.1.before").write_bytes(damaged)  # killed while it was replaced
        RowFiles(folder, 50).close()
        assert same_in_both(folder) == ROWS
        (events,) = tmp_path.glob("events.*")


DAMAGED = [
    '{"step": 30, "loss": 1' + "0" * 400 + "}",
    "[" * 100_000,
    '{"step": true, "loss": 1.0}',
    '{"step": 30}',
    "",
    "{",
    "3",
    "[]",
    "null",
    "{}",
]
DAMAGED += ['{"step": "x"}', '{"step": 40, "loss": "low"}', '{"step": 40, "loss": NaN}']


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_row_is_named(tmp_path, line):
    folder = Folder(tmp_path)
    texts = [json.dumps(row) for row in ROWS]
    folder.metrics.write_text("\n".join([*texts[:3], line, *texts[4:]]) + "\n")
    before = folder.metrics.read_bytes()
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 4 is damaged; remove the file"):
        RowFiles(folder, 50)
    assert folder.metrics.read_bytes() == before


def test_rows_out_of_order_and_bytes_are_damage(tmp_path):
    folder = Folder(tmp_path)
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[0], ROWS[0])))
    with pytest.raises(RunError, match="line 2"):
        read(folder.metrics)
    folder.metrics.write_bytes(b"\xff\xfe{\n")
    with pytest.raises(RunError, match="not a text file"):
        read(folder.metrics)
