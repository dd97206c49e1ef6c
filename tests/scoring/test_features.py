"""Features are scored as a normal distribution around them, against the plain definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitprune_fast as vp
from vitprune_fast.errors import InvalidInput
from vitprune_fast.randomness import derive_seed, normals
from vitprune_fast.testing import random_images, random_vit

NEURONS = "blocks.2.mlp.neurons"


def headless(**more: Any) -> Any:
    return random_vit(num_classes=0, **more).double()


def features(model: Any, images: Tensor, gates: Tensor) -> Tensor:
    """(B, D) with a gate on every neuron of the last block, by a hook of torch."""
    layer = model.blocks[2].mlp.fc2
    hook = layer.register_forward_pre_hook(lambda _, x: (x[0] * gates[:, None],))
    try:
        return model(images).flatten(1)
    finally:
        hook.remove()


def jacobian(model: Any, images: Tensor) -> Tensor:
    """(B, D, units): how the features of a sample move with each gate."""
    gates = torch.ones(len(images), model.blocks[2].mlp.fc2.in_features, dtype=images.dtype)
    gates.requires_grad_()
    out = features(model, images, gates)
    rows = [
        torch.autograd.grad(out[:, d].sum(), gates, retain_graph=True)[0]
        for d in range(len(out[0]))
    ]
    return torch.stack(rows, 1)


def score(model: Any, images: Any, criterion: str = "fisher", **more: Any) -> vp.Scores:
    return vp.score(model, images, criterion, ("neuron",), objective="features", **more)


@pytest.mark.parametrize("pool", ["token", "avg", ""])
def test_g_is_the_gradient_of_drawn_features(pool: str) -> None:
    model = headless(global_pool=pool)
    images = random_images(model, 3).double()
    found = score(model, images, "taylor", per_sample=True, seed=5)
    moves = jacobian(model, images)
    noise = normals(derive_seed(5, "fisher features"), np.arange(3), moves.shape[1])
    want = torch.einsum("bdu,bd->bu", moves, noise)
    torch.testing.assert_close(found.per_sample[NEURONS].double(), want, rtol=1e-6, atol=1e-9)
    squares = score(model, images, seed=5)[NEURONS].double()
    torch.testing.assert_close(squares, want.square().mean(0), rtol=1e-6, atol=1e-9)
    sizes = score(model, images, "taylor", reduction="abs", seed=5)[NEURONS].double()
    torch.testing.assert_close(sizes, want.abs().mean(0), rtol=1e-6, atol=1e-9)


def test_the_mean_of_many_draws_is_the_fisher_information() -> None:
    model, draws = headless(), 4000
    images = random_images(model, 2).double()
    found = score(model, images, draws=draws)[NEURONS].double()
    lengths = jacobian(model, images).square().sum(1)
    # g is normal, so that g^2 has the variance 2 |J|^4; one in a million is off by 5 of its sigmas
    sigma = (2 * lengths.square().sum(0) / draws).sqrt() / len(images)
    assert ((found - lengths.mean(0)).abs() <= 5 * sigma).all()


def test_of_what_is_linear_it_is_twice_what_leaving_out_costs() -> None:
    # behind the last block only a mean over tokens is left, so that gates act in a straight line
    model, draws = headless(global_pool="avg", final_norm=False, fc_norm=False), 4000
    images = random_images(model, 2).double()
    exact = score(model, images, "kl")[NEURONS].double()
    found = score(model, images, draws=draws)[NEURONS].double()
    sigma = (2 * (2 * exact).square() / draws).sqrt()
    assert ((found - 2 * exact).abs() <= 5 * sigma).all()
    said = model(images)
    for unit in (0, 7, 50):
        kept = [u for u in range(len(exact)) if u != unit]
        with vp.mask(model, vp.Plan.of(vp.describe(model), {NEURONS: kept})):
            want = (model(images) - said).square().flatten(1).sum(1).mean() / 2
        torch.testing.assert_close(exact[unit], want, rtol=1e-6, atol=1e-12)


def test_draws_follow_the_place_of_a_sample_alone() -> None:
    model = headless()
    images = random_images(model, 6).double()
    whole = score(model, images, seed=1)
    for cut in (score(model, images.split(2), seed=1), score(model, images, micro_batch=5, seed=1)):
        torch.testing.assert_close(cut[NEURONS], whole[NEURONS], rtol=1e-6, atol=0)
    assert not torch.equal(score(model, images, seed=2)[NEURONS], whole[NEURONS])
    assert whole.provenance["objective"] == "features" and whole.provenance["seed"] == "1"


@pytest.mark.parametrize("criterion", ["fisher", "kl", "activation"])
def test_batches_may_be_images_alone_where_no_labels_are_read(criterion: Any) -> None:
    model = random_vit()
    images = random_images(model, 4)
    labelled = vp.score(model, [(images, torch.arange(4))], criterion)
    for alone in (images, [images], [[images]], [(images[:2],), images[2:]]):
        found = vp.score(model, alone, criterion)
        torch.testing.assert_close(found[NEURONS], labelled[NEURONS])


def test_labels_are_asked_for_where_they_are_read() -> None:
    model = random_vit()
    with pytest.raises(InvalidInput, match=r"must yield \(images, labels\) pairs, .* got Tensor"):
        vp.score(model, [random_images(model, 2)])


class Pooling(nn.Module):
    """As transformers' outputs: what is pooled stands beside the tokens."""

    def __init__(self, model: Any, pooled: bool) -> None:
        super().__init__()
        self.model, self.pooled = model, pooled

    def forward(self, images: Tensor) -> Any:
        tokens = self.model(images)
        said: Any = type("Output", (), {})()
        said.last_hidden_state = tokens
        said.pooler_output = tokens[:, 0] if self.pooled else None
        return said


@pytest.mark.parametrize("pooled", [True, False])
def test_what_a_library_pools_comes_before_its_tokens(pooled: bool) -> None:
    from vitprune_fast.batches import features_of

    model = headless(global_pool="")
    images = random_images(model, 2).double()
    said = features_of(Pooling(model, pooled)(images))
    assert torch.equal(said, model(images)[:, 0] if pooled else model(images))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"criterion": "loss"}, "criterion must be one of fisher, kl, taylor for objective='feat"),
        ({"criterion": "activation"}, "criterion must be one of .*, got 'activation'"),
        ({"criterion": "taylor", "reduction": "signed"}, "not 'signed', got 'taylor' and 'signed'"),
        ({"loss": "mse"}, "loss must be None for objective='features', which reads no targets"),
        ({"objective": "hidden"}, "objective must be one of logits, features, got 'hidden'"),
    ],
)
def test_what_does_not_go_with_features_is_refused(args: Any, message: str) -> None:
    model = random_vit(num_classes=0)
    with pytest.raises(InvalidInput, match=message):
        vp.score(model, random_images(model, 2), **{"objective": "features", **args})


def test_a_model_with_a_classifier_is_none_of_features() -> None:
    model = random_vit()
    with pytest.raises(InvalidInput, match=r"got 'features' and 5 classes; .*reset_classifier"):
        score(model, random_images(model, 2))


def test_features_of_a_hugging_face_model_without_classes_are_scored() -> None:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    sizes: dict[str, Any] = {"image_size": 16, "patch_size": 8, "hidden_size": 24}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 3, "num_labels": 0}
    config = Dinov2Config(**sizes)
    model = Dinov2ForImageClassification(config).eval()
    images = torch.randn(4, 3, 16, 16)
    for criterion in ("taylor", "fisher", "kl"):
        scores = score(model, images, criterion)
        assert scores.samples == 4
        assert all((values > 0).any() for values in scores.values())
