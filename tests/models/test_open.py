from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests import small
from tests.small import NAME
from vitprune_fast import files
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.errors import DamagedFile, InvalidInput
from vitprune_fast.models.open import open_model, skeleton

SMALL = {**small.SMALL, "num_classes": 5}


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return timm.create_model(NAME, **SMALL).state_dict()


def config(path: Path | None = None, **args: object) -> ModelConfig:
    return ModelConfig(name=NAME, args={**SMALL, **args}, checkpoint=path)


@pytest.mark.parametrize("wrapped", ["plain", "model", "state_dict_ema", "module."])
def test_torch_checkpoints_of_every_habit(wrapped: str, tmp_path: Path) -> None:
    path, tensors = tmp_path / "dense.pth", weights()
    content: object = tensors
    if wrapped == "module.":
        content = OrderedDict((f"module.{name}", tensor) for name, tensor in tensors.items())
    elif wrapped != "plain":
        content = {wrapped: tensors, "epoch": 3}
    torch.save(content, path)
    found = open_model(config(path)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_safetensors_checkpoint(tmp_path: Path) -> None:
    path, tensors = tmp_path / "dense.safetensors", weights()
    files.write_tensors(path, tensors)
    model = open_model(config(path))
    assert not model.training
    assert all(torch.equal(model.state_dict()[name], t) for name, t in tensors.items())


class Payload:
    """Unpickled, it would leave a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.ckpt", "x.bin", "x.safetensors"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_code_in_a_checkpoint_is_never_executed(name: str, form: str, tmp_path: Path) -> None:
    path, mark = tmp_path / name, tmp_path / "executed"
    content = {"model": weights(), "extra": Payload(mark)}
    if form == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(DamagedFile) as error:
        open_model(config(path))
    assert not mark.exists()
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_checkpoint_without_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(DamagedFile, match="must hold named tensors, found none"):
        open_model(config(tmp_path / "x.pth"))


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"checkpoint must be a file, got .*none\.pth"):
        open_model(config(tmp_path / "none.pth"))


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        pytest.param({"num_classes": 7}, "trained for 5 classes, but 7 are needed", id="classes"),
        pytest.param(
            {"embed_dim": 36},
            r"cls_token must be \(1, 1, 36\), got \(1, 1, 24\) \(and \d+ more\)",
            id="width",
        ),
        pytest.param({"depth": 3}, r"blocks\.2\..* is missing \(and \d+ more\)", id="deeper"),
        pytest.param({"depth": 1}, r"blocks\.1\..* is unknown", id="shallower"),
        pytest.param({"img_size": 32}, r"pos_embed must be \(1, 17, 24\)", id="image-size"),
    ],
)
def test_checkpoint_of_another_shape(args: dict, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "dense.safetensors"
    files.write_tensors(path, weights())
    with pytest.raises(InvalidInput, match=sentence):
        open_model(config(path, **args))


def test_unknown_model_shows_near_matches() -> None:
    with pytest.raises(InvalidInput, match=r"did you mean .*vit_tiny_patch16_224"):
        skeleton(ModelConfig(name="vit_tinny_patch16_224"))
    with pytest.raises(InvalidInput, match=r"neither a model of timm nor a folder; see timm"):
        skeleton(ModelConfig(name="!!!"))


def test_arguments_the_model_does_not_take() -> None:
    with pytest.raises(InvalidInput, match=r"with colour=red: .*unexpected keyword"):
        skeleton(ModelConfig(name=NAME, args={"colour": "red"}))


def test_skeleton_has_no_weights_and_draws_no_number() -> None:
    state = torch.get_rng_state()
    model = skeleton(ModelConfig(name=NAME))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_a_saved_folder_brings_its_own_sizes(tmp_path: Path) -> None:
    import vitprune_fast as vp

    vp.save(timm.create_model(NAME, **SMALL), tmp_path / "model")
    assert open_model(ModelConfig(name=str(tmp_path / "model"))).num_classes == 5
    with pytest.raises(InvalidInput, match="holds its own weights and sizes"):
        open_model(ModelConfig(name=str(tmp_path / "model"), args={"depth": 3}))


def test_the_head_follows_the_checkpoint(tmp_path: Path) -> None:
    """The classes of the weights decide where no num_classes was asked for."""
    args: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1}
    trained = timm.create_model(NAME, num_classes=2, num_heads=3, **args)
    save_file(trained.state_dict(), tmp_path / "two.safetensors")
    config = ModelConfig(NAME, {**args, "num_heads": 3}, tmp_path / "two.safetensors")
    assert skeleton(config).num_classes == open_model(config).num_classes == 2


def test_an_empty_name_is_no_folder() -> None:
    with pytest.raises(InvalidInput, match="neither a model of timm nor a folder"):
        skeleton(ModelConfig(name=""))
