"""Compensation: what it promises to minimise is minimal, and nothing else changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.surgery.test_carry import heads_and_neurons
from vitprune_fast.errors import InvalidInput
from vitprune_fast.planning import Plan
from vitprune_fast.structure import describe
from vitprune_fast.structure.reading import Reading
from vitprune_fast.surgery import Calibration, calibrate, compensate, mask, prune
from vitprune_fast.testing import random_images, random_vit

pytestmark = pytest.mark.filterwarnings("ignore:compensate:DeprecationWarning")


def batches_of(model: Any, count: int = 3) -> list[Any]:
    return [
        (random_images(model, 8, seed=k), torch.zeros(8, dtype=torch.int64)) for k in range(count)
    ]


def read_by(model: Any, path: str, batches: list[Any]) -> torch.Tensor:
    """What a module reads, (tokens, K), by a hook written for the test."""
    seen = []
    hook = model.get_submodule(path).register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].detach().flatten(0, -2))
    )
    with torch.no_grad():
        for images, _ in batches:
            model(images)
    hook.remove()
    return torch.cat(seen)


def test_calibration_is_the_moments_of_what_is_read() -> None:
    model = random_vit()
    batches = batches_of(model)
    found = calibrate(model, batches)
    for path in ("blocks.0.attn.proj", "blocks.1.mlp.fc2"):
        read, name = read_by(model, path, batches), path.rpartition(".")[0]
        assert torch.allclose(found.means[name], read.mean(0), rtol=1e-10, atol=1e-14)
        assert torch.allclose(found.grams[name], read.T @ read / len(read), rtol=1e-10, atol=1e-14)
        assert found.tokens == len(read)


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 10.0])
def test_least_squares_is_the_least(ridge: float) -> None:
    """Against torch's own solver, on the rows of the data and of the ridge."""
    model = random_vit()
    batches, plan = batches_of(model), heads_and_neurons(model)
    reading = Reading(describe(model), plan)
    calibration = calibrate(model, batches)
    for path in ("blocks.0.attn.proj", "blocks.1.mlp.fc2"):
        name, linear = path.rpartition(".")[0], model.get_submodule(path)
        read = read_by(model, path, batches)
        inner = next(w.inner for w in describe(model).writes() if w.name == name)
        assert inner is not None
        kept = torch.from_numpy(reading.kept_positions(inner))
        centred = read - read.mean(0)
        strength = math.sqrt(ridge * float(centred[:, kept].square().mean()) * len(read))
        old = linear.weight.detach().clone()
        rows = torch.cat([centred[:, kept], strength * torch.eye(len(kept), dtype=torch.float64)])
        target = torch.cat([centred @ old.T, strength * old[:, kept].T])
        want = torch.linalg.lstsq(rows, target).solution.T
        output = read @ old.T + linear.bias
        with compensate(model, plan, calibration, ridge=ridge) as report:
            assert torch.allclose(linear.weight[:, kept], want, rtol=1e-6, atol=1e-8)
            masked = torch.zeros_like(read)
            masked[:, kept] = read[:, kept]
            error = masked @ linear.weight.T + linear.bias - output
            assert error.mean(0).abs().max() <= 1e-10
            found = {each.branch: each for each in report}[name]
        share = float((error.square().sum() / output.square().sum()).sqrt())
        assert found.left == pytest.approx(share, rel=1e-6, abs=1e-9)
        lost = (masked - read) @ old.T
        assert found.lost == pytest.approx(
            float((lost.square().sum() / output.square().sum()).sqrt())
        )
        assert found.left < found.lost


def test_means_go_into_the_bias() -> None:
    model = random_vit()
    batches, plan = batches_of(model), heads_and_neurons(model)
    calibration = calibrate(model, batches, grams=False)
    name, linear = "blocks.0.mlp", model.get_submodule("blocks.0.mlp.fc2")
    gone = torch.ones(linear.in_features, dtype=torch.bool)
    gone[plan[f"{name}.neurons"]] = False
    mean = read_by(model, f"{name}.fc2", batches).mean(0)
    want = linear.bias + linear.weight[:, gone] @ mean[gone]
    old = linear.weight.detach().clone()
    with compensate(model, plan, calibration, "mean") as report:
        assert torch.allclose(linear.bias, want, rtol=1e-12, atol=1e-14)
        assert torch.equal(linear.weight[:, ~gone], old[:, ~gone])
        assert all(math.isnan(each.lost) for each in report)


@pytest.mark.parametrize("how", ["mean", "least_squares"])
@pytest.mark.parametrize(
    "config",
    ["plain", "layerscale-registers-no_embed_class", "res_post_norm", "swiglu_packed-layerscale"],
)
def test_the_pruned_model_is_nearer_and_the_dense_one_as_it_was(config: str, how: Any) -> None:
    model = random_vit(config)
    batches, structure = batches_of(model), describe(model)
    # of one layer: the fits of several do not know of each other
    neurons = structure.axes["blocks.2.mlp.neurons"]
    plan = Plan.of(structure, {neurons.name: range(0, neurons.size, 2)})
    calibration = calibrate(model, batches)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        want = model(batches[0][0])
        plain = (prune(model, plan)(batches[0][0]) - want).norm()
        with compensate(model, plan, calibration, how):
            small = prune(model, plan)
            with mask(model, plan):
                masked = model(batches[0][0])
        got = small(batches[0][0])
    assert (got - masked).abs().max() <= 1e-12 * max(1, float(masked.abs().max()))
    assert (got - want).norm() < plain
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_emptied_branch_writes_its_mean() -> None:
    model = random_vit()
    plan = Plan.of(describe(model), {"blocks.1.attn.heads": []})
    calibration = calibrate(model, batches_of(model))
    proj = model.get_submodule("blocks.1.attn.proj")
    want = proj.weight @ calibration.means["blocks.1.attn"] + proj.bias
    with compensate(model, plan, calibration):
        assert torch.allclose(proj.bias, want, rtol=1e-10, atol=1e-12)


def test_projections_behind_a_norm_are_left_alone() -> None:
    model = random_vit("scale_attn_norm-scale_mlp_norm")
    plan = heads_and_neurons(model)
    calibration = calibrate(model, batches_of(model))
    with compensate(model, plan, calibration) as report:
        assert report == []


def test_an_exception_leaves_the_model_as_it_was() -> None:
    model = random_vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibration = calibrate(model, batches_of(model))
    with pytest.raises(KeyboardInterrupt), compensate(model, heads_and_neurons(model), calibration):
        raise KeyboardInterrupt
    # and where a later branch cannot be fitted
    del calibration.means["blocks.1.mlp"]
    fitting = compensate(model, heads_and_neurons(model), calibration)
    with pytest.raises(InvalidInput, match=r"means for blocks.1.mlp, got none"), fitting:
        pass
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_wrong_arguments_are_refused() -> None:
    model = random_vit()
    plan, calibration = heads_and_neurons(model), calibrate(model, batches_of(model), grams=False)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"how": "median"}, "how must be mean or least_squares, got 'median'"),
        ({"ridge": -1.0}, "ridge must be a finite number >= 0, got -1.0"),
        ({}, "calibration must hold grams for least_squares, got none of blocks.0"),
        ({"calibration": Calibration(0)}, "must hold .* means for blocks.0.* got none"),
    ]
    for changed, message in cases:
        arguments = {"calibration": calibration, **changed}
        with pytest.raises(InvalidInput, match=message), compensate(model, plan, **arguments):
            pass
    torn = Calibration(1, calibration.means, {n: torch.eye(5) for n in calibration.means})
    shape = r"grams of shape \(\d+, \d+\) for blocks.0.*, got \(5, 5\)"
    with pytest.raises(InvalidInput, match=shape), compensate(model, plan, torn):
        pass
    with pytest.raises(InvalidInput, match="batches must hold at least one image, got none"):
        calibrate(model, [])
    with pytest.raises(InvalidInput, match="dtype must be float32 or float64"):
        calibrate(model, batches_of(model), dtype=torch.bfloat16)
    broken = [(torch.full_like(images, torch.nan), labels) for images, labels in batches_of(model)]
    with pytest.raises(InvalidInput, match="batches must give finite activations"):
        calibrate(model, broken)
    large = random_vit(dtype=torch.float32)
    with torch.no_grad():
        large.blocks[0].mlp.fc1.weight.mul_(1e20)
        large.blocks[0].mlp.fc2.weight.mul_(1e-20)
    with pytest.raises(InvalidInput, match=r"finite activations.*blocks\.0\.mlp"):
        calibrate(large, batches_of(large))


def test_a_fit_without_a_solution_says_what_helps() -> None:
    """One image has fewer tokens than the branch has units, so only a ridge decides."""
    model = random_vit()
    structure = describe(model)
    size = structure.axes["blocks.0.mlp.neurons"].size
    plan = Plan.of(structure, {"blocks.0.mlp.neurons": list(range(size - 1))})
    images = random_images(model, 1)
    few = calibrate(model, [(images, [0])])
    assert few.tokens < size - 1
    few.grams["blocks.0.mlp"].sub_(torch.eye(size, dtype=torch.float64) * 1e-9)
    fitting = compensate(model, plan, few, ridge=0.0)
    with pytest.raises(InvalidInput, match="ridge must be large enough for a solution"), fitting:
        pass
    with compensate(model, plan, few, ridge=1e-2) as report:
        assert report[0].left <= report[0].lost


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_that_never_change_tell_nothing(dtype: torch.dtype) -> None:
    """No ridge has a fit on kept units without variance; the means make up for all."""
    model = random_vit(dtype=dtype)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.zero_()
    batches, plan = batches_of(model), heads_and_neurons(model)
    weight = model.blocks[0].mlp.fc2.weight.detach().clone()
    kept = list(plan["blocks.0.mlp.neurons"])
    for ridge in (0.0, 1e-3):
        with compensate(model, plan, calibrate(model, batches), ridge=ridge) as report:
            found = next(one for one in report if one.branch == "blocks.0.mlp")
            assert torch.equal(model.blocks[0].mlp.fc2.weight[:, kept], weight[:, kept])
        assert found.lost > 0.1 and found.left <= 1e-3 * found.lost


@pytest.mark.filterwarnings("default:compensate:DeprecationWarning")
def test_it_says_what_replaces_it() -> None:
    model = random_vit()
    calibration = calibrate(model, batches_of(model))
    with (
        pytest.warns(DeprecationWarning, match=r"vp.prune\(model, plan, calibration=batches\)"),
        compensate(model, heads_and_neurons(model), calibration),
    ):
        pass
