"""Settings of published recipes, each by what it does to numbers."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitprune_fast as vp
from vitprune_fast.cli.distill import Distill
from vitprune_fast.cli.options import parse
from vitprune_fast.distill import DistillConfig, distill
from vitprune_fast.distill.average import EpochAverage
from vitprune_fast.distill.optim import make_optimizer
from vitprune_fast.errors import InvalidInput
from vitprune_fast.testing import random_images, random_pvt, random_vit

# nothing but the gradient of the labels, at one rate
BARE: dict[str, Any] = {
    "lr": 1e-2,
    "min_lr": 1e-2,
    "warmup_epochs": 0,
    "alpha": 0.0,
    "weight_decay": 0.0,
    "clip_norm": 0.0,
}


def batches(count: int = 3, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    images = random_images(random_vit(), count * size)
    return list(zip(images.split(size), (torch.arange(count * size) % 5).split(size), strict=True))


def trained(data: list[tuple[Tensor, Tensor]], epochs: int = 1, **settings: Any) -> Any:
    model = random_vit()
    distill(model, None, data, None, DistillConfig(epochs=epochs, **{**BARE, **settings}))
    return model


def by_hand(data: list[tuple[Tensor, Tensor]], loss: Any, **adam: Any) -> Any:
    model = random_vit().train()
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.0, **adam})
    for images, labels in data:
        optimizer.zero_grad()
        loss(model(images), labels).backward()
        optimizer.step()
    return model


def check_same(a: nn.Module, b: nn.Module) -> None:
    # in fp64, sums in another order
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_betas_and_eps_are_those_of_adamw() -> None:
    data, options = batches(), {"betas": (0.5, 0.9), "eps": 1e-3}
    wanted = by_hand(data, F.cross_entropy, **options)
    check_same(trained(data, **options), wanted)
    with pytest.raises(AssertionError):
        check_same(trained(data), wanted)


def test_binary_cross_entropy_trains_with_the_threshold_on_mixed_labels() -> None:
    data = batches()
    plain = by_hand(
        data, lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 5).double())
    )
    check_same(trained(data, label_loss="bce"), plain)
    mixed: dict[str, Any] = {"label_loss": "bce", "mixup": 1.0, "epochs": 1}
    found = [
        distill(random_vit(), None, data, None, DistillConfig(**{**BARE, **mixed, **more})).history
        for more in ({}, {"bce_threshold": 0.0}, {"bce_threshold": 0.999})
    ]
    # whole counts for two classes, shares that make one, and none
    first, whole, none = (entry["bce"] for (entry,) in found)
    assert len({first, whole, none}) == 3 and all(entry["ce"] is None for (entry,) in found)


@pytest.mark.parametrize("plain", [False, True])
def test_the_rate_grows_with_the_images_of_a_step(plain: bool) -> None:
    data: Any = batches(4)
    if not plain:
        data = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*(torch.cat(each) for each in zip(*data, strict=True))),
            batch_size=4,
        )
    # two batches of four a step, for a rate that is meant for two images
    got = trained(data, lr=1e-3, min_lr=1e-3, warmup_lr=0.0, accumulate=2, lr_batch=2, epochs=3)
    told: list[float] = []
    config = DistillConfig(epochs=3, **{**BARE, "accumulate": 2, "log_steps": 1}, lr_batch=32)
    distill(
        random_vit(),
        None,
        data,
        None,
        config,
        on_event=lambda e: told.append(e["lr"]) if e["event"] == "step" else None,
    )
    assert told[0] == pytest.approx(1e-2 * 8 / 32) and len(told) == 6
    # the cosine ends at min_lr, which is not scaled
    wanted = trained(data, lr=4e-3, min_lr=1e-3, accumulate=2, epochs=3)
    check_same(got, wanted)


def scales(model: nn.Module) -> dict[str, float]:
    named = dict(model.named_parameters())
    optimizer = make_optimizer(model, named, [], DistillConfig(layer_decay=0.5))
    of = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    return {name: of[id(p)] for name, p in named.items()}


def test_layers_decay_in_every_family_with_blocks() -> None:
    vit = scales(random_vit(depth=3))
    transformers = pytest.importorskip("transformers")
    torchvision = pytest.importorskip("torchvision")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=48
    )
    hf = scales(transformers.ViTForImageClassification(config))
    tv = scales(torchvision.models.VisionTransformer(32, 8, 3, 3, 24, 48, num_classes=5))
    for found, embedding, block, final in (
        (vit, ("pos_embed", "patch_embed."), "blocks.{}.", ("norm.", "head.")),
        (hf, ("vit.embeddings.",), ".{}.", ("vit.layernorm.", "classifier.")),
        (tv, ("class_token", "conv_proj."), "encoder_layer_{}.", ("encoder.ln.", "heads.")),
    ):
        assert {v for n, v in found.items() if n.startswith(embedding)} == {0.0625}
        for number in range(3):
            inside = {v for n, v in found.items() if block.format(number) in n}
            assert inside == {0.5 ** (3 - number)}
        assert {v for n, v in found.items() if n.startswith(final)} == {1.0}


def test_layers_decay_from_stage_to_stage() -> None:
    found = scales(random_pvt(depths=(1, 1, 2, 1)))
    for path, scale in (
        ("patch_embed.", 2**-6),
        ("stages.0.blocks.0.", 2**-5),
        ("stages.0.norm.", 2**-5),
        ("stages.1.downsample.", 2**-5),
        ("stages.2.blocks.0.", 2**-3),
        ("stages.2.norm.", 2**-2),
        ("stages.3.downsample.", 2**-2),
        ("stages.3.blocks.0.", 2**-1),
        ("stages.3.norm.", 1.0),
        ("head.", 1.0),
    ):
        assert {v for n, v in found.items() if n.startswith(path)} == {scale}


def test_blocks_that_are_gone_count_as_no_layer() -> None:
    model = random_vit(depth=3)
    plan = vp.Plan.of(vp.describe(model), {"blocks": [0, 2]})
    left = scales(vp.prune(model, plan))
    assert {v for n, v in left.items() if n.startswith("blocks.")} == {0.25, 0.5}
    assert left["patch_embed.proj.weight"] == 0.125


def test_an_average_once_an_epoch_is_that_of_up_vit() -> None:
    data, seen = batches(), []
    model = random_vit()
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def note() -> bool:
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return False

    config = DistillConfig(epochs=3, ema=0.2, ema_every="epoch", **BARE)
    distill(model, None, data, None, config, stop=note)
    for number in (1, 2, 3):
        now = seen[3 * number - 1]
        decay = min(0.2, (1 + number) / (10 + number))
        average = {n: average[n] * decay + now[n] * (1 - decay) for n in now}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, average[name], rtol=0, atol=1e-12)
    own = EpochAverage(model, 0.999)
    # 199 / 208 at the end of its 198th epoch, and the decay itself from the 8990th on
    assert own.get_decay(198) == 199 / 208 and own.get_decay(9000) == 0.999


def test_an_average_once_an_epoch_goes_on_after_a_stop(tmp_path: Any) -> None:
    data, config = batches(), DistillConfig(epochs=3, ema=0.9, ema_every="epoch", **BARE)
    whole, broken = random_vit(), random_vit()
    distill(whole, None, data, None, config)
    taken: list[None] = []

    def stop() -> bool:
        taken.append(None)
        return len(taken) == 5

    for _ in range(2):
        distill(broken, None, data, None, config, checkpoint_dir=tmp_path, stop=stop)
    assert all(map(torch.equal, whole.state_dict().values(), broken.state_dict().values()))


def test_a_distillation_token_learns_and_both_heads_answer() -> None:
    data = batches()
    student, start = random_vit("deit_distilled"), random_vit("deit_distilled")
    config = DistillConfig(epochs=1, **{**BARE, "alpha": 0.5}, loss=("hard",))
    distill(student, random_vit(seed=1), data, None, config)
    for name in ("dist_token", "head_dist.weight", "head.weight"):
        assert not torch.equal(student.state_dict()[name], start.state_dict()[name])
    heads = copy.deepcopy(student).train()
    heads.set_distilled_training(True)
    with torch.no_grad():
        one, other = heads(data[0][0])
        torch.testing.assert_close(student.eval()(data[0][0]), (one + other) / 2)
    # the teacher's class alone moves the head of the token, labels alone the other
    for alpha, still in ((1.0, "head.weight"), (0.0, None)):
        model = random_vit("deit_distilled")
        config = DistillConfig(epochs=1, **{**BARE, "alpha": alpha}, loss=("hard",))
        distill(model, random_vit(seed=1), data, None, config)
        same = [n for n in start.state_dict() if n.endswith("weight") and n.startswith("head")]
        same = [n for n in same if torch.equal(model.state_dict()[n], start.state_dict()[n])]
        assert same == ([still] if still else [])


def test_a_distillation_token_of_transformers_learns_too() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.DeiTConfig(
        image_size=16, patch_size=8, intermediate_size=48, num_labels=5, **sizes
    )
    torch.manual_seed(0)
    start = transformers.DeiTForImageClassificationWithTeacher(config).double()
    for alpha, still in ((1.0, "cls_classifier"), (0.5, ""), (0.0, "")):
        student = copy.deepcopy(start)
        settings = DistillConfig(epochs=1, **{**BARE, "alpha": alpha}, loss=("hard",))
        distill(student, random_vit(seed=1), batches(), None, settings)
        for name in ("cls_classifier", "distillation_classifier"):
            same = torch.equal(
                student.get_parameter(f"{name}.weight"), start.get_parameter(f"{name}.weight")
            )
            assert same == (name == still)


def test_the_recipes_of_the_page_can_be_set() -> None:
    page = (Path(__file__).parents[2] / "docs" / "teach-what-is-left.md").read_text("utf-8")
    rows = re.findall(r"^\| [^|]* \| `(--[^`]*)` \|$", page, re.MULTILINE)
    understood = [
        parse("distill", ["--model", "m", "--data", "d", *row.split()], lambda _: Distill())
        for row in rows
    ]
    assert len(rows) == 7
    deit, up = (each for each in understood if each and each.data.crop_scale == 0.08)
    assert deit.schedule.lr_batch == 512 and deit.data.repeats == 3
    assert up.schedule.ema_every == "epoch" and up.schedule.cutmix_larger


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"eps": 0.0}, "eps must be above 0, got 0.0"),
        ({"lr_batch": 512}, "lr_batch must be unset without lr, got 512"),
        ({"lr_batch": 0, "lr": 1e-3}, "lr_batch must be unset or at least 1"),
        ({"label_loss": "mse"}, "label_loss must be one of ce, bce, got .mse"),
        ({"bce_threshold": 0.2}, "bce_threshold must be unset, or given with label_loss bce"),
        (
            {"label_loss": "bce", "bce_threshold": 0.0, "label_smoothing": 0.1},
            "bce_threshold must be .* without label_smoothing, got 0.0",
        ),
        ({"ema_every": "run"}, "ema_every must be one of step, epoch, got .run"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        DistillConfig(**options)
