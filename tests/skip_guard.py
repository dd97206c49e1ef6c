"""Skipped tests are compared with a declared set; the session fails on any difference.

Each line of declared_skips.txt is ``<condition> <path>::<test>``: the test is skipped exactly when
the condition (or one of several, ``a|b``) holds. A test that vanishes silently, or a skip that
nobody declared, is a failure.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DECLARED = HERE / "declared_skips.txt"


def conditions() -> dict[str, bool]:
    """Whether each condition a declared skip may name holds on this machine."""
    import torch

    from vitprune_fast._extension import OBSTACLE
    from vitprune_fast._toolkit import cuda_home

    return {
        "no-gpu": not torch.cuda.is_available(),
        "no-nvcc": cuda_home() is None,
        "no-cuda-sources": not any(HERE.parent.glob("csrc/cuda/*.cu")),
        "no-native": OBSTACLE is not None,
        "no-triton": importlib.util.find_spec("triton") is None,
        "no-tensorboard": importlib.util.find_spec("tensorboard") is None,
        "no-mount": os.geteuid() != 0 or not _succeeds("unshare", "--mount", "true"),
        "no-schedstat": not Path("/proc/self/schedstat").is_file(),
        "no-compiler": not any(shutil.which(name) for name in ("c++", "g++", "clang++")),
    }


def _succeeds(*command: str) -> bool:
    return bool(shutil.which(command[0])) and subprocess.run(command).returncode == 0


def read_declared(lines: Iterable[str]) -> dict[str, str]:
    """Map ``path::test`` to the condition under which it is skipped."""
    declared = {}
    for line in lines:
        if line.strip() and not line.startswith("#"):
            condition, test = line.split()
            declared[test] = condition
    return declared


def differences(
    skipped: set[str], ran: set[str], declared: dict[str, str], holds: dict[str, bool]
) -> list[str]:
    """One sentence for each test whose skipping differs from what was declared."""
    expected = {
        test
        for test, condition in declared.items()
        if any(holds[part] for part in condition.split("|"))
    }
    wrong = [f"skipped, but not declared: {test}" for test in sorted(skipped - expected)]
    wrong += [f"declared as skipped here, but ran: {test}" for test in sorted(expected & ran)]
    return wrong


class SkipGuard:
    """Collects what was skipped; under pytest-xdist the controller hears of every worker."""

    def __init__(self) -> None:
        self.skipped: set[str] = set()
        self.ran: set[str] = set()
        self.wrong: list[str] = []

    @staticmethod
    def _name(nodeid: str) -> str:
        return nodeid.partition("[")[0]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped.add(self._name(report.nodeid))
        elif report.when == "call":
            self.ran.add(self._name(report.nodeid))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.skipped.add(self._name(report.nodeid))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        declared = read_declared(DECLARED.read_text().splitlines())
        self.wrong = differences(self.skipped, self.ran, declared, conditions())
        if self.wrong and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.wrong:
            terminalreporter.section("skips that differ from tests/declared_skips.txt", red=True)
            for sentence in self.wrong:
                terminalreporter.write_line(sentence)


def is_controller(config: pytest.Config) -> bool:
    """False in a pytest-xdist worker."""
    return not hasattr(config, "workerinput") and "xdist.worker" not in sys.argv
