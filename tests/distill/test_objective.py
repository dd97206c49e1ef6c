"""The loss of distillation: its parts, their weights, several teachers, and who fits whom."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from vitprune_fast.distill import DistillConfig
from vitprune_fast.distill.hidden_states import HiddenStates
from vitprune_fast.distill.losses.manifold import Manifold
from vitprune_fast.distill.losses.relation import qkv_relation
from vitprune_fast.distill.objective import Objective, images_like
from vitprune_fast.distill.teachers import Teacher, TeacherSet
from vitprune_fast.errors import InvalidInput
from vitprune_fast.testing import random_images, random_vit

LABELS = torch.tensor([0, 3, 1])


def evaluated(
    config: DistillConfig, student: Any, *teachers: Teacher, done: float = 0.0
) -> tuple[Tensor, dict[str, Tensor], Objective]:
    images = random_images(student, 3)
    objective = Objective(config, student, TeacherSet(list(teachers)), images_like(student))
    with objective.watching(student) as watch:
        said = watch.output(student(images))
    generator = torch.Generator().manual_seed(1)
    loss, parts = objective(said, LABELS, objective.ask(images), done, generator)
    return loss, parts, objective


@pytest.mark.parametrize(
    "loss",
    [
        *("soft", "soft_deit", "soft_sum", "soft_sigmoid", "hidden", "features"),
        *("manifold", "manifold_intra", "manifold_inter", "manifold_random", "manifold_full"),
    ],
)
@pytest.mark.parametrize("config", ["plain", "layerscale-registers-no_embed_class"])
def test_an_equal_teacher_teaches_nothing(loss: str, config: str) -> None:
    student = random_vit(config).train()
    teacher = Teacher(copy.deepcopy(student))
    value, parts, _ = evaluated(DistillConfig(loss=(loss,), alpha=1.0), student, teacher)
    assert abs(float(parts[loss].detach())) <= 1e-12
    (value - parts["ce"] if loss not in parts or "kd" not in parts else value).backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            assert float(parameter.grad.abs().max()) <= 1e-10, name


def test_an_equal_teacher_leaves_relations_where_they_are() -> None:
    student = random_vit()
    _, parts, _ = evaluated(
        DistillConfig(loss=("relation",)), student, Teacher(copy.deepcopy(student))
    )
    parts["relation"].backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert gradients and max(float(g.abs().max()) for g in gradients) <= 1e-10


def test_the_sum_has_the_weights_of_the_config() -> None:
    student, teacher = random_vit(), Teacher(random_vit(seed=1), weight=2.0)
    config = DistillConfig(
        loss=("soft", "manifold", "hidden"),
        loss_weights=(1.0, 4.0, 0.5),
        loss_weights_end=(3.0, 0.0, 0.5),
        alpha=0.3,
    )
    for done, weights in ((0.0, (1.0, 4.0, 0.5)), (0.5, (2.0, 2.0, 0.5)), (1.0, (3.0, 0.0, 0.5))):
        loss, parts, _ = evaluated(config, student, teacher, done=done)
        soft, manifold, hidden = (
            2 * w * parts[n] for w, n in zip(weights, config.loss, strict=True)
        )
        assert float(parts["kd"].detach()) == pytest.approx(float(soft.detach()), rel=1e-12)
        want = 0.7 * parts["ce"] + 0.3 * soft + manifold + hidden
        assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-12)


@pytest.mark.parametrize("loss", ["soft", "soft_deit", "soft_sum"])
def test_one_launch_gives_the_same_loss_and_gradient(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Teacher(random_vit(seed=1), weight=2.0)
    config = DistillConfig(loss=(loss, "hidden"), alpha=0.3, temperature=3.0, label_smoothing=0.1)
    found = []
    for fuses in (False, True):
        one = (lambda self, _: self.terms[0]) if fuses else lambda *_: None
        monkeypatch.setattr(Objective, "_one_soft", one)
        student = random_vit()
        value, parts, _ = evaluated(config, student, teacher)
        value.backward()
        found.append((value, parts, student.head.weight.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_without_a_logit_loss_labels_count_whole() -> None:
    student, teacher = random_vit(), Teacher(random_vit(seed=1))
    loss, parts, _ = evaluated(DistillConfig(loss=("hidden",), alpha=0.9), student, teacher)
    assert float(loss) == pytest.approx(float(parts["ce"] + parts["hidden"]), rel=1e-12)


def test_several_teachers_have_losses_of_their_own() -> None:
    student = random_vit(dtype=torch.float32)
    cnn = timm.create_model("resnet18", num_classes=5).eval()
    teachers = Teacher(copy.deepcopy(student), name="self"), Teacher(cnn, name="cnn")
    config = DistillConfig(loss=("self:soft_deit", "cnn:hard", "soft"))
    _, parts, _ = evaluated(config, student, *teachers)
    assert set(parts) == {"ce", "kd", "self:soft_deit", "cnn:hard", "self:soft", "cnn:soft"}
    assert float(parts["self:soft"]) == pytest.approx(0, abs=1e-6)
    with pytest.raises(InvalidInput, match=r"loss must name one of the teachers \(self, cnn\)"):
        evaluated(DistillConfig(loss=("other:soft",)), student, *teachers)


def test_other_widths_get_projectors_beside_the_student() -> None:
    student = random_vit(dtype=torch.float32)
    keys = set(student.state_dict())
    teacher = Teacher(random_vit(embed_dim=36, dtype=torch.float32))
    config = DistillConfig(loss=("hidden", "features", "manifold", "manifold_full"))
    _, parts, objective = evaluated(config, student, teacher)
    assert set(objective.projectors) == {"hidden", "features"}
    torch.stack(list(parts.values())).sum().backward()
    assert all(p.grad is not None for p in objective.projectors.parameters())
    assert set(student.state_dict()) == keys


def test_a_trunk_without_class_token_and_a_cnn_teach_the_manifold() -> None:
    student = random_vit(dtype=torch.float32, img_size=32, patch_size=8, depth=4)
    cait = timm.create_model(
        "cait_xxs24_224", img_size=32, patch_size=8, num_classes=5, depth=6, pretrained=False
    )
    _, parts, objective = evaluated(DistillConfig(loss=("manifold",)), student, Teacher(cait))
    loss = objective.terms[0].loss
    assert isinstance(loss, Manifold) and loss.num_rows == 192
    assert loss.pairs == [(0, 0), (1, 1), (2, 4), (3, 5)]
    parts["manifold"].backward()
    assert float(student.blocks[0].mlp.fc1.weight.grad.abs().max()) > 0
    # 4 x 4 patches and a feature map of 4 x 4
    cnn = Teacher(timm.create_model("resnet18", num_classes=5).eval(), image_size=32)
    config = DistillConfig(loss=("manifold_full",), layers=((-1, 1),))
    _, parts, _ = evaluated(config, student, cnn)
    assert float(parts["manifold_full"]) > 0


def test_relations_know_which_tokens_are_patches() -> None:
    # grids of 2 x 3, where what is over a square is not the prefix: 3 of 7 tokens, 2 of 11
    student, model = (
        random_vit(img_size=(8, 12)),
        random_vit(img_size=(8, 12), reg_tokens=4, seed=1),
    )
    teacher, config = Teacher(model), DistillConfig(loss=("relation",), layers=((0, 0),))
    _, parts, _ = evaluated(config, student, teacher)
    images, packed = random_images(student, 3), []
    for each in (student, model):
        with HiddenStates(each, (), qkv=(0,)) as hidden:
            each(images)
            packed.append(hidden.qkv[0])
            assert hidden.qkv_prefix_tokens == [each.num_prefix_tokens]
    ours, theirs = packed
    kept = model.num_prefix_tokens - 1
    assert torch.equal(
        parts["relation"], qkv_relation(ours.flatten(3), theirs[:, kept:].flatten(3))
    )


def test_who_does_not_fit_is_refused_at_once() -> None:
    student = random_vit()
    for teacher, config, sentence in (
        (student, DistillConfig(), "must be another model than the student"),
        (random_vit(num_classes=7), DistillConfig(), "must have 5 classes like the student, got 7"),
        (random_vit(), DistillConfig(loss=("hidden",), layers=((0, 3),)), "layers must be blocks"),
        (random_vit("swiglu"), DistillConfig(loss=("hidden",), layers=((5, 0),)), "layers must be"),
        (
            random_vit(img_size=24, patch_size=8),
            DistillConfig(loss=("manifold",)),
            "tokens must have the grid of the student",
        ),
    ):
        with pytest.raises(InvalidInput, match=sentence):
            evaluated(config, student, Teacher(teacher))


def test_features_of_other_classes_may_still_teach() -> None:
    student, teacher = random_vit(), Teacher(random_vit(num_classes=7, seed=1))
    _, parts, _ = evaluated(DistillConfig(loss=("manifold",)), student, teacher)
    assert float(parts["manifold"]) > 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss": "soft"}, r"loss must be a tuple of names, got 'soft'; say \('soft',\)"),
        ({"loss": ("warm",)}, r"loss must hold names among features, .*, got 'warm'"),
        ({"loss": ("soft", "soft")}, r"loss must name each loss once"),
        (
            {"loss_weights": (1.0, 2.0)},
            r"loss_weights must be one finite number .* got \[1.0, 2.0\]",
        ),
        ({"loss_weights_end": (-1.0,)}, r"loss_weights_end must be one finite number"),
    ],
)
def test_config_rejects(options: dict, sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        DistillConfig(**options)
