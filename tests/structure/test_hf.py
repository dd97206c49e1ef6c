"""Classifiers of transformers go through every stage as timm's do."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.huggingface import BACKBONES, MODELS, batch_of, layers_of, model_of
from torch import Tensor, nn
from torch.nn import functional as F

import vitprune_fast as vp
from tests.plans import KINDS, draw_plan
from tests.structure.cuts import (
    assert_dims_save_what_they_cost,
    assert_prunes,
    gap,
    half_of_the_dims,
    says,
)
from vitprune_fast import modeling_pruned
from vitprune_fast.batches import logits_of
from vitprune_fast.distill import DistillConfig
from vitprune_fast.errors import DamagedFile, InvalidInput, UnsupportedArchitecture
from vitprune_fast.modeling_pruned import Constant, SlimSeparateAttention
from vitprune_fast.planning import Plan
from vitprune_fast.surgery.folds import fold_attention_biases

SOME = ("vit", "deit-teacher", "dinov2-giant", "dinov2-registers")


def uniform(structure: vp.Structure, **counts: int) -> Plan:
    """The first so many units of every axis of a kind."""
    kept = {a.name: range(counts[a.kind]) for a in structure.axes.values() if a.kind in counts}
    return Plan.of(structure, kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_pruned_equals_masked_and_comes_back_from_files(
    name: str, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, (images, _) = model_of(name, dtype), batch_of(2, dtype)
    pruned, got = assert_prunes(model, images, kind, f"{name} {kind}")
    vp.save(pruned, tmp_path)
    assert torch.equal(says(vp.load(tmp_path), images), got)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_is_pruned_and_comes_back_from_files(name: str, tmp_path: Path) -> None:
    model, (images, _) = model_of(name), batch_of(2)
    report = vp.check_structure(model)
    assert report.ok, report
    structure = vp.describe(model)
    for kind in ("embed", "mixture"):
        pruned = vp.prune(model, draw_plan(structure, kind, random.Random(0)))
        vp.save(pruned, tmp_path / kind)
        got, want = vp.load(tmp_path / kind)(images), pruned(images)
        assert torch.equal(got.last_hidden_state, want.last_hidden_state)
        assert (want.pooler_output is None) == (got.pooler_output is None)
        if want.pooler_output is not None:
            assert torch.equal(got.pooler_output, want.pooler_output)


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_that_keeps_everything_changes_no_bit(name: str) -> None:
    model, (images, _) = model_of(name), batch_of(2)
    pruned = vp.prune(model, Plan.of(vp.describe(model), {}))
    assert pruned.config.to_dict() == model.config.to_dict()
    want = dict(model.named_parameters())
    assert all(torch.equal(p, want[n]) for n, p in pruned.named_parameters())
    assert torch.equal(says(pruned, images), says(model, images))


@pytest.mark.parametrize("name", SOME)
def test_the_table_of_a_pruned_model_has_the_sizes_of_the_plan(name: str) -> None:
    model = model_of(name)
    structure = vp.describe(model)
    pruned = vp.prune(model, uniform(structure, head=2, neuron=8, embed=16))
    sizes = {"head": 2, "qk_dim": 16, "v_dim": 16, "neuron": 8, "embed": 16}
    found = vp.describe(pruned)
    assert found.axes.keys() == structure.axes.keys()
    for axis in found.axes.values():
        assert axis.size == sizes.get(axis.kind, structure.axes[axis.name].size)
    assert pruned.config.hidden_size == 16 and pruned.config.num_attention_heads == 2
    # one config for all modules, and another than that of the dense model
    assert layers_of(pruned)[1].attention.config is pruned.config
    assert model.config.hidden_size == 24


TOKENS = {"vit": 5, "vit-eager": 5, "deit-teacher": 6, "dinov2-giant": 5, "dinov2-registers": 9}


@pytest.mark.parametrize("kind", ["qk_dim", "v_dim"])
@pytest.mark.parametrize("name", TOKENS)
def test_dims_alone_save_what_they_cost(name: str, kind: str) -> None:
    pruned = assert_dims_save_what_they_cost(model_of(name), kind, layers=2, tokens=TOKENS[name])
    assert all(type(each.attention) is SlimSeparateAttention for each in layers_of(pruned))
    # it has no word for two widths, and tells none that is wrong
    assert not hasattr(pruned.config, "head_dim")


@pytest.mark.parametrize(("name", "kind"), [("vit", "qk_dim"), ("dinov2-registers", "v_dim")])
def test_a_model_of_two_widths_is_one_like_any_other(name: str, kind: str, tmp_path: Path) -> None:
    model, (images, _) = model_of(name), batch_of(2)
    pruned = vp.prune(model, half_of_the_dims(vp.describe(model), kind))
    report = vp.check_structure(pruned, plans=1)
    assert report.ok, str(report)
    vp.save(pruned, tmp_path)
    for again in (vp.load(tmp_path), modeling_pruned.load(tmp_path)):
        assert torch.equal(says(again, images), says(pruned, images)) and str(again) == str(pruned)


def test_a_model_of_two_widths_compiles_and_exports() -> None:
    model, (images, _) = model_of(), batch_of(2)
    pruned = vp.prune(model, half_of_the_dims(vp.describe(model), "qk_dim"))
    compiled: Any = torch.compile(pruned, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(pruned, (images,)).module()
    for other in (compiled, exported):
        assert gap(says(other, images), says(pruned, images)) <= 1e-12


def test_weights_of_attention_are_refused_where_they_would_be_lost() -> None:
    model, (images, _) = model_of("vit-eager"), batch_of(2)
    pruned: Any = vp.prune(model, half_of_the_dims(vp.describe(model), "v_dim"))
    assert len(pruned(images, output_hidden_states=True).hidden_states) == 3
    with pytest.raises(ValueError, match="attention: output_attentions must be off"):
        pruned(images, output_attentions=True)
    pruned.config.output_attentions = True
    with pytest.raises(ValueError, match="attention: output_attentions must be off"):
        pruned(images)
    assert pruned(images, output_attentions=False).logits.isfinite().all()


@pytest.mark.parametrize("name", SOME)
def test_scores_are_finite_differences(name: str) -> None:
    """Of heads and neurons, by what their output projections read."""
    model, (images, labels) = model_of(name), batch_of(2)
    scores = vp.score(model, [(images, labels)], per_sample=True).per_sample
    structure, step = vp.describe(model), 1e-5
    for name, rows in scores.items():
        tap, size = structure.taps[name], structure.axes[name].size
        projection: nn.Linear = model.get_submodule(tap.module)
        columns = torch.arange(projection.in_features).view(size, -1)[1]
        losses = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            moved.get_submodule(tap.module).weight.data[:, columns] *= 1 + sign * step
            losses.append(F.cross_entropy(says(moved, images), labels, reduction="none"))
        want = (losses[0] - losses[1]) / (2 * step)
        # truncation is step^2, rounding 2^-52 / step; scores are handed back in fp32
        assert (rows[:, 1].double() - want).abs().max() <= 1e-7 * max(1, want.abs().max())


@pytest.mark.parametrize("name", SOME)
def test_what_goes_with_a_model_goes_with_it(name: str) -> None:
    """Optimizer and average come along, a sweep runs, and what is left can be trained further."""
    model, (images, labels) = model_of(name, torch.float32), batch_of(8, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    F.cross_entropy(logits_of(model(images)), labels).backward()
    optimizer.step()
    plan = draw_plan(vp.describe(model), "mixture", random.Random(5))
    average, calibration = copy.deepcopy(model), [torch.randn(240, 3, 16, 16)]
    pruned, moved, ema, report = vp.prune(model, plan, optimizer, average, calibration, report=True)
    assert report.fits
    assert [p.shape for p in ema.parameters()] == [p.shape for p in pruned.parameters()]
    logits_of(pruned(images)).sum().backward()
    moved.step()
    before = vp.evaluate(pruned, [(images, labels)], model)
    assert before.samples == 8 and before.agreement is not None
    # the learning rate follows from what the models say
    config = DistillConfig(epochs=1, mixup=0.2)
    result = vp.distill(pruned, model, [(images, labels)], None, config)
    assert result.history[-1]["kd"] > 0
    assert vp.latency(pruned, seconds=0, min_runs=1).runs == 1


@pytest.mark.parametrize("name", SOME)
def test_what_the_library_leaves_on_a_model_is_no_obstacle(name: str, tmp_path: Path) -> None:
    model, (images, _) = model_of(name), batch_of()
    # puts hooks on it for good
    model(images, output_hidden_states=True)
    model.gradient_checkpointing_enable()
    vp.save(model, tmp_path / "model")
    assert torch.equal(vp.load(tmp_path / "model")(images).logits, model(images).logits)


@pytest.mark.parametrize("name", SOME)
def test_gates_and_the_live_part(name: str) -> None:
    model, (images, _) = model_of(name), batch_of(2)
    structure = vp.describe(model)
    plan = draw_plan(structure, "head", random.Random(3))
    with vp.mask(model, plan):
        want = says(model, images)
    with vp.gates.attach(model, ("head",), "fixed", init=plan):
        assert gap(says(model, images), want) <= 1e-12
    emptied = Plan.of(structure, {structure.units("head")[0].name: []})
    with vp.mask(model, emptied):
        want = says(model, images)
    soft = vp.SoftCompaction(model, emptied)
    assert any(isinstance(module, Constant) for module in soft.model.modules())
    logits = logits_of(soft.refresh()(images))
    assert gap(logits.detach(), want) <= 1e-12
    logits.sum().backward()
    soft.scatter()


def test_names_of_labels_are_saved(tmp_path: Path) -> None:
    model = model_of(dtype=torch.float32)
    model.config.id2label = dict(enumerate(("class", "device", "c", "d", "e")))
    model.config.label2id = {label: number for number, label in model.config.id2label.items()}
    vp.save(model, tmp_path)
    again: Any = vp.load(tmp_path)
    assert again.config.id2label == model.config.id2label
    assert again.config.label2id == model.config.label2id
    assert type(model).from_pretrained(tmp_path).config.id2label == model.config.id2label


def test_what_a_model_hands_back_beside_logits_is_saved(tmp_path: Path) -> None:
    model, (images, _) = model_of("vit-eager", torch.float32), batch_of(2, torch.float32)
    model.config.output_attentions = model.config.output_hidden_states = True
    pruned: Any = vp.prune(model, uniform(vp.describe(model), head=2))
    vp.save(pruned, tmp_path)
    again: Any = vp.load(tmp_path)
    for name in ("attentions", "hidden_states"):
        want, got = (getattr(each(images), name) for each in (pruned, again))
        assert len(want) and all(map(torch.equal, want, got)), name


def test_a_constant_that_stands_for_attention_is_saved(tmp_path: Path) -> None:
    model, (images, _) = model_of(), batch_of(2)
    structure = vp.describe(model)
    emptied = Plan.of(structure, {structure.units("head")[0].name: []})
    soft = vp.SoftCompaction(model, emptied).model
    vp.save(soft, tmp_path)
    assert torch.equal(says(vp.load(tmp_path), images), says(soft, images))


@pytest.mark.parametrize("name", SOME)
def test_biases_of_attention_fold(name: str) -> None:
    model, (images, _) = model_of(name), batch_of(2)
    before = says(model, images)
    # keys and values, of two layers of 24
    assert fold_attention_biases(model) == 2 * 2 * 24
    assert gap(says(model, images), before) <= 1e-12
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith("k_proj.bias"))


@pytest.mark.parametrize("name", SOME)
def test_transformers_opens_what_its_config_can_say(name: str, tmp_path: Path) -> None:
    model, (images, _) = model_of(name, torch.float32), batch_of(2, torch.float32)
    # 24 neurons of a stream of 24; a SwiGLU's number follows from the width
    counts = {"head": 2, "block": 1} | ({} if name == "dinov2-giant" else {"neuron": 24})
    pruned = vp.prune(model, uniform(vp.describe(model), **counts))
    vp.save(pruned, tmp_path)
    assert not (tmp_path / "modeling_pruned.py").exists()
    opened = type(pruned).from_pretrained(tmp_path)
    assert torch.equal(says(opened, images), says(pruned, images))
    assert opened.config.head_dim == 8 and opened.config.num_hidden_layers == 1


def test_a_ragged_model_is_opened_without_us(tmp_path: Path) -> None:
    model, (images, _) = model_of("vit-eager", torch.float32), batch_of(2, torch.float32)
    plan = draw_plan(vp.describe(model), "mixture", random.Random(5))
    pruned = vp.prune(model, plan)
    vp.save(pruned, tmp_path)
    assert (tmp_path / "modeling_pruned.py").exists()
    opened = modeling_pruned.load(tmp_path)
    assert torch.equal(says(opened, images), says(pruned, images))
    # how attention is computed decides the last bits
    assert opened.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "changes",
    [
        {"class": "transformers.models.vit.modeling_vit.ViTModel"},
        {"class": "transformers.models.vit.configuration_vit.logging"},
        {"class": "os.config"},
        {"attn_implementation": "someone/kernels"},
        {"_attn_implementation": "someone/kernels"},
        {"auto_map": {"AutoModel": "theirs.Model"}},
        {"dtype": "load"},
        # of another kind than the library itself checks for
        {"hidden_size": "x"},
        {"hidden_act": ["gelu"]},
    ],
    ids=str,
)
def test_a_config_of_strangers_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    vp.save(model_of(dtype=torch.float32), tmp_path)
    (tmp_path / "manifest.json").unlink()
    text = json.loads((tmp_path / "config.json").read_text())
    text["vitprune_fast"]["args"]["config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(text))
    from vitprune_fast.files import write_manifest

    write_manifest(tmp_path, ["config.json", "model.safetensors"])
    with pytest.raises(DamagedFile):
        vp.load(tmp_path)


def test_labels_of_another_kind_are_refused() -> None:
    model, batches = model_of(), [batch_of(2)]
    model.config.problem_type = "multi_label_classification"
    for verb in (
        lambda: vp.score(model, batches),
        lambda: vp.evaluate(model, batches),
        lambda: vp.distill(model, None, batches, None, DistillConfig(epochs=1)),
    ):
        with pytest.raises(InvalidInput, match=r"loss must be 'bce' or a function .*multi_label"):
            verb()
    # needs no loss
    assert vp.score(model, batches, "activation")


class _Adapted(nn.Linear):
    """As a LoRA layer: ``.weight`` is that of the base, and what it computes is more."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias
        self.base_layer: Any = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_layers_that_compute_by_more_than_their_weight_are_refused() -> None:
    model = model_of()
    attention = layers_of(model)[0].attention
    attention.q_proj = _Adapted(attention.q_proj)
    with pytest.raises(
        UnsupportedArchitecture, match=r"_Adapted at .*q_proj; pass what merge_and_unload\("
    ):
        vp.describe(model)


class _Attention(nn.Identity):
    """A part that some program of somebody's put in."""


def test_parts_of_others_are_refused() -> None:
    model = model_of()
    layers_of(model)[1].block.attention = _Attention()
    with pytest.raises(
        UnsupportedArchitecture, match=r"\.1 must be made of parts of .*_Attention$"
    ):
        vp.describe(model)


def test_only_dinov2_takes_images_of_another_size() -> None:
    with pytest.raises(InvalidInput, match="input_size must be that of the config, 16 x 16"):
        vp.describe(model_of(), 24)
    model = model_of("dinov2-registers")
    assert vp.cost(model, 24).macs == vp.predict_cost(vp.describe(model, 24)).macs
    with pytest.raises(InvalidInput, match="at least one patch"):
        vp.describe(model, 4)
