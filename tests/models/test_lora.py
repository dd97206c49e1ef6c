"""LoRA that peft trained, merged by us and by peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from tests.small import NAME, SMALL, words
from vitprune_fast import files
from vitprune_fast.cli.main import main
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.errors import DamagedFile, InvalidInput
from vitprune_fast.models.lora import read_adapter
from vitprune_fast.models.open import open_model, skeleton
from vitprune_fast.run.assumptions import about_weights

peft: Any = pytest.importorskip("peft")


def trained(folder: Path, **settings: Any) -> nn.Module:
    """What peft makes of an adapter that it saved here, beside the weights it is for."""
    torch.manual_seed(1)
    model = timm.create_model(NAME, num_classes=5, **SMALL)
    torch.save(model.state_dict(), folder / "dense.pth")
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["qkv", "fc1", "proj"], **settings}
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(**options))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.1)
    torch.save(adapted.state_dict(), folder / "adapted.pth")
    adapted.save_pretrained(folder / "adapter")
    return adapted.merge_and_unload()


def config(folder: Path, **more: Any) -> ModelConfig:
    paths = {"checkpoint": folder / "dense.pth", "merge_lora": folder / "adapter"}
    return ModelConfig(NAME, SMALL, **{**paths, **more})


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="plain"),
        pytest.param({"use_rslora": True}, id="rslora"),
        pytest.param(
            {"rank_pattern": {"blocks.1.mlp.fc1": 2}, "alpha_pattern": {"attn.qkv": 9}},
            id="patterns",
        ),
        pytest.param({"bias": "lora_only"}, id="biases"),
        pytest.param({"target_modules": r".*patch_embed\.proj|.*fc2"}, id="convolution"),
        pytest.param({"modules_to_save": ["head"]}, id="head"),
    ],
)
def test_equals_what_peft_merges(settings: dict, tmp_path: Path) -> None:
    theirs = trained(tmp_path, **settings).state_dict()
    model: Any = open_model(config(tmp_path))
    ours = model.state_dict()
    before = torch.load(tmp_path / "dense.pth", weights_only=True)
    assert any(not torch.equal(before[name], each) for name, each in ours.items())
    assert ours.keys() == theirs.keys()
    for name, each in theirs.items():
        # peft multiplies in another order: three roundings of sums of at most three terms
        assert (each - ours[name]).abs().max() <= 8 * 2**-24 * each.abs().max(), name
    said = about_weights(config(tmp_path), 0, model)
    assert said == {"lora": f"{tmp_path / 'adapter'} is added to the weights"}


def test_its_head_decides_the_number_of_classes(tmp_path: Path) -> None:
    trained(tmp_path, modules_to_save=["head"])
    body = timm.create_model(NAME, **SMALL).state_dict()
    files.write_tensors(tmp_path / "body.safetensors", body)
    own = config(tmp_path, checkpoint=tmp_path / "body.safetensors")
    assert skeleton(own).num_classes == open_model(own).num_classes == 5


def test_a_saved_folder_takes_it_too(tmp_path: Path) -> None:
    import vitprune_fast as vp

    theirs = trained(tmp_path)
    vp.save(open_model(config(tmp_path, merge_lora=None)), tmp_path / "dense")
    found = open_model(ModelConfig(str(tmp_path / "dense"), merge_lora=tmp_path / "adapter"))
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(found(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_adapters_in_place_of_weights_are_refused_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path)
    command = ["describe", *words({**SMALL, "num_classes": 5}), "--checkpoint"]
    for given in ("adapted.pth", "adapter"):
        assert main([*command, str(tmp_path / given)]) == 2
        error = capsys.readouterr().err
        assert "adapter" in error and "give --merge-lora" in error, error
    merging = ["--merge-lora", str(tmp_path / "adapter")]
    assert main([*command, str(tmp_path / "dense.pth"), *merging]) == 0
    assert main(["describe", *words(SMALL), *merging]) == 2
    assert "merge-lora must come with the weights" in capsys.readouterr().err


def test_what_is_no_plain_lora_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, use_dora=True)
    with pytest.raises(InvalidInput, match=r"got use_dora=True .*merge_and_unload"):
        open_model(config(tmp_path))
    with pytest.raises(InvalidInput, match=r"must be a folder with adapter_config\.json"):
        open_model(config(tmp_path, merge_lora=tmp_path))
    settings = tmp_path / "adapter" / "adapter_config.json"
    changed = {**json.loads(settings.read_text()), "use_dora": False, "lora_alpha": None}
    settings.write_text(json.dumps(changed))
    with pytest.raises(InvalidInput, match=r"plain LoRA of layers, got .*magnitude"):
        read_adapter(tmp_path / "adapter")
    trained(tmp_path)
    settings.write_text(json.dumps(changed))
    with pytest.raises(DamagedFile, match="a number lora_alpha, got None"):
        open_model(config(tmp_path))
    narrow = {**SMALL, "embed_dim": 36}
    files.write_tensors(
        tmp_path / "narrow.safetensors",
        timm.create_model(NAME, num_classes=5, **narrow).state_dict(),
    )
    trained(tmp_path)
    other = ModelConfig(NAME, narrow, tmp_path / "narrow.safetensors", tmp_path / "adapter")
    with pytest.raises(InvalidInput, match=r"merge-lora must fit the model, got .*\(24, 24\)"):
        open_model(other)
