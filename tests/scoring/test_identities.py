"""The identities that make scores nearly free, in fp64 on a random ViT.

Truth is the gradient of real gates: factors of 1 on heads, dims, neurons, norm outputs, branches
and everything written into a channel. Each test compares it with what activations or weights and
their gradients give. Losses are summed over samples. Notation: B samples, N tokens, C channels, H
heads, K head dims; ``d`` before a name is the gradient of the loss; ``W * dW`` is elementwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import LayerNorm
from torch import Tensor, nn
from torch.nn import functional as F

from vitprune_fast.modules.norms import norm_over_kept
from vitprune_fast.scoring import score
from vitprune_fast.structure import UNIT_KINDS
from vitprune_fast.testing import random_images, random_vit

# both sides are sums of at most a few thousand fp64 terms
TOLERANCE = 1e-10
BLOCKS = [0, 2]


def same(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape and want.abs().max() > 0
    assert (got - want).norm() <= tolerance * want.norm()


@dataclass
class Run:
    """One forward and backward with gates at 1."""

    model: Any
    images: Tensor
    labels: Tensor
    gates: dict[str, Tensor] = field(default_factory=dict)
    # tensors of the graph, by name; their gradients are retained
    at: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.zeros(0))

    def gate(self, name: str, *shape: int) -> Tensor:
        """The gate of this name, the same one at every call."""
        known = self.gates.get(name)
        if known is None:
            known = self.gates[name] = torch.ones(*shape, dtype=torch.float64, requires_grad=True)
        return known

    def keep(self, name: str, x: Tensor) -> Tensor:
        self.at[name] = x
        if x.requires_grad:
            x.retain_grad()
        return x

    def d(self, name: str) -> Tensor:
        """The gradient of the loss by a gate or a tensor of the graph."""
        found = self.gates.get(name, self.at.get(name))
        assert found is not None and found.grad is not None
        return found.grad

    def adx(self, name: str) -> Tensor:
        """Activation times gradient."""
        return (self.at[name] * self.d(name)).detach()


def hook_input(module: nn.Module, function: Any) -> Any:
    return module.register_forward_pre_hook(lambda _, inputs: (function(inputs[0]), *inputs[1:]))


def hook_output(module: nn.Module, function: Any) -> Any:
    return module.register_forward_hook(lambda _, inputs, output: function(output))


def run_of(model: Any, batch: int = 5) -> Run:
    """Gates and retained gradients everywhere, then one backward of the summed loss."""
    r = Run(model, random_images(model, batch), torch.arange(batch) % model.num_classes)
    channels, handles = model.embed_dim, []

    def into_stream(x: Tensor, branch: str = "") -> Tensor:
        x = x * r.gate("embed", channels)
        return x * r.gate(branch, 1) if branch else x

    def stem(x: Tensor) -> Tensor:
        return r.keep("stem", into_stream(x))

    handles.append(hook_input(model.blocks[0], stem))
    handles.append(hook_input(model.norm, partial(r.keep, "x.norm")))
    for i, block in enumerate(model.blocks):
        attn, mlp = block.attn, block.mlp
        attn.fused_attn = False
        heads, dims, hidden = attn.num_heads, attn.head_dim, mlp.fc2.in_features

        def qkv(x: Tensor, i: int = i, heads: int = heads, dims: int = dims) -> Tensor:
            x = r.keep(f"{i}.qkv", x).unflatten(-1, (3, heads, dims))
            gates = [r.gate(f"{i}.{name}", heads, dims) for name in ("q", "k", "v")]
            return (x * torch.stack(gates)).flatten(-3)

        def o(x: Tensor, i: int = i, heads: int = heads, dims: int = dims) -> Tensor:
            x = r.keep(f"{i}.o", x).unflatten(-1, (heads, dims))
            gates = r.gate(f"{i}.head", heads)[:, None] * r.gate(f"{i}.v_dim", heads, dims)
            return (x * gates).flatten(-2)

        def a(x: Tensor, i: int = i, hidden: int = hidden) -> Tensor:
            return r.keep(f"{i}.a", x) * r.gate(f"{i}.neuron", hidden)

        def y(x: Tensor, name: str = "") -> Tensor:
            return r.keep(f"y.{name}", x * r.gate(f"ln.{name}", channels))

        handles += [
            hook_output(attn.qkv, qkv),
            hook_input(attn.attn_drop, partial(r.keep, f"{i}.p")),
            hook_input(attn.proj, o),
            hook_output(attn, partial(into_stream, branch=f"{i}.attn")),
            hook_output(mlp.fc1, partial(r.keep, f"{i}.h")),
            hook_input(mlp.fc2, a),
            hook_output(mlp, partial(into_stream, branch=f"{i}.mlp")),
        ]
        for k in (1, 2):
            norm, name = getattr(block, f"norm{k}"), f"{i}.norm{k}"
            handles.append(hook_input(norm, partial(r.keep, f"x.{name}")))
            handles.append(hook_output(norm, partial(y, name=name)))
    handles.append(hook_output(model.norm, partial(r.keep, "y.norm")))
    r.logits = model(r.images)
    F.cross_entropy(r.logits, r.labels, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return r


def wdw(tensor: Any) -> Tensor:
    """A tensor times its gradient, elementwise."""
    return (tensor * tensor.grad).detach()


@pytest.fixture(scope="module")
def run() -> Run:
    # without eps the network is exactly invariant to the scale of its stream (rows 9, 11, 13)
    return run_of(random_vit(norm_layer=partial(LayerNorm, eps=0.0)))


def per_sample(run: Run, *units: str) -> dict[str, Tensor]:
    """Our scores, by hooks alone; test_units.py compares the fused path with real gates."""
    batch = (run.images, run.labels)
    return dict(score(run.model, [batch], units=units, per_sample=True, path="taps").per_sample)


# what scores hand back in fp32
FP32 = 1e-6


@pytest.mark.parametrize("i", BLOCKS)
def test_row_1_head_gate_is_the_delta_of_flash_attention(run: Run, i: int) -> None:
    attn = run.model.blocks[i].attn
    heads = attn.num_heads
    delta = run.adx(f"{i}.o").unflatten(-1, (heads, -1)).sum(-1)  # (B, N, H)
    same(delta.sum((0, 1)), run.d(f"{i}.head"))
    # what the softmax backward subtracts
    same(run.adx(f"{i}.p").sum(-1).transpose(1, 2), delta)
    same(per_sample(run, "head")[f"blocks.{i}.attn.heads"], delta.sum(1), FP32)


@pytest.mark.parametrize("i", BLOCKS)
def test_row_2_head_gate_from_values(run: Run, i: int) -> None:
    value = run.adx(f"{i}.qkv").unflatten(-1, (3, run.model.blocks[i].attn.num_heads, -1))[:, :, 2]
    same(value.sum((0, 1, 3)), run.d(f"{i}.head"))


@pytest.mark.parametrize("i", BLOCKS)
def test_row_3_v_dim_gate(run: Run, i: int) -> None:
    attn, want = run.model.blocks[i].attn, run.d(f"{i}.v_dim").flatten()
    rows = (wdw(attn.qkv.weight).sum(1) + wdw(attn.qkv.bias)).view(3, -1)
    same(run.adx(f"{i}.o").sum((0, 1)), want)
    same(run.adx(f"{i}.qkv").sum((0, 1)).view(3, -1)[2], want)
    same(wdw(attn.proj.weight).sum(0), want)
    same(rows[2], want)
    same(run.d(f"{i}.v").flatten(), want)
    scores = per_sample(run, "v_dim")[f"blocks.{i}.attn.v_dims"]
    same(scores, run.adx(f"{i}.o").sum(1), FP32)
    same(scores.double().sum(0), wdw(attn.proj.weight).sum(0), FP32)


@pytest.mark.parametrize("i", BLOCKS)
def test_row_4_neuron_gate_is_a_column_sum(run: Run, i: int) -> None:
    column = wdw(run.model.blocks[i].mlp.fc2.weight).sum(0)
    same(column, run.d(f"{i}.neuron"))
    same(run.adx(f"{i}.a").sum((0, 1)), column)
    scores = per_sample(run, "neuron")[f"blocks.{i}.mlp.neurons"]
    same(scores, run.adx(f"{i}.a").sum(1), FP32)
    same(scores.double().sum(0), column, FP32)


@pytest.mark.parametrize("act", [nn.ReLU, partial(nn.LeakyReLU, 0.2), nn.GELU])
def test_row_5_rows_of_fc1_are_another_score(act: Any) -> None:
    run = run_of(random_vit(act_layer=act))
    mlp = run.model.blocks[1].mlp
    row = wdw(mlp.fc1.weight).sum(1) + wdw(mlp.fc1.bias)
    same(row, run.adx("1.h").sum((0, 1)))
    if act is not nn.GELU:
        # homogeneous of degree 1
        same(row, run.d("1.neuron"))
        return
    same(row, run.d("1.neuron") + gelu_excess(run, 1))
    assert (row - run.d("1.neuron")).norm() > 0.01 * row.norm()


def gelu_excess(run: Run, i: int) -> Tensor:
    """sum_n h^2 phi(h) da, by which GELU differs from a function of degree 1."""
    h = run.at[f"{i}.h"].detach()
    density = torch.exp(-h.square() / 2) / math.sqrt(2 * math.pi)
    return (h.square() * density * run.d(f"{i}.a")).sum((0, 1))


@pytest.mark.parametrize("i", BLOCKS)
def test_row_6_qk_dim_gate(run: Run, i: int) -> None:
    qkv, want = run.model.blocks[i].attn.qkv, run.d(f"{i}.q").flatten()
    rows = (wdw(qkv.weight).sum(1) + wdw(qkv.bias)).view(3, -1)
    sums = run.adx(f"{i}.qkv").sum((0, 1)).view(3, -1)
    for got in (sums[0], sums[1], rows[0], rows[1], run.d(f"{i}.k").flatten()):
        same(got, want)
    each = run.adx(f"{i}.qkv").sum(1).unflatten(-1, (3, -1))
    for part in (0, 1):
        same(per_sample(run, "qk_dim")[f"blocks.{i}.attn.qk_dims"], each[:, part], FP32)


@pytest.mark.parametrize("i", BLOCKS)
def test_row_7_qk_dims_add_up_to_the_temperature(run: Run, i: int) -> None:
    """sum_d q_d dq_d = sum S dS = the derivative by the log of the inverse temperature."""
    attn = run.model.blocks[i].attn
    q, k, _ = run.at[f"{i}.qkv"].detach().unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * attn.head_dim**-0.5
    p, dp = run.at[f"{i}.p"].detach(), run.d(f"{i}.p")
    dlogits = p * (dp - (p * dp).sum(-1, keepdim=True))
    want = run.d(f"{i}.q").sum(1)
    same((logits * dlogits).sum((0, 2, 3)), want)
    # the scale itself as a variable, one per head
    log_scale = torch.zeros(attn.num_heads, 1, 1, dtype=torch.float64, requires_grad=True)
    known, attn.scale = attn.scale, attn.head_dim**-0.5 * log_scale.exp()
    loss = F.cross_entropy(run.model(run.images), run.labels, reduction="sum")
    (by_temperature,) = torch.autograd.grad(loss, log_scale)
    attn.scale = known
    same(by_temperature.flatten(), want)


@pytest.mark.parametrize("i", BLOCKS)
def test_row_8_norm_output_gate(run: Run, i: int) -> None:
    block = run.model.blocks[i]
    for k, reader in ((1, block.attn.qkv), (2, block.mlp.fc1)):
        norm, want = getattr(block, f"norm{k}"), run.d(f"ln.{i}.norm{k}")
        same(wdw(norm.weight) + wdw(norm.bias), want)
        same(wdw(reader.weight).sum(0), want)


def stem_score(model: Any) -> Tensor:
    """(C,) of patch embedding, class token and position embedding."""
    proj = model.patch_embed.proj
    tokens = wdw(model.cls_token).sum((0, 1)) + wdw(model.pos_embed).sum((0, 1))
    return wdw(proj.weight).sum((1, 2, 3)) + wdw(proj.bias) + tokens


def test_row_9_embed_gate_on_every_write(run: Run) -> None:
    rows = stem_score(run.model)
    for block in run.model.blocks:
        for out in (block.attn.proj, block.mlp.fc2):
            rows = rows + wdw(out.weight).sum(1) + wdw(out.bias)
    want = run.d("embed")
    same(rows, want)
    # the network does not see the scale of its stream, so signed scores carry no total
    assert want.sum().abs() <= TOLERANCE * want.abs().sum()
    with_eps = run_of(random_vit(norm_layer=partial(LayerNorm, eps=1e-6))).d("embed")
    assert with_eps.sum().abs() <= 1e-5 * with_eps.abs().sum()


def weighted_norm(norm: Any, gate: Tensor, x: Tensor) -> Tensor:
    """LayerNorm whose statistics count channel c ``gate[c]`` times: at 0 it is not there."""
    weight = gate / gate.sum()
    mean = (weight * x).sum(-1, keepdim=True)
    variance = (weight * (x - mean).square()).sum(-1, keepdim=True)
    return gate * ((x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias)


def row_means(run: Run, norm: Any, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x hat, c1 = mean(gamma dy x hat), c2 = mean(gamma dy), sigma and mean / sigma."""
    x, dy = run.at[f"x.{name}"].detach(), run.d(f"y.{name}")
    mean = x.mean(-1, keepdim=True)
    sigma = (x.var(-1, keepdim=True, correction=0) + norm.eps).sqrt()
    hat, scaled = (x - mean) / sigma, norm.weight.detach() * dy
    c1 = (scaled * hat).mean(-1, keepdim=True)
    return hat, c1, scaled.mean(-1, keepdim=True), sigma, mean / sigma


def named_norms(model: Any) -> dict[str, Any]:
    norms = {
        f"{i}.norm{k}": getattr(b, f"norm{k}") for i, b in enumerate(model.blocks) for k in (1, 2)
    }
    return norms | {"norm": model.norm}


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
def test_row_10_removal_of_a_channel_at_its_readers(eps: float) -> None:
    """From what a LayerNorm backward holds; with eps, 1 becomes r2 = var / (var + eps)."""
    run = run_of(random_vit(norm_layer=partial(LayerNorm, eps=eps)))
    gate = torch.ones(run.model.embed_dim, dtype=torch.float64, requires_grad=True)
    total = torch.zeros(len(run.images), run.model.embed_dim, dtype=torch.float64)
    scores = per_sample(run, "embed")["embed"]
    for name, norm in named_norms(run.model).items():
        hat, c1, c2, _, _ = row_means(run, norm, name)
        r2 = hat.square().mean(-1, keepdim=True)
        terms = run.adx(f"y.{name}") - hat * c2 - (hat.square() - r2) * c1 / 2
        # this reader alone
        x, dy = run.at[f"x.{name}"].detach(), run.d(f"y.{name}")
        (alone,) = torch.autograd.grad((weighted_norm(norm, gate, x) * dy).sum(), gate)
        same(terms.sum((0, 1)), alone)
        total += terms.sum(1)
        norm.forward = partial(weighted_norm, norm, gate)
    same(scores, total, FP32)
    # all readers of the stream at once, in the whole network
    loss = F.cross_entropy(run.model(run.images), run.labels, reduction="sum")
    same(total.sum(0), torch.autograd.grad(loss, gate)[0])


def test_row_10_a_gate_at_zero_is_the_masked_norm(run: Run) -> None:
    norm, x = run.model.blocks[1].norm1, run.at["x.1.norm1"].detach()
    kept = torch.arange(24) != 3
    same(weighted_norm(norm, kept.double(), x), norm_over_kept(norm, kept, x))
    smaller = F.layer_norm(x[..., kept], (23,), norm.weight[kept], norm.bias[kept], norm.eps)
    same(weighted_norm(norm, kept.double(), x)[..., kept], smaller)


@pytest.mark.parametrize("name", ["0.norm1", "2.norm2", "norm"])
def test_row_11_zeroing_a_channel_at_one_reader(run: Run, name: str) -> None:
    norm = named_norms(run.model)[name]
    hat, c1, c2, sigma, shift = row_means(run, norm, name)
    x, dy = run.at[f"x.{name}"].detach().requires_grad_(), run.d(f"y.{name}")
    (dx,) = torch.autograd.grad((norm(x) * dy).sum(), x)
    inner = norm.weight.detach() * dy - c2 - hat * c1
    same(dx, inner / sigma)
    zeroing = ((hat + shift) * inner).sum((0, 1))
    same(zeroing, (x.detach() * dx).sum((0, 1)))
    assert zeroing.sum().abs() <= TOLERANCE * zeroing.abs().sum()


@pytest.mark.parametrize("i", BLOCKS)
def test_row_12_branch_gates(run: Run, i: int) -> None:
    block = run.model.blocks[i]
    for name, out, units in (("attn", block.attn.proj, "head"), ("mlp", block.mlp.fc2, "neuron")):
        want = run.d(f"{i}.{name}")
        same((wdw(out.weight).sum() + wdw(out.bias).sum()).view(1), want)
        same((run.d(f"{i}.{units}").sum() + wdw(out.bias).sum()).view(1), want)
    scores = per_sample(run, "head", "neuron", "attn_branch", "mlp_branch", "block")
    for name, units in (("attn", "attn.heads"), ("mlp", "mlp.neurons")):
        branch = scores[f"{name}_branches"][:, i]
        same(branch.double().sum().view(1), run.d(f"{i}.{name}"), FP32)
        # sample by sample what its units do not say is the bias
        bias = branch - scores[f"blocks.{i}.{units}"].sum(1)
        out = block.attn.proj if name == "attn" else block.mlp.fc2
        assert (bias.double().sum() - wdw(out.bias).sum()).abs() <= 1e-5 * branch.abs().sum()
    both = scores["attn_branches"][:, i] + scores["mlp_branches"][:, i]
    same(scores["blocks"][:, i], both, FP32)


def test_row_13_all_branch_gates_are_minus_the_stem(run: Run) -> None:
    branches = [run.d(f"{i}.{name}") for i in range(3) for name in ("attn", "mlp")]
    same(torch.cat(branches).sum(), -stem_score(run.model).sum())
    scores = per_sample(run, "block")["blocks"].double()
    error = (scores.sum() + stem_score(run.model).sum()).abs()
    assert error <= FP32 * scores.abs().sum()


def test_row_14_depthwise_ffn() -> None:
    """PVTv2's FFN: fc1, depthwise convolution, GELU, fc2."""
    torch.manual_seed(0)
    fc1, fc2 = nn.Linear(8, 10).double(), nn.Linear(10, 8).double()
    depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10).double()
    tokens = torch.randn(3, 36, 8, dtype=torch.float64)
    u = fc1(tokens)
    z = depthwise(u.transpose(1, 2).reshape(3, 10, 6, 6)).flatten(2).transpose(1, 2)
    a = F.gelu(z)
    for tensor in (u, z, a):
        tensor.retain_grad()
    (fc2(a) * torch.randn(8, dtype=torch.float64)).square().sum().backward()
    u_du, z_dz, a_da = (wdw(t).sum((0, 1)) for t in (u, z, a))
    filters = wdw(depthwise.weight).sum((1, 2, 3))
    same(wdw(fc2.weight).sum(0), a_da)
    same(filters + wdw(depthwise.bias), z_dz)
    same(wdw(fc1.weight).sum(1) + wdw(fc1.bias), u_du)
    same(filters, u_du)


@pytest.mark.parametrize("i", BLOCKS)
def test_row_15_linked_weights_count_twice(run: Run, i: int) -> None:
    attn, mlp = run.model.blocks[i].attn, run.model.blocks[i].mlp
    rows = (wdw(attn.qkv.weight).sum(1) + wdw(attn.qkv.bias)).view(3, -1)
    same(rows[2] + wdw(attn.proj.weight).sum(0), 2 * run.d(f"{i}.v_dim").flatten())
    linked = wdw(mlp.fc1.weight).sum(1) + wdw(mlp.fc1.bias) + wdw(mlp.fc2.weight).sum(0)
    same(linked, 2 * run.d(f"{i}.neuron") + gelu_excess(run, i))


def test_row_16_biases_that_fold_away() -> None:
    """Without the key bias and with the value bias folded into proj nothing changes but scores."""
    model = random_vit()
    run = run_of(model)
    for block in model.blocks:
        gradient = block.attn.qkv.bias.grad.view(3, -1)
        assert gradient[1].abs().max() <= TOLERANCE * gradient[0].abs().max()
    before, scores = run.logits.detach(), per_sample(run, "head")
    values = [block.attn.qkv.bias.detach().view(3, -1)[2].clone() for block in model.blocks]
    with torch.no_grad():
        for block, value in zip(model.blocks, values, strict=True):
            block.attn.proj.bias += block.attn.proj.weight @ value
            block.attn.qkv.bias.view(3, -1)[1:] = 0
        same(model(run.images), before)
    for i, value in enumerate(values):
        # a fold takes the constant part out of the head's output
        gone = (value * run.d(f"{i}.o").sum(1)).view(5, 3, 8).sum(-1)
        name = f"blocks.{i}.attn.heads"
        same(per_sample(run, "head")[name], scores[name].double() - gone, 1e-5)
        assert gone.norm() > 0.01 * scores[name].norm()


@pytest.mark.parametrize("i", BLOCKS)
def test_row_17_scores_about_the_mean(run: Run, i: int) -> None:
    """A unit replaced by its mean, which the next bias takes over."""
    block = run.model.blocks[i]
    for name, out in (("a", block.mlp.fc2), ("o", block.attn.proj)):
        x, dx = run.at[f"{i}.{name}"].detach(), run.d(f"{i}.{name}")
        mean = x.mean((0, 1))
        to_bias = out.bias.grad @ out.weight.detach()
        same(dx.sum((0, 1)), to_bias)
        same(wdw(out.weight).sum(0) - mean * to_bias, ((x - mean) * dx).sum((0, 1)))


def log_probabilities(model: Any, images: Tensor, gate: Tensor) -> Tensor:
    """(B, classes) with a gate on the neurons of block 1."""
    handle = hook_input(model.blocks[1].mlp.fc2, lambda a: a * gate)
    logits = model(images)
    handle.remove()
    return logits.log_softmax(-1)


def test_rows_18_and_19_kl_to_self_is_half_the_fisher_information() -> None:
    model = random_vit(mlp_ratio=1.0)
    images, units = random_images(model, 6), 24
    ones = torch.ones(units, dtype=torch.float64)
    jacobian: Any = torch.autograd.functional.jacobian(
        lambda gate: log_probabilities(model, images, gate), ones
    )
    with torch.no_grad():
        known = log_probabilities(model, images, ones)
        p = known.exp()
        # first order: nothing, whatever the unit
        first = (p[:, :, None] * jacobian).sum(1)
        assert first.abs().max() <= TOLERANCE * jacobian.abs().max()
        fisher = (p[:, :, None] * jacobian.square()).sum(1).mean(0)
        step, measured = 1e-3, torch.zeros_like(fisher)
        for unit in range(units):
            for sign in (1, -1):
                gate = ones.clone()
                gate[unit] += sign * step
                now = log_probabilities(model, images, gate)
                # the mean of both sides has no third-order term
                measured[unit] += (p * (known - now)).sum(1).mean() / 2
    same(measured / (step**2 / 2), fisher, 1e-4)


def test_row_19_the_score_of_a_sampled_label_has_the_fisher_as_its_mean() -> None:
    """Squares of our scores with label y, averaged over all y with their probabilities."""
    model = random_vit(mlp_ratio=1.0)
    images = random_images(model, 6)
    p = model(images).softmax(-1).detach()
    expected = torch.zeros(24, dtype=torch.float64)
    for label in range(model.num_classes):
        batch = (images, torch.full((6,), label))
        scores = score(model, [batch], units=("neuron",), per_sample=True, path="taps")
        g = scores.per_sample["blocks.1.mlp.neurons"].double()
        expected += (p[:, label, None] * g.square()).mean(0)
    ones = torch.ones(24, dtype=torch.float64)
    jacobian: Any = torch.autograd.functional.jacobian(
        lambda gate: log_probabilities(model, images, gate), ones
    )
    same(expected, (p[:, :, None] * jacobian.square()).sum(1).mean(0), FP32)


def test_row_21_one_batched_backward_gives_every_sample(run: Run) -> None:
    """Absolute values and squares of these cannot come out of parameter gradients: only sums do."""
    together = per_sample(run, *UNIT_KINDS)
    for b in range(len(run.images)):
        one = Run(run.model, run.images[b : b + 1], run.labels[b : b + 1])
        for name, value in per_sample(one, *UNIT_KINDS).items():
            same(value, together[name][b : b + 1], FP32)
