"""No test is decided by a clock: on a busy machine everything takes longer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

TESTS = Path(__file__).parent
CLOCKS = {"perf_counter", "monotonic", "process_time", "thread_time", "time", "datetime.now"}


def decided_by_a_clock(source: str) -> Iterator[str]:
    """``line: what`` of each reading of a clock, and each limit shorter than that of every test."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            limits = [word.value for word in node.keywords if word.arg in ("timeout", "deadline")]
            if called.endswith("mark.timeout"):
                limits += node.args
            seconds = [each.value for each in limits if isinstance(each, ast.Constant)]
            short = any(isinstance(each, (int, float)) and each < 300 for each in seconds)
            if short or called.removeprefix("time.").removesuffix("_ns") in CLOCKS:
                yield f"{node.lineno}: {ast.unparse(node)}"


def test_no_test_reads_a_clock() -> None:
    # a process that does nothing but end, which takes milliseconds
    declared = {"run/attempts.py": 1}
    found = {}
    for path in TESTS.rglob("*.py"):
        lines = list(decided_by_a_clock(path.read_text(encoding="utf-8")))
        name = path.relative_to(TESTS).as_posix()
        if len(lines) != declared.get(name, 0):
            found[name] = lines
    assert not found


@pytest.mark.parametrize(
    "planted",
    [
        "start = time.perf_counter()",
        "assert monotonic() < start + 5",
        "assert time.time() - start < 1",
        "assert time_ns() - start < 1e9",
        "process.communicate(timeout=60)",
        "@settings(deadline=200)\ndef test(): pass",
        "@pytest.mark.timeout(5)\ndef test(): pass",
    ],
)
def test_a_planted_clock_is_found(planted: str) -> None:
    assert len(list(decided_by_a_clock(planted))) == 1
    assert not list(decided_by_a_clock("@pytest.mark.timeout(1200)\ndef test(): time.sleep(1)"))


def test_examples_have_no_deadline() -> None:
    assert hypothesis.settings().deadline is None
