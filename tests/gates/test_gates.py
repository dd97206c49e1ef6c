"""Gates of every kind: what they compute, how they are trained, how they come off again."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vitprune_fast as vp
from vitprune_fast.errors import InvalidInput
from vitprune_fast.gates import GATED_UNITS, KINDS, kinds
from vitprune_fast.structure import describe
from vitprune_fast.testing import VITS, random_images, random_vit

BAD: Any = None


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).abs().max() <= 1e-12 * max(1.0, float(other.abs().max()))


def options_of(kind: str, model: Any) -> dict[str, Any]:
    if kind == "fixed":
        return {"init": 1.0}
    return {"keep": 1.0} if kind == "ste" else {}


# what gates are, and what they leave alone


def test_a_gated_model_is_freed_with_its_gates() -> None:
    model: Any = random_vit(depth=1)
    # attaching puts such a method back on detaching
    model.remembered = model.forward_features
    gates = vp.gates.attach(model, units=("head",), penalty={"head": 1e-3, "neuron": 1e-3})
    freed = weakref.ref(model)
    del model, gates
    gc.collect()
    assert freed() is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", VITS)
def test_gates_start_open_and_come_off_without_a_trace(config: str, kind: Any) -> None:
    model = random_vit(config)
    images = random_images(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {path: set(vars(module)) for path, module in model.named_modules()}
    with torch.no_grad():
        want = model(images)
    options = options_of(kind, model)
    with torch.no_grad(), vp.gates.attach(model, GATED_UNITS, kind, **options) as gates:
        same(model(images), want)
        assert list(model.state_dict()) == list(before)
        assert not {*map(id, gates.parameters())} & {*map(id, model.parameters())}
        copied = copy.deepcopy(model)
        assert torch.equal(copied(images), want)
    with torch.no_grad():
        assert torch.equal(model(images), want)
    for one in (model, copied):
        assert {path: set(vars(module)) for path, module in one.named_modules()} == modules
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, before[name])
        for module in one.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("units", [(unit,) for unit in GATED_UNITS], ids=GATED_UNITS)
@pytest.mark.parametrize("config", VITS)
def test_a_gate_of_one_gets_the_first_order_score(config: str, units: tuple[str]) -> None:
    """The gradient of a gate at 1 is the sum over samples of the unit's signed score."""
    model = random_vit(config)
    images, labels = random_images(model, 5), torch.arange(5)
    scores = vp.score(model, [(images, labels)], "taylor", units, "signed", per_sample=True)
    with vp.gates.attach(model, units, init=1.0) as gates:
        F.cross_entropy(model(images), labels, reduction="sum").backward()
        for name in gates.axes:
            gradient = gates.score(name).grad
            assert gradient is not None
            # scores of samples are kept in fp32: five of them are rounded
            largest = scores.per_sample[name].abs().max().item()
            error = (gradient - scores.per_sample[name].double().sum(0)).abs().max()
            assert largest > 0 and error <= 5 * 2**-24 * largest


@pytest.mark.parametrize("config", ["plain", "swiglu", "swiglu_packed-layerscale", "qk_norm"])
def test_gradcheck_of_a_gated_model(config: str) -> None:
    model = random_vit(config, depth=1, mlp_ratio=0.5).requires_grad_(False)
    images = random_images(model)
    gates = vp.gates.attach(model, GATED_UNITS)
    names = list(gates.axes)
    values = [torch.randn(axis.size, dtype=torch.float64) for axis in gates.axes.values()]
    for value in values:
        value[0] = 0

    def logits(*given: torch.Tensor) -> torch.Tensor:
        # in place of the parameters, which cannot be a function's arguments
        vars(gates)["value"] = lambda axis, training=False: given[names.index(axis)]
        return model(images)

    assert torch.autograd.gradcheck(logits, [value.requires_grad_() for value in values])


def test_gates_scale_units_in_bf16_too() -> None:
    model = random_vit(dtype=torch.float32).bfloat16()
    images = random_images(model)
    with vp.gates.attach(model, GATED_UNITS) as gates:
        assert {p.dtype for p in gates.parameters()} == {torch.float32}
        model(images).float().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in gates.parameters())


def test_gates_under_autocast_are_those_of_full_precision() -> None:
    model = random_vit(dtype=torch.float32)
    images = random_images(model)
    with vp.gates.attach(model, GATED_UNITS, init=0.7) as gates:
        results = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = model(images).float().square().mean()
            results.append([loss, *torch.autograd.grad(loss, list(gates.parameters()))])
        for exact, mixed in zip(*results, strict=True):
            assert mixed.dtype == torch.float32
            # a few hundred products of 8 bits one after the other, three blocks deep
            assert (mixed - exact).norm() <= 0.1 * exact.norm()


@pytest.mark.parametrize(
    ("units", "kind"),
    [
        (("head",), "fixed"),
        (("neuron",), "l1"),
        (("v_dim", "neuron"), "l1"),
        (GATED_UNITS, "fixed"),
    ],
)
def test_closed_units_contribute_nothing_whatever_they_hold(
    units: tuple[str, ...], kind: Any
) -> None:
    """Heads whose gates learn are computed while closed, since a closed gate has a gradient."""
    model = random_vit()
    images = random_images(model)
    axes = ("blocks.1.attn.heads", "blocks.1.mlp.neurons")
    with vp.gates.attach(model, units, kind, init=1.0) as gates, torch.no_grad():
        for name in axes:
            if name in gates.axes:
                gates.score(name)[1] = 0
        want = model(images)
        if "head" in units:
            model.blocks[1].attn.qkv.bias[-9] = torch.nan  # values of the middle head
        if "neuron" in units:
            model.blocks[1].mlp.fc1.bias[1] = torch.nan
        assert torch.equal(model(images), want)


def test_all_gates_closed_is_a_model_of_biases() -> None:
    model = random_vit()
    images = random_images(model)
    with vp.gates.attach(model, GATED_UNITS, "fixed", init=0.0), torch.no_grad():
        closed = model(images)
    plan = vp.Plan.of(
        describe(model), {a.name: [] for u in ("head", "neuron") for a in describe(model).units(u)}
    )
    with torch.no_grad():
        same(vp.prune(model, plan)(images), closed)


def test_one_set_of_gates_serves_several_models() -> None:
    model = random_vit()
    images = random_images(model)
    gates = vp.gates.attach(model)
    average = copy.deepcopy(model)
    gates.attach(average)
    with torch.no_grad():
        gates.score("blocks.0.attn.heads")[:] = torch.tensor([0.5, 0.0, 2.0])
        assert torch.equal(model(images), average(images))
    apart = copy.deepcopy(gates)
    with torch.no_grad():
        apart.score("blocks.0.attn.heads")[:] = 1
    assert gates.score("blocks.0.attn.heads").tolist() == [0.5, 0.0, 2.0]
    gates.detach(average)
    with pytest.raises(InvalidInput, match="must have these gates, got one without"):
        gates.detach(average)
    gates.detach()
    with torch.no_grad():
        assert torch.equal(model(images), average(images))


def test_a_gated_model_compiles() -> None:
    model = random_vit(dtype=torch.float32, depth=1)
    images = random_images(model)
    with vp.gates.attach(model, GATED_UNITS) as gates:
        results = []
        for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            loss = forward(images).sum()
            results.append((loss, *torch.autograd.grad(loss, list(gates.parameters()))))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


# kinds


def test_l1_trains_towards_the_units_that_matter() -> None:
    """Gates of units that nothing reads go to 0 under the penalty, and the others stay."""
    model = random_vit(dtype=torch.float32).requires_grad_(False)
    model.blocks[0].mlp.fc2.weight[:, ::2] = 0
    images, labels = random_images(model, 8), torch.arange(8) % 5
    with vp.gates.attach(model, ("neuron",), penalty=1e-2) as gates:
        assert gates.penalty().item() == pytest.approx(1e-2 * 3 * 96)
        optimizer = torch.optim.SGD(gates.parameter_groups(lr=1.0))
        for _ in range(100):
            loss = F.cross_entropy(model(images), labels) + gates.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        score = gates.score("blocks.0.mlp.neurons").detach()
        assert score[::2].abs().max() <= 1e-2 + 1e-6
        assert score[1::2].abs().mean() > 0.1


def test_ste_keeps_the_best_of_all_axes_and_lets_gradients_pass() -> None:
    model = random_vit()
    images = random_images(model)
    with vp.gates.attach(model, ("head", "neuron"), "ste", keep={"head": 5 / 9, "neuron": 0.25}):
        gates = vp.gates.detach(model)
        with torch.no_grad():
            for number, name in enumerate(a.name for a in gates.structure.units("head")):
                gates.score(name)[:] = torch.tensor([0.1, -5.0, 3.0]) * (number + 1)
            for name in (a.name for a in gates.structure.units("neuron")):
                gates.score(name).normal_()
        gates.attach(model)
        loss = model(images).square().sum()
        values = gates.values()
        assert [values[f"blocks.{i}.attn.heads"].tolist() for i in range(3)] == [
            [0, 0, 1],
            [1, 0, 1],
            [1, 0, 1],
        ]
        assert gates.alive() == {"head": (5, 9), "neuron": (72, 288)}
        loss.backward()
        # closed units learn as open ones do
        gradient = gates.score("blocks.0.attn.heads").grad
        assert gradient is not None and (gradient != 0).all()
        gates.set_keep(1.0)
        assert gates.alive() == {"head": (9, 9), "neuron": (288, 288)}
        gates.set_keep({"head": 0, "neuron": 1})
        assert gates.alive() == {"head": (0, 9), "neuron": (288, 288)}
    # a plan is made with thresholds of the scores as they are, not as they were in a forward
    with torch.no_grad():
        gates.set_keep({"head": 1 / 9, "neuron": 1})
        gates.score("blocks.0.attn.heads")[1] = 100
        plan = vp.gates.to_plan(model, gates, min_units=0)
        assert [plan[f"blocks.{i}.attn.heads"] for i in range(3)] == [[1], [], []]
    # units that tie with the threshold stay: nothing is cut before the scores differ
    with vp.gates.attach(model, kind="ste", keep=0.5) as gates:
        assert gates.alive() == {"head": (9, 9), "neuron": (288, 288)}


def test_ste_learns_a_threshold_for_every_axis() -> None:
    score = torch.randn(20, dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor(-0.3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(20, dtype=torch.float64)
    gate = kinds.top_share(score, threshold)
    # sigmoid(-0.3) * 20 = 8.51
    best = score.argsort(descending=True)[:9]
    assert sorted(gate.nonzero().flatten().tolist()) == sorted(best.tolist())
    got = torch.autograd.grad((gate * weight).sum(), (score, threshold))
    assert torch.equal(got[0], weight)
    same(got[1], weight[best].sum())
    counts = [int(kinds.top_share(score, torch.tensor(t), 8).sum()) for t in (-9.0, -0.3, 0.4, 9.0)]
    # 1, 9, 12 and 20 of them, to the nearest multiple of 8, ties to even; all there are at most
    assert counts == [8, 8, 16, 16]
    model = random_vit()
    with vp.gates.attach(model, kind="ste", thresholds="learned") as gates:
        groups = gates.parameter_groups(lr=0.1, threshold_lr=0.5)
        assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups] == [
            (6, 0.1, 0.0),
            (6, 0.5, 0.0),
        ]
        model(random_images(model)).sum().backward()
        assert all(p.grad is not None for p in gates.parameters())


def test_hard_concrete_is_the_published_gate() -> None:
    log_alpha = torch.linspace(-4, 4, 9, dtype=torch.float64)
    noise = kinds.logistic_noise(200_000, 0, 0, "axis")
    drawn = kinds.hard_concrete(log_alpha[:, None], noise)
    # eq. 12, against the share of draws that are open: binomial error of 200,000 draws, 5 sigma
    share = (drawn != 0).double().mean(1)
    want = torch.sigmoid(log_alpha - 2 / 3 * math.log(0.1 / 1.1))
    same(kinds.probability_open(log_alpha), want)
    assert ((share - want).abs() <= 5 * (want * (1 - want) / 200_000).sqrt() + 1e-6).all()
    assert drawn.min() == 0 and drawn.max() == 1
    settled = kinds.hard_concrete(log_alpha)
    same(settled, (torch.sigmoid(log_alpha) * 1.2 - 0.1).clamp(0, 1))


def test_hard_concrete_draws_can_be_gone_on_from() -> None:
    model = random_vit().train()
    images = random_images(model)
    gates = vp.gates.attach(model, kind="hard_concrete", seed=3)
    with torch.no_grad():
        first, second = model(images), model(images)
        assert not torch.equal(first, second)
        assert torch.equal(model.eval()(images), model(images))
        saved = {name: value.clone() for name, value in gates.state_dict().items()}
        third = model.train()(images)
        again = vp.gates.attach(copy.deepcopy(model), kind="hard_concrete", seed=3)
        again.load_state_dict(saved)
        gates.detach()
        again.attach(model)
        assert torch.equal(model(images), third)
        again.set_step(0)
        assert torch.equal(model(images), first)
    assert again.penalty().item() == pytest.approx(
        1e-4 * 297 * torch.sigmoid(torch.tensor(2.5 + 2 / 3 * math.log(11))).item()
    )


def test_fixed_gates_are_what_was_given() -> None:
    model = random_vit()
    structure = describe(model)
    values = {"blocks.2.attn.heads": torch.tensor([0.0, 1.0, 0.5])}
    with vp.gates.attach(model, kind="fixed", init=values) as gates:
        assert gates.value("blocks.2.attn.heads").tolist() == [0.0, 1.0, 0.5]
        assert gates.alive() == {"head": (8, 9), "neuron": (288, 288)}
        assert gates.parameter_groups(lr=1.0) == []
        assert gates.penalty() == 0
    plan = vp.Plan.of(structure, {"blocks.2.attn.heads": [0, 2], "blocks.1.mlp.neurons": [5]})
    images = random_images(model)
    with vp.gates.attach(model, kind="fixed", init=plan), torch.no_grad():
        same(model(images), vp.prune(model, plan)(images))


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": ("token",)}, "units must be a list of kinds among head, neuron, qk_dim, v_dim"),
        ({"units": "head"}, "units must be a list of kinds among .*, got 'head'"),
        ({"units": ()}, "units must be a list of kinds among"),
        ({"kind": "l0"}, "kind must be one of l1, ste, hard_concrete, fixed, got 'l0'"),
        ({"kind": "ste"}, "keep must be given for 'ste' with global thresholds, got None"),
        ({"kind": "ste", "keep": 1.5}, r"keep of head must be a share in \[0, 1\], got 1.5"),
        ({"kind": "ste", "keep": {"head": 1}}, "keep must name the unit kinds head, neuron"),
        ({"keep": 0.5}, "keep must be None but for 'ste' with global thresholds"),
        ({"kind": "ste", "thresholds": "local"}, "thresholds must be 'global' or 'learned'"),
        ({"round_to": 0}, "round_to must be a whole number >= 1, got 0"),
        ({"penalty": -1.0}, "penalty of head must be a number >= 0, got -1.0"),
        ({"penalty": {"head": 1.0}}, "penalty must name the unit kinds head, neuron, got head"),
        ({"init": math.nan}, "init must be a finite number, got nan"),
        ({"kind": "fixed"}, "init must be given for 'fixed', got None"),
        ({"init": {"embed": torch.ones(24)}}, "init must name axes that are gated, got 'embed'"),
        (
            {"init": {"blocks.0.attn.heads": torch.ones(4)}},
            r"init of blocks.0.attn.heads must be \(3,\), one number per unit, got \(4,\)",
        ),
        (
            {"init": {"blocks.0.attn.heads": [1, 1, 1]}},
            r"init of blocks.0.attn.heads must be \(3,\), .*, got list",
        ),
        (
            {"init": {"blocks.0.attn.heads": torch.tensor([1, math.nan, 1])}},
            "init of blocks.0.attn.heads must be finite, got NaN or Inf",
        ),
    ],
)
def test_bad_gates_are_refused_and_change_nothing(options: dict[str, Any], message: str) -> None:
    model = random_vit()
    with pytest.raises(InvalidInput, match=f"gates.attach: {message}"):
        vp.gates.attach(model, **options)
    assert not model._forward_pre_hooks and "__deepcopy__" not in vars(model)


def test_two_sets_of_gates_are_refused() -> None:
    model = random_vit()
    gates = vp.gates.attach(model)
    with pytest.raises(InvalidInput, match="must have no gates yet, got one with gates; detach"):
        vp.gates.attach(model, ("qk_dim",))
    assert vp.gates.detach(model) is gates
    with pytest.raises(InvalidInput, match="must have gates attached, got one without"):
        vp.gates.detach(model)
    with pytest.raises(InvalidInput, match="must be of kind 'ste' with global thresholds, got 'l1"):
        gates.set_keep(0.5)
    small = random_vit(depth=2)
    with pytest.raises(InvalidInput, match="must be the one the gates were made for, got one with"):
        gates.attach(small)
    assert not small._forward_pre_hooks
    other = random_vit(embed_dim=32, num_heads=4)
    gates.attach(other)
    with pytest.raises(InvalidInput, match=r"blocks.0.attn.proj 3 units of 8 columns, .*, got 32"):
        other(random_images(other))
    gates.detach(other)


def test_a_gate_that_is_not_a_number_is_seen() -> None:
    kinds: tuple[dict[str, Any], ...] = (
        {"kind": "l1"},
        {"kind": "ste", "keep": 1.0},
        {"kind": "hard_concrete"},
    )
    for options in kinds:
        model = random_vit()
        with vp.gates.attach(model, **options) as gates, torch.no_grad():
            gates.score("blocks.0.attn.heads")[0] = math.nan
            assert model(random_images(model)).isnan().any()
            with pytest.raises(InvalidInput, match="gates must be finite, got NaN or Inf"):
                vp.gates.to_plan(model, gates)
            with pytest.raises(InvalidInput, match="must be finite"):
                vp.gates.fold(model, gates)


def test_gates_are_modules_of_their_own() -> None:
    model = random_vit()
    with vp.gates.attach(model, kind="ste", thresholds="learned") as gates:
        assert isinstance(gates, nn.Module)
        assert "scores.blocks/0/attn/heads" in gates.state_dict()
        other = copy.deepcopy(gates)
        other.load_state_dict(gates.state_dict())


def test_fixed_gates_that_are_exchanged_are_seen() -> None:
    model = random_vit()
    heads = {axis.name: torch.tensor([0.0, 1, 1]) for axis in describe(model).units("head")}
    images = random_images(model)
    want = model(images)
    gates = vp.gates.attach(model, ["head"], "fixed", init=heads)
    model(images)
    opened = {
        name: torch.ones_like(value) if value.ndim else value
        for name, value in gates.state_dict().items()
    }
    gates.load_state_dict(opened, assign=True)
    assert (model(images) - want).abs().max() <= 1e-12


def test_a_gated_model_is_not_pickled() -> None:
    model = random_vit()
    with vp.gates.attach(model):
        for part in (model, model.blocks[0]):
            with pytest.raises(InvalidInput, match=r"pickle copy.deepcopy\(model\), or detach"):
                pickle.dumps(part)
        pickle.dumps(copy.deepcopy(model))
    pickle.dumps(model)
