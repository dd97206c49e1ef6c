"""One rule for all verbs: what wraps a model is looked through, what it is not is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim.swa_utils import AveragedModel
from torchvision.models import VisionTransformer as TorchvisionViT
from transformers import ViTConfig, ViTForImageClassification

import vitprune_fast as vp
from vitprune_fast.errors import InvalidInput, UnsupportedArchitecture
from vitprune_fast.testing import random_images, random_vit

IMAGES = random_images(random_vit(), 4)
CONFIG = vp.DistillConfig(epochs=1, warmup_epochs=0, lr=1e-3)


def batches(classes: int = 5) -> list[tuple[Tensor, Tensor]]:
    return [(IMAGES, torch.arange(4) % max(classes, 1))]


def half() -> vp.Plan:
    model = random_vit()
    return vp.plan(model, vp.score(model, batches()), 0.5)


def _prune(model: Any, tmp: Path) -> Tensor:
    return vp.prune(model, half())(IMAGES)


def _mask(model: Any, tmp: Path) -> Tensor:
    with vp.mask(model, half()) as masked:
        return masked(IMAGES)


def _save(model: Any, tmp: Path) -> Tensor:
    vp.save(model, tmp / "saved")
    return vp.load(tmp / "saved")(IMAGES)


def _gates(model: Any, tmp: Path) -> Tensor:
    gates = vp.gates.attach(model, kind="l1")
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.mul_(0.5)
    said = model(IMAGES)
    vp.gates.detach(model)
    return said


def _search(model: Any) -> vp.Plan:
    """Where the labels are what the model says, so that it is always right."""
    with torch.no_grad():
        said = model.eval()(IMAGES)
    labels = getattr(said, "logits", said).argmax(1)
    # made of the model where that can be scored: the axes of a library have names of their own
    try:
        scores = vp.score(model, criterion="magnitude")
    except vp.VitpruneError:
        scores = vp.score(random_vit(), criterion="magnitude")
    return vp.search(model, scores, [(IMAGES, labels)], mode="fixed", tolerance=0.9).chosen.plan


def _distill(model: Any, tmp: Path) -> Tensor:
    teacher = random_vit(seed=3)
    config = vp.DistillConfig(epochs=1, warmup_epochs=0, loss=("features", "hidden"))
    found = vp.distill(model, teacher, batches(), batches(), config)
    return found.model.eval()(IMAGES)


VERBS: dict[str, Callable[[Any, Path], Any]] = {
    "describe": lambda model, tmp: vp.describe(model),
    "score": lambda model, tmp: vp.score(model, batches())["blocks.1.mlp.neurons"],
    "search": lambda model, tmp: _search(model),
    "plan": lambda model, tmp: vp.plan(model, vp.score(random_vit(), batches()), 0.5),
    "mask": _mask,
    "prune": _prune,
    "evaluate": lambda model, tmp: vp.evaluate(model, batches()),
    "distill": _distill,
    "save": _save,
    "cost": lambda model, tmp: vp.cost(model),
    "latency": lambda model, tmp: vp.latency(model, seconds=0, min_runs=1).batch_size,
    "peak_memory_bytes": lambda model, tmp: vp.peak_memory_bytes(model),
    "gates.attach": _gates,
    "check_structure": lambda model, tmp: vp.check_structure(model, plans=1).ok,
    "fold_attention_biases": lambda model, tmp: vp.fold_attention_biases(model),
    "SoftCompaction": lambda model, tmp: vp.SoftCompaction(model, half()).model(IMAGES),
}


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    model(IMAGES)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "module.compile": _compiled_in_place,
    "compile of DataParallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process, without which there is no DistributedDataParallel."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_verb_looks_through_what_wraps_a_model(
    wrapper: str, verb: str, tmp_path: Path, alone: None
) -> None:
    wanted = VERBS[verb](random_vit(), tmp_path)
    found = VERBS[verb](WRAPPERS[wrapper](random_vit()), tmp_path)
    if isinstance(wanted, Tensor):
        # compiled code may order its sums otherwise
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    else:
        assert found == wanted


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_no_module_is_refused_with_how_to_open_it(verb: str, tmp_path: Path) -> None:
    def ask(given: Any) -> Any:
        if verb == "search":
            return vp.search(given, vp.score(random_vit(), batches()), batches(), mode="fixed")
        return VERBS[verb](given, tmp_path)

    for given, kind in (("vit_small", "str 'vit_small'"), (random_vit().state_dict(), "Dict")):
        with pytest.raises(InvalidInput, match=rf"^[\w.]+: model must be a .*Module, got .*{kind}"):
            ask(given)


def test_averages_of_weights_are_looked_through() -> None:
    model = random_vit()
    wrapped = AveragedModel(model)
    assert vp.describe(wrapped).axes == vp.describe(model).axes
    assert vp.cost(wrapped) == vp.cost(model)


def _lora(model: Any, *names: str) -> Any:
    return get_peft_model(model, LoraConfig(target_modules=list(names)))


def small_hf(**more: Any) -> ViTForImageClassification:
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "intermediate_size": 48, "num_labels": 5}
    return ViTForImageClassification(ViTConfig(**{**sizes, **heads, **more})).eval()


ADAPTED: dict[str, Callable[[], Any]] = {
    "PeftModel": lambda: _lora(random_vit(), "qkv"),
    "compiled PeftModel": lambda: torch.compile(_lora(random_vit(), "qkv"), backend="eager"),
    "in timm": lambda: inject_adapter_in_model(LoraConfig(target_modules=["fc1"]), random_vit()),
    "in transformers": lambda: inject_adapter_in_model(
        LoraConfig(target_modules=["q_proj"]), small_hf()
    ),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", ADAPTED)
def test_adapters_are_refused_with_the_remedy(kind: str, verb: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitecture, match=rf"^{verb}: .*peft\..*merge_and_unload\(\)"):
        VERBS[verb](ADAPTED[kind](), tmp_path)


def test_what_is_merged_is_scored() -> None:
    model = _lora(random_vit(), "qkv")
    merged = model.merge_and_unload()
    assert vp.score(merged, batches()).samples == 4


def _timm(head: nn.Module) -> Any:
    model = random_vit()
    model.head = head
    return model.double()


def _transformers() -> Any:
    model = small_hf(num_labels=10)
    model.classifier = nn.Linear(24, 5)
    return model.double()


def _set(model: Any, classes: int) -> None:
    model.num_classes = classes


def _set_labels(model: Any, classes: int) -> None:
    model.num_labels = model.config.num_labels = classes


# the model, the classes of its head, and what the error says to do
STALE: dict[str, tuple[Callable[[], Any], int, str, Callable[[Any, int], Any]]] = {
    "no head": (lambda: _timm(nn.Identity()), 0, "model.num_classes = 0", _set),
    "timm": (lambda: _timm(nn.Linear(24, 3)), 3, "model.num_classes = 3", _set),
    "timm, reset": (
        *(lambda: _timm(nn.Linear(24, 3)), 3, r"model.reset_classifier\(3\)"),
        lambda model, classes: model.reset_classifier(classes),
    ),
    "transformers": (
        *(_transformers, 5, "model.num_labels = model.config.num_labels = 5", _set_labels),
    ),
}
LABELLED: dict[str, Callable[[Any, int], Any]] = {
    "score": lambda model, classes: vp.score(model, batches(classes)),
    "evaluate": lambda model, classes: vp.evaluate(model, batches(classes)),
    "distill": lambda model, classes: vp.distill(model, None, batches(classes), None, CONFIG),
    "search": lambda model, classes: _search(model),
}


@pytest.mark.parametrize("kind", STALE)
def test_a_head_of_other_classes_is_refused_and_the_remedy_helps(kind: str, tmp_path: Path) -> None:
    build, classes, remedy, follow = STALE[kind]
    model = build()
    verbs = {**LABELLED, "describe": lambda m, _: vp.describe(m), "cost": lambda m, _: vp.cost(m)}
    for verb, call in {**verbs, "save": lambda m, _: vp.save(m, tmp_path / "out")}.items():
        with pytest.raises(InvalidInput, match=rf"must have a head of the classes.*{remedy}") as e:
            call(model, classes)
        assert str(e.value).startswith(("score:", f"{verb}:"))
    follow(model, classes)
    model.double()
    vp.save(model, tmp_path / "out")
    said, again = (m(IMAGES) for m in (model.eval(), vp.load(tmp_path / "out")))
    assert torch.equal(getattr(said, "logits", said), getattr(again, "logits", again))
    for call in LABELLED.values() if classes else ():
        call(model, classes)


@pytest.mark.parametrize("head", [nn.Linear(24, 5), nn.Identity()])
def test_torchvision_takes_any_head(head: nn.Module, tmp_path: Path) -> None:
    model: Any = TorchvisionViT(16, 8, 2, 3, 24, 48, num_classes=10).eval()
    model.heads = head
    model.double()
    vp.save(model, tmp_path / "out")
    assert torch.equal(vp.load(tmp_path / "out")(IMAGES), model(IMAGES))
    if isinstance(head, nn.Linear):
        for call in LABELLED.values():
            call(model, 5)
        return
    scores = vp.score(model, IMAGES, criterion="fisher", objective="features")
    small = vp.prune(model, vp.plan(model, scores, 0.7))
    config = replace(CONFIG, loss=("features", "hidden"))
    assert vp.distill(small, model, [IMAGES], None, config).finished


@pytest.mark.parametrize("classes", [0, 1])
@pytest.mark.parametrize("verb", LABELLED)
def test_labels_need_two_classes(verb: str, classes: int) -> None:
    got = classes or "none"
    with pytest.raises(InvalidInput, match=f"^{verb}: .*at least 2 classes, got {got}; "):
        LABELLED[verb](random_vit(num_classes=classes), classes)


class Odd(nn.Module):
    """Says that it has three classes, by a head that nobody knows, and puts out four numbers."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3 * 16 * 16, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.map(images.flatten(1))


@pytest.mark.parametrize("verb", ["evaluate", "distill"])
def test_outputs_of_other_classes_than_said_are_refused(verb: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{verb}: .*of the 3 classes that it says.* got 4"):
        LABELLED[verb](Odd(), 3)
