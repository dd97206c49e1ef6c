"""The README.md of a saved model says what holds of it, and is nobody else's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import vitprune_fast as vp
from vitprune_fast import files
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.errors import InvalidInput
from vitprune_fast.models.open import open_model
from vitprune_fast.saved_models import replace_card
from vitprune_fast.testing import random_vit

PIXELS = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.9}


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def tables(text: str) -> list[list[list[str]]]:
    """Every table, as lines of cells without the rule below the head."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    return [
        [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()]
        for table in found
    ]


def number(text: str) -> float:
    value = float(text.replace(",", "").rstrip("%"))
    return value / 100 if text.endswith("%") else value


def figures(text: str) -> dict[str, dict[str, float]]:
    """Column -> row -> number."""
    head, _, *rows = tables(text)[0]
    return {
        column: {row[0]: number(row[at]) for row in rows if row[at]}
        for at, column in enumerate(head)
        if at
    }


def front_of(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def cut() -> Any:
    model = random_vit(dtype=torch.float32)
    kept = {"blocks.0.attn.heads": [0], "blocks.2.mlp.neurons": [3, 4]}
    return vp.prune(model, vp.Plan.of(vp.describe(model), kept, ["blocks.1.attn"]))


def test_the_numbers_are_those_of_the_model(tmp_path: Path) -> None:
    small = cut()
    vp.save(small, tmp_path)
    cost, text = vp.cost(small), text_of(tmp_path)
    weights = (tmp_path / "model.safetensors").stat().st_size
    assert figures(text) == {
        "this model": {
            "parameters": cost.params,
            "MACs per image": cost.macs,
            "bytes of weights": weights,
        }
    }
    assert tables(text)[1] == [
        ["block", "heads", "q/k dims", "v dims", "neurons"],
        ["---"] * 5,
        ["blocks.0", "1", "8", "8", "96"],
        ["blocks.1", "gone", "gone", "gone", "96"],
        ["blocks.2", "3", "8", "8", "2"],
    ]
    assert "Weights come from: not recorded. License: not recorded." in text
    assert "mean and std not recorded" in text


def test_what_is_known_of_before_and_after_stands_side_by_side(tmp_path: Path) -> None:
    small = cut()
    small.pretrained_cfg = PIXELS
    results = {
        "before": {"params": 1234567, "top1": 0.8123, "latency_ms": 1.5, "images_per_s": 1000.25},
        "after": {"top1": 0.79, "latency_ms": 0.75},
    }
    vp.save(small, tmp_path, results)
    found = figures(text_of(tmp_path))
    assert found["before"] == {
        "parameters": 1234567,
        "top-1": 0.8123,
        "latency of one image, ms": 1.5,
        "images per second in batches of 64": 1000.2,
    }
    assert found["after"]["parameters"] == vp.cost(small).params
    assert found["after"]["top-1"] == 0.79
    assert "mean `0.1, 0.2, 0.3`, std `0.4, 0.5, 0.6`, crop_pct `0.9`" in text_of(tmp_path)
    # the same model, the same bits
    one = (tmp_path / "README.md").read_bytes(), (tmp_path / "manifest.json").read_bytes()
    vp.save(small, tmp_path, results)
    assert one == ((tmp_path / "README.md").read_bytes(), (tmp_path / "manifest.json").read_bytes())


@pytest.mark.parametrize("wrong", [{"accuracy": 1.0}, {"top1": float("nan")}, {"top1": "good"}])
def test_other_figures_are_refused_before_anything_is_written(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"^save: results must hold finite numbers of params"):
        vp.save(cut(), tmp_path / "model", {"after": wrong})
    assert not (tmp_path / "model").exists()


def test_a_card_may_be_written_again_and_the_folder_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = cut()
    vp.save(small, tmp_path)
    states, write = [], files.write_bytes

    def watched(path: Any, data: bytes) -> None:
        write(path, data)
        # whoever is stopped here leaves this behind
        states.append(files.check_manifest(tmp_path))

    monkeypatch.setattr(files, "write_bytes", watched)
    replace_card(small, tmp_path, {"before": {"top1": 0.5}, "after": {"top1": 0.25}})
    assert len(states) == 3 and "README.md" in states[-1]
    assert figures(text_of(tmp_path))["after"]["top-1"] == 0.25
    assert vp.load(tmp_path)


# where a model comes from


def test_the_source_of_weights_is_told_by_those_that_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    create = timm.create_model
    # the weights themselves would have to be fetched
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **args: create(name, **args))
    small = {"depth": 1, "embed_dim": 24, "num_heads": 3}
    name = "vit_tiny_patch16_224"
    for pretrained in (True, False):
        model = open_model(ModelConfig(name, args=small, pretrained=pretrained))
        vp.save(model, tmp_path / "first")
        # pruned, saved and opened again
        again = vp.load(tmp_path / "first")
        plan = vp.Plan.of(vp.describe(again), {"blocks.0.attn.heads": [0]})
        vp.save(vp.prune(again, plan), tmp_path / "second")
        for folder in (tmp_path / "first", tmp_path / "second"):
            front, text = front_of(text_of(folder)), text_of(folder)
            if pretrained:
                assert front["base_model"].startswith(f"timm/{name}.")
                assert front["license"] == "apache-2.0"
                assert f"come from: `{front['base_model']}`. License: apache-2.0." in text
            else:
                assert "base_model" not in front and "license" not in front
                assert "come from: random." in text
            assert f"Architecture: `{name}` (`VisionTransformer` of timm)" in text


def test_libraries_that_open_a_folder_alone_are_named(tmp_path: Path) -> None:
    dense = random_vit(dtype=torch.float32)
    for model, library, opened in (
        (dense, "timm", "timm.create_model("),
        (cut(), "vitprune_fast", "from modeling_pruned import load"),
    ):
        vp.save(model, tmp_path)
        assert front_of(text_of(tmp_path))["library_name"] == library
        assert opened in text_of(tmp_path)


def test_what_transformers_loaded_is_named_but_no_folder_is(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from integrations.huggingface import model_of

    model = model_of("vit", torch.float32)
    for name, base in (("google/vit-small", "google/vit-small"), (str(tmp_path), None)):
        model.config._name_or_path = model.name_or_path = name
        vp.save(model, tmp_path / "hf")
        front = front_of(text_of(tmp_path / "hf"))
        assert front["library_name"] == "transformers" and front.get("base_model") == base
        for file in ("README.md", "config.json"):
            assert str(tmp_path) not in (tmp_path / "hf" / file).read_text()
    model.config._name_or_path = "google/vit-small"
    vp.save(model, tmp_path / "hf")
    vp.save(vp.load(tmp_path / "hf"), tmp_path / "again")
    assert front_of(text_of(tmp_path / "again"))["base_model"] == "google/vit-small"


def test_a_backbone_is_no_classifier(tmp_path: Path) -> None:
    for name, classes, task in (("a", 0, "feature-extraction"), ("b", 5, "classification")):
        vp.save(random_vit(num_classes=classes), tmp_path / name)
        front = front_of(text_of(tmp_path / name))
        assert front["pipeline_tag"] == front["tags"][0] == f"image-{task}"


def test_texts_of_strangers_stay_texts(tmp_path: Path) -> None:
    model = cut()
    evil = "x\n---\n# No | `model` <script> [link](https://example.org)"
    model.pretrained_cfg = {"architecture": evil, "interpolation": evil, **PIXELS}
    model.derived_from = {"weights": evil, "license": evil}
    model.caveats = {"pixels": evil}
    vp.save(model, tmp_path)
    text = text_of(tmp_path)
    assert "<script>" not in text and "](https" not in text and "\n# No" not in text
    assert [*front_of(text)] == ["library_name", "pipeline_tag", "tags"]


# whose it is


def test_a_readme_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    vp.save(cut(), tmp_path)
    assert text_of(tmp_path) == "mine"
    replace_card(cut(), tmp_path, {})
    assert "README.md" not in files.check_manifest(tmp_path)
    assert text_of(tmp_path) == "mine" and vp.load(tmp_path)


def test_a_card_may_be_changed_and_stays_when_the_model_is_saved_again(tmp_path: Path) -> None:
    small = cut()
    vp.save(small, tmp_path)
    (tmp_path / "README.md").write_text(text_of(tmp_path) + "my notes\n")
    assert vp.load(tmp_path)
    vp.save(small, tmp_path)
    assert text_of(tmp_path).endswith("my notes\n") and vp.load(tmp_path)


def test_folders_of_before_there_were_cards_open(tmp_path: Path) -> None:
    vp.save(cut(), tmp_path)
    (tmp_path / "README.md").unlink()
    files.write_manifest(tmp_path, ["config.json", "model.safetensors", "modeling_pruned.py"])
    assert vp.load(tmp_path)


@pytest.mark.parametrize("wrong", [[1], {"now": 3}, {"now": {"top1": True}}])
def test_results_of_another_form_are_refused(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"^save: results must"):
        vp.save(random_vit(depth=1), tmp_path / "out", results=wrong)
    assert not (tmp_path / "out").exists()
