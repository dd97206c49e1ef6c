"""One rule for batches: scoring, measuring and training take and refuse the same ones."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import vitprune_fast as vp
from vitprune_fast.distill import DistillConfig, distill
from vitprune_fast.errors import InvalidInput
from vitprune_fast.testing import random_vit

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CONFIG = DistillConfig(epochs=1, lr=1e-3, warmup_epochs=0, alpha=0.5)


def _distill(model: nn.Module, batches: Any) -> float:
    # a fresh teacher: the student's own bits move
    return distill(model, _vit(), batches, None, CONFIG).history[0]["loss"]


def _score(model: nn.Module, batches: Any) -> torch.Tensor:
    return vp.score(model, batches)["blocks.0.mlp.neurons"]


def _vit(**args: Any) -> Any:
    return random_vit(**{"dtype": torch.float32, "depth": 1, **args})


CONSUMERS = {"score": _score, "evaluate": vp.evaluate, "distill": _distill}
every = pytest.mark.parametrize("function", CONSUMERS)
Consumer = Callable[[nn.Module, Any], Any]


@every
@pytest.mark.parametrize(
    "labels",
    [
        [1, 4],
        (1, 4),
        *(torch.tensor([1, 4]).to(t) for t in (torch.uint8, torch.int16, torch.int32)),
    ],
)
def test_labels_may_be_a_list_or_of_any_integer_dtype(function: str, labels: Any) -> None:
    consume: Consumer = CONSUMERS[function]
    wanted = consume(_vit(), [(IMAGES, torch.tensor([1, 4]))])
    found = consume(_vit(), [[IMAGES, labels, "more"]])
    assert torch.equal(wanted, found) if function == "score" else wanted == found


@every
@pytest.mark.parametrize(
    "names", [("pixel_values", "labels"), ("image", "label"), ("img", "label")]
)
@pytest.mark.parametrize("kind", [dict, UserDict])
def test_batches_may_name_what_they_hold(
    function: str, names: tuple[str, str], kind: Callable[[dict[str, Any]], Any]
) -> None:
    consume: Consumer = CONSUMERS[function]
    wanted = consume(_vit(), [(IMAGES, [1, 4])])
    found = consume(_vit(), [kind({"id": 3, names[1]: [1, 4], names[0]: IMAGES})])
    assert torch.equal(wanted, found) if function == "score" else wanted == found


def test_batches_that_name_images_alone_do_where_nothing_else_is_read() -> None:
    model, named = _vit(), [{"pixel_values": IMAGES}]
    wanted = vp.score(model, [IMAGES], criterion="activation")
    found = vp.score(model, named, criterion="activation")
    assert all(torch.equal(wanted[axis], found[axis]) for axis in wanted)
    half = vp.plan(vp.describe(model), found, vp.Budget(macs=0.6))
    one, other = (vp.prune(model, half, calibration=each) for each in ([IMAGES] * 9, named * 9))
    assert torch.equal(one(IMAGES), other(IMAGES))


@every
@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        (IMAGES, r"batches must yield \(images, labels\) pairs, or name them .*, got Tensor"),
        ({"x": IMAGES, "labels": [0, 1]}, "pixel_values and labels, got dict with x, labels"),
        ({"image": IMAGES}, "pixel_values and labels, got dict with image"),
        ({}, "got dict with nothing"),
        ((IMAGES,), "labels, got tuple of length 1"),
        (3, "labels, got int"),
        ("ab", "labels, got str"),
        ((IMAGES, [0]), r"labels must be 2 class numbers.*got \(1,\)"),
        ((IMAGES, [[0, 1], [1, 0]]), r"labels must be 2 .*got \(2, 2\) .*argmax.*loss='bce' for"),
        ((IMAGES, ["cat", "dog"]), "labels must be 2 class numbers.*got list"),
        ((IMAGES, [0.0, 1.0]), "labels must be 2 class numbers.*float32"),
        ((IMAGES, [False, True]), "labels must be 2 class numbers.*bool"),
        ((IMAGES, [0, 5]), r"labels must lie in 0\.\.4 .*got 0\.\.5"),
        ((IMAGES, [-100, 0]), r"labels must lie in 0\.\.4 .*got -100\.\.0"),
        ((IMAGES[0], [0, 1, 2]), r"images must be a floating tensor \(B, C, H, W\)"),
        ((IMAGES.byte(), [0, 1]), "images must be a floating tensor .*uint8; take images / 255, "),
        ((IMAGES.tolist(), [0, 1]), "images must be a floating tensor .*got list"),
        ((IMAGES[:, :1], [0, 1]), r"images must be \(B, 3, 16, 16\) .*got \(2, 1, 16, 16\)"),
        ((IMAGES[..., :8], [0, 1]), r"images must be \(B, 3, 16, 16\) .*got \(2, 3, 16, 8\)"),
    ],
)
def test_other_batches_are_refused(function: str, batch: Any, sentence: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{function}: .*{sentence}"):
        CONSUMERS[function](_vit(), [batch])


@pytest.mark.parametrize("function", ["score", "evaluate"])
def test_what_cannot_be_iterated_is_refused(function: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{function}: batches must be an iterable"):
        CONSUMERS[function](_vit(), 3)
    whole = {"pixel_values": IMAGES, "labels": [0, 1]}
    with pytest.raises(InvalidInput, match=f"^{function}: .*pixel_values, labels; a single batch"):
        CONSUMERS[function](_vit(), whole)


@every
def test_logits_of_every_token_are_refused(function: str) -> None:
    with pytest.raises(InvalidInput, match=rf"^{function}: model must give logits \(2, classes\)"):
        CONSUMERS[function](_vit(global_pool=""), [(IMAGES, [0, 1])])


@every
def test_a_model_of_any_image_size_still_takes_whole_patches_only(function: str) -> None:
    def consume(images: torch.Tensor) -> None:
        batches, model = [(images, [0, 1])], _vit(dynamic_img_size=True)
        if function == "distill":
            distill(model, None, batches, None, CONFIG)
        else:
            CONSUMERS[function](model, batches)

    consume(IMAGES[..., :8])
    with pytest.raises(InvalidInput, match=r"multiples of 8, multiples of 8\).*\(2, 3, 16, 12\)"):
        consume(IMAGES[..., :12])


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_fp32_images_reach_a_model_in_its_own_dtype(function: str, dtype: torch.dtype) -> None:
    batches = [(IMAGES, [1, 4])]
    if function == "score":
        # gradients in float16 underflow unless the loss is scaled up
        scale = 1024.0 if dtype == torch.float16 else None
        found = vp.score(_vit(dtype=dtype), batches, units="all", loss_scale=scale)
        assert found.samples == 2 and all(value.isfinite().all() for value in found.values())
    elif function == "evaluate":
        found = vp.evaluate(_vit(dtype=dtype), batches)
        assert found.samples == 2 and found.nonfinite_count == 0
    elif dtype == torch.float16:
        with pytest.raises(InvalidInput, match="student must have parameters of float32"):
            _distill(_vit(dtype=dtype), batches)
    else:
        # a teacher in half precision for a student of any other
        student, teacher = _vit(dtype=dtype), _vit(dtype=torch.float16, seed=1)
        first, last = distill(
            student, teacher, batches * 10, None, replace(CONFIG, epochs=2)
        ).history
        assert first["skipped"] == last["skipped"] == 0 and last["loss"] < 0.9 * first["loss"]
        assert {p.dtype for p in student.parameters()} == {dtype}


def test_the_teacher_may_have_another_dtype() -> None:
    found = vp.evaluate(_vit(), [(IMAGES, [1, 4])], _vit(dtype=torch.float64))
    assert found.agreement == 1.0


def test_distill_needs_something_to_train() -> None:
    with pytest.raises(InvalidInput, match="student must have a parameter that requires a grad"):
        distill(_vit().requires_grad_(False), None, [(IMAGES, [0, 1])], None, CONFIG)
