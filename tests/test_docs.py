"""The pages of docs are run, block after block, as a reader would."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from vitprune_fast import ops

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {
    "architecture.md": 0,
    "choose-what-goes.md": 3,
    "learn-gates.md": 4,
    "make-up-for-what-goes.md": 3,
    "recipes/auto-ratio.md": 0,
    "search-ratios.md": 3,
    "score-with-torch-pruning.md": 3,
    "teach-what-is-left.md": 4,
    "score-a-hugging-face-vit.md": 2,
    "score-a-torchvision-vit.md": 2,
    "score-for-torch-nn-prune.md": 2,
    "use-the-ops-alone.md": 4,
    "recipes/kd-cnn.md": 0,
}


def blocks(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
    assert all(language == "python" for language, _ in found), "every block must be run"
    return [code for _, code in found]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_as_written(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    codes = blocks(page)
    assert len(codes) == PAGES[page]
    names: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        # Torch-Pruning warns of parameters that belong to no layer, such as cls_token
        warnings.simplefilter("ignore", UserWarning)
        for number, code in enumerate(codes, 1):
            exec(compile(code, f"{page}, block {number}", "exec"), names)
    assert not list(tmp_path.iterdir())


def test_every_op_that_is_named_exists() -> None:
    text = (DOCS / "use-the-ops-alone.md").read_text(encoding="utf-8")
    named = {*re.findall(r"\b(scored_\w+|gated_\w+|taylor_score|backends)\b", text)}
    assert len(named) == 6 and not named - {*ops.__all__}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_lines(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https:)([^)#]+)\)", text):
        assert ((DOCS / page).parent / target).exists(), target
    assert not [line for line in text.splitlines() if len(line) > 105 and "|" not in line]
