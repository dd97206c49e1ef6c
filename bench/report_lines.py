"""A plugin of pytest that adds a line of JSON for every test as it ends, the whole fault with it.

python -m pytest -p bench.report_lines --lines FILE ...
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import lines

# of a report of a fault, from its end: what was expected and what was there
LONGEST = 6000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", type=Path, required=True, help="add each test that ends to it")


def pytest_configure(config: pytest.Config) -> None:
    # workers send their reports to the process that started them
    if not hasattr(config, "workerinput"):
        path: Any = config.getoption("--lines")
        config.pluginmanager.register(Lines(path), "lines")


class Lines:
    """Adds lines to a file.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            finding = {
                "test": report.nodeid,
                "failed": report.failed,
                "seconds": round(report.duration, 2),
            }
            if report.failed:
                finding["fault"] = report.longreprtext[-LONGEST:]
            lines.append(self._path, "test", finding)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            finding = {"test": report.nodeid, "failed": True, "seconds": 0.0}
            lines.append(self._path, "test", {**finding, "fault": report.longreprtext[-LONGEST:]})
