"""What error messages begin with: something that a user can have typed."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import vitprune_fast as vp
from vitprune_fast import errors
from vitprune_fast.cli.main import VERBS

ROOT = Path(vp.__file__).parent
KINDS = {name for name, kind in vars(errors).items() if inspect.isclass(kind)}
# rooms whose names Python users import besides the public ones, by what they are documented with
ROOMS = ("gates", "ops", "data", "distill", "distill.masks", "distill.teachers", "data.augment")
INTEGRATIONS = ("integrations.nn_prune", "integrations.torch_pruning", "distill.hidden_states")
# besides our own: what is typed in timm to open a folder
WORDS = {
    *(*VERBS, "data", "model", "config", "sweep", "integrations", "vitprune-fast"),
    "create_model",
}


def heads() -> Iterator[tuple[str, str]]:
    """Where an error of ours is made, and the fixed text before its first colon."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            text = node.args[0] if node.func.id in KINDS else None
            if isinstance(text, ast.JoinedStr):
                text = text.values[0]
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                head, colon, _ = text.value.partition(": ")
                if colon and " " not in head:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", head


def test_errors_begin_with_a_verb_an_option_or_a_public_name() -> None:
    rooms = [vp, *(import_module(f"vitprune_fast.{room}") for room in (*ROOMS, *INTEGRATIONS))]
    found = dict(heads())
    assert len(found) > 300
    unknown = {
        place: head
        for place, head in found.items()
        if (name := head.partition(".")[0]) not in WORDS
        and not any(hasattr(room, name) for room in rooms)
    }
    assert not unknown
