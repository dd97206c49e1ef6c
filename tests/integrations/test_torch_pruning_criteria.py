"""Which of Torch-Pruning 1.6.1's importances ours correspond to, worked out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

import vitprune_fast as vp
from vitprune_fast.integrations.torch_pruning import FisherImportance, TaylorImportance
from vitprune_fast.structure import Structure
from vitprune_fast.structure.axes import Axis, as_dim
from vitprune_fast.structure.places import Place
from vitprune_fast.testing import random_images, random_vit, randomise


class Small(nn.Module):
    """Every hidden unit has a single outgoing weight, so that a gate is a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(4, 6), nn.Linear(6, 1), nn.Linear(1, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.fc2(self.fc1(images.flatten(1)).relu()))


def small() -> tuple[Any, Structure, Tensor, Tensor]:
    model = randomise(Small().double(), 0)
    neurons = Axis("neurons", 6, "neuron")
    structure = Structure("Small", (1, 2, 2), axes={"neurons": neurons})
    structure.tensors = {
        "fc1.weight": (as_dim(neurons), as_dim(4)),
        "fc2.weight": (as_dim(1), as_dim(neurons)),
    }
    structure.taps["neurons"] = Place("fc2", "input", as_dim(neurons))
    images = torch.randn(5, 1, 2, 2, dtype=torch.float64)
    return model, structure, images, torch.arange(5) % 3


def group_of(model: Any, example: Tensor, layer: nn.Linear, everything: int) -> Any:
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
    return graph.get_pruning_group(layer, tp.prune_linear_out_channels, list(range(everything)))


def accumulated(model: Any, importance: Any, images: Tensor, labels: Tensor) -> Any:
    """The loop of Torch-Pruning's own documentation."""
    importance.zero_grad()
    for loss in F.cross_entropy(model(images), labels, reduction="none"):
        model.zero_grad()
        loss.backward(retain_graph=True)
        importance.accumulate_grad(model)
    return importance


# torch_pruning says that a normalizer is a str and takes None for none
RAW: Any = None


# of the layer that reads the units alone: the last with weights in its group
def hessian() -> Any:
    return tp.importance.GroupHessianImportance(group_reduction="gate", normalizer=RAW)


def test_hessian_of_torch_pruning_keeps_the_last_sample_only() -> None:
    model, _, images, labels = small()
    group = group_of(model, images[:1], model.fc1, 6)
    all_five = accumulated(model, hessian(), images, labels)(group)
    last_one = accumulated(model, hessian(), images[4:], labels[4:])(group)
    each = [accumulated(model, hessian(), images[[b]], labels[[b]])(group) for b in range(5)]
    assert torch.equal(all_five, last_one)
    assert not torch.allclose(all_five, torch.stack(each).mean(0), rtol=0.1)


def test_squared_taylor_is_what_the_hessian_stands_for() -> None:
    """Mean over all samples of (w dw)^2, with one weight per unit; not of the last sample alone."""
    model, structure, images, labels = small()
    group = group_of(model, images[:1], model.fc1, 6)
    each = [accumulated(model, hessian(), images[[b]], labels[[b]])(group) for b in range(5)]
    importance = TaylorImportance(
        model, [(images, labels)], structure=structure, units=("neuron",), reduction="square"
    )
    got = importance(group)
    assert got is not None
    assert torch.allclose(got, torch.stack(each).mean(0).float(), rtol=1e-5)


def test_fisher_draws_labels_from_the_model() -> None:
    """The expectation over labels, by hand; the labels that came with the images have no part."""
    model, structure, images, labels = small()
    importance = FisherImportance(
        model, [(images, labels)], structure=structure, units=("neuron",), draws=4000
    )
    expected = torch.zeros(6, dtype=torch.float64)
    for image in images:
        h = model.fc1(image.flatten()[None]).relu().detach().requires_grad_()
        logits = model.head(model.fc2(h))
        for label, p in enumerate(logits.softmax(-1)[0].tolist()):
            loss = F.cross_entropy(logits, torch.tensor([label]))
            (gradient,) = torch.autograd.grad(loss, h, retain_graph=True)
            expected += p * (h * gradient)[0].detach().square() / len(images)
    got = importance.scores["neurons"].double()
    # 20000 draws of bounded terms: a standard error below 2 %
    assert (got - expected).norm() < 0.1 * expected.norm()
    other = FisherImportance(
        model, [(images, (labels + 1) % 3)], structure=structure, units=("neuron",), draws=4000
    )
    assert torch.equal(other.scores["neurons"], importance.scores["neurons"])


def relu_vit() -> Any:
    """fc1 without bias before a ReLU: a unit's incoming and outgoing w * dw have the same sum."""
    model = random_vit(act_layer=nn.ReLU)
    for block in model.blocks:
        block.mlp.fc1.bias = None
    return model


def test_signed_taylor_is_the_multivariable_one_of_torch_pruning() -> None:
    """Its |sum w dw| of the summed loss; with a mean over two layers that agree."""
    model = relu_vit()
    images, labels = random_images(model, 4), torch.arange(4)
    signed, usual = (
        TaylorImportance(model, [(images, labels)], units=("neuron",), reduction=reduction)
        for reduction in ("signed", "abs")
    )
    theirs: Any = tp.importance.GroupTaylorImportance(multivariable=True, normalizer=RAW)
    F.cross_entropy(model(images), labels, reduction="sum").backward()
    differ = 0
    for block in model.blocks:
        group = group_of(model, images[:1], block.mlp.fc1, 96)
        want, got, other = theirs(group), signed(group), usual(group)
        assert got is not None and other is not None
        assert torch.allclose(4 * got, want, rtol=1e-4, atol=1e-6)
        assert torch.equal(got.argsort()[-20:], want.argsort()[-20:])
        differ += int((other.argsort() != want.argsort()).sum())
    # the mean of magnitudes ranks in another way: samples cannot cancel
    assert differ


@pytest.mark.parametrize("make", [TaylorImportance, FisherImportance])
def test_both_are_importances_of_torch_pruning(make: Callable[..., Any]) -> None:
    model = random_vit()
    importance = make(model, [(random_images(model, 4), torch.arange(4))])
    assert importance.scores.criterion == importance.criterion
    assert issubclass(type(importance), tp.importance.Importance)
    batch = random_images(model, 4), torch.arange(4)
    reduction = importance.scores.reduction
    again = vp.score(copy.deepcopy(model), [batch], importance.criterion, reduction=reduction)  # pyright: ignore
    assert reduction == {"taylor": "abs", "fisher": "square"}[importance.criterion]
    assert all(torch.equal(again[name], value) for name, value in importance.scores.items())
