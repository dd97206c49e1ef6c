"""A loss of the user's own, in score, evaluate and distill, against its plain definition."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitprune_fast as vp
from vitprune_fast.distill.teachers import Teacher
from vitprune_fast.errors import InvalidInput, RunFolderError
from vitprune_fast.scoring import ScoringStopped
from vitprune_fast.sealed import CheckpointRefused
from vitprune_fast.testing import random_images, random_vit

NEURONS = "blocks.2.mlp.neurons"
CONFIG = vp.DistillConfig(epochs=2, warmup_epochs=0, lr=1e-3, checkpoint_steps=1)


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    """One loss a sample of numbers of classes; what is nearly right weighs less."""
    loss = F.cross_entropy(outputs, targets, reduction="none")
    return (1 - (-loss).exp()) ** 2 * loss


def huber(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.huber_loss(outputs, targets, reduction="none").mean(1)


def many_hot(count: int) -> Tensor:
    return (torch.arange(count * 5).view(count, 5) % 3 == 0).float()


TARGETS = {
    "labels": torch.tensor([0, 4, 2]),
    "shares": many_hot(3),
    "numbers": torch.linspace(-1, 1, 15).view(3, 5),
}
# what is given, its targets, and what it says of one sample, written out
LOSSES: dict[str, tuple[Any, str, Any]] = {
    "bce of labels": (
        *("bce", "labels"),
        lambda o, t: F.binary_cross_entropy_with_logits(o, F.one_hot(t, 5).to(o)),
    ),
    "bce": ("bce", "shares", lambda o, t: F.binary_cross_entropy_with_logits(o, t.to(o))),
    "mse": ("mse", "numbers", lambda o, t: (o - t.to(o)).square().mean()),
    "focal": (focal, "labels", lambda o, t: focal(o[None], t[None])[0]),
    "huber": (huber, "numbers", lambda o, t: F.huber_loss(o, t.to(o))),
}


def gated(model: Any, images: Tensor, gates: Tensor) -> Tensor:
    layer = model.blocks[2].mlp.fc2
    hook = layer.register_forward_pre_hook(lambda _, x: (x[0] * gates[:, None],))
    try:
        return model(images)
    finally:
        hook.remove()


@pytest.mark.parametrize("name", LOSSES)
def test_scores_are_derivatives_of_the_loss_of_each_sample(name: str) -> None:
    given, kind, plain = LOSSES[name]
    model, targets = random_vit().double(), TARGETS[kind]
    images = random_images(model, 3).double()
    gates = torch.ones(3, 96, dtype=torch.float64, requires_grad=True)
    out = gated(model, images, gates)
    torch.stack([plain(o, t) for o, t in zip(out, targets, strict=True)]).sum().backward()
    assert gates.grad is not None
    want = gates.grad
    score: Any = partial(vp.score, model, [(images, targets)], "taylor", ("neuron",), loss=given)
    close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-10)
    kept = score(reduction="signed", per_sample=True)
    close(kept.per_sample[NEURONS].double(), want)
    for reduction, each in (("signed", want), ("abs", want.abs()), ("square", want.square())):
        close(score(reduction=reduction)[NEURONS].double(), each.mean(0))
    # magnitudes of terms that add up are never less than that of their sum
    tokens = score(reduction="token_abs")[NEURONS].double() * 5
    assert (tokens >= want.abs().mean(0) * (1 - 1e-6)).all() and tokens.gt(0).any()
    assert kept.provenance["loss"].endswith(given if isinstance(given, str) else given.__name__)


@pytest.mark.parametrize("name", LOSSES)
def test_the_rise_of_the_loss_is_that_behind_a_mask(name: str) -> None:
    given, kind, plain = LOSSES[name]
    model, targets = random_vit().double(), TARGETS[kind]
    images = random_images(model, 3).double()
    found = vp.score(model, [(images, targets)], "loss", ("neuron",), loss=given)[NEURONS].double()

    def losses() -> Tensor:
        with torch.no_grad():
            return torch.stack([plain(o, t) for o, t in zip(model(images), targets, strict=True)])

    before = losses()
    for unit in (0, 50, 95):
        kept = [u for u in range(96) if u != unit]
        with vp.mask(model, vp.Plan.of(vp.describe(model), {NEURONS: kept})):
            want = (losses() - before).mean()
        torch.testing.assert_close(found[unit], want, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_evaluate_gives_the_mean_of_the_loss_and_no_top1(name: str) -> None:
    given, kind, plain = LOSSES[name]
    model, targets = random_vit(), TARGETS[kind]
    images = random_images(model, 3)
    batches = [(images[:2], targets[:2]), (images[2:], targets[2:])]
    found = vp.evaluate(model, batches, loss=given)
    with torch.no_grad():
        want = sum(plain(o, t).item() for o, t in zip(model(images), targets, strict=True)) / 3
    assert found.loss == pytest.approx(want, rel=1e-5) and found.samples == 3
    assert found.top1 != found.top1 and found.top5 != found.top5


def mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


@pytest.mark.parametrize("verb", ["score", "evaluate", "distill"])
def test_a_mean_over_samples_is_refused_with_the_remedy(verb: str) -> None:
    model = random_vit()
    batches = [(random_images(model, 3), TARGETS["labels"])]
    with pytest.raises(InvalidInput, match=rf"^{verb}: .*\(3,\), got \(\) .*mean; .*'none'"):
        if verb == "distill":
            vp.distill(model, None, batches, None, CONFIG, target_loss=mean)
        elif verb == "evaluate":
            vp.evaluate(model, batches, loss=mean)
        else:
            vp.score(model, batches, loss=mean)


@pytest.mark.parametrize(
    ("args", "targets", "message"),
    [
        ({"criterion": "fisher", "loss": "bce"}, "labels", "loss must be None .*'fisher'.*taylor"),
        ({"criterion": "kl", "loss": focal}, "labels", "loss must be None .*'kl'.*got .*focal"),
        ({"criterion": "activation", "loss": "mse"}, "labels", "loss must be None .*'activation'"),
        ({"criterion": "magnitude", "loss": "mse"}, "labels", "loss must be None .*'magnitude'"),
        ({"loss": "ce"}, "labels", "loss must be None, 'bce', 'mse' or a function .* got 'ce'"),
        ({"loss": 3}, "labels", "loss must be None, 'bce', 'mse' or a function .* got 3"),
        ({"loss": "mse"}, "labels", r"targets must have the shape \(3, 5\) .*'mse', got \(3,\)"),
        ({"loss": "bce"}, "out of range", r"labels must lie in 0\.\.4 .* got 0\.\.5"),
        ({}, "shares", r"labels must be 3 class numbers, one per image, got \(3, 5\)"),
    ],
)
def test_what_does_not_go_together_is_refused(args: Any, targets: str, message: str) -> None:
    model = random_vit()
    given = {**TARGETS, "out of range": torch.tensor([0, 5, 1])}[targets]
    with pytest.raises(InvalidInput, match=f"^score: {message}"):
        vp.score(model, [(random_images(model, 3), given)], **args)


def test_a_label_out_of_range_is_found_in_any_batch() -> None:
    model = random_vit()
    images = random_images(model, 3)
    batches = [(images, TARGETS["labels"]), (images, torch.tensor([0, 5, 1]))]
    with pytest.raises(InvalidInput, match=r"labels must lie in 0\.\.4"):
        vp.score(model, batches, loss="bce")


def test_regression_to_one_number_takes_both_shapes() -> None:
    model = random_vit(num_classes=1)
    images, numbers = random_images(model, 4), torch.linspace(-1, 1, 4)
    flat, column = (vp.score(model, [(images, t)], loss="mse") for t in (numbers, numbers[:, None]))
    assert torch.equal(flat[NEURONS], column[NEURONS]) and flat[NEURONS].gt(0).any()


def hf(kind: str) -> Any:
    from tests.test_bare import small_hf

    return small_hf(problem_type=kind)


def test_a_multi_label_model_takes_bce_and_a_function_alone(tmp_path: Path) -> None:
    images = torch.randn(3, 3, 16, 16)
    batches = [(images, many_hot(3))]
    for loss in ("mse", None):
        with pytest.raises(InvalidInput, match=r"loss must be 'bce' or a function.*multi_label"):
            vp.score(hf("multi_label_classification"), batches, loss=loss)
    own = vp.score(hf("multi_label_classification"), batches, loss=huber)
    assert own.provenance["loss"] == f"{__name__}.huber"
    model = hf("multi_label_classification")
    assert vp.score(model, batches, loss="bce").samples == 3
    config = vp.DistillConfig(epochs=20, warmup_epochs=0, lr=1e-2, keep="best")
    before = vp.evaluate(model, batches, loss="bce").loss
    found = vp.distill(model, None, batches, batches, config, target_loss="bce")
    after = vp.evaluate(found.model, batches, loss="bce").loss
    assert before is not None and after is not None and after < before / 2
    assert found.best_loss == pytest.approx(after, rel=1e-6) and found.best_top1 is None


def test_regression_learns_and_the_least_loss_is_kept(tmp_path: Path) -> None:
    model = random_vit()
    images = random_images(model, 8)
    batches = [(images[:4], torch.randn(4, 5)), (images[4:], torch.randn(4, 5))]
    # too fast at the end to be best there
    config = vp.DistillConfig(epochs=6, warmup_epochs=0, lr=0.05, min_lr=0.05, keep="best")
    found = vp.distill(model, None, batches, batches, config, target_loss="mse")
    losses = [found.start["val_loss"], *(entry["val_loss"] for entry in found.history)]
    assert all(entry["val_top1"] is None and "target" in entry for entry in found.history)
    assert found.best_loss == min(losses)
    assert vp.evaluate(found.model, batches, loss="mse").loss == min(losses)


def test_a_loss_of_ones_own_stands_beside_those_of_a_teacher() -> None:
    teacher, model, other = random_vit(seed=1), random_vit(), random_vit()
    batches = [(random_images(model, 4), torch.arange(4))]
    config = vp.DistillConfig(epochs=1, warmup_epochs=0, lr=1e-3, alpha=0.25, dtype="float32")
    with torch.no_grad():
        own = focal(other.train()(batches[0][0]), batches[0][1]).mean().item()
    (entry,) = vp.distill(model, teacher, batches, None, config, target_loss=focal).history
    assert entry["target"] == pytest.approx(own, rel=1e-5) and entry["ce"] is None
    assert entry["loss"] == pytest.approx(0.75 * own + 0.25 * entry["kd"], rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "remedy"), [("bce", "take 'soft_sigmoid'"), ("mse", "such as 'features'")]
)
def test_losses_by_a_softmax_do_not_stand_beside_several_labels(loss: Any, remedy: str) -> None:
    model = random_vit(depth=1)
    data = [(random_images(model, 3), many_hot(3))]
    for names in (("soft",), ("hidden", "hard"), ("self:soft_deit",)):
        config = vp.DistillConfig(epochs=1, loss=names)
        teacher = Teacher(random_vit(depth=1, seed=1), name="self")
        with pytest.raises(InvalidInput, match=rf"target_loss='{loss}'.*{names[-1]}.*{remedy}"):
            vp.distill(model, teacher, data, None, config, target_loss=loss)


def test_classes_by_themselves_are_taught_by_a_teacher_that_knows_them() -> None:
    teacher, model = random_vit(depth=1, seed=1), random_vit(depth=1, seed=2)
    images = random_images(model, 40)
    with torch.no_grad():
        data = [(x, (teacher(x) > 0).float()) for x in images.split(8)]
    config = vp.DistillConfig(epochs=4, warmup_epochs=0, lr=3e-3, loss=("soft_sigmoid",), alpha=1.0)
    before = vp.evaluate(model, data, loss="bce").loss
    result = vp.distill(model, teacher, data, None, config, target_loss="bce")
    assert result.history[-1]["soft_sigmoid"] < result.history[0]["soft_sigmoid"]
    after = vp.evaluate(model, data, loss="bce").loss
    assert before is not None and after is not None and after < before


def test_a_training_goes_on_with_its_loss_alone(tmp_path: Path) -> None:
    batches = [(random_images(random_vit(), 3), TARGETS["labels"])]

    def train(loss: Any) -> Any:
        return vp.distill(
            *(random_vit(), None, batches, None, CONFIG),
            target_loss=loss,
            checkpoint_dir=tmp_path / "points",
        )

    assert train(focal).finished
    for other in (None, "bce"):
        with pytest.raises(RunFolderError, match=r"target_loss: .*focal -> (None|bce)"):
            train(other)
    assert train(partial(focal)).finished


def test_scoring_goes_on_with_its_loss_alone(tmp_path: Path) -> None:
    model = random_vit()
    batches = [(random_images(model, 3), TARGETS["labels"])] * 3
    file, asked = tmp_path / "sums.safetensors", iter([False, True])
    with pytest.raises(ScoringStopped):
        vp.score(model, batches, loss=focal, checkpoint=file, stop=lambda: next(asked))
    with pytest.raises(CheckpointRefused, match="another model, criterion, loss"):
        vp.score(model, batches, loss="bce", checkpoint=file)
    assert vp.score(model, batches, loss=focal, checkpoint=file).samples == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing must be unset with a target_loss"),
        ({"mixup": 0.8}, "mixup must be unset with a target_loss"),
        ({"keep": "one-se"}, "keep must be `last` or `best` with a target_loss"),
    ],
)
def test_settings_of_labels_are_refused_beside_it(settings: Any, message: str) -> None:
    model = random_vit()
    batches = [(random_images(model, 3), TARGETS["labels"])]
    config = vp.DistillConfig(epochs=1, warmup_epochs=0, **settings)
    with pytest.raises(InvalidInput, match=message):
        vp.distill(model, None, batches, batches, config, target_loss=focal)


def test_a_module_is_a_function_too() -> None:
    model = random_vit()
    batches = [(random_images(model, 3), TARGETS["labels"])]
    own = vp.score(model, batches, loss=nn.CrossEntropyLoss(reduction="none"))
    assert torch.equal(own[NEURONS], vp.score(model, batches)[NEURONS])
    assert own.provenance["loss"] == "torch.nn.modules.loss.CrossEntropyLoss"


def test_a_loss_without_a_gradient_is_refused() -> None:
    model = random_vit(depth=1)
    batches = [(random_images(model), torch.zeros(len(random_images(model)), dtype=torch.int64))]
    with pytest.raises(InvalidInput, match=r"^score: loss must be differentiable"):
        vp.score(model, batches, loss=lambda outputs, targets: outputs.detach().sum(1))


def test_a_refusal_names_the_argument_of_the_verb() -> None:
    model = random_vit(depth=1)
    images = random_images(model)
    data = [(images, torch.zeros(len(images), dtype=torch.int64))]
    config = vp.DistillConfig(epochs=1, alpha=0)
    with pytest.raises(
        InvalidInput, match=r"^distill: target_loss must give one number per sample"
    ):
        vp.distill(model, None, data, data, config, target_loss=nn.CrossEntropyLoss())
    model.reset_classifier(1)
    with pytest.raises(InvalidInput, match="say target_loss='bce'"):
        vp.distill(model, None, data, data, config)


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    """Each sample against all others of its batch."""
    near = outputs @ outputs.T
    return F.cross_entropy(near, torch.arange(len(outputs)), reduction="none")


def centred(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs - outputs.mean(0), targets, reduction="none")


@pytest.mark.parametrize("criterion", ["taylor", "loss"])
@pytest.mark.parametrize("mixing", [contrastive, centred])
def test_a_loss_that_mixes_samples_has_no_score_of_a_sample(mixing: Any, criterion: str) -> None:
    model = random_vit(depth=1)
    images = random_images(model, 3)
    rule = rf"^score: loss must be of each sample alone, got one of .*{mixing.__name__} that mixes"
    with pytest.raises(InvalidInput, match=rule):
        vp.score(model, [(images, TARGETS["labels"])], criterion=criterion, loss=mixing)
    # a lost sample has no finite derivative, and mixes nothing
    images[1] = torch.nan
    found = vp.score(model, [(images, TARGETS["labels"])], criterion=criterion, loss=focal)
    assert (found.samples, found.skipped) == (2, 1)
