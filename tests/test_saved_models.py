"""Saved models come back bit for bit, with us, with the file next to them, or with timm alone."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn

from tests.plans import KINDS, draw_plan
from tests.test_bare import small_hf
from vitprune_fast import modeling_pruned
from vitprune_fast.errors import DamagedFile, InvalidInput, RunFolderError, UnsupportedArchitecture
from vitprune_fast.planning import Plan
from vitprune_fast.saved_models import check_savable, load, save
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


@pytest.mark.parametrize("family", ["transformers", "torchvision"])
def test_models_of_every_library_keep_how_images_are_prepared(family: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_dim": 24, "mlp_dim": 48, "num_layers": 1, "num_heads": 3}
    model: Any = (
        small_hf()
        if family == "transformers"
        else torchvision.models.VisionTransformer(image_size=16, patch_size=8, **sizes)
    )
    said = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "label_names": list("abcde")}
    model.pretrained_cfg = {**said, "paper_ids": "of other weights"}
    save(model, tmp_path)
    for again in (load(tmp_path), modeling_pruned.load(tmp_path)):
        assert again.pretrained_cfg == said
    save(load(tmp_path), tmp_path)
    assert load(tmp_path).pretrained_cfg == said


@pytest.mark.parametrize("kind", ["nothing", *KINDS])
@pytest.mark.parametrize("config", EVERY)
def test_saved_models_come_back_bit_for_bit(config: str, kind: str, tmp_path: Path) -> None:
    model = random_vit(config, drop_path_rate=0.1, attn_drop_rate=0.2, dtype=torch.float32)
    plan = draw_plan(describe(model), kind, random.Random(f"{config} {kind}"))
    pruned = prune(model, plan)
    save(pruned, tmp_path)
    images = random_images(model)
    for again in (load(tmp_path), modeling_pruned.load(tmp_path)):
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


def test_the_file_beside_it_reads_weights_into_memory(tmp_path: Path) -> None:
    save(random_vit(), tmp_path)
    model = modeling_pruned.load(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    want = random_vit().state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
    # an address as torch allocates them, which the library of matrix products may look at
    assert all(tensor.data_ptr() % 64 == 0 for tensor in model.state_dict().values())


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


def _change(*keys: Any, to: Any) -> Any:
    def change(config: Any) -> None:
        place = config["vitprune_fast"]
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to

    return pytest.param(change, id="-".join(keys) + f"-{to!r:.30}")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.clear(),
        lambda c: c["vitprune_fast"]["args"].clear(),
        lambda c: c["vitprune_fast"]["args"].pop("depth"),
        lambda c: c.update(pretrained_cfg="a name"),
        lambda c: (c.pop("pretrained_cfg"), c["vitprune_fast"].update(pretrained_cfg=[1])),
        _change("version", to=99),
        _change("class", to="os.system"),
        _change("class", to="timm.models.resnet.ResNet"),
        _change("args", "depth", to=10**9),
        _change("args", "depth", to=9),
        _change("args", "num_heads", to=-3),
        _change("args", "mlp_ratio", to=1e300),
        _change("args", "mlp_layer", to={"class": "torch.nn.modules.linear.Linear"}),
        _change("args", "act_layer", to={"class": "timm.layers.create_act.F"}),
        _change("args", "norm_layer", to={"class": "exec"}),
        _change("args", to=7),
        _change("args", "embed_dim", to=0),
        _change("args", "embed_dim", to=12),
        _change("args", "img_size", to="big"),
        _change("args", "surprise", to=1),
        _change("args", "device", to="cpu"),
        _change("attributes", "forward", to="x"),
        _change("attributes", "blocks.0.attn.num_heads", to=[1]),
        _change("attributes", "blocks.0.attn.num_heads", to=2),
        _change("attributes", "blocks.0.attn", to=None),
        _change("swaps", "blocks.0.attn", to="os.system"),
        _change("swaps", "blocks.0.attn", to="timm.models.vision_transformer.VisionTransformer"),
        _change("swaps", "blocks.0.attn.qkv.weight", to="Constant"),
        _change("swaps", "", to="Constant"),
        _change("halves", "blocks.0", to={"chain": ["forward"], "core": "forward"}),
        _change("halves", "blocks.0", to={"chain": ["norm1", "attn"], "core": "mlp"}),
        _change("halves", "", to={"chain": ["blocks"], "core": "blocks"}),
        _change("deleted", to=["blocks.0"]),
        _change("deleted", to=["blocks.0.attn.forward"]),
    ],
)
def test_forged_descriptions_give_one_typed_error(change, tmp_path: Path) -> None:
    save(random_vit(dtype=torch.float32), tmp_path)
    _forge(tmp_path, change)
    with pytest.raises(DamagedFile):
        load(tmp_path)


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedFile, match=r"no folder$"):
        load(tmp_path / "nothing")
    (tmp_path / "weights.pth").touch()
    with pytest.raises(DamagedFile, match="no folder; weights go into a model, or to --checkpoint"):
        load(tmp_path / "weights.pth")
    with pytest.raises(DamagedFile, match=r"vp.save wrote, .* without manifest.json; save or copy"):
        load(tmp_path)
    save(random_vit(dtype=torch.float32), tmp_path / "model")
    with pytest.raises(DamagedFile, match=r"without manifest.json; of a run take .*model$"):
        load(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(DamagedFile, match=r"model\.safetensors"):
        load(tmp_path / "model")


def _without(model: Any, *paths: str) -> None:
    for path in paths:
        module, _, name = path.rpartition(".")
        setattr(model.get_submodule(module), name, None)


# what users do to a model, and describe accepts
CHANGES: dict[str, Any] = {
    "head without bias": lambda m: _without(m, "head.bias"),
    "no head": lambda m: (setattr(m, "head", nn.Identity()), setattr(m, "num_classes", 0)),
    "patches without bias": lambda m: _without(m, "patch_embed.proj.bias"),
    "a norm without bias": lambda m: _without(m, "blocks.1.norm1.bias"),
    "a norm of its own": lambda m: setattr(
        m, "norm", nn.LayerNorm(24, 1e-3, elementwise_affine=False)
    ),
    "a block without biases": lambda m: _without(
        *(m, "blocks.0.attn.qkv.bias", "blocks.0.attn.proj.bias", "blocks.0.mlp.fc2.bias")
    ),
    "fc1 without bias": lambda m: _without(m, *(f"blocks.{i}.mlp.fc1.bias" for i in range(3))),
    "an activation": lambda m: setattr(m.blocks[1].mlp, "act", nn.LeakyReLU(0.3)),
    "another kind of MLP": lambda m: setattr(m.blocks[2], "mlp", SwiGLUPacked(24, 96).eval()),
    "another kind of block": lambda m: m.blocks.__setitem__(1, ResPostBlock(24, 3).eval()),
    "a block without scale": lambda m: setattr(m.blocks[1], "ls2", nn.Identity()),
    "a list of its own": lambda m: setattr(m, "crops", [1, [2, 3], None]),
    "another reduction": lambda m: m.feature_info[0].update(reduction=3),
    "flags": lambda m: setattr(m.blocks[2].attn, "scale", 0.3),
}
ARGUMENTS: dict[str, Any] = {
    "norms without bias": {"norm_layer": partial(nn.LayerNorm, bias=False)},
    "norms without affine": {"norm_layer": partial(nn.LayerNorm, elementwise_affine=False)},
    "no norms": {"norm_layer": nn.Identity},
    "mish": {"act_layer": "mish"},
    "hard_swish": {"act_layer": "hard_swish"},
    "tanh": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "patch norm": {"embed_norm_layer": nn.LayerNorm},
    "dropout": {"drop_rate": 0.1, "pos_drop_rate": 0.2, "proj_drop_rate": 0.3},
    "any size": {"dynamic_img_size": True, "dynamic_img_pad": True, "patch_drop_rate": 0.5},
}


@pytest.mark.parametrize("is_cut", [False, True], ids=["dense", "pruned"])
@pytest.mark.parametrize("what", [*CHANGES, *ARGUMENTS])
def test_what_describe_accepts_comes_back(what: str, is_cut: bool, tmp_path: Path) -> None:
    options = {"init_values": 0.1, "dtype": torch.float32, **ARGUMENTS.get(what, {})}
    model = random_vit(**options)
    CHANGES.get(what, lambda _: None)(model)
    if what == "no norms":
        # without a norm random weights grow to infinity
        for parameter in model.parameters():
            parameter.data /= 4
    check_savable(model)
    if is_cut:
        kept = {"blocks.0.attn.heads": [0, 2], "blocks.2.mlp.neurons": [1, 2, 5]}
        model = prune(model, Plan.of(describe(model), kept, ["blocks.1.attn"]))
    save(model, tmp_path)
    again, images = load(tmp_path), random_images(model)
    assert torch.equal(again(images), model(images)) and model(images).isfinite().all()
    assert str(again) == str(model)
    assert vars(again).get("crops") == vars(model).get("crops")
    assert again.feature_info == model.feature_info
    # what timm itself opens is the same as well
    if not (tmp_path / "modeling_pruned.py").exists():
        assert torch.equal(opened_by_timm(tmp_path)(images), model(images))


class _Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class _Act(nn.GELU):
    pass


class _Vit(VisionTransformer):
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: setattr(m, "head", _Scaled(24, 5)),
            "describe: head must be a Linear .*_Scaled$",
        ),
        (
            lambda m: setattr(m.blocks[1].mlp, "act", _Act()),
            "save: blocks.1.mlp.act must be .*, a GELU, got a _Act",
        ),
        (
            lambda m: m.blocks[0].attn.add_module("more", nn.Identity()),
            "save: blocks.0.attn.more must be .*, nothing, got",
        ),
        (
            lambda m: setattr(m, "__class__", _Vit),
            "describe: model must be one of timm VisionTransformer, .*_Vit",
        ),
        (lambda m: setattr(m, "note", float("nan")), "save: note must be a plain value, got nan"),
    ],
)
def test_what_cannot_be_written_down_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    model = random_vit(dtype=torch.float32)
    change(model)
    for ask in (check_savable, lambda model: save(model, tmp_path / "model")):
        with pytest.raises(UnsupportedArchitecture, match=f"^{message}"):
            ask(model)
    assert not (tmp_path / "model").exists()


def test_a_name_of_its_own_is_never_exchanged(tmp_path: Path) -> None:
    model = random_vit(dtype=torch.float32)
    model.pretrained_cfg = {"architecture": "vit_of_mine"}
    save(model, tmp_path)
    again: Any = load(tmp_path)
    assert again.pretrained_cfg["architecture"] == "vit_of_mine"
    assert "vit_base" not in (tmp_path / "config.json").read_text()


def test_a_description_is_short(tmp_path: Path) -> None:
    """Sizes are those of the tensors: a dense model has no word of its blocks."""
    save(random_vit(dtype=torch.float32, depth=12), tmp_path)
    spec = json.loads((tmp_path / "config.json").read_text())["vitprune_fast"]
    assert spec["swaps"] == spec["halves"] == spec["attributes"] == {}
    assert "deleted" not in spec and "blocks." not in json.dumps(spec)


def test_a_place_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, taken = random_vit(dtype=torch.float32, depth=1), tmp_path / "file"
    taken.write_text("mine")
    for folder in (taken, taken / "deeper" / "model"):
        with pytest.raises(
            RunFolderError, match=f"folder {folder} must be .* got {taken}, which is no"
        ):
            save(model, folder)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(RunFolderError, match="link, which is no folder"):
        save(model, tmp_path / "link")
    # a name that no file system takes shows only when the folder is made
    with pytest.raises(RunFolderError, match=r"folder .* must be a folder"):
        save(model, tmp_path / ("x" * 300))
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        with pytest.raises(RunFolderError, match=f"{tmp_path}, which is read-only"):
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
