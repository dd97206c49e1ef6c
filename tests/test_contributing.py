"""The examples of CONTRIBUTING.md, put into a copy of the tree: they touch few files and work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# kind -> files it may touch: of the product, and all
ROWS = {
    match[1]: (int(match[2]), int(match[3]))
    for match in re.finditer(r"\(examples/(\w+)\)[^|]*\| (\d+) \| (\d+) \|", PAGE)
}
# what the issue that asked for them allows
MOST = {
    "family": (2, 3),
    "criterion": (1, 2),
    "op": (4, 6),
    "recipe": (1, 2),
    "loss": (2, 3),
    "allocation": (1, 2),
}


def applied(kind: str, tree: Path) -> list[str]:
    """Puts an example into a tree; the files that it touched."""
    example, touched = ROOT / "examples" / kind, []
    for path in sorted(p for p in example.rglob("*.py") if "__pycache__" not in p.parts):
        name = path.relative_to(example)
        assert not (tree / name).exists(), f"{name} is there already"
        shutil.copy(path, tree / name)
        touched.append(str(name))
    edits = example / "edits.yaml"
    for edit in yaml.safe_load(edits.read_text(encoding="utf-8")) if edits.exists() else []:
        path = tree / edit["file"]
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines.count(edit["after"]) == 1, edit
        lines.insert(lines.index(edit["after"]) + 1, edit["add"].rstrip("\n"))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        touched.append(edit["file"])
    return sorted({*touched})


def copied(tree: Path) -> None:
    """The package, its compiled parts, its tests and benches, without results."""
    leave = shutil.ignore_patterns("__pycache__", ".*", "results")
    for name in ("vitprune_fast", "tests", "kernels", "bench"):
        shutil.copytree(ROOT / name, tree / name, ignore=leave, symlinks=True)
    for name in ("pyproject.toml", "CONTRIBUTING.md", "setup.py"):
        shutil.copy(ROOT / name, tree / name)


def test_every_row_of_the_page_is_an_example() -> None:
    assert ROWS.keys() == MOST.keys()
    assert {p.name for p in (ROOT / "examples").iterdir() if p.is_dir()} == MOST.keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", MOST)
def test_an_extension_touches_few_files_and_works(kind: str, tmp_path: Path) -> None:
    copied(tmp_path)
    touched = applied(kind, tmp_path)
    product = [name for name in touched if not name.startswith("tests/")]
    assert (len(product), len(touched)) == ROWS[kind]
    assert ROWS[kind] <= MOST[kind] and len(touched) <= MOST[kind][1]
    tests = [name for name in touched if Path(name).name.startswith("test_")]
    if kind == "op":
        tests = ["tests/ops/test_contract.py", "-k", "turn"]
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*words, *tests],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    # the copy was tested, and not what is installed
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout
