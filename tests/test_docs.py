"""The pages of docs are run, block after block, as a reader would."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from vitprune_fast import ops
from vitprune_fast.cli.main import main
from vitprune_fast.config.run import RunConfig
from vitprune_fast.config.yamlfile import from_plain
from vitprune_fast.recipes.by_name import named

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {
    "architecture.md": 0,
    "choose-what-goes.md": 3,
    "data-sets.md": 0,
    "feed-the-device.md": 0,
    "learn-gates.md": 4,
    "make-up-for-what-goes.md": 3,
    "many-processes.md": 0,
    "search-ratios.md": 3,
    "score-with-torch-pruning.md": 3,
    "teach-what-is-left.md": 4,
    "score-a-hugging-face-vit.md": 3,
    "score-a-torchvision-vit.md": 2,
    "score-for-torch-nn-prune.md": 2,
    "use-the-ops-alone.md": 4,
    "use-the-result.md": 8,
    **{
        f"recipes/{name}.md": 0
        for name in (
            *("README", "auto-ratio", "fast", "kd-cnn", "manifold", "unified", "width-depth"),
        )
    },
}


# what a reader sees: scores that are not 0, gates that closed, ratios above 0
SHOWS = {
    "learn-gates.md": r"'head': \(6, 9\), 'neuron': \(1152, 2304\)\}\n5\d% of the multiply",
    "score-a-torchvision-vit.md": r"tensor\(\[ *[1-9]",
    "score-for-torch-nn-prune.md": r"^[1-9]\d* neurons of the first block are silent",
    "search-ratios.md": r"chosen +\d+\.\d% +[1-9]\d\.\d%",
}


def blocks(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
    assert all(language in ("python", "bash") for language, _ in found), "every block must be run"
    return [code for language, code in found if language == "python"]


def commands() -> list[str]:
    """Those of the pages of recipes, which take a data set to run."""
    found = []
    for page in (DOCS / "recipes").glob("*.md"):
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            lines = [line.partition("#")[0].strip() for line in block.splitlines()]
            found += [line for line in lines if "vitprune" in line]
    return sorted({*found})


@pytest.mark.parametrize("command", commands())
def test_commands_of_recipes_are_accepted(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)[1:]
    if "vitprune_fast.cli.main" in words:
        words = words[words.index("vitprune_fast.cli.main") + 1 :]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--print-config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    recipe = words[words.index("--recipe") + 1] if "--recipe" in words else "fast"
    config = from_plain(printed, RunConfig())
    assert config.recipe == recipe and named(recipe).steps(config)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_as_written(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
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
    assert re.search(SHOWS.get(page, ""), capsys.readouterr().out)


def test_every_op_that_is_named_exists() -> None:
    text = (DOCS / "use-the-ops-alone.md").read_text(encoding="utf-8")
    named = {*re.findall(r"\b(scored_\w+|gated_\w+|taylor_score|backends)\b", text)}
    assert len(named) == 6 and not named - {*ops.__all__}


# what is run by tests/test_readme.py is held to the same form
@pytest.mark.parametrize("page", [*PAGES, "the-command-line.md", "measure-on-a-gpu.md"])
def test_links_and_lines(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https:)([^)#]+)\)", text):
        assert ((DOCS / page).parent / target).exists(), target
    assert not [line for line in text.splitlines() if len(line) > 105 and "|" not in line]
