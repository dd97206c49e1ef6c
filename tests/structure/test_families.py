"""A family of one's own goes through every stage, saving included."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitprune_fast as vp
from vitprune_fast import modeling_pruned
from vitprune_fast.structure import Family, Structure, families
from vitprune_fast.structure.builder import Builder


class Ease(nn.Module):
    """One branch of a block."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Step(nn.Module):
    """Two branches, like a transformer block of MLPs alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_a, self.a_mlp = nn.LayerNorm(width), Ease(width, 2 * width)
        self.norm_b, self.b_mlp = nn.LayerNorm(width), Ease(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a_mlp(self.norm_a(x))
        return x + self.b_mlp(self.norm_b(x))


class Toy(nn.Module):
    """Its constructor always makes four blocks."""

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.width = width
        self.stem = nn.Linear(12, width)
        self.steps = nn.ModuleList(Step(width) for _ in range(4))
        self.register_buffer("shift", torch.zeros(width), persistent=False)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.flatten(1)) + self.shift
        for step in self.steps:
            x = step(x)
        return self.head(x)


def describe(model: Any, image: tuple[int, int] | None) -> Structure:
    height, width = image or (2, 2)
    t = Builder(model, "Toy", (3, height, width))
    embed = t.axis("embed", model.width, "embed")
    t.attr("", width=embed)
    t.linear("stem", embed, 12, 1)
    t.tensor("shift", embed)
    t.stem(embed, "stem.bias")
    for number, step in enumerate(model.steps):
        path = f"steps.{number}"
        for side in ("a", "b"):
            core, norm = f"{path}.{side}_mlp", f"{path}.norm_{side}"
            if not hasattr(step, f"{side}_mlp"):
                continue
            t.norm(norm, embed)
            neurons = t.axis(
                f"{core}.neurons", getattr(step, f"{side}_mlp").up.out_features, "neuron"
            )
            t.linear(f"{core}.up", neurons, embed, 1)
            t.linear(f"{core}.down", embed, neurons, 1)
            t.tap(neurons, f"{core}.down", neurons)
            t.reader(embed, core, norm)
            t.branch(core, embed, "mlp_branch", neurons, out=f"{core}.down", norm=norm)
    t.linear("head", model.head.out_features, embed, 1)
    t.reader(embed, "head")
    return t.finish()


def construct(model: Any) -> families.ConstructorCall:
    args = {"width": model.width, "classes": model.head.out_features}
    return {"class": families.qualified(Toy), "args": args}


FAMILY = Family(
    describe,
    construct,
    images=lambda _: (3, None, None),
    blocks=lambda _: ("steps",),
    halves=lambda _, core: (f"norm_{core[0]}", core),
)


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    monkeypatch.setattr(families, "REGISTERED", {})


def toy() -> Any:
    torch.manual_seed(0)
    model: Any = Toy().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) / 2
    model.shift.copy_(torch.randn(8))
    return model


def test_a_family_of_ones_own_is_pruned_and_saved(tmp_path: Path) -> None:
    model, images = toy(), torch.randn(4, 3, 2, 2)
    with pytest.raises(vp.UnsupportedArchitecture, match=r"must be one of timm .* got Toy"):
        vp.describe(model)
    vp.register_family(Toy, FAMILY)
    assert families.stated_shape(model) == (3, None, None)
    batch = (images, torch.tensor([0, 1, 2, 0]))
    report = vp.check_structure(model)
    assert report.ok, str(report)
    assert vp.describe(model).depth == 4
    scores = vp.score(model, [batch], units=("neuron",))
    assert len(scores) == 8 and all(torch.count_nonzero(each) for each in scores.values())
    kept = {
        "embed": [0, 1, 2, 4, 7],
        "steps.0.a_mlp.neurons": [1, 3],
        "steps.3.b_mlp.neurons": list(range(9)),
    }
    removed = ["steps.1.a_mlp", "steps.1.b_mlp", "steps.2.a_mlp"]
    plan = vp.Plan.of(vp.describe(model), kept, removed)
    pruned: Any = vp.prune(model, plan)
    assert [type(step).__name__ for step in pruned.steps] == ["Step", "HalfBlock", "Step"]
    vp.save(pruned, tmp_path)
    for again in (vp.load(tmp_path), modeling_pruned.load(tmp_path, classes=[Toy])):
        assert torch.equal(again(images), pruned(images)) and str(again) == str(pruned)
    spec = json.loads((tmp_path / "config.json").read_text())["vitprune_fast"]
    assert spec["deleted"] == ["steps.3"]
    assert spec["halves"] == {"steps.1": {"chain": ["norm_b", "b_mlp"], "core": "b_mlp"}}


def test_a_class_that_nobody_registered_opens_nowhere(tmp_path: Path) -> None:
    vp.register_family(Toy, FAMILY)
    vp.save(toy(), tmp_path)
    with pytest.raises(ValueError, match=r"Toy' is no module class of timm\.models"):
        modeling_pruned.load(tmp_path)
    del families._FAMILIES[families.qualified(Toy)]
    with pytest.raises(vp.DamagedFile, match="Toy"):
        vp.load(tmp_path)


@pytest.mark.parametrize("wrong", ["Toy", 3, Path, nn.Linear(1, 1)], ids=str)
def test_what_is_no_class_is_refused(wrong: Any) -> None:
    with pytest.raises(vp.InvalidInput, match="register_family: model_class must be"):
        vp.register_family(wrong, FAMILY)


def test_what_is_no_family_is_refused() -> None:
    name: Any = "timm_vit"
    with pytest.raises(vp.InvalidInput, match="family must be a Family, got 'timm_vit'"):
        vp.register_family(Toy, name)


def test_no_library_is_imported_before_a_model_of_it_is_met() -> None:
    script = """
import sys
from vitprune_fast.structure import families
import vitprune_fast.modeling_pruned
assert not {"timm", "transformers", "torchvision"} & {n.partition(".")[0] for n in sys.modules}
assert families.named("timm.models.vision_transformer.VisionTransformer").describe
assert "timm" in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
