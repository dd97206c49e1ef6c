"""A plugin of pytest: a line of JSON for every test as it ends, the whole fault with it.

python -m pytest -p bench.report_lines --lines FILE [--again FILE] ...

``--again`` leaves out the tests that passed in the run which wrote that file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bench import lines

# of a report of a fault, from its end: what was expected and what was there
LONGEST = 6000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", type=Path, required=True, help="add each test that ends to it")
    parser.addoption("--again", type=Path, help="lines of a run, whose passed tests are left out")


def pytest_configure(config: pytest.Config) -> None:
    path: Any = config.getoption("--lines")
    config.pluginmanager.register(Lines(path, is_worker=hasattr(config, "workerinput")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if path := config.getoption("--again"):
        passed = {
            line["test"]: not line["failed"]
            for line in lines.read(Path(path))
            if line["kind"] == "test"
        }
        items[:] = [item for item in items if not passed.get(item.nodeid)]


class Lines:
    """Adds lines to a file, and ends a process whose GPU a kernel broke.

    Args:
        path: of the file.
        is_worker: whether another process, which gets its reports, writes the lines.
        note: what tells these tests from others of the same name.
    """

    def __init__(self, path: Path, *, is_worker: bool = False, note: str = ""):
        self._path, self._is_worker, self._note = path, is_worker, note

    def _add(self, report: Any, seconds: float) -> None:
        if self._is_worker:
            return
        finding = {"test": report.nodeid + self._note, "failed": report.failed, "seconds": seconds}
        if report.failed:
            finding["fault"] = report.longreprtext[-LONGEST:]
        lines.append(self._path, "test", finding)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            self._add(report, round(report.duration, 2))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._add(report, 0.0)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self) -> None:
        """After an illegal access every call of this process fails, and says nothing more."""
        import torch

        if not torch.cuda.is_initialized():
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if self._is_worker:
                # another one takes its place, and the next tests are judged
                os._exit(1)
            pytest.exit(f"the GPU cannot be used any more: {error}", returncode=3)
