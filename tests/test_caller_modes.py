"""What a caller's autograd mode changes of a result: nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitprune_fast as vp
from vitprune_fast.distill import MaskSchedule
from vitprune_fast.errors import InvalidInput
from vitprune_fast.testing import random_images, random_vit

MODES: dict[str, Callable[[], Any]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
}
CONFIG = vp.DistillConfig(epochs=1, warmup_epochs=0, loss=("soft", "hidden"), mixup=0.2)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Made in the mode of the caller, as are those of his loop."""
    return [(random_images(random_vit(), 4) + 0, torch.arange(4) + 0)]


def plan() -> vp.Plan:
    names = {"blocks.1.attn.heads": [0, 2], "blocks.2.mlp.neurons": [*range(48)]}
    return vp.Plan.of(vp.describe(random_vit()), names)


def _scored(criterion: str, **more: Any) -> Callable[[Any, Path], Any]:
    def verb(model: Any, tmp: Path) -> Any:
        if "objective" in more:
            model.reset_classifier(0)
        return dict(vp.score(model, batches(), criterion, **more))

    return verb


def _pruned(model: Any, tmp: Path) -> Any:
    return vp.prune(model, plan(), calibration=batches())


def _loaded(model: Any, tmp: Path) -> Any:
    vp.save(model, tmp / "model")
    return vp.load(tmp / "model")


def _with_moments(model: Any, tmp: Path) -> Any:
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.inference_mode(False), torch.enable_grad():
        model(random_images(model, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    pruned, cut = vp.prune(model, plan(), optimizer)
    with torch.inference_mode(False), torch.enable_grad():
        pruned(random_images(model, 2)).sum().backward()
        cut.step()
    return pruned


def _masked(model: Any, tmp: Path) -> Any:
    with vp.mask(model, plan()), torch.inference_mode(False), torch.enable_grad():
        model(random_images(model, 2)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def _gated(model: Any, tmp: Path) -> Any:
    gates = vp.gates.attach(model, kind="l1")
    vp.distill(model, random_vit(seed=1), batches(), None, CONFIG, gates=gates)
    vp.gates.fold(model, gates)
    return model


def _softly(model: Any, tmp: Path) -> Any:
    schedule = MaskSchedule(0.6, "linear", end=0.9, every=1, samples=4)
    return vp.distill(model, None, batches() * 3, None, CONFIG, masks=schedule).model


def _distilled(model: Any, tmp: Path) -> Any:
    best = vp.DistillConfig(epochs=2, warmup_epochs=0, keep="best", ema=0.5)
    return vp.distill(model, random_vit(seed=1), batches(), batches(), best).model


def _folded(model: Any, tmp: Path) -> Any:
    vp.fold_attention_biases(model)
    return model


VERBS: dict[str, Callable[[Any, Path], Any]] = {
    "describe": lambda model, tmp: vp.describe(model),
    "taylor": _scored("taylor"),
    "taylor of a loss": _scored("taylor", loss="bce"),
    "fisher": _scored("fisher"),
    "fisher of features": _scored("fisher", objective="features"),
    "kl": _scored("kl"),
    "activation": _scored("activation"),
    "magnitude": _scored("magnitude"),
    "plan": lambda model, tmp: vp.plan(model, vp.score(model, criterion="magnitude"), 0.5),
    "mask": _masked,
    "prune": _pruned,
    "prune with an optimizer": _with_moments,
    "load": _loaded,
    "evaluate": lambda model, tmp: vp.evaluate(model, batches(), random_vit(seed=1)),
    "distill": _distilled,
    "distill behind masks": _softly,
    "gates": _gated,
    "fold_attention_biases": _folded,
    "cost": lambda model, tmp: vp.cost(model),
    "peak_memory_bytes": lambda model, tmp: vp.peak_memory_bytes(model),
    "check_structure": lambda model, tmp: str(vp.check_structure(model, plans=1)),
}


def _plain(found: Any) -> Any:
    """Values of tensors by name; what is none is as it is."""
    if isinstance(found, nn.Module):
        found = found.state_dict()
    return found


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("mode", MODES)
def test_a_verb_gives_the_same_in_every_mode(mode: str, verb: str, tmp_path: Path) -> None:
    wanted = VERBS[verb](random_vit(), tmp_path)
    model = random_vit()
    before = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    with MODES[mode]():
        inside = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        found = VERBS[verb](model, tmp_path)
        assert (torch.is_inference_mode_enabled(), torch.is_grad_enabled()) == inside
    assert (torch.is_inference_mode_enabled(), torch.is_grad_enabled()) == before
    one, other = _plain(wanted), _plain(found)
    if not isinstance(one, dict):
        assert one == other
        return
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]) and not other[name].is_inference(), name
    if isinstance(found, nn.Module):
        # what comes out can learn
        vp.distill(found, None, batches(), None, vp.DistillConfig(epochs=1, warmup_epochs=0))


@pytest.mark.parametrize("verb", ["taylor", "distill"])
def test_a_model_made_in_inference_mode_is_refused(verb: str, tmp_path: Path) -> None:
    with torch.inference_mode():
        model = random_vit()
    with pytest.raises(InvalidInput, match=r"must be built outside torch.inference_mode\(\)"):
        VERBS[verb](model, tmp_path)
