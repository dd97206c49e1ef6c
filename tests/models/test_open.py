from __future__ import annotations

import pickle
from argparse import Namespace
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
from vitprune_fast.run.assumptions import about_weights

SMALL = {**small.SMALL, "num_classes": 5}


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return timm.create_model(NAME, **SMALL).state_dict()


def config(path: Path | None = None, **args: object) -> ModelConfig:
    return ModelConfig(name=NAME, args={**SMALL, **args}, checkpoint=path)


Tensors = dict[str, torch.Tensor]


def under(*prefixes: str) -> Any:
    return lambda tensors: {p + name: tensor for p in prefixes for name, tensor in tensors.items()}


def other(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


# what people publish under these names: file content from tensors, and what must be said of it
HABITS: dict[str, tuple[Any, str]] = {
    "plain": (lambda t: t, ""),
    "model": (lambda t: {"model": t, "epoch": 3}, ""),
    "model_state_dict": (lambda t: {"model_state_dict": t, "optimizer": {"state": {0: t}}}, ""),
    "net": (lambda t: {"net": t, "acc": 0.9}, ""),
    "nested": (lambda t: {"state": {"network": t}}, ""),
    "module.": (under("module."), "names without module."),
    "_orig_mod.": (under("_orig_mod."), ""),
    "_orig_mod.module.": (under("_orig_mod.module."), "names without module."),
    "module._orig_mod.": (under("module._orig_mod."), "names without module."),
    "block by block": (
        lambda t: {n.replace("blocks.1.", "blocks.1._orig_mod."): v for n, v in t.items()},
        "",
    ),
    "lightning": (
        lambda t: {"state_dict": under("model.")(t), "hyper_parameters": {"lr": 1e-3}},
        "names without model.",
    ),
    "backbone.": (under("backbone."), "names without backbone."),
    "encoder.": (under("encoder."), "names without encoder."),
    "head beside the backbone": (
        lambda t: {n if "head" in n else f"net.backbone.{n}": v for n, v in t.items()},
        "names without net.backbone.",
    ),
    "averaged": (
        lambda t: {"n_averaged": torch.tensor(3), **under("module.")(t)},
        "names without module.; leaves out n_averaged",
    ),
    "timm": (
        lambda t: {"state_dict": other(t), "state_dict_ema": t, "args": Namespace(lr=0.1)},
        "takes state_dict_ema, not state_dict",
    ),
    "dino": (
        lambda t: {"student": under("module.")(other(t)), "teacher": t},
        "takes teacher, not student.module",
    ),
    "dino in one": (
        lambda t: {**under("student.")(other(t)), **under("teacher.")(t)},
        "takes teacher, not student; names without teacher.; leaves out student",
    ),
    "mae": (
        lambda t: {
            **t,
            "mask_token": t["cls_token"],
            "decoder_blocks.0.norm1.bias": t["norm.bias"],
        },
        "leaves out decoder_blocks, mask_token",
    ),
}


@pytest.mark.parametrize("habit", HABITS)
def test_torch_checkpoints_of_every_habit(habit: str, tmp_path: Path) -> None:
    path, tensors = tmp_path / "dense.pth", weights()
    made, said = HABITS[habit]
    torch.save(made(tensors), path)
    model: Any = open_model(config(path))
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert model.caveats.get("checkpoint", "") == (f"{path}: {said}" if said else "")
    # the same is said before the weights are read
    assert skeleton(config(path)).caveats == model.caveats
    assert about_weights(config(path), 0, model) == (
        {"checkpoint": f"{path}: {said}"} if said else {}
    )


def test_another_size_of_images_and_other_channels_are_adapted_as_timm_does(
    tmp_path: Path,
) -> None:
    path = tmp_path / "dense.pth"
    torch.save(weights(), path)
    model: Any = open_model(config(path, img_size=32, in_chans=1))
    theirs = timm.create_model(
        NAME,
        **{**SMALL, "img_size": 32, "in_chans": 1},
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path), "num_classes": 5},
    )
    found = theirs.state_dict()
    assert all(torch.equal(found[name], each) for name, each in model.state_dict().items())
    assert "pos_embed resized from (1, 5, 24) to (1, 17, 24)" in model.caveats["checkpoint"]
    assert "weight resized from (24, 3, 8, 8) to (24, 1, 8, 8)" in model.caveats["checkpoint"]
    # and back, from grey to colour
    torch.save(model.state_dict(), path)
    back = open_model(config(path, img_size=32)).get_parameter("patch_embed.proj.weight")
    grey = model.patch_embed.proj.weight
    torch.testing.assert_close(back.sum(1, keepdim=True), grey, rtol=1e-6, atol=1e-7)


def test_a_file_without_a_head_gets_a_new_one(tmp_path: Path) -> None:
    path, tensors = tmp_path / "body.pth", weights()
    torch.save({n: t for n, t in tensors.items() if "head" not in n}, path)
    model: Any = open_model(config(path, num_classes=4))
    assert model.num_classes == 4 and model.caveats["head"] == "random"
    assert torch.equal(model.state_dict()["norm.weight"], tensors["norm.weight"])
    said = about_weights(config(path), 7, model)
    assert "has no head" in said["checkpoint"] and "random (seed 7)" in said["head"]
    # a head for other classes stays unused where the data's are to be learned
    torch.save(tensors, path)
    args = {name: value for name, value in SMALL.items() if name != "num_classes"}
    fresh: Any = open_model(ModelConfig(NAME, args, path), classes=4)
    assert fresh.num_classes == 4 and "its head of 5 classes is left out" in str(fresh.caveats)


def test_a_layer_that_timm_would_drop_is_not_lost(tmp_path: Path) -> None:
    tensors = {**weights(), "pre_logits.fc.weight": torch.eye(24)}
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(InvalidInput, match=r"pre_logits\.fc\.weight is unknown"):
        open_model(config(tmp_path / "x.pth"))


def test_names_of_another_library_are_named(tmp_path: Path) -> None:
    hf = {"vit.embeddings.cls_token": torch.ones(1), "vit.encoder.layer.0.bias": torch.ones(1)}
    torch.save(hf, tmp_path / "x.pth")
    with pytest.raises(
        InvalidInput, match=r"1 of the model's 32 names .*, and its own 2 begin with vit;"
    ):
        open_model(config(tmp_path / "x.pth"))
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(InvalidInput, match=r"0 of the .*, and its own 1 begin with conv1;"):
        open_model(config(tmp_path / "x.pth"))
    torch.save({**weights(), "blocks.7.norm1.bias": torch.ones(24)}, tmp_path / "x.pth")
    with pytest.raises(InvalidInput, match=r"blocks\.7\.norm1\.bias is unknown; 32 of the .* 32"):
        open_model(config(tmp_path / "x.pth"))


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
    ],
)
def test_checkpoint_of_another_shape(args: dict, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "dense.safetensors"
    files.write_tensors(path, weights())
    with pytest.raises(InvalidInput, match=sentence):
        open_model(config(path, **args))


def test_arguments_of_timms_training_say_what_would_fit(tmp_path: Path) -> None:
    sizes = {name: size for name, size in SMALL.items() if name not in ("img_size", "num_classes")}
    made = Namespace(model=NAME, model_kwargs=sizes, img_size=SMALL["img_size"], num_classes=5)
    path = tmp_path / "model_best.pth.tar"
    torch.save({"state_dict": weights(), "args": made}, path)
    with pytest.raises(InvalidInput, match="it was trained as --model") as refused:
        open_model(config(path, embed_dim=36))
    words = str(refused.value).partition("--model-args ")[2].split()
    assert {*words} == {f"{name}={size}" for name, size in SMALL.items()}
    # what cannot be told is not guessed
    torch.save({"state_dict": weights(), "args": Namespace(lr=0.1)}, path)
    with pytest.raises(InvalidInput, match="check --model and --model-args"):
        open_model(config(path, embed_dim=36))


def test_pixels_of_timms_training_come_before_those_of_the_name(tmp_path: Path) -> None:
    path = tmp_path / "model_best.pth.tar"
    own = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3], "crop_pct": 1.0}
    args = Namespace(**own, interpolation="")
    torch.save({"state_dict": weights(), "args": args}, path)
    for make in (open_model, skeleton):
        model: Any = make(config(path))
        stated = model.pretrained_cfg
        assert {name: stated[name] for name in own} == own | {
            "mean": tuple(own["mean"]),
            "std": tuple(own["std"]),
        }
        assert model.caveats["pixels"].startswith("mean, std, crop_pct of the checkpoint's arg")
    # train.py leaves what nobody asked for at None
    for nothing in (Namespace(mean=None, std=None, crop_pct=None), Namespace(mean="x", std=[0.0])):
        torch.save({"state_dict": weights(), "args": nothing}, path)
        unasked: Any = open_model(config(path))
        assert unasked.caveats["pixels"].startswith("timm's for")


def test_unknown_model_shows_near_matches() -> None:
    with pytest.raises(InvalidInput, match=r"did you mean .*vit_tiny_patch16_224"):
        skeleton(ModelConfig(name="vit_tinny_patch16_224"))
    # of a name that was not typed whole as well, and not gcvit_tiny
    with pytest.raises(InvalidInput, match=r"did you mean vit_tiny_patch16_224, vit_tiny_"):
        skeleton(ModelConfig(name="vit_tinny"))
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
