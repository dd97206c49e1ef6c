"""Saved models come back bit for bit, with us, with the file beside them, or with timm alone."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from tests.plans import draw_plan
from vitprune_fast.checkpoint import load, save
from vitprune_fast.errors import DamagedFile, InvalidInput, RunFolderError, UnsupportedArchitecture
from vitprune_fast.planning import Plan
from vitprune_fast.structure import describe
from vitprune_fast.surgery import prune
from vitprune_fast.testing import VITS, random_images, random_vit

EVERY = [*VITS]


def opened_by_timm(folder: Path) -> Any:
    """Timm 1.0.23 takes weights in a folder for a torch file unless it is told where they are."""
    name = f"local-dir:{folder}"
    try:
        return timm.create_model(name, pretrained=True).eval()
    except pickle.UnpicklingError:
        weights = str(folder / "model.safetensors")
        return timm.create_model(name, checkpoint_path=weights).eval()


@pytest.mark.parametrize("kind", ["nothing", "head", "neuron", "branch", "mixture"])
@pytest.mark.parametrize("config", EVERY)
def test_saved_models_come_back_bit_for_bit(config: str, kind: str, tmp_path: Path) -> None:
    model = random_vit(config, drop_path_rate=0.1, attn_drop_rate=0.2, dtype=torch.float32)
    plan = draw_plan(describe(model), kind, random.Random(f"{config} {kind}"))
    pruned = prune(model, plan)
    save(pruned, tmp_path)
    again = load(tmp_path)
    images = random_images(model)
    assert torch.equal(again(images), pruned(images))
    assert str(again) == str(pruned)
    assert not list(tmp_path.glob("*.tmp*"))
    if not (tmp_path / "modeling_pruned.py").exists():
        opened = opened_by_timm(tmp_path)
        assert torch.equal(opened(images), pruned(images))


@pytest.mark.parametrize("config", ["plain", "deit_distilled", "pre_norm-avg-fc_norm-no_qkv_bias"])
def test_a_model_of_one_size_opens_with_plain_timm(config: str, tmp_path: Path) -> None:
    model = random_vit(config, dtype=torch.float32)
    structure = describe(model)
    kept = {axis.name: list(range(5, 50)) for axis in structure.units("neuron")}
    pruned = prune(model, Plan.of(structure, {**kept, "blocks": [0, 2]}))
    save(pruned, tmp_path)
    assert not (tmp_path / "modeling_pruned.py").exists()
    opened = opened_by_timm(tmp_path)
    images = random_images(model)
    assert torch.equal(opened(images), pruned(images))


def test_any_other_model_opens_with_the_file_beside_it(tmp_path: Path) -> None:
    model = random_vit("deit_distilled", dtype=torch.float32)
    plan = Plan.of(
        describe(model),
        {"blocks.0.attn.heads": [], "blocks.1.attn.heads": [2], "blocks.2.mlp.neurons": [3]},
    )
    pruned, images = prune(model, plan), random_images(model)
    save(pruned, tmp_path)
    save_file({"images": images, "logits": pruned(images)}, tmp_path / "check.safetensors")
    code = (
        "import sys, torch; from safetensors.torch import load_file\n"
        "import modeling_pruned\n"
        "check = load_file('check.safetensors')\n"
        "model = modeling_pruned.load('.')\n"
        "assert torch.equal(model(check['images']), check['logits'])\n"
        "assert not any(name.split('.')[0] == 'vitprune_fast' for name in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_saving_again_replaces_all_of_it(tmp_path: Path) -> None:
    model = random_vit(dtype=torch.float32)
    structure = describe(model)
    save(prune(model, Plan.of(structure, {"blocks.0.attn.heads": [1]})), tmp_path)
    assert (tmp_path / "modeling_pruned.py").exists()
    save(model, tmp_path)
    assert not (tmp_path / "modeling_pruned.py").exists()
    assert torch.equal(load(tmp_path)(random_images(model)), model(random_images(model)))


def test_every_bit_flip_is_found(tmp_path: Path) -> None:
    save(random_vit(dtype=torch.float32, depth=1), tmp_path)
    rng = random.Random(0)
    for name in ("model.safetensors", "config.json"):
        path = tmp_path / name
        good = path.read_bytes()
        for _ in range(40):
            at = rng.randrange(len(good))
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :])
            with pytest.raises(DamagedFile):
                load(tmp_path)
        path.write_bytes(good)
    load(tmp_path)


def _forge(folder: Path, change) -> None:
    """Change the config and sign it again, as an attacker would."""
    from vitprune_fast.files import write_manifest

    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder, ["config.json", "model.safetensors"])


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.clear(),
        lambda c: c["vitprune_fast"].update(version=99),
        lambda c: c["vitprune_fast"].update({"class": "os.system"}),
        lambda c: c["vitprune_fast"]["blocks"][0]["attn"].update(heads=10**9),
        lambda c: c["vitprune_fast"]["blocks"][0]["attn"].update(heads=-3),
        lambda c: c["vitprune_fast"]["blocks"][0]["mlp"].update(hidden=10**12),
        lambda c: c["vitprune_fast"]["blocks"][0]["mlp"].update({"class": "Linear"}),
        lambda c: c["vitprune_fast"]["blocks"].clear(),
        lambda c: c["vitprune_fast"].update(blocks=7),
        lambda c: c["vitprune_fast"]["args"].update(embed_dim=0),
        lambda c: c["vitprune_fast"]["args"].update(img_size="big"),
        lambda c: c["vitprune_fast"]["args"].update(surprise=1),
        lambda c: c["vitprune_fast"]["args"]["norm_layer"].update({"class": "exec"}),
        lambda c: c["vitprune_fast"]["attributes"].update({"forward": "x"}),
        lambda c: c["vitprune_fast"]["attributes"].update({"blocks.0.attn.num_heads": [1]}),
    ],
)
def test_forged_descriptions_give_one_typed_error(change, tmp_path: Path) -> None:
    save(random_vit(dtype=torch.float32), tmp_path)
    _forge(tmp_path, change)
    with pytest.raises(DamagedFile):
        load(tmp_path)


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedFile, match="no folder"):
        load(tmp_path / "nothing")
    save(random_vit(dtype=torch.float32), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(DamagedFile, match=r"model\.safetensors"):
        load(tmp_path / "model")


def test_what_cannot_be_written_down_is_refused(tmp_path: Path) -> None:
    model = random_vit(dtype=torch.float32)
    model.blocks[1].mlp.act = nn.Tanh()
    with pytest.raises(UnsupportedArchitecture, match="act"):
        save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_place_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, taken = random_vit(dtype=torch.float32, depth=1), tmp_path / "file"
    taken.write_text("mine")
    for folder in (taken, taken / "deeper" / "model"):
        with pytest.raises(RunFolderError, match=f"got {folder}: {taken} is no folder"):
            save(model, folder)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(RunFolderError, match="link is no folder"):
        save(model, tmp_path / "link")
    # a name that no file system takes shows only when the folder is made
    with pytest.raises(RunFolderError, match="make_folder: path must be a folder"):
        save(model, tmp_path / ("x" * 300))
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        with pytest.raises(RunFolderError, match=f"{tmp_path} is read-only"):
            save(model, tmp_path / "new" / "model")
    assert taken.read_text() == "mine" and not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", ['{"architecture": "resnet50"}', "[1]", "not json"])
def test_a_folder_of_something_else_is_not_overwritten(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InvalidInput, match=f"got {tmp_path}, whose config.json is of something"):
        save(random_vit(dtype=torch.float32, depth=1), tmp_path)
    assert (tmp_path / "config.json").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_damaged_model_may_be_saved_again(tmp_path: Path) -> None:
    model = random_vit(dtype=torch.float32, depth=1)
    save(model, tmp_path)
    (tmp_path / "config.json").write_text("{")
    save(model, tmp_path)
    assert torch.equal(load(tmp_path)(random_images(model)), model(random_images(model)))
