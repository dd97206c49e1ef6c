"""Leaving one out in batches equals masking one unit at a time, and disturbs nothing."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.error_budget import assert_within_budget
from vitprune_fast.errors import InvalidInput
from vitprune_fast.planning import Plan
from vitprune_fast.scoring.ablation import leave_one_out
from vitprune_fast.structure import UNIT_KINDS, Structure, describe
from vitprune_fast.surgery import mask
from vitprune_fast.testing import VITS, random_images, random_vit

# small enough for one forward per unit: 2 blocks, 3 heads of 4 dims, 18 neurons, 12 channels
SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 12, "mlp_ratio": 1.5}
Scores = dict[str, Tensor]


def batch_of(model: Any, size: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    return random_images(model, size, seed=seed), torch.arange(size) % model.num_classes


def axes_of(structure: Structure, *kinds: str) -> list[Any]:
    return [axis for axis in structure.axes.values() if axis.kind in (kinds or UNIT_KINDS)]


def scores_of(model: Any, batch: tuple, measure: Any, *kinds: str, candidates: int = 32) -> Scores:
    structure = describe(model)
    axes = axes_of(structure, *kinds)
    return dict(leave_one_out(model, structure, axes, measure, candidates)(*batch))


def damage(full: Tensor, masked: Tensor, labels: Tensor, measure: str) -> Tensor:
    full, masked = full.double(), masked.double()
    if measure == "loss":
        before = F.cross_entropy(full, labels, reduction="none")
        return F.cross_entropy(masked, labels, reduction="none") - before
    p = full.softmax(-1)
    return (p * (full.log_softmax(-1) - masked.log_softmax(-1))).sum(-1)


@torch.no_grad()
def one_by_one(model: Any, batch: tuple, *kinds: str) -> tuple[Scores, Scores]:
    """Loss and KL by the definition: one masked forward per unit."""
    images, labels = batch
    structure, full = describe(model), model(images)
    loss, kl = {}, {}
    for axis in axes_of(structure, *kinds):
        logits = []
        for unit in range(axis.size):
            kept = [u for u in range(axis.size) if u != unit]
            with mask(model, Plan.of(structure, {axis.name: kept})):
                logits.append(model(images))
        loss[axis.name] = torch.stack([damage(full, z, labels, "loss") for z in logits], 1)
        kl[axis.name] = torch.stack([damage(full, z, labels, "kl") for z in logits], 1)
    return loss, kl


@pytest.fixture(autouse=True)
def ragged_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``mask`` take plans that no box could hold: the loss of one unit is defined for all."""
    module = importlib.import_module("vitprune_fast.surgery.mask")
    known = module.describe
    monkeypatch.setattr(module, "describe", lambda m: replace(known(m), unpaddable=set()))


@pytest.mark.parametrize("config", VITS)
def test_equals_one_mask_at_a_time(config: str) -> None:
    """In fp64 to its rounding; in fp32 to twice the error of the masked forwards themselves."""
    model = random_vit(config, dtype=torch.float32, **SMALL)
    batch = batch_of(model)
    got32 = {measure: scores_of(model, batch, measure) for measure in ("loss", "kl")}
    loop32 = dict(zip(("loss", "kl"), one_by_one(model, batch), strict=True))
    model.double()
    batch = (batch[0].double(), batch[1])
    exact = dict(zip(("loss", "kl"), one_by_one(model, batch), strict=True))
    kinds = {axis.kind for axis in describe(model).axes.values()}
    assert kinds == set(UNIT_KINDS)
    for measure, want in exact.items():
        got = scores_of(model, batch, measure)
        assert list(got) == list(want) == list(describe(model).axes)
        for name, value in want.items():
            assert got[name].dtype == torch.float64
            assert (got[name] - value).norm() <= 1e-10 * value.norm(), name
        # in every axis at once: one axis alone has too few values for a fair largest error
        assert all(value.dtype == torch.float32 for value in got32[measure].values())
        assert_within_budget(_flat(got32[measure]), _flat(loop32[measure]), _flat(want))


def _flat(scores: Scores) -> Tensor:
    return torch.cat([value.flatten() for value in scores.values()])


@pytest.mark.parametrize("measure", ["loss", "kl"])
@pytest.mark.parametrize("candidates", [1, 5, 7, 1000])
def test_any_number_of_candidates_at_once(candidates: int, measure: str) -> None:
    model = random_vit("qk_norm", **SMALL)
    batch = batch_of(model)
    want = scores_of(model, batch, measure)
    got = scores_of(model, batch, measure, candidates=candidates)
    for name in want:
        assert (got[name] - want[name]).norm() <= 1e-12 * want[name].norm()


def test_no_more_rows_than_asked_for_and_no_block_before_the_candidates() -> None:
    model = random_vit(depth=3, embed_dim=12)
    images, labels = batch_of(model, 2)
    rows: dict[str, list[int]] = {"stem": [], "first": [], "second": [], "last": []}
    model.patch_embed.register_forward_hook(lambda *a: rows["stem"].append(len(a[2])))
    for name, block in zip(("first", "second", "last"), model.blocks, strict=True):
        block.mlp.fc1.register_forward_hook(lambda *a, name=name: rows[name].append(len(a[2])))
    structure = describe(model)
    axes = [structure.axes["blocks.1.mlp.neurons"]]
    leave_one_out(model, structure, axes, "loss", candidates=20)(images, labels)
    # 48 neurons in 3 forwards of at most 20; their own block makes its neurons once for all
    assert rows["first"] == [2]
    assert rows["second"] == [2, 2, 2, 2]
    assert rows["last"] == [2, 40, 40, 16]
    assert set(rows["stem"]) == {2}


def test_kl_needs_no_labels_and_is_not_negative() -> None:
    model = random_vit(dtype=torch.float32, **SMALL)
    images, labels = batch_of(model)
    scores = scores_of(model, (images, None), "kl")
    for name, value in scores_of(model, (images, labels), "kl").items():
        assert torch.equal(value, scores[name])
        assert (value >= 0).all() and (value > 0).any()
    with torch.no_grad():
        # nothing reads this neuron, so nothing changes without it
        model.blocks[0].mlp.fc2.weight[:, 3] = 0
    without = scores_of(model, (images, None), "kl", "neuron")["blocks.0.mlp.neurons"]
    assert (without[:, 3] >= 0).all() and without[:, 3].max() < 1e-9


def test_what_helps_has_a_positive_loss_score() -> None:
    model = random_vit(**SMALL)
    images = random_images(model, 16)
    with torch.no_grad():
        # labels that the model itself gives: the loss can hardly fall without a branch
        labels = model(images).argmax(-1)
    for value in scores_of(model, (images, labels), "loss", "attn_branch", "block").values():
        assert (value.mean(0) > 0).all()


def test_rows_depend_on_their_own_sample_alone() -> None:
    model = random_vit("scale_attn_norm-scale_mlp_norm", **SMALL)
    images, labels = batch_of(model, 4)
    clean = scores_of(model, (images, labels), "loss")
    images[2] = float("nan")
    for name, value in scores_of(model, (images, labels), "loss").items():
        assert not value[2].isfinite().any()
        others = [0, 1, 3]
        assert (value[others] - clean[name][others]).norm() <= 1e-12 * clean[name].norm()


@pytest.mark.parametrize("config", ["plain", "scale_attn_norm-scale_mlp_norm", "swiglu"])
def test_nan_in_a_unit_goes_with_the_unit(config: str) -> None:
    model = random_vit(config, **SMALL)
    batch = batch_of(model)
    with torch.no_grad():
        for layer in ("fc1", "fc1_g"):
            if hasattr(model.blocks[0].mlp, layer):
                getattr(model.blocks[0].mlp, layer).weight[5] = float("nan")
        plan = Plan.of(describe(model), {"blocks.0.mlp.neurons": [*range(5), *range(6, 18)]})
        with mask(model, plan):
            want = model(batch[0])
    structure, blocks = describe(model), []

    def catch(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        blocks.append(output)

    model.register_forward_hook(catch)
    axes = [structure.axes["blocks.0.mlp.neurons"]]
    leave_one_out(model, structure, axes, "loss")(*batch)
    logits = blocks[-1].view(18, *want.shape)
    assert (logits[5] - want).abs().max() <= 1e-12 * want.abs().max()
    assert not logits[[u for u in range(18) if u != 5]].isfinite().any()


class Surprise(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 4, 60], ids=lambda n: f"{n} forwards")
def test_the_model_comes_back_exactly_as_it_was(after: int) -> None:
    """After an error at any place, and between two batches."""
    model = random_vit("qk_norm", drop_path_rate=0.5, proj_drop_rate=0.5, **SMALL)
    model.train()
    model.blocks[1].eval()
    structure, batch = describe(model), batch_of(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = 0

    def fail(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > after > 0:
            raise Surprise

    model.fc_norm.register_forward_hook(fail)

    def snapshot() -> list[Any]:
        return [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
            for m in model.modules()
        ]

    before = snapshot()
    measure = leave_one_out(model, structure, axes_of(structure), "loss", 3)
    assert snapshot() == before
    if after:
        with pytest.raises(Surprise):
            for _ in range(2):
                measure(*batch)
    else:
        measure(*batch)
    assert snapshot() == before
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_dropout_is_off() -> None:
    model = random_vit(drop_path_rate=0.9, proj_drop_rate=0.9, **SMALL)
    batch = batch_of(model)
    still, moving = (scores_of(m, batch, "loss", "head") for m in (model.eval(), model.train()))
    assert all(torch.equal(still[name], moving[name]) for name in still)


def test_a_forward_that_somebody_exchanged_is_put_back() -> None:
    model = random_vit("qk_norm", **SMALL)
    want = scores_of(model, batch_of(model), "loss", "qk_dim")
    block, calls = model.blocks[0], []
    known = block.forward

    def counting(x: Tensor, **options: Any) -> Tensor:
        calls.append(1)
        return known(x, **options)

    block.forward = counting
    got = scores_of(model, batch_of(model), "loss", "qk_dim")
    assert vars(block)["forward"] is counting and calls
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_a_pruned_model_with_half_blocks_and_constants() -> None:
    """Blocks that lost a branch, and an emptied one whose constant nothing could take over."""
    from vitprune_fast.surgery import prune

    model = random_vit("no_class_token-no_pos_embed", depth=4, embed_dim=12, mlp_ratio=1.5)
    with torch.no_grad():
        model.patch_embed.proj.bias = None
    plan = Plan.of(
        describe(model),
        {"blocks.0.attn.heads": [], "blocks.0.mlp.neurons": [], "blocks.3.attn.heads": [1]},
        removed=["blocks.2.mlp"],
    )
    pruned = prune(model, plan)
    kinds = [type(m).__name__ for m in pruned.modules()]
    assert kinds.count("Constant") == 2 and "HalfBlock" in kinds
    batch = batch_of(pruned)
    loss, _ = one_by_one(pruned, batch)
    for name, value in scores_of(pruned, batch, "loss").items():
        assert (value - loss[name]).norm() <= 1e-10 * loss[name].norm(), name


def test_half_precision_gives_fp32() -> None:
    model = random_vit(dtype=torch.bfloat16, **SMALL)
    for value in scores_of(model, batch_of(model), "kl").values():
        assert value.dtype == torch.float32 and value.isfinite().all()


def test_a_batch_without_samples() -> None:
    model = random_vit(**SMALL)
    images, labels = batch_of(model)
    scores = scores_of(model, (images[:0], labels[:0]), "loss", "head", "embed")
    assert {tuple(v.shape) for v in scores.values()} == {(0, 3), (0, 12)}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"labels": None}, "must hold labels"),
        ({"labels": torch.tensor([0, 1, 7])}, r"lie in 0\.\.4"),
    ],
)
def test_wrong_arguments_are_refused(args: dict, message: str) -> None:
    model = random_vit(**SMALL)
    images, labels = batch_of(model)
    batch = (images, args.pop("labels", labels))
    with pytest.raises(InvalidInput, match=message):
        scores_of(model, batch, "loss", "head")
