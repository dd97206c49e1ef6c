"""Every family goes to every format that has a word for it, and is refused by the others."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vitprune_fast as vp
from tests.plans import draw_plan
from vitprune_fast.batches import logits_of
from vitprune_fast.errors import (
    BackendUnavailable,
    InvalidInput,
    RunFolderError,
    StageFailed,
    UnsupportedArchitecture,
)
from vitprune_fast.testing import (
    PVT_IMAGE,
    PVTS,
    VITS,
    random_cait,
    random_images,
    random_pvt,
    random_vit,
)

F32 = torch.float32
PIXELS: dict[str, Any] = {
    "mean": (0.1, 0.2, 0.3),
    "std": (0.4, 0.5, 0.6),
    "crop_pct": 0.5,
    "interpolation": "bilinear",
    "label_names": list("abcde"),
}


def hf(name: str) -> Any:
    from integrations.huggingface import model_of

    return model_of(name, F32)


def torchvision(name: str) -> Any:
    from integrations.test_torchvision import model_of

    return model_of(name, F32)


MODELS: dict[str, Callable[[], Any]] = {
    **{f"timm {n}": lambda n=n: random_vit(n, dtype=F32, depth=2) for n in VITS},
    "timm dynamic": lambda: random_vit(dtype=F32, depth=2, dynamic_img_size=True),
    **{f"pvt {n}": lambda n=n: random_pvt(n, dtype=F32) for n in PVTS},
    "cait": lambda: random_cait(dtype=F32, depth=2),
    **{
        f"hf {n}": lambda n=n: hf(n)
        for n in ("vit", "vit-eager", "deit", "deit-teacher", "dinov2", "dinov2-giant")
    },
    "hf dinov2-registers": lambda: hf("dinov2-registers"),
    **{f"torchvision {n}": lambda n=n: torchvision(n) for n in ("plain", "pre_logits")},
}
# one of each library in the quick suite
QUICK = ("timm qk_norm", "hf vit", "torchvision plain", "pvt b0", "cait", "timm deit_distilled")


def cut(name: str, kind: str = "mixture") -> Any:
    model = MODELS[name]()
    return vp.prune(model, draw_plan(vp.describe(model), kind, random.Random(f"{name} {kind}")))


def uniform(model: Any, **counts: int) -> Any:
    """The model with the first so many units of every axis of a kind, of dims in every head."""
    axes = [a for a in vp.describe(model).axes.values() if a.kind in counts]
    kept = {a.name: [u for u in range(a.size) if u % a.width < counts[a.kind]] for a in axes}
    return vp.prune(model, vp.Plan.of(vp.describe(model), kept))


def images_of(model: Any, batch: int, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = vp.describe(model).input_size
    return torch.randn(batch, *size, generator=generator).to(next(model.parameters()).dtype)


@torch.no_grad()
def says(model: Any, images: Tensor) -> Tensor:
    return logits_of(model(images))


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    assert (got - want).abs().max() <= tolerance * max(1.0, float(want.abs().max()))


def by_onnxruntime(path: Path) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def assert_goes(name: str, kind: str, format: str, folder: Path) -> None:
    """A pruned model and what was exported of it say the same at sizes nobody looked at before."""
    model = cut(name, kind)
    made = vp.export(model, format, folder / f"model.{format}")
    assert made.gap <= made.tolerance and made.path.is_file()
    assert [path.name for path in folder.iterdir()] == [made.path.name]
    read = by_onnxruntime if format == "onnx" else lambda path: torch.export.load(path).module()
    other = read(made.path)
    for batch in (2, 7):
        images = images_of(model, batch)
        assert_close(other(images), says(model, images))


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_every_family_goes_to_pt2(name: str, tmp_path: Path) -> None:
    assert_goes(name, "mixture", "pt2", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["emptied", "branch", "dims"])
@pytest.mark.parametrize("name", QUICK)
def test_every_kind_of_cut_goes_to_pt2(name: str, kind: str, tmp_path: Path) -> None:
    assert_goes(name, kind, "pt2", tmp_path)


@pytest.mark.parametrize(
    "name", [n if n in QUICK[:2] else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_every_family_goes_to_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert_goes(name, "mixture", "onnx", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["emptied", "branch", "dims"])
@pytest.mark.parametrize("name", QUICK)
def test_every_kind_of_cut_goes_to_onnx(name: str, kind: str, tmp_path: Path) -> None:
    """Branches without heads among them, whose Reshape onnxruntime would refuse."""
    pytest.importorskip("onnxruntime")
    assert_goes(name, kind, "onnx", tmp_path)


def test_the_file_says_what_its_input_and_output_are(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = random_vit(dtype=F32, depth=1)
    model.pretrained_cfg = {"architecture": "vit_tiny_patch16_224", **PIXELS}
    path = vp.export(model, "onnx", tmp_path / "m.onnx").path
    found = onnx.load(path)
    said = {entry.key: entry.value for entry in found.metadata_props}
    assert said.pop("architecture") == "vit_tiny_patch16_224"
    assert said.pop("interpolation") == "bilinear"
    assert {name: json.loads(text) for name, text in said.items()} == {
        "input_size": [3, 16, 16],
        "classes": list("abcde"),
        **{name: list(PIXELS[name]) for name in ("mean", "std")},
        "crop_pct": 0.5,
    }
    for value, name in ((found.graph.input, "images"), (found.graph.output, "logits")):
        assert [v.name for v in value] == [name]
        assert value[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    # nothing of the machine that wrote it
    assert b"site-packages" not in path.read_bytes() and b".py" not in path.read_bytes()
    assert not onnx.checker.check_model(found, full_check=True)


def test_weights_of_many_bytes_lie_beside_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(import_module("vitprune_fast.export.onnx"), "MOST_BYTES", 0)
    model = random_vit(dtype=F32, depth=1)
    path = vp.export(model, "onnx", tmp_path / "m.onnx").path
    assert sorted(each.name for each in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert_close(by_onnxruntime(path)(random_images(model)), says(model, random_images(model)))


def test_pt2_opens_with_torch_alone_and_says_how_images_are_made(tmp_path: Path) -> None:
    model = cut("hf vit")
    model.pretrained_cfg = PIXELS
    vp.export(model, "pt2", tmp_path / "m.pt2")
    images = images_of(model, 2)
    save_file({"images": images, "logits": says(model, images)}, tmp_path / "check.safetensors")
    code = (
        "import json, sys, torch\n"
        "for name in ('vitprune_fast', 'timm', 'transformers'): sys.modules[name] = None\n"
        "from safetensors.torch import load_file\n"
        "check, facts = load_file('check.safetensors'), {'facts.json': ''}\n"
        "model = torch.export.load('m.pt2', extra_files=facts).module()\n"
        "assert torch.equal(model(check['images']), check['logits'])\n"
        "assert json.loads(facts['facts.json'])['mean'] == [0.1, 0.2, 0.3]\n"
    )
    run_apart(code, tmp_path)


def run_apart(code: str, folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


# what is exported is a copy


@pytest.mark.parametrize("fused", [True, False])
def test_the_model_is_only_read(fused: bool, tmp_path: Path) -> None:
    with torch.inference_mode():
        model = random_vit("qk_norm", dtype=F32, depth=1).train()
    model.blocks[0].attn.fused_attn = fused
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with torch.inference_mode():
        vp.export(model, "pt2", tmp_path / "m.pt2")
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    again = torch.export.load(tmp_path / "m.pt2").module()
    assert_close(again(images_of(model, 2)), says(model.eval(), images_of(model, 2)))


@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        ("pt2", torch.bfloat16),
        ("pt2", torch.float64),
        pytest.param("onnx", torch.float16, marks=pytest.mark.slow),
    ],
)
def test_other_dtypes_are_judged_by_their_own_rounding(
    format: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    model = random_vit(dtype=F32, depth=2).to(dtype)
    made = vp.export(model, format, tmp_path / f"model.{format}")
    size = made.tolerance / max(1e-4, 16 * torch.finfo(dtype).eps)
    assert made.gap <= made.tolerance and 1 <= size < 30


# what is refused, before anything is written


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        ("onxx", lambda m: m, "format must be one of hf, onnx, pt2, timm, got 'onxx'"),
        ("onnx", lambda m: m.bfloat16(), "model must be float32 or float16 for format onnx"),
        ("pt2", lambda m: m.to("meta"), "model must hold weights, got one on the meta device"),
        ("hf", lambda m: m, "model must be of transformers for format hf, got a VisionTransf"),
        ("pt2", lambda m: _infinite(m), "model must put out finite logits"),
        ("pt2", lambda m: _hooked(m), "model must compute by its classes alone, got a hook on"),
    ],
)
def test_what_cannot_be_exported_is_said(
    format: str, change: Any, message: str, tmp_path: Path
) -> None:
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    model = change(random_vit(dtype=F32, depth=1))
    with pytest.raises((InvalidInput, UnsupportedArchitecture), match=f"^export: {message}"):
        vp.export(model, format, tmp_path / f"model.{format}")
    assert not list(tmp_path.iterdir())


def _infinite(model: Any) -> Any:
    model.head.bias.data[0] = torch.inf
    return model


def _hooked(model: Any) -> Any:
    model.blocks[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def test_a_model_behind_a_mask_is_refused(tmp_path: Path) -> None:
    model = random_vit(dtype=F32, depth=1)
    plan = vp.Plan.of(vp.describe(model), removed=["blocks.0.attn"])
    with vp.mask(model, plan), pytest.raises(InvalidInput, match=r"^export: model .* vp\.mask"):
        vp.export(model, "pt2", tmp_path / "m.pt2")


def test_what_says_something_else_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.pt2").write_text("mine")
    from vitprune_fast.export import pt2

    model, good = random_vit(dtype=F32, depth=1), pt2.FORMAT
    for wrong, message in (
        (lambda images: says(model, images) + 0.1, "must be those of the model to .* nothing"),
        (lambda images: says(model, images) * torch.nan, "must be those of the model to"),
        (lambda images: {}["x"], "must hold and read back the model, got KeyError"),
    ):
        monkeypatch.setattr(pt2, "FORMAT", type(good)(good.write, lambda path, w=wrong: w, ".pt2"))
        with pytest.raises(StageFailed, match=message):
            vp.export(model, "pt2", tmp_path / "m.pt2")
        assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]
        assert (tmp_path / "m.pt2").read_text() == "mine"


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(BackendUnavailable, match=r"onnxscript.*pip install 'vitprune_fast\[onnx\]"):
        vp.export(random_vit(dtype=F32, depth=1), "onnx", tmp_path / "m.onnx")


def test_places_of_others_are_left_alone(tmp_path: Path) -> None:
    model = random_vit(dtype=F32, depth=1)
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(InvalidInput, match="path must be a file, got a folder"):
        vp.export(model, "pt2", tmp_path / "folder.pt2")
    with pytest.raises(InvalidInput, match=r"must end in \.onnx, got .*; take model\.onnx$"):
        vp.export(model, "onnx", tmp_path / "model")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidInput, match="path must be a folder, got a file"):
        vp.export(model, "timm", tmp_path / "notes.txt")
    (tmp_path / "folder.pt2").rmdir()
    with pytest.raises(InvalidInput, match=r"path must be new, .* with notes\.txt; take another"):
        vp.export(model, "timm", tmp_path)
    folder = tmp_path / "timm"
    for _ in range(2):
        vp.export(model, "timm", folder)
    (folder / "README.md").write_text("mine")
    with pytest.raises(InvalidInput, match=r"not changed since, got .* with README\.md"):
        vp.export(model, "timm", folder)
    assert (folder / "README.md").read_text() == "mine"


# transformers


@pytest.mark.parametrize("name", ["vit", "deit", "deit-teacher", "dinov2", "dinov2-registers"])
@pytest.mark.parametrize(
    "counts",
    [{"head": 2, "neuron": 48, "embed": 16}, {"qk_dim": 4, "v_dim": 4, "block": 1}],
    ids=["widths", "dims"],
)
def test_uniform_models_open_with_transformers_alone(
    name: str, counts: dict[str, int], tmp_path: Path
) -> None:
    """Heads that lost dims keep their temperature, for which a config has no word."""
    transformers = pytest.importorskip("transformers")
    model = hf(name)
    model.pretrained_cfg = PIXELS
    if "dinov2" in name and "neuron" in counts:
        # its config tells the ratio to the width, a whole number
        counts = {**counts, "neuron": 2 * counts["embed"]}
    small = uniform(model, **counts)
    small.config.id2label = {number: f"class {number}" for number in range(5)}
    small.config.label2id = {f"class {number}": number for number in range(5)}
    images = images_of(model, 3)
    want = says(small, images)
    made = vp.export(small, "hf", tmp_path / "hf", results={"before": {"top1": 0.5}, "after": {}})
    assert made.gap <= made.tolerance and torch.equal(says(small, images), want)
    again = getattr(transformers, type(small).__name__).from_pretrained(tmp_path / "hf").eval()
    assert type(again).__module__ == type(small).__module__
    for other in (again, vp.load(tmp_path / "hf")):
        assert_close(says(other, images), want, 1e-5)
    assert again.config.id2label[3] == "class 3" and again.config.label2id["class 3"] == 3
    prepared = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert list(prepared.image_mean) == [0.1, 0.2, 0.3] and prepared.resample == 2
    assert "| top-1 | 50.00% |  |" in (tmp_path / "hf" / "README.md").read_text()


def test_neurons_that_a_config_cannot_count_are_named(tmp_path: Path) -> None:
    small = uniform(hf("dinov2"), neuron=40)
    with pytest.raises(UnsupportedArchitecture, match=r"multiple of the width 24.*'neuron': 24\}"):
        vp.export(small, "hf", tmp_path / "hf")


def test_an_image_is_prepared_as_it_was_in_training(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import numpy as np
    from PIL import Image
    from timm.data import create_transform

    model = hf("vit")
    model.pretrained_cfg = PIXELS
    vp.export(model, "hf", tmp_path / "hf")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    transform: Any = create_transform(
        (3, 16, 16), mean=PIXELS["mean"], std=PIXELS["std"], crop_pct=0.5, interpolation="bilinear"
    )
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    got = processor(image, return_tensors="pt")["pixel_values"][0]
    # a step of 255 in the darkest channel: each rounds to bytes in its own way
    assert (got - transform(image)).abs().max() <= 2.1 / 255 / 0.4


@pytest.mark.parametrize(
    ("kept", "removed", "message"),
    [
        (
            {"vit.layers.1.attention.heads": [0, 1]},
            [],
            r"vit.layers.1.attention.heads keeps 2, vit.layers.0.attention.heads keeps 3; plan "
            "with allocation='uniform', or use onnx",
        ),
        (
            {"vit.layers.0.mlp.neurons": [0, 1]},
            [],
            r"vit.layers.1.mlp.neurons keeps 40, vit.layers.0",
        ),
        ({}, ["vit.layers.1.attention"], r"vit.layers.1 has no heads left; use onnx"),
        (
            {f"vit.layers.{i}.attention.qk_dims": [0, 1, 8, 9, 16, 17] for i in range(2)},
            [],
            "vit.layers.0.attention must be .* a ViTAttention, got a SlimSeparateAttention; use",
        ),
    ],
)
def test_a_ragged_model_is_refused_by_its_first_axis(
    kept: dict[str, list[int]], removed: list[str], message: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    model = hf("vit")
    small = vp.prune(model, vp.Plan.of(vp.describe(model), kept, removed))
    with pytest.raises(UnsupportedArchitecture, match=f"one where {message}"):
        vp.export(small, "hf", tmp_path / "hf")
    assert not list(tmp_path.iterdir())


# a deployer without us


BLOCKED = "import sys; sys.modules['vitprune_fast'] = None\n"


def opens_alone(folder: str, name: str, model: Any) -> str:
    """What a deployer writes, for a folder that the model's library opens, and for any other."""
    if Path(folder, "modeling_pruned.py").exists():
        return (
            f"sys.modules.pop('modeling_pruned', None); sys.path.insert(0, {folder!r})\n"
            f"from modeling_pruned import load\nmodel = load({folder!r})\n"
        )
    if name.startswith("hf"):
        return (
            f"from transformers import {type(model).__name__} as Class\n"
            f"model = Class.from_pretrained({folder!r}).eval()\n"
        )
    weights = f"checkpoint_path={folder + '/model.safetensors'!r}"
    return f"import timm; model = timm.create_model('local-dir:{folder}', {weights}).eval()\n"


def test_every_saved_folder_opens_without_us(tmp_path: Path) -> None:
    """Pruned, by the file beside the weights; dense, by the library alone where it can."""
    pytest.importorskip("transformers")
    code = BLOCKED + "import torch; from safetensors.torch import load_file\n"
    alone = set()
    for name in (*QUICK, "hf dinov2-giant"):
        dense = MODELS[name]()
        for kind, model in (("pruned", cut(name)), ("dense", dense)):
            folder = str(tmp_path / f"{name} {kind}".replace(" ", "-"))
            vp.save(model, folder)
            images = images_of(dense, 2)
            checked = {"images": images, "logits": says(model, images)}
            save_file(checked, f"{folder}/check.safetensors")
            code += opens_alone(folder, name, model) + (
                f"check = load_file({folder + '/check.safetensors'!r})\n"
                "out = model(check['images']); out = getattr(out, 'logits', out)\n"
                f"assert torch.equal(out, check['logits']), {folder!r}\n"
            )
            if not Path(folder, "modeling_pruned.py").exists():
                alone.add(f"{name} {kind}")
    assert alone == {f"{name} dense" for name in (*QUICK, "hf dinov2-giant")} - {
        "torchvision plain dense"
    }
    run_apart(code, tmp_path)


# timm, with us


@pytest.mark.parametrize("name", ["timm plain", "timm deit_distilled", "pvt b0", "cait"])
@pytest.mark.parametrize("is_cut", [True, False], ids=["pruned", "dense"])
def test_timm_opens_every_folder(name: str, is_cut: bool, tmp_path: Path) -> None:
    import timm

    model = cut(name, "head") if is_cut else MODELS[name]()
    images = images_of(model, 2)
    made = vp.export(model, "timm", tmp_path / "timm")
    assert made.gap == 0
    source: Any = {"checkpoint_path": str(tmp_path / "timm" / "model.safetensors")}
    opened = timm.create_model(f"local-dir:{made.path}", **source).eval()
    assert torch.equal(says(opened, images), says(model, images))
    other = timm.create_model(f"local-dir:{made.path}", num_classes=3, drop_rate=0.0).eval()
    assert says(other, images).shape == (2, 3)
    features = timm.create_model(f"local-dir:{made.path}", features_only=True, out_indices=(0, 1))
    maps = features.eval()(images)
    info: Any = features.feature_info
    assert [m.shape[1] for m in maps] == info.channels() and len(maps) == 2
    sides = [max(images.shape[2:]) / r for r in info.reduction()]
    assert all(abs(max(m.shape[2:]) - side) < 1 for m, side in zip(maps, sides, strict=True))


def test_a_pruned_model_of_timm_is_named_by_a_folder(tmp_path: Path) -> None:
    import timm

    assert {"vit_pruned", "cait_pruned", "pvt_v2_pruned"} <= {*timm.list_models()}
    with pytest.raises(InvalidInput, match="vit_pruned must be opened from a folder"):
        timm.create_model("vit_pruned")
    vp.save(cut("timm plain"), tmp_path)
    with pytest.raises(InvalidInput, match=r"options of vit_pruned must be .*, got embed_dim"):
        timm.create_model(f"local-dir:{tmp_path}", embed_dim=12)


@pytest.mark.parametrize("first", ["timm", "vitprune_fast"])
def test_names_are_registered_whichever_is_imported_first(first: str) -> None:
    second = ({"timm", "vitprune_fast"} - {first}).pop()
    code = (
        f"import importlib.util, sys, {first}\n"
        # a question whether it is there is no import
        "importlib.util.find_spec('timm')\n"
        "assert ('timm' in sys.modules) == (sys.argv[1] == 'timm')\n"
        "assert ('torch' in sys.modules) == (sys.argv[1] == 'timm')\n"
        f"import {second}, timm\n"
        "assert timm.is_model('vit_pruned')\n"
        "assert not [f for f in sys.meta_path if 'vitprune' in type(f).__module__]\n"
        "assert 'vitprune_fast.saved_models' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, first], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_size_of_images_can_be_said() -> None:
    model = random_pvt(dtype=F32)
    model.pretrained_cfg = {}
    with pytest.raises(InvalidInput, match="input_size"):
        vp.export(model, "pt2", "never.pt2")
    assert not Path("never.pt2").exists()


def test_a_model_of_any_size_goes_by_the_size_that_is_said(tmp_path: Path) -> None:
    model: nn.Module = random_pvt(dtype=F32)
    model.pretrained_cfg = {}  # pyright: ignore[reportArgumentType]
    vp.export(model, "pt2", tmp_path / "m.pt2", input_size=PVT_IMAGE)
    images = torch.randn(2, *PVT_IMAGE)
    assert_close(torch.export.load(tmp_path / "m.pt2").module()(images), says(model, images))


def test_what_is_no_regular_file_is_left_alone(tmp_path: Path) -> None:
    """Such as a device; a pipe stands for it."""
    os.mkfifo(tmp_path / "pipe.pt2")
    for format in ("pt2", "timm"):
        with pytest.raises(RunFolderError, match="got a device, a pipe or a socket"):
            vp.export(random_vit(dtype=F32, depth=1), format, tmp_path / "pipe.pt2")
    assert (tmp_path / "pipe.pt2").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe.pt2"]


def test_a_manifest_of_others_is_left_alone(tmp_path: Path) -> None:
    model = random_vit(dtype=F32, depth=1)
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(InvalidInput, match=r"with manifest\.json; take another folder"):
        vp.export(model, "timm", tmp_path)
    assert (tmp_path / "manifest.json").read_text() == '{"name": "an app"}'
    folder = tmp_path / "timm"
    vp.export(model, "timm", folder)
    (folder / "note.txt").write_text("mine")
    with pytest.raises(InvalidInput, match=r"with note\.txt; take another folder"):
        vp.export(model, "timm", folder)


def test_names_that_cannot_be_are_one_sentence(tmp_path: Path) -> None:
    model = random_vit(dtype=F32, depth=1)
    for name in (f"{'a' * 300}.pt2", "a\0b.pt2"):
        with pytest.raises(RunFolderError, match="must be"):
            vp.export(model, "pt2", tmp_path / name)
    # as long as a file system takes them
    vp.export(model, "pt2", tmp_path / f"{'a' * 251}.pt2")


def test_a_model_with_gates_is_refused(tmp_path: Path) -> None:
    model = random_vit(dtype=F32, depth=1)
    refused = pytest.raises(InvalidInput, match=r"^export: model .* got gates")
    with vp.gates.attach(model, init=0.5), refused:
        vp.export(model, "pt2", tmp_path / "m.pt2")
    vp.export(model, "pt2", tmp_path / "m.pt2")


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_what_wraps_a_model_is_taken_off(wrap: Any, tmp_path: Path) -> None:
    model = random_vit(dtype=F32, depth=1)
    assert vp.export(wrap(model), "timm", tmp_path / "timm").gap == 0
