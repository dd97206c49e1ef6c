"""Scores of transformers models are derivatives by real gates; the models come back unharmed."""

from __future__ import annotations

import contextlib
import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from integrations.gates import Gates
from integrations.huggingface import MLP, MODELS, batch_of, layers_of, model_of
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

import vitprune_fast as vp
from vitprune_fast.errors import InvalidInput, UnsupportedArchitecture
from vitprune_fast.structure import UNIT_KINDS


def gates_of(model: Any, batch: int) -> Gates:
    gates = Gates(batch)
    layers = layers_of(model)
    embed = gates.leaf("embed", 24)
    for layer in layers:
        qk = gates.attention(layer.heads, layer.out, 3)
        gates.after(layer.projections[0], lambda q, g=qk: q * g.flatten(1)[:, None])
        gates.neurons(layer.neurons, layer.last)
        for norm in layer.norms:
            gates.norm(norm, embed)
    gates.norm(getattr(model, model.base_model_prefix).layernorm, embed)
    gates.branches([layer.attention for layer in layers], [layer.mlp for layer in layers])
    return gates


@pytest.mark.parametrize("path", ["auto", "taps"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_of_every_unit_kind_are_gate_derivatives(name: str, path: Any) -> None:
    model = model_of(name)
    images, labels = batch_of()
    got = vp.score(model, [(images, labels)], units="all", per_sample=True, path=path).per_sample
    want = gates_of(model, len(images)).derivatives(
        lambda x: model(pixel_values=x).logits, images, labels
    )
    assert got.keys() == want.keys()
    assert {vp.describe(model).axes[name].kind for name in got} == set(UNIT_KINDS)
    for axis, value in want.items():
        # handed back in fp32
        assert (got[axis].double() - value).norm() <= 2**-23 * value.norm(), axis


@pytest.mark.parametrize("name", ["vit", "deit-teacher", "dinov2-giant"])
def test_leaving_out_units_one_by_one(name: str) -> None:
    model = model_of(name)
    images, labels = batch_of(3)
    got = vp.score(model, [(images, labels)], "loss", units="all", per_sample=True).per_sample
    want = gates_of(model, 3).damage(lambda x: model(pixel_values=x).logits, images, labels)
    assert got.keys() == want.keys()
    for axis, value in want.items():
        assert (got[axis].double() - value).norm() <= 2**-23 * value.norm(), axis


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_activation_of_branches_is_how_far_they_turn_the_stream(name: str) -> None:
    model = model_of(name)
    images, labels = batch_of(3)
    scores = vp.score(model, [(images, labels)], "activation", units="all")
    hidden = model(pixel_values=images, output_hidden_states=True).hidden_states
    turns = []
    for before, after in pairwise(hidden):
        turns.append(1 - nn.functional.cosine_similarity(before, after, dim=-1).mean())
    assert torch.allclose(scores["blocks"].double(), torch.stack(turns), rtol=1e-6)
    layer = layers_of(model)[0]
    written = layer.attention(layer.norms[0](hidden[0]))
    if isinstance(written, tuple):
        written = written[0]
    if name == "dinov2":
        written = layer.block.layer_scale1(written)
    turn = 1 - nn.functional.cosine_similarity(hidden[0], hidden[0] + written, dim=-1).mean()
    assert scores["attn_branches"][0].item() == pytest.approx(turn.item(), 1e-6)


@pytest.mark.parametrize("name", ["vit", "dinov2-giant"])
def test_the_model_comes_back_exactly_as_it_was(name: str) -> None:
    model = model_of(name).train()
    model.classifier.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]

    def batches():
        yield batch_of()
        raise KeyError("a batch that cannot be read")

    for stream in ([batch_of()], batches()):
        with contextlib.suppress(KeyError):
            vp.score(model, stream, units="all")
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        assert [m.training for m in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == trainable
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
            assert "forward" not in module.__dict__
        assert hasattr(model(pixel_values=batch_of()[0]), "logits")


def test_every_parameter_has_a_layout() -> None:
    for name in MODELS:
        model = model_of(name)
        structure = vp.describe(model)
        assert {n for n, _ in model.named_parameters()} == structure.tensors.keys()


def test_magnitude_needs_no_data() -> None:
    model = model_of("dinov2-giant")
    scores = vp.score(model, criterion="magnitude", reduction="group", units=("neuron",))
    layer = layers_of(model)[1]
    # the value of neuron 5 stands below all gates, or in a layer of its own
    rows = torch.cat([linear.weight for linear in layer.first])
    owned = (rows[5], rows[5 + layer.last.in_features], layer.last.weight[:, 5])
    got = scores["dinov2.encoder.layer.1.mlp.neurons"][5].item()
    assert got == pytest.approx(torch.cat(owned).norm().item(), 1e-6)


def test_other_models_are_refused() -> None:
    arguments: dict[str, Any] = MLP | {"decoder_hidden_size": 24, "decoder_num_attention_heads": 3}
    config = ViTMAEConfig(**arguments)
    with pytest.raises(UnsupportedArchitecture, match=r"one of timm.*, got ViTMAEForPreTraining"):
        vp.describe(ViTMAEForPreTraining(config))

    class ViTForImageClassification(nn.Module):
        """Another thing of the same name."""

    with pytest.raises(UnsupportedArchitecture):
        vp.describe(ViTForImageClassification())
    model = model_of()
    layers_of(model)[1].block.attention = nn.Identity()
    wanted = (
        r"\.1\.attention must have q_proj, .*; or attention\.query, .*, got Identity with other"
    )
    with pytest.raises(UnsupportedArchitecture, match=wanted):
        vp.describe(model)
    for name in ("layers", "encoder"):
        if hasattr(model.vit, name):
            delattr(model.vit, name)
    with pytest.raises(UnsupportedArchitecture, match=r"vit must have layers; or encoder\.layer, "):
        vp.describe(model)
    with pytest.raises(InvalidInput, match="units must be among"):
        vp.score(model_of(), [batch_of()], units=("heads",))
    assert isinstance(vp.score(model_of(), [batch_of()]), vp.Scores)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_older_versions_are_refused_by_prune(name: str) -> None:
    model = model_of(name)
    structure = vp.describe(model)
    plan = vp.Plan.of(structure, {structure.units("head")[0].name: [1]})
    if layers_of(model)[0].tells_head_dim:
        assert vp.describe(vp.prune(model, plan)).units("head")[0].size == 1
        return
    with pytest.raises(UnsupportedArchitecture, match=r"transformers must be 5\.18 or later"):
        vp.prune(model, plan)
