"""Imports form a tree that flows one way, as docs/architecture.md draws it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "vitprune_fast"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
# what every room may import
GROUND = (
    *("errors", "_version", "_toolkit", "_host", "_extension", "wide", "_checks", "randomness"),
    *(
        "_when_imported",
        "stated",
        "bare",
        "registry",
        "hardware",
        "files",
        "sealed",
        "transfer",
        "precision",
        "ranks",
    ),
    *("batches", "target_loss", "timing", "config"),
)
# the flow: a room imports rooms that stand before it, and none that stands after it
ORDER = (
    *GROUND,
    *("modules", "reference", "kernels", "ops", "modeling_pruned", "structure", "model_card"),
    *("saved_models", "models", "evaluation", "data", "scoring", "planning", "surgery", "check"),
    *("testing", "search", "gates", "export", "integrations", "distill", "run", "recipes"),
    *("doctor", "benches"),
    *("vitprune_fast", "cli", "__main__"),
)


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; what is compiled counts as well."""
    found = {}
    for folder, name in ((PACKAGE, PACKAGE), ("kernels", f"{PACKAGE}.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py*")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if path.suffix in (".py", ".pyi") and (folder != PACKAGE or parts[0] != "kernels"):
                found[".".join((name, *parts)).removesuffix(".__init__")] = path
    return found


def imports(source: str, package: str, known: set[str]) -> set[str]:
    """The modules among ``known`` that a source imports, anywhere in it.

    Inside functions and for type checkers counts too. A name taken from a package is the module of
    that name where there is one, and else something that the package itself holds.

    Args:
        source: Python code.
        package: that relative imports start from.
        known: dotted names.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -(node.level - 1) or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in known else base for name in names}
    return found & known


def graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    paths = modules()
    return {
        name: imports(
            path.read_text(encoding="utf-8"),
            name if path.stem == "__init__" else name.rpartition(".")[0],
            {*paths} - {name},
        )
        for name, path in paths.items()
    }


def room(module: str) -> str:
    """The folder or single file right below the package that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def crossings() -> Iterator[tuple[str, str]]:
    """Every import of a module of another room: who, and what."""
    for module, imported in graph().items():
        yield from ((module, other) for other in imported if room(other) != room(module))


def test_no_circle_between_files() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_imports_between_rooms_run_one_way() -> None:
    place = {name: number for number, name in enumerate(ORDER)}
    against = [f"{a} -> {b}" for a, b in crossings() if place[room(b)] > place[room(a)]]
    assert not against


def test_the_page_draws_the_flow_that_stands() -> None:
    rows = re.findall(r"^\| `(\w+)\S*` \|.*\|([^|]*)\|$", PAGE, re.MULTILINE)
    assert tuple(name for name, _ in rows) == ORDER
    assert {room(module) for module in modules()} == {*ORDER}
    may = {
        name: {*ORDER} if "all above" in allowed else {*GROUND, *re.findall(r"`(\w+)`", allowed)}
        for name, allowed in rows
    }
    assert not [f"{a} -> {b}" for a, b in crossings() if room(b) not in may[room(a)]]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import p.a.one", "p.a.one"),
        ("import p", "p"),
        ("from p import a", "p.a"),
        ("from p import prune", "p"),
        ("from p.a import two", "p.a"),
        ("from p.a.one import two", "p.a.one"),
        ("from . import one", "p.a.one"),
        ("from .one import two", "p.a.one"),
        ("from .. import b", "p.b"),
        ("from ..b import two", "p.b"),
        ("def late():\n    from p.b import two", "p.b"),
        ("if TYPE_CHECKING:\n    from ..b import Two", "p.b"),
        ("import torch\nfrom torch import a", None),
    ],
)
def test_an_import_is_found_however_it_is_written(source: str, found: str | None) -> None:
    known = {"p", "p.a", "p.a.one", "p.b"}
    assert imports(source, "p.a", known) == ({found} if found else set())
