"""A student without a classifier learns features and states, and no label."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import vitprune_fast as vp
from vitprune_fast.batches import features_of
from vitprune_fast.distill.hidden_states import pooled_of
from vitprune_fast.errors import InvalidInput
from vitprune_fast.testing import random_images, random_vit

IMAGES = random_images(random_vit(), 8)
ALONE = [IMAGES[:4], IMAGES[4:]]


def config(**more: Any) -> vp.DistillConfig:
    settings = {"epochs": 2, "warmup_epochs": 0, "lr": 1e-3, "loss": ("features",), **more}
    return vp.DistillConfig(**settings)


def student() -> Any:
    return random_vit(num_classes=0)


def distance(model: Any, teacher: Any) -> Tensor:
    with torch.no_grad():
        return (model.eval()(IMAGES) - teacher.eval()(IMAGES)).square().mean()


@pytest.mark.parametrize("loss", [("features",), ("hidden",), ("features", "relation")])
def test_no_label_takes_part(loss: tuple[str, ...]) -> None:
    teacher = random_vit(seed=1, num_classes=0)
    labelled = [(images, torch.full((4,), 1000)) for images in ALONE]
    first, second = (
        vp.distill(student(), teacher, batches, batches, config(loss=loss))
        for batches in (ALONE, labelled)
    )
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name])
    for entry in first.history:
        terms = sum(vp.DistillConfig(loss=loss).weight(word, 0) * entry[word] for word in loss)
        assert entry["ce"] is None and entry["loss"] == pytest.approx(terms, rel=1e-5)


def test_validation_measures_the_features_and_keeps_the_nearest() -> None:
    teacher = random_vit(seed=1, num_classes=0)
    before = distance(student(), teacher).item()
    settings = config(epochs=8, lr=0.01, min_lr=0.01, keep="best")
    found = vp.distill(student(), teacher, ALONE, ALONE, settings)
    after = distance(found.model, teacher).item()
    assert after < before / 2
    # the weight of the loss
    assert found.best_loss == pytest.approx(20 * after, rel=1e-5)
    losses = [found.start["val_loss"], *(entry["val_loss"] for entry in found.history)]
    assert found.best_loss == min(losses) and losses[0] == pytest.approx(20 * before, rel=1e-5)
    assert found.best_top1 is None


def test_a_backbone_of_transformers_learns_its_features() -> None:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    sizes: dict[str, Any] = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_labels": 0}

    def backbone(seed: int) -> Any:
        torch.manual_seed(seed)
        made = Dinov2Config(**sizes, num_hidden_layers=2, num_attention_heads=3)
        return Dinov2ForImageClassification(made).eval()

    teacher, model = backbone(0), backbone(1)
    wanted = teacher(IMAGES).logits
    before = (model(IMAGES).logits - wanted).square().mean()
    found = vp.distill(model, teacher, ALONE, None, config(epochs=8, lr=0.01))
    assert (features_of(found.model.eval()(IMAGES)) - wanted).square().mean() < before / 2


@pytest.mark.parametrize("pools", [True, False])
@pytest.mark.parametrize("loss", [("features",), ("hidden",)])
def test_a_model_without_a_head_learns_from_its_like(loss: tuple[str, ...], pools: bool) -> None:
    from transformers import ViTConfig, ViTModel

    sizes: dict[str, Any] = {"image_size": 16, "patch_size": 8, "hidden_size": 24}

    def backbone(seed: int) -> Any:
        torch.manual_seed(seed)
        made = ViTConfig(**sizes, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48)
        return ViTModel(made, add_pooling_layer=pools).eval()

    teacher, model = backbone(0), backbone(1)
    found = vp.distill(model, teacher, ALONE, [IMAGES], config(loss=loss, epochs=8, keep="best"))
    assert found.best_loss is not None and found.best_loss < 0.9 * found.start["val_loss"]
    assert pooled_of(found.model(IMAGES)).shape == (8, 24)
    with pytest.raises(InvalidInput, match=r"must have a classifier .* got none"):
        vp.distill(model, teacher, ALONE, None, config(loss=("soft",)))
    with pytest.raises(InvalidInput, match=r"must have a classifier .* objective='features'"):
        vp.score(model, [(IMAGES, torch.arange(8))])


@pytest.mark.parametrize(
    ("teacher", "settings"),
    [
        (None, {}),
        (random_vit(seed=1), {"loss": ("soft",)}),
        (random_vit(seed=1), {"loss": ("soft", "features")}),
        (random_vit(seed=1), {"loss": ()}),
        (random_vit(seed=1), {"label_loss": "bce"}),
    ],
)
def test_losses_of_labels_and_logits_are_refused(teacher: Any, settings: Any) -> None:
    with pytest.raises(InvalidInput, match=r"^distill: model must have a classifier .* got none; "):
        vp.distill(student(), teacher, [(IMAGES, torch.arange(8))], None, config(**settings))


def test_mixing_is_refused() -> None:
    with pytest.raises(InvalidInput, match="mixup and cutmix must be 0"):
        vp.distill(student(), random_vit(seed=1), ALONE, None, config(mixup=0.5))


def nearest(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(1)


def test_a_loss_of_ones_own_needs_no_classifier() -> None:
    targets = torch.randn(8, 24)
    settings = config(epochs=8, lr=0.01, loss=())
    found = vp.distill(
        *(student(), None, [(IMAGES, targets)], [(IMAGES, targets)], settings), target_loss=nearest
    )
    assert found.history[-1]["val_loss"] < found.history[0]["val_loss"]


def test_the_base_class_of_transformers_is_a_backbone_too() -> None:
    from transformers import Dinov2Config, Dinov2Model

    sizes: dict[str, Any] = {"image_size": 16, "patch_size": 8, "hidden_size": 24}

    def backbone(seed: int) -> Any:
        torch.manual_seed(seed)
        made = Dinov2Config(**sizes, num_hidden_layers=2, num_attention_heads=3)
        return Dinov2Model(made).eval()

    teacher, model = backbone(0), backbone(1)
    with pytest.raises(InvalidInput, match=r"got none; .* objective='features'"):
        vp.score(model, [(IMAGES, torch.arange(8))])
    wanted = features_of(teacher(IMAGES))
    before = (features_of(model(IMAGES)) - wanted).square().mean()
    found = vp.distill(model, teacher, ALONE, None, config(epochs=8, lr=0.01))
    assert (features_of(found.model.eval()(IMAGES)) - wanted).square().mean() < before / 2


def test_the_rate_follows_how_far_the_features_are_from_those_of_the_teacher() -> None:
    teacher = random_vit(seed=1, num_classes=0)
    near = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.mul_(1 + 1e-4)
        apart = (student()(IMAGES) - teacher(IMAGES)).square().sum(1).mean().item() / 2
    gentle, bold = (
        vp.distill(each, teacher, ALONE, None, config(epochs=1, lr=None)).start
        for each in (near, student())
    )
    assert bold["distance"] == pytest.approx(apart, rel=1e-5)
    assert 0 < gentle["distance"] < bold["distance"] and 0 < gentle["reach"] < bold["reach"]
    assert gentle["peak_lr"] < bold["peak_lr"]
