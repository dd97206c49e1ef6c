"""The guard itself: an undeclared skip, or a declared one that runs, fails a session."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from skip_guard import DECLARED, conditions, differences, read_declared

HERE = Path(__file__).parent


def test_differences_go_both_ways():
    declared = {"a.py::one": "no-native|no-gpu", "a.py::two": "no-nvcc"}
    holds = {"no-gpu": True, "no-nvcc": False, "no-native": False}
    assert differences({"a.py::one"}, {"a.py::two"}, declared, holds) == []
    assert differences(set(), set(), declared, holds) == []
    (sentence,) = differences({"a.py::one", "a.py::three"}, set(), declared, holds)
    assert sentence == "skipped, but not declared: a.py::three"
    (sentence,) = differences({"a.py::two"}, set(), declared, holds)
    assert sentence == "skipped, but not declared: a.py::two"
    (sentence,) = differences(set(), {"a.py::one"}, declared, holds)
    assert sentence == "declared as skipped here, but ran: a.py::one"


def test_every_declared_skip_names_a_test_and_a_condition():
    known = conditions()
    for test, condition in read_declared(DECLARED.read_text().splitlines()).items():
        path, _, name = test.partition("::")
        assert f"def {name}(" in (HERE.parent / path).read_text(), test
        assert set(condition.split("|")) <= set(known), condition


CONFTEST = """
from skip_guard import SkipGuard, is_controller

def pytest_configure(config):
    if is_controller(config):
        config.pluginmanager.register(SkipGuard())
"""


@pytest.mark.parametrize(
    ("body", "workers"),
    [
        pytest.param("pytest.skip('why not')", [], id="skip"),
        pytest.param("pytest.skip('why not')", ["-n", "1"], id="skip-under-xdist"),
        pytest.param("assert True", [], id="pass"),
    ],
)
def test_undeclared_skip_fails_the_session(tmp_path, body, workers):
    shutil.copy(HERE / "skip_guard.py", tmp_path)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "declared_skips.txt").write_text("# nothing is declared\n")
    (tmp_path / "test_one.py").write_text(f"import pytest\n\ndef test_one():\n    {body}\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", *workers, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    skips = "skip" in body
    assert result.returncode == (1 if skips else 0), result.stdout
    assert ("skipped, but not declared: test_one.py::test_one" in result.stdout) == skips
