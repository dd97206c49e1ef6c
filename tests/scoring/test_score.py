"""Scores are the exact per-sample derivatives by gates, and the model comes back as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from vitprune_fast.errors import DamagedFile, InvalidInput
from vitprune_fast.files import read_metadata, read_tensors, write_tensors
from vitprune_fast.scoring import Scores, score, scored_axes, stream
from vitprune_fast.scoring.scores import Accumulator
from vitprune_fast.scoring.taylor import scorer
from vitprune_fast.structure import describe
from vitprune_fast.testing import random_images, random_vit


def batch_of(model: Any, size: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    labels = torch.arange(size) % model.num_classes
    return random_images(model, size, seed=seed), labels


@pytest.mark.parametrize("reduction", ["abs", "square", "signed"])
def test_reductions(reduction: Any) -> None:
    model = random_vit()
    batch = batch_of(model)
    scores = score(model, [batch], reduction=reduction, per_sample=True)
    how = {"abs": Tensor.abs, "square": Tensor.square, "signed": Tensor.clone}[reduction]
    for name, value in scores.items():
        each = how(scores.per_sample[name].double())
        assert value.dtype == torch.float32
        # the terms were rounded to fp32, and signed ones cancel: half an ulp of each, summed
        bound = 2**-22 * each.abs().mean(0)
        assert ((value.double() - each.mean(0)).abs() <= bound).all()
    assert scores.samples == 6 and scores.skipped == 0


@pytest.mark.parametrize("config", ["plain", "deit_distilled", "swiglu", "qk_norm"])
def test_batch_sums_are_weight_times_gradient(config: str) -> None:
    """Identity: the sum over samples of a neuron's signed score is the column sum of W2 * dW2."""
    model = random_vit(config)
    images, labels = batch_of(model)
    sums = {
        name: value.double().sum(0)
        for name, value in score(model, [(images, labels)], per_sample=True).per_sample.items()
    }
    F.cross_entropy(model(images), labels, reduction="sum").backward()
    for i, block in enumerate(model.blocks):
        fc2, proj = block.mlp.fc2.weight, block.attn.proj.weight
        columns = (fc2 * fc2.grad).sum(0)
        error = (sums[f"blocks.{i}.mlp.neurons"] - columns).norm() / columns.norm()
        heads = (proj * proj.grad).sum(0).view(block.attn.num_heads, -1).sum(1)
        head_error = (sums[f"blocks.{i}.attn.heads"] - heads).norm() / heads.norm()
        assert max(error, head_error) < 1e-6


@settings(max_examples=20)
@given(
    cut=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_another_split_of_the_same_samples(cut: list[int], dtype: torch.dtype) -> None:
    model = random_vit(dtype=dtype)
    images, labels = batch_of(model, sum(cut))
    whole = score(model, [(images, labels)])
    parts = list(zip(images.split(cut), labels.split(cut), strict=True))
    split = score(model, parts)
    # fp64 scores are handed back rounded to fp32
    tolerance = 1e-5 if dtype == torch.float32 else 2e-7
    for name in whole:
        error = (split[name].double() - whole[name].double()).norm() / whole[name].double().norm()
        assert error <= tolerance


def test_sums_of_another_split_in_fp64() -> None:
    """Before they are rounded to fp32, sums over another split agree to fp64 rounding."""
    model = random_vit(dtype=torch.float64)
    structure = describe(model)
    axes = scored_axes(structure, "all")
    images, labels = batch_of(model, 7)
    sums = []
    for micro_batch in (7, 2):
        accumulator = Accumulator({axis.name: axis.size for axis in axes}, "abs")
        with scorer(model, structure, axes) as score_batch:
            stream.run(score_batch, model, [(images, labels)], accumulator, micro_batch=micro_batch)
        assert accumulator.sums is not None
        sums.append(accumulator.sums)
    whole, split = sums
    assert (split - whole).norm() / whole.norm() <= 1e-12
    # units trade places only where they differ by less than that
    order = whole.argsort()
    steps = whole[order].diff()
    swapped = split[order].diff() < 0
    assert (steps[swapped] <= 1e-12 * whole.norm()).all()


def test_same_batches_same_bits() -> None:
    model = random_vit(dtype=torch.float32)
    batches = [batch_of(model, 3, seed) for seed in range(3)]
    first, second = (score(model, batches, per_sample=True) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name])
        assert torch.equal(first.per_sample[name], second.per_sample[name])


class Surprise(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True], ids=["normally", "after an exception"])
def test_the_model_comes_back_exactly_as_it_was(fails: bool) -> None:
    model = random_vit(drop_path_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5)
    model.train()
    model.blocks[1].eval()
    model.norm.weight.requires_grad_(False)
    seen: list[int] = []
    handle = model.blocks[0].mlp.fc2.register_forward_pre_hook(lambda *_: seen.append(1))
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = {
        "state": {n: t.clone() for n, t in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "grads": [p.requires_grad for p in model.parameters()],
        "hooks": [
            (len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "random": torch.random.get_rng_state(),
    }

    def batches():
        yield batch_of(model)
        if fails:
            raise Surprise

    if fails:
        with pytest.raises(Surprise):
            score(model, batches())
    else:
        score(model, batches())
    assert seen
    handle.remove()
    model.blocks[0].mlp.fc2.register_forward_pre_hook(lambda *_: None)
    assert all(torch.equal(t, before["state"][n]) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == before["modes"]
    assert [p.requires_grad for p in model.parameters()] == before["grads"]
    assert [
        (len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks))
        for m in model.modules()
    ] == before["hooks"]
    assert torch.equal(torch.random.get_rng_state(), before["random"])
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["head.weight"]


def test_dropout_is_off() -> None:
    model = random_vit(drop_path_rate=0.9, proj_drop_rate=0.9)
    batch = batch_of(model)
    still = score(model.eval(), [batch])
    moving = score(model.train(), [batch])
    assert all(torch.equal(still[name], moving[name]) for name in still)


def test_no_weight_gradient_exists_during_the_backward() -> None:
    model = random_vit()
    alive: list[bool] = []
    model.blocks[0].attn.proj.register_full_backward_hook(
        lambda *_: alive.append(
            any(p.requires_grad or p.grad is not None for p in model.parameters())
        )
    )
    score(model, [batch_of(model)])
    assert alive == [False]


def test_a_sample_with_nan_is_set_aside_and_counted() -> None:
    model = random_vit()
    images, labels = batch_of(model)
    clean = score(model, [(images[[0, 1, 3, 4, 5]], labels[[0, 1, 3, 4, 5]])])
    images[2] = float("nan")
    scores = score(model, [(images, labels)])
    assert (scores.samples, scores.skipped) == (5, 1)
    for name in clean:
        assert torch.allclose(scores[name], clean[name], rtol=1e-6)


def test_a_model_in_half_precision_needs_a_loss_scale() -> None:
    model = random_vit(dtype=torch.float16)
    images, labels = batch_of(model)
    with pytest.raises(InvalidInput, match=r"loss_scale must be given .* float16"):
        score(model, [(images, labels)])
    full = score(random_vit(), [(images.double(), labels)])
    for scale in (256.0, 1024.0):
        got = score(model, [(images, labels)], loss_scale=scale)
        for name, value in full.items():
            assert (got[name] - value).norm() <= 2e-2 * value.norm()


def test_v_dims_sum_to_their_head() -> None:
    model = random_vit()
    scores = score(model, [batch_of(model)], units=("head", "v_dim"), per_sample=True)
    dims = scores.per_sample["blocks.1.attn.v_dims"].view(6, 3, 8).sum(-1)
    assert torch.allclose(dims, scores.per_sample["blocks.1.attn.heads"], rtol=1e-5, atol=1e-6)


def test_scores_survive_a_file(tmp_path: Path) -> None:
    model = random_vit()
    scores = score(model, [batch_of(model)], units="all", per_sample=True)
    scores.save(tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors")
    assert list(again) == list(again.per_sample) == list(scores)
    assert all(torch.equal(again[n], scores[n]) for n in scores)
    assert all(torch.equal(again.per_sample[n], scores.per_sample[n]) for n in scores)
    assert (again.criterion, again.reduction, again.samples) == ("taylor", "square", 6)
    assert again.provenance == scores.provenance


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("values/blocks.0.attn.heads", lambda x: x[None], "one floating number per unit of"),
        ("values/blocks.0.attn.heads", lambda x: x.long(), "one floating number per unit of"),
        ("per_sample/blocks.0.attn.heads", lambda x: x[:, 1:], "one number per sample and unit"),
        ("per_sample/blocks.0.attn.heads", lambda x: x[1:], "one number per sample and unit"),
        ("samples", lambda x: "-6", "numbers of samples"),
        ("skipped", lambda x: "many", "invalid literal"),
    ],
)
def test_a_file_with_something_else_for_scores_is_refused(
    tmp_path: Path, name: str, change: Any, message: str
) -> None:
    model, path = random_vit(), tmp_path / "scores.safetensors"
    score(model, [batch_of(model)], per_sample=True).save(path)
    tensors, metadata = read_tensors(path), read_metadata(path)
    changed: Any = tensors if name in tensors else metadata
    changed[name] = change(changed[name])
    write_tensors(path, tensors, metadata)
    with pytest.raises(DamagedFile, match=f"must hold scores, got a file without .*{message}"):
        Scores.load(path)


@pytest.mark.parametrize("classes", [0, 1])
def test_a_model_that_tells_no_classes_apart_is_refused(classes: int) -> None:
    model = random_vit(num_classes=classes)
    batch = random_images(model, 3), [0, 0, 0]
    criteria: Any = ("taylor", "fisher", "loss", "kl")
    for criterion in criteria:
        with pytest.raises(InvalidInput, match=f"at least 2 classes, got {classes or 'none'}; "):
            score(model, [batch], criterion)
    assert score(model, [batch], "activation").samples == 3
    assert len(score(model, criterion="magnitude"))


def test_a_file_without_scores_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(DamagedFile, match="must hold scores"):
        Scores.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"path": "fast"}, "path must be one of auto, fused, taps, got 'fast'"),
        ({"loss_scale": 0.0}, "loss_scale must be a finite number > 0, got 0.0"),
        ({"loss_scale": float("nan")}, "loss_scale must be a finite number > 0, got nan"),
        ({"seed": 0.5}, "seed must be a whole number, got 0.5"),
        ({"units": ("heads",)}, "score: units must be among head, .* got 'heads'"),
        ({"criterion": "random"}, "criterion must be one of"),
        ({"reduction": "mean"}, "reduction must be one of .* 'taylor', got 'mean'"),
        ({"criterion": "magnitude", "reduction": "l3"}, "one of group, l1, l2"),
        ({"criterion": "fisher", "reduction": "abs"}, "reduction must be one of square"),
        ({"units": "head"}, "a list of unit kinds"),
        ({"draws": 0}, "draws must be a whole number >= 1, got 0"),
        ({"candidates": True}, "candidates must be a whole number >= 1, got True"),
        ({"micro_batch": 2.5}, "micro_batch must be a whole number >= 1, got 2.5"),
        ({"criterion": "fisher", "draws": 2, "per_sample": True}, "draws must be 1"),
        ({"batches": None}, "batches must be given"),
        ({"batches": []}, "at least one sample"),
        ({"batches": [torch.zeros(2, 3, 16, 16)]}, r"\(images, labels\) pairs"),
        ({"batches": [(torch.zeros(2, 3, 16, 16), torch.tensor([0, 9]))]}, r"lie in 0\.\.4"),
        ({"batches": [(torch.zeros(2, 3, 16, 16), torch.tensor([0]))]}, "one per image"),
    ],
)
def test_wrong_arguments_are_refused(args: dict, message: str) -> None:
    model = random_vit(dtype=torch.float32)
    given: dict[str, Any] = {"batches": [batch_of(model)]} | args
    with pytest.raises(InvalidInput, match=message):
        score(model, **given)


def test_scores_of_every_axis_in_model_order() -> None:
    model = random_vit()
    scores = score(model, [batch_of(model)])
    order = [n for n, a in describe(model).axes.items() if a.kind in ("head", "neuron")]
    assert list(scores) == order


@pytest.mark.parametrize("criterion", ["taylor", "kl", "activation", "magnitude"])
@pytest.mark.parametrize("other", [{"depth": 1}, {"embed_dim": 30}], ids=["depth", "width"])
def test_the_structure_of_another_model_is_refused(criterion: Any, other: Any) -> None:
    model = random_vit()
    with pytest.raises(InvalidInput, match="structure must be of the model"):
        score(random_vit(**other), [batch_of(model)], criterion, structure=describe(model))


def test_a_batch_of_nothing_adds_nothing() -> None:
    model = random_vit()
    images, labels = batch_of(model)
    with_empty = score(model, [(images[:0], []), (images, labels), (images[:0], labels[:0])])
    assert with_empty.samples == len(images)


def test_units_may_come_from_any_iterable() -> None:
    model = random_vit()
    kinds: Any = (kind for kind in ("head",))
    assert len(score(model, [batch_of(model)], units=kinds)) == len(model.blocks)
    wrong: Any
    for wrong in (3, (), None, "head"):
        with pytest.raises(InvalidInput, match="score: units must be a list of unit kinds"):
            score(model, [batch_of(model)], units=wrong)
    wrong = ["taylor"]
    with pytest.raises(InvalidInput, match="score: criterion must be one of"):
        score(model, [batch_of(model)], wrong)


@pytest.mark.parametrize("criterion", ["fisher", "kl", "activation"])
def test_labels_are_not_read_where_none_are_needed(criterion: Any) -> None:
    model = random_vit()
    images, labels = batch_of(model)
    want = score(model, [(images, labels)], criterion)
    got = score(model, [(images, torch.full_like(labels, -1))], criterion)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_weights_that_cannot_be_scored_are_refused() -> None:
    criteria: Any = ("taylor", "kl", "activation", "magnitude")
    model = random_vit()
    batch = batch_of(model)
    for criterion in criteria:
        with pytest.raises(InvalidInput, match="must hold its weights, got cls_token on the meta"):
            score(random_vit().to("meta"), [batch], criterion)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[0, 0] = torch.nan
    with pytest.raises(
        InvalidInput, match=r"finite weights, got NaN or Inf in blocks\.1\.mlp\.fc2"
    ):
        score(model, criterion="magnitude")


def test_a_model_built_in_inference_mode_is_refused_and_left_alone() -> None:
    with torch.inference_mode():
        model = random_vit()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert any(flags)
    with pytest.raises(InvalidInput, match=r"built outside torch\.inference_mode"):
        score(model, [batch_of(model)])
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
