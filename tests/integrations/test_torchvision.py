"""Scores of torchvision's ViT are derivatives by real gates; its attention is only lent out."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from integrations.gates import Gates
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer, resnet18
from torchvision.models.vision_transformer import ConvStemConfig

import vitprune_fast as vp
from vitprune_fast.errors import UnsupportedArchitecture
from vitprune_fast.structure import UNIT_KINDS, families
from vitprune_fast.testing import randomise

SMALL: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "num_layers": 2,
    "num_heads": 3,
    "hidden_dim": 24,
    "mlp_dim": 40,
    "num_classes": 5,
}
STEM = [ConvStemConfig(8, 3, 4), ConvStemConfig(16, 3, 2)]
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pre_logits": {"representation_size": 12},
    "conv_stem": {"conv_stem_configs": STEM},
    "dropout": {"dropout": 0.2, "attention_dropout": 0.2},
}


def model_of(name: str = "plain", dtype: torch.dtype = torch.float64) -> Any:
    return randomise(VisionTransformer(**SMALL, **MODELS[name]).to(dtype).eval(), 0)


def batch_of(size: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.arange(size) % 5


class GatedAttention(nn.Module):
    """What nn.MultiheadAttention computes, written out, with gates on every unit."""

    def __init__(self, module: nn.MultiheadAttention, gates: Gates, path: str):
        super().__init__()
        self.module = module
        self.head = gates.leaf(f"{path}.heads", 3)
        self.v_dim = gates.leaf(f"{path}.v_dims", 3, 8)
        self.qk_dim = gates.leaf(f"{path}.qk_dims", 3, 8)

    def forward(self, x: Tensor, *_: Any, need_weights: bool) -> tuple[Tensor, None]:
        module = self.module
        projected = F.linear(x, module.in_proj_weight, module.in_proj_bias)
        q, k, v = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in projected.chunk(3, -1))
        scores = torch.einsum("bhnk,bhk,bhmk->bhnm", q, self.qk_dim, k) / math.sqrt(8)
        out = torch.einsum("bhnm,bhmk->bnhk", scores.softmax(-1), v)
        gated = out * (self.head[:, :, None] * self.v_dim)[:, None]
        return module.out_proj(gated.flatten(2)), None


def gates_of(model: Any, batch: int) -> tuple[Any, Gates]:
    """A copy of the model with gates."""
    model, gates = copy.deepcopy(model), Gates(batch)
    embed = gates.leaf("embed", 24)
    blocks = list(model.encoder.layers)
    for name, block in model.encoder.layers.named_children():
        path = f"encoder.layers.{name}"
        block.self_attention = GatedAttention(block.self_attention, gates, f"{path}.self_attention")
        gates.neurons(f"{path}.mlp", block.mlp[3])
        for norm in (block.ln_1, block.ln_2):
            gates.norm(norm, embed)
    gates.norm(model.encoder.ln, embed)
    gates.branches([b.self_attention for b in blocks], [b.mlp for b in blocks])
    return model, gates


@pytest.mark.parametrize("path", ["auto", "taps"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_of_every_unit_kind_are_gate_derivatives(name: str, path: Any) -> None:
    model = model_of(name)
    images, labels = batch_of()
    got = vp.score(model, [(images, labels)], units="all", per_sample=True, path=path).per_sample
    gated, gates = gates_of(model, len(images))
    want = gates.derivatives(gated, images, labels)
    assert got.keys() == want.keys()
    assert {vp.describe(model).axes[name].kind for name in got} == set(UNIT_KINDS)
    for axis, value in want.items():
        # handed back in fp32
        assert (got[axis].double() - value).norm() <= 2**-23 * value.norm(), axis


def test_leaving_out_units_one_by_one() -> None:
    model = model_of()
    images, labels = batch_of(3)
    got = vp.score(model, [(images, labels)], "loss", units="all", per_sample=True).per_sample
    gated, gates = gates_of(model, 3)
    want = gates.damage(gated, images, labels)
    assert got.keys() == want.keys()
    for axis, value in want.items():
        assert (got[axis].double() - value).norm() <= 2**-23 * value.norm(), axis


def test_magnitude_and_activation() -> None:
    model = model_of()
    scores = vp.score(model, criterion="magnitude", reduction="group", units=("head",))
    attention = model.encoder.layers[1].self_attention
    rows = attention.in_proj_weight.view(3, 3, 8, 24)[:, 2].flatten()
    owned = torch.cat([rows, attention.out_proj.weight[:, 16:].flatten()])
    name = "encoder.layers.encoder_layer_1.self_attention.heads"
    assert scores[name][2].item() == pytest.approx(owned.norm().item(), 1e-6)
    sizes = vp.score(model, [batch_of()], "activation", units=("qk_dim", "neuron"))
    assert len(sizes) == 4 and all((values > 0).all() for values in sizes.values())


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_visible_attention_computes_the_same(dtype: torch.dtype, gradients: bool) -> None:
    """Also without gradients, where PyTorch takes its fused path."""
    model = model_of(dtype=dtype)
    images, _ = batch_of(dtype=dtype)
    with torch.set_grad_enabled(gradients):
        usual = model(images)
        with families.opened(model, vp.describe(model)):
            visible = model(images)
        exact = model_of()(images.double())
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    largest = exact.abs().max().clamp(min=1)
    assert (visible - usual).abs().max() <= bound * largest
    assert (visible - exact).abs().max() <= bound * largest


def test_hooks_see_q_k_v_and_what_enters_the_output_projection() -> None:
    model = model_of()
    attention = model.encoder.layers[0].self_attention
    seen: dict[str, Tensor] = {}
    attention.out_proj.register_forward_pre_hook(lambda _, x: seen.update(out=x[0]))
    model(batch_of()[0])
    assert not seen
    with families.opened(model, vp.describe(model)):
        attention.in_proj.register_forward_hook(lambda _, x, y: seen.update(qkv=y))
        model(batch_of()[0])
    assert seen["qkv"].shape == (4, 5, 72) and seen["out"].shape == (4, 5, 24)


def test_attention_that_is_visible_already_stays_so() -> None:
    model = model_of()

    def visible() -> list[bool]:
        return [hasattr(m, "in_proj") for m in model.modules() if hasattr(m, "in_proj_weight")]

    with families.opened(model, vp.describe(model)):
        with families.opened(model, vp.describe(model)):
            pass
        assert visible() and all(visible())
    assert not any(visible())


@pytest.mark.parametrize("fails", [False, True], ids=["normally", "after an exception"])
def test_the_model_comes_back_exactly_as_it_was(fails: bool) -> None:
    model = model_of("dropout").train()
    own = model.encoder.layers[1].self_attention
    lent = own.forward = lambda *inputs, **options: nn.MultiheadAttention.forward(
        own, *inputs, **options
    )
    before = copy.deepcopy(model.state_dict())
    names = [n for n, _ in model.named_modules()]

    def batches():
        yield batch_of()
        if fails:
            raise KeyError

    if fails:
        with pytest.raises(KeyError):
            vp.score(model, batches())
    else:
        vp.score(model, batches())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [n for n, _ in model.named_modules()] == names
    assert all(m.training for m in model.modules())
    assert own.__dict__["forward"] is lent
    assert "forward" not in model.encoder.layers[0].self_attention.__dict__
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_every_parameter_has_a_layout() -> None:
    for name in MODELS:
        model = model_of(name)
        tensors = {*dict(model.named_parameters()), *dict(model.named_buffers())}
        assert tensors == vp.describe(model).tensors.keys()


def test_other_models_are_refused() -> None:
    with pytest.raises(UnsupportedArchitecture, match="got ResNet"):
        vp.describe(resnet18())
    model = model_of()
    block = model.encoder.layers[1]
    block.self_attention = nn.MultiheadAttention(24, 3, kdim=12, vdim=12, batch_first=True)
    with pytest.raises(UnsupportedArchitecture, match=r"layer_1\.self_attention must be nn.Multi"):
        vp.describe(model)
    model.encoder.layers[1] = nn.Identity()
    with pytest.raises(UnsupportedArchitecture, match=r"layer_1 must be an EncoderBlock"):
        vp.describe(model)
    model = model_of()
    attention, x = model.encoder.layers[0].self_attention, torch.randn(1, 5, 24).double()
    with families.opened(model, vp.describe(model)):
        for arguments in ({}, {"need_weights": False, "attn_mask": torch.zeros(5, 5).double()}):
            with pytest.raises(ValueError, match="on one tensor"):
                attention(x, x, x, **arguments)
