"""Teachers: they see the student's crop in their own way, once, and stay as they were."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitprune_fast as vp
from vitprune_fast.data import Loader, open_data
from vitprune_fast.distill.hidden_states import HiddenStates
from vitprune_fast.distill.losses._base import Seen
from vitprune_fast.distill.teachers import Teacher, TeacherSet, resolve_teacher
from vitprune_fast.errors import InvalidInput

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5)


def _vit(seed: int = 0, **options: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return VisionTransformer(**{**sizes, "num_classes": 5, **options})


def _cnn(**options: Any) -> Any:
    torch.manual_seed(1)
    sizes = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "num_classes": 5}
    model: Any = timm.create_model("resnet18", **{**sizes, **options})
    # running statistics that a forward in training mode would move
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


class _Counting(nn.Module):
    """Remembers what it was shown."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.num_classes = classes
        self.head = nn.Linear(3, classes)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.head(x.mean((2, 3)))


def _states(output: Seen) -> list[Tensor]:
    return [state for state, _ in output.states.values()]


# what the teacher sees


_VALUES = st.floats(-1, 1)
_SCALES = st.floats(0.05, 2)


@settings(max_examples=30)
@given(st.tuples(*[_VALUES] * 6), st.tuples(*[_SCALES] * 6))
def test_normalisation_is_that_of_the_same_pixels(
    means: tuple[float, ...], stds: tuple[float, ...]
) -> None:
    pixels = torch.rand(2, 3, 4, 5, dtype=torch.float64)

    def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return torch.stack([(pixels[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)

    teacher = Teacher(
        _Counting().double(),
        student_mean=means[:3],
        student_std=stds[:3],
        mean=means[3:],
        std=stds[3:],
    )
    got = teacher.convert(normalised(means[:3], stds[:3]))
    # values up to 40 lose a few ulp in each of four operations
    torch.testing.assert_close(got, normalised(means[3:], stds[3:]), rtol=1e-13, atol=1e-12)


def test_conversion_commutes_with_mixup_cutmix_and_resizing() -> None:
    teacher = Teacher(
        _Counting().double(),
        student_mean=_HALF,
        student_std=_HALF,
        mean=_MEAN,
        std=_STD,
        image_size=(12, 20),
    )
    first, second = torch.randn(2, 3, 3, 8, 8, dtype=torch.float64)
    mixed = teacher.convert(0.3 * first + 0.7 * second)
    torch.testing.assert_close(
        mixed, 0.3 * teacher.convert(first) + 0.7 * teacher.convert(second), rtol=1e-12, atol=1e-12
    )
    # cutmix commutes with the normalisation, pixel by pixel; the resize sees the pasted image
    plain = Teacher(
        _Counting().double(), student_mean=_HALF, student_std=_HALF, mean=_MEAN, std=_STD
    )
    pasted = first.clone()
    pasted[:, :, 2:5, 1:7] = second[:, :, 2:5, 1:7]
    wanted = plain.convert(first)
    wanted[:, :, 2:5, 1:7] = plain.convert(second)[:, :, 2:5, 1:7]
    assert torch.equal(plain.convert(pasted), wanted)
    resized = F.interpolate(plain.convert(pasted), (12, 20), mode="bicubic", antialias=True)
    assert torch.equal(teacher.convert(pasted), resized)
    # a constant picture stays one: the weights of the resize sum to 1
    flat = teacher.convert(torch.full((1, 3, 8, 8), 0.25, dtype=torch.float64))
    torch.testing.assert_close(flat, flat[:, :, :1, :1].expand_as(flat), rtol=1e-12, atol=1e-12)


def test_equal_normalisation_changes_no_bit() -> None:
    images = torch.randn(2, 3, 16, 16)
    same: dict[str, Any] = dict(student_mean=_MEAN, student_std=_STD, mean=_MEAN, std=_STD)
    for options in ({}, same):
        assert Teacher(_vit(), **options).convert(images) is images
    model: Any = _vit()
    model.pretrained_cfg = {"mean": _MEAN, "std": _STD}
    assert Teacher(model, student_mean=_MEAN, student_std=_STD).convert(images) is images
    converted = Teacher(model, student_mean=_HALF, student_std=_HALF).convert(images)
    stated = Teacher(model, student_mean=_HALF, student_std=_HALF, mean=_MEAN, std=_STD)
    assert not torch.equal(converted, images)
    assert torch.equal(converted, stated.convert(images))


def test_sizes_follow_the_teacher() -> None:
    images = torch.randn(2, 3, 24, 40)
    assert Teacher(_vit()).convert(images).shape[2:] == (16, 16)
    assert Teacher(_vit(dynamic_img_size=True)).convert(images) is images
    assert Teacher(_cnn()).convert(images) is images
    assert Teacher(_cnn(), image_size=32).convert(images).shape[2:] == (32, 32)
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, embed_dim=24, depths=(1,))
    assert Teacher(swin).convert(images).shape[2:] == (32, 32)
    with pytest.raises(InvalidInput, match=r"must be \(16, 16\), the one size .* got \(32, 32\)"):
        Teacher(_vit(), image_size=32)


def test_grey_images_are_repeated_for_a_colour_teacher() -> None:
    grey = torch.randn(2, 1, 16, 16)
    same = Teacher(_cnn()).convert(grey)
    assert torch.equal(same, grey.expand(-1, 3, -1, -1))
    options: dict[str, Any] = {
        "student_mean": (0.3,),
        "student_std": (0.4,),
        "mean": _MEAN,
        "std": _STD,
    }
    got = Teacher(_cnn(), **options).convert(grey)
    pixels = grey * 0.4 + 0.3
    wanted = (pixels - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)
    torch.testing.assert_close(got, wanted)
    # a configuration made for colour says nothing about a grey teacher
    grey_teacher = Teacher(_cnn(in_chans=1), student_mean=(0.3,), student_std=(0.4,))
    assert grey_teacher.convert(grey) is grey


# frozen


def test_the_caller_s_model_is_left_as_it_was() -> None:
    model = _cnn().train()
    model.bn1.eval()
    model.fc.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(4, 3, 32, 32, requires_grad=True)
    teacher = Teacher(model, blocks=(0, 3), features=True)
    holder = nn.ModuleList([teacher]).train()
    assert not teacher.training and holder.training
    output = teacher(images)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(output.logits_BC, copy.deepcopy(model).eval()(images))
    assert output.features is not None
    for each in (output.logits_BC, output.features, *_states(output)):
        assert not each.requires_grad and each.grad_fn is None
    assert not any(module._forward_hooks for module in model.modules())


def test_modes_and_hooks_come_back_after_an_exception() -> None:
    class Failing(_Counting):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError

    model = Failing().train()
    with pytest.raises(KeyError):
        Teacher(model)(torch.randn(2, 3, 4, 4))
    assert model.training
    vit = _vit().train()
    vit.blocks[1] = model
    with pytest.raises(KeyError):
        Teacher(vit, blocks=(0,))(torch.randn(2, 3, 16, 16))
    assert vit.training and not vit.blocks[0]._forward_hooks and not vit._forward_pre_hooks


def test_states_teach_a_student_through_autograd() -> None:
    teacher, student = Teacher(_vit(), blocks=(0, -1), features=True), _vit(1)
    images = torch.randn(2, 3, 16, 16)
    output = teacher(images)
    assert [prefix for _, prefix in output.states.values()] == [1, 1]
    with HiddenStates(student, (0, -1)) as hidden:
        student(images)
        pairs = list(zip(hidden.states, _states(output), strict=True))
        torch.stack([(mine - other).square().mean() for mine, other in pairs]).sum().backward()
    assert student.patch_embed.proj.weight.grad is not None
    assert all(parameter.grad is None for parameter in teacher.parameters())


# how it runs


def test_a_copy_answers_in_another_dtype() -> None:
    model = _vit().train()
    teacher = Teacher(model, dtype=torch.bfloat16, blocks=(1,))
    images = torch.randn(4, 3, 16, 16)
    output = teacher(images)
    assert output.logits_BC.dtype == torch.float32 and _states(output)[0].dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    exact = copy.deepcopy(model).eval()(images)
    # eight bits of mantissa through a dozen matrix products
    assert (output.logits_BC - exact).norm() < 0.05 * exact.norm()
    assert Teacher(model, dtype=torch.float32).model is model
    assert Teacher(model.double())(images.double()).logits_BC.dtype == torch.float64


def test_channels_last_changes_the_layout_alone() -> None:
    model = _cnn()
    teacher = Teacher(model, channels_last=True, blocks=(2,))
    images = torch.randn(2, 3, 32, 32)
    weight = teacher.model.get_submodule("layer2.0.conv1").weight
    assert isinstance(weight, Tensor) and weight.is_contiguous(memory_format=torch.channels_last)
    assert model.layer2[0].conv1.weight.is_contiguous()
    got, wanted = teacher(images), Teacher(model, blocks=(2,))(images)
    torch.testing.assert_close(got.logits_BC, wanted.logits_BC, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(_states(got)[0], _states(wanted)[0], rtol=1e-5, atol=1e-5)


def test_compiled_teachers_of_one_shape_keep_their_states_apart() -> None:
    torch.compiler.reset()
    images = torch.randn(2, 3, 16, 16)
    models = [_vit(seed) for seed in range(3)]
    first = Teacher(models[0], compile="aot_eager")
    others = [Teacher(model, compile="aot_eager", blocks=(0, 1)) for model in models[1:]]
    for _ in range(2):
        assert torch.equal(first(images).logits_BC, models[0].eval()(images))
        for teacher, model in zip(others, models[1:], strict=True):
            got, wanted = teacher(images), Teacher(model, blocks=(0, 1))(images)
            assert torch.equal(got.logits_BC, wanted.logits_BC)
            assert all(map(torch.equal, _states(got), _states(wanted)))
    torch.compiler.reset()


def test_a_sharded_teacher_passes_through() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = _vit().eval()
        images = torch.randn(2, 3, 16, 16)
        wanted = Teacher(copy.deepcopy(model), blocks=(0, 1), features=True)(images)
        assert Teacher(copy.deepcopy(model), name="whole").fingerprint() != "whole"
        mesh = init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        teacher = Teacher(model, blocks=(0, 1), features=True, name="shards")
        assert teacher.fingerprint() == "shards"
        got = teacher(images)
        assert torch.equal(got.logits_BC, wanted.logits_BC)
        assert all(map(torch.equal, _states(got), _states(wanted)))
        # its parameters are whole ones after a forward
        assert teacher.fingerprint() == "shards"
        with pytest.raises(InvalidInput, match="left alone for a sharded model"):
            Teacher(model, dtype=torch.bfloat16)
    finally:
        torch.distributed.destroy_process_group()


def test_a_distilled_teacher_gives_the_mean_of_its_heads() -> None:
    model: Any = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2
    )
    model.set_distilled_training(True)
    nn.init.normal_(model.head_dist.weight)
    images = torch.randn(2, 3, 32, 32)
    got = Teacher(model.train())(images).logits_BC
    model.eval()
    tokens = model.forward_features(images)
    assert torch.equal(got, (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2)


@pytest.mark.gpu
def test_no_forward_waits_for_the_device() -> None:
    images = torch.randn(4, 3, 32, 32)
    for options in ({}, {"dtype": torch.bfloat16, "channels_last": True}):
        teacher = Teacher(
            _cnn().cuda(),
            student_mean=_HALF,
            student_std=_HALF,
            mean=_MEAN,
            std=_STD,
            image_size=48,
            blocks=(0, 3),
            features=True,
            **options,
        )
        here = images.cuda()
        teacher(here)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = teacher(here)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert output.logits_BC.isfinite().all()


# several


def test_each_of_several_teachers_runs_once() -> None:
    models = [_Counting(), _Counting()]
    teachers = TeacherSet(
        [
            Teacher(models[0], name="self", weight=1.0),
            Teacher(
                models[1], name="cnn", student_mean=_HALF, student_std=_HALF, mean=_MEAN, std=_STD
            ),
        ]
    )
    images = torch.randn(3, 3, 8, 8)
    answers = teachers(images)
    assert list(answers) == ["self", "cnn"] and len(teachers) == 2
    assert [len(model.seen) for model in models] == [1, 1]
    assert torch.equal(models[0].seen[0], images) and not torch.equal(models[1].seen[0], images)
    assert teachers["cnn"].weight == 1.0
    with pytest.raises(InvalidInput, match="name must be one of self, cnn, got 'other'"):
        teachers["other"]
    with pytest.raises(InvalidInput, match="a name of its own each, got _Counting, _Counting"):
        TeacherSet([Teacher(model) for model in models])
    with pytest.raises(InvalidInput, match="must be at least one"):
        TeacherSet([])


# refusals


def test_a_student_is_not_its_own_teacher() -> None:
    student = _vit()
    twin = copy.deepcopy(student)
    twin.head = student.head
    guises: tuple[Any, ...] = (student, nn.DataParallel(student), torch.compile(student), twin)
    for same in guises:
        with pytest.raises(InvalidInput, match=r"chase itself; give copy\.deepcopy"):
            resolve_teacher(same, student)
    resolve_teacher(copy.deepcopy(student), student)
    # a converted copy is another model
    resolve_teacher(student, student, dtype=torch.bfloat16)


def test_other_classes_are_refused() -> None:
    with pytest.raises(InvalidInput, match="must have 5 classes like the student, got 7"):
        resolve_teacher(_vit(num_classes=7), _vit())
    with pytest.raises(InvalidInput, match="must have 5 classes like the student, got 7"):
        TeacherSet([Teacher(_vit(num_classes=7))]).check_student(_vit())
    # a teacher of features alone may have any
    resolve_teacher(_vit(num_classes=0), _vit(), logits=False)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"student_mean": _MEAN}, "student_mean and student_std must be given together"),
        ({"mean": _MEAN, "std": _STD}, "must be given to convert to mean and std, got None"),
        (
            {"student_mean": _MEAN, "student_std": _STD, "mean": _MEAN},
            "mean and std must be given together",
        ),
        ({"student_mean": _MEAN, "student_std": (1, 0, 1)}, "std above 0"),
        ({"student_mean": (float("nan"),) * 3, "student_std": _STD}, "must be finite"),
        ({"student_mean": (0.5, 0.5), "student_std": (1, 1)}, r"one number per channel .* \(3\)"),
        ({"image_size": 0}, "whole numbers above 0, got 0"),
        ({"image_size": (16, 16, 3)}, "one or two whole numbers"),
        ({"dtype": torch.int8}, r"must be a floating dtype, got torch\.int8"),
        ({"weight": -1.0}, "weight must be finite and at least 0, got -1.0"),
        ({"blocks": (4,)}, "numbers from -4 to 3"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        Teacher(_cnn(), **options)


def test_images_and_outputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"must take the 4 channels .* got a model of 3"):
        Teacher(_cnn())(torch.randn(2, 4, 16, 16))
    with pytest.raises(InvalidInput, match=r"must take the 3 channels .* got a model of 1"):
        Teacher(_cnn(in_chans=1))(torch.randn(2, 3, 16, 16))
    with pytest.raises(InvalidInput, match=r"floating tensor \(B, C, H, W\), got \(3, 16, 16\)"):
        Teacher(_cnn())(torch.randn(3, 16, 16))
    with pytest.raises(InvalidInput, match=r"torch\.uint8"):
        Teacher(_cnn())(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    teacher = Teacher(_Counting(), student_mean=_MEAN, student_std=_STD, mean=_HALF, std=_HALF)
    with pytest.raises(InvalidInput, match="student_mean must have 1 values"):
        teacher(torch.randn(2, 1, 16, 16))
    with pytest.raises(InvalidInput, match=r"must give logits \(2, classes\), got \(2, 5, 5\)"):
        Teacher(_vit(global_pool=""))(torch.randn(2, 3, 16, 16))
    name: Any = "resnet18"
    with pytest.raises(InvalidInput, match="model must be a module, got str"):
        Teacher(name)


# from names and folders


def test_resolve_takes_modules_folders_names_and_the_student_itself(tmp_path: Path) -> None:
    student: Any = _vit()
    images = torch.randn(2, 3, 16, 16)
    data: dict[str, Any] = {"student_mean": _HALF, "student_std": _HALF}
    teacher = Teacher(_vit(1))
    assert resolve_teacher(teacher, student) is teacher
    with pytest.raises(
        InvalidInput, match="options of a teacher must be given to the Teacher itself"
    ):
        resolve_teacher(teacher, student, dtype=torch.bfloat16)

    student.pretrained_cfg = {"mean": _MEAN, "std": _STD}
    own = resolve_teacher("self", student, mean=None, std=None, **data)
    assert own.name == "self" and torch.equal(own(images).logits_BC, student.eval()(images))
    with torch.no_grad():
        student.head.bias += 1
    assert not torch.equal(own(images).logits_BC, student(images))

    saved: Any = _vit(2)
    saved.pretrained_cfg = {"mean": _MEAN, "std": _STD}
    vp.save(saved, tmp_path / "dense")
    opened = resolve_teacher(str(tmp_path / "dense"), student, **data)
    assert opened.name == "dense"
    pixels = images * 0.5 + 0.5
    wanted = (pixels - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)
    torch.testing.assert_close(opened(images).logits_BC, saved.eval()(wanted))

    data = {"student_mean": (0.5,), "student_std": (0.5,)}
    named = resolve_teacher("resnet18", _vit(in_chans=1, num_classes=10), pretrained=False, **data)
    assert isinstance(named.model, timm.models.ResNet)
    assert named.model.in_chans == 1 and named.model.num_classes == 10
    grey = images[:, :1]
    assert named.convert(grey) is grey
    with pytest.raises(InvalidInput, match="neither a model of timm nor a folder; did you mean"):
        resolve_teacher("resnet19", student)


def test_a_checkpoint_of_the_student_s_data_sees_what_the_student_sees(tmp_path: Path) -> None:
    trained = timm.create_model("test_resnet", num_classes=5).eval()
    path = tmp_path / "teacher.safetensors"
    save_file(trained.state_dict(), path)
    images = torch.randn(2, 3, 48, 48)
    data: dict[str, Any] = {"student_mean": (0.1, 0.2, 0.3), "student_std": _HALF}
    teacher = resolve_teacher("test_resnet", _vit(), checkpoint=path, mean=None, **data)
    assert torch.equal(teacher(images).logits_BC, trained(images))
    with pytest.raises(InvalidInput, match=r"^Teacher: checkpoint .*trained for 5 classes, but 6"):
        resolve_teacher("test_resnet", _vit(num_classes=6), checkpoint=path)
    for other in (_vit(1), "self", tmp_path):
        with pytest.raises(InvalidInput, match="checkpoint must go with a model of timm"):
            resolve_teacher(other, _vit(), checkpoint=path)


def test_a_pretrained_name_sees_the_size_and_normalisation_of_its_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[dict[str, Any]] = []
    loaded = _cnn()

    def create(name: str, **options: Any) -> nn.Module:
        made.append(options)
        return loaded

    monkeypatch.setattr(timm, "create_model", create)
    teacher = resolve_teacher("resnet18", _vit(), student_mean=_HALF, student_std=_HALF)
    assert made[0] == {"pretrained": True}
    images = torch.randn(2, 3, 32, 32)
    got = teacher.convert(images)
    assert got.shape == (2, 3, 224, 224)
    plain = Teacher(loaded, student_mean=_HALF, student_std=_HALF, mean=_MEAN, std=_STD)
    resized = F.interpolate(plain.convert(images), (224, 224), mode="bicubic", antialias=True)
    assert torch.equal(got, resized)
    kept = resolve_teacher("resnet18", _vit(), image_size=32)
    assert kept.convert(images) is images


@pytest.mark.parametrize("size", [8, 32])
def test_a_cnn_teaches_the_digits(size: int) -> None:
    data = open_data("digits", image_size=size, channels=1)
    images, labels = next(iter(Loader(data.split("train"), 16)))[:2]
    student = _vit(img_size=size, patch_size=4, in_chans=1, num_classes=10)
    teacher = resolve_teacher(
        "resnet18",
        student,
        pretrained=False,
        student_mean=data.mean,
        student_std=data.std,
        blocks=(0, 1, 2, 3),
        features=True,
    )
    output = teacher(images)
    assert output.logits_BC.shape == (len(labels), 10)
    assert output.features is not None and output.features.shape == (16, 512)
    # a stride of 4 in the stem, then 2 per stage
    tokens = [state.shape[1] for state in _states(output)]
    assert tokens == [max(size // stride, 1) ** 2 for stride in (4, 8, 16, 32)]
