"""Cores and threads: affinity, quotas of cgroups as containers show them, OMP_NUM_THREADS."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vitprune_fast.errors import InvalidInput
from vitprune_fast.run.cores import available_cores, default_threads, workers_for_a_gpu
from vitprune_fast.run.profile import applied, choose_profile


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def machine(root: Path, memberships: str, **limits: str) -> Path:
    """A fake root; a limit is named after its folder below /sys/fs/cgroup, `_` for its top."""
    own = root / "proc" / "self"
    own.mkdir(parents=True)
    (own / "cgroup").write_text(memberships + "\n")
    for folder, limit in limits.items():
        place = root / "sys/fs/cgroup" / folder.strip("_")
        place.mkdir(parents=True, exist_ok=True)
        quota, _, period = limit.partition(" ")
        if "cpuacct" in folder:
            (place / "cpu.cfs_quota_us").write_text(quota + "\n")
            (place / "cpu.cfs_period_us").write_text(period + "\n")
        else:
            (place / "cpu.max").write_text(limit + "\n")
    return root


@pytest.mark.parametrize(
    ("limit", "found"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("299999 100000", 2),
        ("6400000 100000", 8),
        ("20000 10000", 2),
        # what is no limit is none
        ("", 8),
        ("many 100000", 8),
        ("200000 0", 8),
        ("0 100000", 8),
    ],
)
def test_quota_of_the_own_cgroup(tmp_path: Path, limit: str, found: int) -> None:
    root = machine(tmp_path, "0::/job", job=limit)
    assert available_cores(root) == found


def test_the_smallest_of_nested_quotas_limits(tmp_path: Path) -> None:
    limits = {"a": "300000 100000", "a/b": "max 100000", "a/b/c": "500000 100000"}
    # siblings and children do not matter
    limits |= {"a/other": "100000 100000", "a/b/c/child": "100000 100000"}
    assert available_cores(machine(tmp_path, "0::/a/b/c", **limits)) == 3


def test_a_container_sees_its_own_cgroup_as_the_top(tmp_path: Path) -> None:
    assert available_cores(machine(tmp_path, "0::/", _="400000 100000")) == 4


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_that_is_told_the_path_of_the_host(tmp_path: Path, version: int) -> None:
    """Without a namespace of cgroups: its cgroup is mounted, its path is the one outside."""
    if version == 2:
        root = machine(tmp_path, "0::/docker/abc", _="200000 100000")
    else:
        member = "4:cpu,cpuacct:/docker/abc\n0::/docker/abc"
        root = machine(tmp_path, member, **{"cpu,cpuacct": "200000 100000"})
    assert available_cores(root) == 2


def test_a_path_outside_of_what_is_mounted_falls_back_to_its_top(tmp_path: Path) -> None:
    assert available_cores(machine(tmp_path, "0::/../else", _="300000 100000")) == 3


def test_quotas_of_version_1(tmp_path: Path) -> None:
    limits = {
        "cpu,cpuacct": "-1 100000",
        "cpu,cpuacct/a": "350000 100000",
        "cpu,cpuacct/a/b": "-1 100000",
    }
    root = machine(tmp_path, "5:memory:/elsewhere\n4:cpu,cpuacct:/a/b\n0::/a", **limits)
    assert available_cores(root) == 3


@pytest.mark.parametrize("gone", ["proc/self/cgroup", "sys/fs/cgroup/cpu.max"])
def test_without_these_files_the_affinity_counts(tmp_path: Path, gone: str) -> None:
    root = machine(tmp_path, "0::/", _="200000 100000")
    assert available_cores(root) == 2
    (root / gone).unlink()
    assert available_cores(root) == 8


def test_strange_lines_are_passed_over(tmp_path: Path) -> None:
    root = machine(tmp_path, "nothing\n0::/", _="200000 100000")
    assert available_cores(root) == 2
    (root / "proc/self/cgroup").write_bytes(b"\xff")
    assert available_cores(root) == 8


def test_affinity_is_not_exceeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machine(tmp_path, "0::/", _="400000 100000")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert available_cores(root) == 1


def test_systems_without_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert available_cores(tmp_path) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cores(tmp_path) == 1


@pytest.mark.parametrize(
    ("words", "threads"), [("3", 3), ("4,2", 4), (" 5 , 1", 5), ("16", 16), ("", 8), ("  ", 8)]
)
def test_threads_are_what_openmp_is_told(tmp_path: Path, words: str, threads: int) -> None:
    assert default_threads({"OMP_NUM_THREADS": words}, tmp_path) == threads


def test_threads_are_the_cores_without_the_variable(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/job", job="250000 100000")
    assert default_threads({}, root) == 2
    assert default_threads({"OMP_NUM_THREADS": "6"}, root) == 6


@pytest.mark.parametrize("words", ["0", "-2", "two", "1.5", "0,4", ",4", "²"])
def test_an_unusable_variable_is_refused(tmp_path: Path, words: str) -> None:
    with pytest.raises(InvalidInput, match=f"at least 1, got '{words}'; unset it, or give"):
        default_threads({"OMP_NUM_THREADS": words}, tmp_path)


def test_what_is_given_wins_over_the_variable_and_that_over_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert choose_profile("cpu", threads=5).threads == 5
    assert choose_profile("cpu").threads == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    # what is not needed is not judged
    assert choose_profile("cpu", threads=5).threads == 5
    with pytest.raises(InvalidInput, match="OMP_NUM_THREADS must be a number of threads"):
        choose_profile("cpu")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert choose_profile("cpu").threads == available_cores()
    with pytest.raises(InvalidInput, match="threads must be 1 to 1024, got 0"):
        choose_profile("cpu", threads=0)


def test_applied_sets_the_threads_and_puts_them_back() -> None:
    before = torch.get_num_threads()
    profile = choose_profile("cpu", threads=before + 1)
    with pytest.raises(KeyError), applied(profile):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("cores", "processes", "workers"),
    [(1, 1, 1), (16, 1, 15), (128, 8, 15), (128, 1, 16), (4, 8, 1)],
)
def test_processes_that_read_share_the_cores(cores: int, processes: int, workers: int) -> None:
    assert workers_for_a_gpu(cores, processes) == workers
