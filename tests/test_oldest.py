"""The lane of the oldest versions: what it installs, and with which interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import oldest as lane
from tests.declared import PROJECT, oldest

HERE = "{}.{}".format(*sys.version_info[:2])


def test_a_lower_bound_is_the_version_to_install() -> None:
    listed = ["b", "a>=1.2", "c>=3; python_version < '3.11'", "d==4", "b>=2", "a"]
    assert oldest(listed) == ["a==1.2", "b==2", 'c==3; python_version < "3.11"', "d==4"]
    pins = oldest(PROJECT["dependencies"])
    assert {"torch==2.11", "timm==1.0.23"} <= {*pins}


def program(path: Path, says: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {says}\n")
    path.chmod(0o755)
    return path


def test_the_interpreter_is_looked_for_on_the_path_and_at_pyenv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHON_OLDEST", raising=False)
    monkeypatch.setattr(lane, "oldest_python", lambda: "3.1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    with pytest.raises(SystemExit, match=r"PYTHON_OLDEST must be a Python 3\.1, got none; install"):
        lane.interpreter()
    # as pyenv's, where another version is chosen
    program(tmp_path / "bin" / "python3.1", "")
    with pytest.raises(SystemExit, match=r"got .*python3\.1 \(does not run\)"):
        lane.interpreter()
    found = program(tmp_path / "pyenv" / "versions" / "3.1.4" / "bin" / "python3.1", "3.1")
    assert lane.interpreter() == found
    monkeypatch.setenv("PYTHON_OLDEST", sys.executable)
    with pytest.raises(SystemExit, match=rf"must be a Python 3\.1, got .*\({HERE}\)"):
        lane.interpreter()
    monkeypatch.setenv("PYTHON_OLDEST", str(tmp_path / "none"))
    with pytest.raises(SystemExit, match=r"got .*none \(No such file or directory\)"):
        lane.interpreter()
    monkeypatch.setenv("PYTHON_OLDEST", str(found))
    assert lane.interpreter() == found


def test_the_copy_has_everything_but_what_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    for name in ("vitprune_fast/a.py", "vitprune_fast/_C.abi3.so", "runs/x", ".venv/y", "setup.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    monkeypatch.setattr(lane, "ROOT", root)
    monkeypatch.setattr(lane, "COPY", root / "build" / "oldest")
    kept = root / "build" / "oldest" / "build" / "a.o"
    stale = root / "build" / "oldest" / "vitprune_fast" / "gone.py"
    for path in (kept, stale):
        path.parent.mkdir(parents=True)
        path.write_text("")
    lane.copy_repository()
    copied = root / "build" / "oldest"
    files = {str(path.relative_to(copied)) for path in copied.rglob("*") if path.is_file()}
    assert files == {"vitprune_fast/a.py", "setup.py", "build/a.o"}
