"""The number of cores: affinity and a container's quota."""

import os

import pytest

from attn.functional import cpu
from attn.training import meshes


@pytest.mark.parametrize(
    "quota, expected",
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1), ("1600000 100000", 8)],
)
def test_cores_respect_a_quota(monkeypatch, tmp_path, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    file = tmp_path / "cpu.max"
    file.write_text(quota + "\n")
    assert cpu.cores(file) == expected


def test_cores_without_a_quota_are_those_of_the_affinity(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6}, raising=False)
    assert cpu.cores(tmp_path / "missing") == 3


def test_training_counts_cores_in_the_same_way():
    assert meshes.cores is cpu.cores
