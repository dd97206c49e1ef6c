"""Attention on packed qkv whose backward also scores heads, q/k dims and v dims, per sample.

B batch, N tokens, H heads, K head dim; packed ``qkv`` is (B, N, 3, H, K).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitprune_fast import _checks
from vitprune_fast._checks import check_wide, refuse_second_derivative
from vitprune_fast.ops._dispatch import Backend
from vitprune_fast.ops._forms import Forms, custom_op
from vitprune_fast.ops._qkv import (
    check_qkv,
    choose_attention,
    factor_of_logits,
    heads_first,
    with_adjacent_dims,
)
from vitprune_fast.reference import attention_score as _reference
from vitprune_fast.wide import wide_dtype

NEEDS = ("qkv", "head", "qk_dim", "v_dim")
_OP = "attention_score"
# torch's efficient attention stores the rows of the normalisers padded to this many, and wants
# heads of a multiple of so many dims
_LSE_ALIGNMENT, _DIM_ALIGNMENT = 32, 8

# which of NEEDS are wanted; and the four results, where what is not wanted has no elements,
# because a registered op cannot return None
Wanted = tuple[bool, bool, bool, bool]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


class AttentionScore(NamedTuple):
    """Results of the backward; None where not asked for.

    Args:
        qkv: gradient of packed qkv, ``(B, N, 3, H, K)``, contiguous, of the dtype of qkv.
        head: ``(B, H)``, fp32 or fp64.
        qk_dim: ``(B, H, K)``, fp32 or fp64.
        v_dim: ``(B, H, K)``, fp32 or fp64.
    """

    qkv: Tensor | None
    head: Tensor | None
    qk_dim: Tensor | None
    v_dim: Tensor | None


def _fake(qkv_BN3HK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, num_tokens, _, num_heads, head_dim = qkv_BN3HK.shape
    out_BNHK = qkv_BN3HK.new_empty(batch, num_tokens, num_heads, head_dim)
    lse_BHN = out_BNHK.new_empty(batch, num_heads, num_tokens, dtype=wide_dtype(qkv_BN3HK))
    return out_BNHK, lse_BHN


def _fake_score(
    grad_out_BNHK: Tensor,
    qkv_BN3HK: Tensor,
    out_BNHK: Tensor,
    lse_BHN: Tensor,
    scale: float,
    per_token: bool,
    qkv: bool,
    head: bool,
    qk_dim: bool,
    v_dim: bool,
) -> Gradients:
    batch, _, _, num_heads, head_dim = qkv_BN3HK.shape
    wide = wide_dtype(qkv_BN3HK)
    return (
        qkv_BN3HK.new_empty(qkv_BN3HK.shape if qkv else (0,)),
        qkv_BN3HK.new_empty((batch, num_heads) if head else (0,), dtype=wide),
        qkv_BN3HK.new_empty((batch, num_heads, head_dim) if qk_dim else (0,), dtype=wide),
        qkv_BN3HK.new_empty((batch, num_heads, head_dim) if v_dim else (0,), dtype=wide),
    )


def _padded(x: Tensor) -> Tensor:
    """``x`` with as many dims as torch's efficient attention wants: zeros change nothing."""
    padding = -x.shape[-1] % _DIM_ALIGNMENT
    return torch.nn.functional.pad(x, (0, padding)) if padding else x


def _eager(qkv_BN3HK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The forward of torch's own fused attention."""
    aten = torch.ops.aten
    _, num_tokens, _, _, head_dim = qkv_BN3HK.shape
    if not qkv_BN3HK.is_cuda:
        out_BHNK, lse_BHN = aten._scaled_dot_product_flash_attention_for_cpu(
            *heads_first(qkv_BN3HK), scale=scale
        )
    elif qkv_BN3HK.dtype == torch.float64:
        return _reference.attention(qkv_BN3HK, scale)
    else:
        out_BHNK, lse_BHN, _, _ = aten._scaled_dot_product_efficient_attention(
            *heads_first(_padded(qkv_BN3HK)), None, True, scale=scale
        )
    out_BNHK = out_BHNK[..., :head_dim].transpose(1, 2).contiguous()
    return out_BNHK, lse_BHN[..., :num_tokens].contiguous()


def _eager_dqkv(
    grad_out_BNHK: Tensor, qkv_BN3HK: Tensor, out_BNHK: Tensor, lse_BHN: Tensor, scale: float
) -> Tensor:
    """The backward of torch's own fused attention."""
    aten = torch.ops.aten
    if not qkv_BN3HK.is_cuda:
        dout_BHNK, out_BHNK = grad_out_BNHK.transpose(1, 2), out_BNHK.transpose(1, 2)
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout_BHNK, *heads_first(qkv_BN3HK), out_BHNK, lse_BHN, 0.0, False, scale=scale
        )
    elif qkv_BN3HK.dtype == torch.float64:
        return _reference.attention_score(grad_out_BNHK, qkv_BN3HK, out_BNHK, lse_BHN, scale)[0]
    else:
        padding = -lse_BHN.shape[2] % _LSE_ALIGNMENT
        lse_padded = torch.nn.functional.pad(lse_BHN, (0, padding), value=torch.inf)
        # read only when there is dropout
        seed = torch.zeros((), dtype=torch.int64, device=qkv_BN3HK.device)
        gradients = aten._scaled_dot_product_efficient_attention_backward(
            _padded(grad_out_BNHK).transpose(1, 2),
            *heads_first(_padded(qkv_BN3HK)),
            None,
            _padded(out_BNHK).transpose(1, 2),
            lse_padded,
            seed,
            seed,
            0.0,
            [True, True, True, False],
            scale=scale,
        )[:3]
    dqkv_BN3HK = torch.stack([gradient.transpose(1, 2) for gradient in gradients], 2)
    return dqkv_BN3HK[..., : qkv_BN3HK.shape[-1]].contiguous()


def _eager_score(
    grad_out_BNHK: Tensor,
    qkv_BN3HK: Tensor,
    out_BNHK: Tensor,
    lse_BHN: Tensor,
    scale: float,
    per_token: bool,
    qkv: bool,
    head: bool,
    qk_dim: bool,
    v_dim: bool,
) -> Gradients:
    wide = wide_dtype(qkv_BN3HK)
    dqkv_BN3HK = qkv_BN3HK.new_empty(0)
    head_BH = qk_dim_BHK = v_dim_BHK = qkv_BN3HK.new_empty(0, dtype=wide)

    def over_tokens(terms: Tensor) -> Tensor:
        return (terms.abs() if per_token else terms).sum(1)

    if head or v_dim:
        product_BNHK = out_BNHK.to(wide) * grad_out_BNHK.to(wide)
        head_BH = over_tokens(product_BNHK.sum(3)) if head else head_BH
        v_dim_BHK = over_tokens(product_BNHK) if v_dim else v_dim_BHK
    if qkv or qk_dim:
        gradient = _eager_dqkv(grad_out_BNHK, qkv_BN3HK, out_BNHK, lse_BHN, scale)
        dqkv_BN3HK = gradient if qkv else dqkv_BN3HK
        if qk_dim:
            qk_dim_BHK = over_tokens(qkv_BN3HK[:, :, 0].to(wide) * gradient[:, :, 0].to(wide))
    return dqkv_BN3HK, head_BH, qk_dim_BHK, v_dim_BHK


_forms = Forms("attention", _fake, _eager, triton="attention_score:attention_fwd", cpu=True, op=_OP)
_score_forms = Forms(
    _OP, _fake_score, _eager_score, triton="attention_score:attention_bwd", cpu=True
)


def _run(qkv_BN3HK: Tensor, scale: float, form: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    if qkv_BN3HK.numel() == 0:
        return _fake(qkv_BN3HK, scale)
    return form(with_adjacent_dims(qkv_BN3HK), scale)


def _run_score(
    grad_out_BNHK: Tensor,
    qkv_BN3HK: Tensor,
    out_BNHK: Tensor,
    lse_BHN: Tensor,
    scale: float,
    per_token: bool,
    wanted: Wanted,
    chosen: str,
) -> Gradients:
    grad_out_BNHK, qkv_BN3HK, out_BNHK = (
        with_adjacent_dims(x) for x in (grad_out_BNHK, qkv_BN3HK, out_BNHK)
    )
    arguments = (grad_out_BNHK, qkv_BN3HK, out_BNHK, lse_BHN.contiguous(), scale, per_token)
    if qkv_BN3HK.numel() == 0:
        dqkv, head, qk_dim, v_dim = _fake_score(*arguments, *wanted)
        return dqkv, head.zero_(), qk_dim.zero_(), v_dim.zero_()
    return _score_forms[chosen](*arguments, *wanted)


# opaque to autograd and to compilers; the normalisers come out because backward needs them
@custom_op("vitprune_fast::scored_attention")
def _scored(
    qkv_BN3HK: Tensor,
    head_BH: Tensor | None,
    qk_dim_BHK: Tensor | None,
    v_dim_BHK: Tensor | None,
    scale: float,
    per_token: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _run(qkv_BN3HK, scale, _forms.plain[backend])


@_scored.register_fake
def _(qkv_BN3HK, head_BH, qk_dim_BHK, v_dim_BHK, scale, per_token, backend):
    return _fake(qkv_BN3HK, scale)


def _setup_context(ctx, inputs, output):
    qkv_BN3HK, _, _, _, ctx.scale, ctx.per_token, ctx.backend = inputs
    out_BNHK, lse_BHN = output
    ctx.mark_non_differentiable(lse_BHN)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv_BN3HK, out_BNHK, lse_BHN)


def _backward(ctx, grad_out_BNHK: Tensor | None, _grad_lse: Tensor | None):
    refuse_second_derivative("scored_attention")
    if grad_out_BNHK is None:
        return (None,) * 7
    wanted = tuple(ctx.needs_input_grad[:4])
    qkv_BN3HK, out_BNHK, lse_BHN = ctx.saved_tensors
    gradients = _run_score(
        grad_out_BNHK, qkv_BN3HK, out_BNHK, lse_BHN, ctx.scale, ctx.per_token, wanted, ctx.backend
    )
    given = [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]
    return *given, None, None, None


_scored.register_autograd(_backward, setup_context=_setup_context)


def attention(
    qkv_BN3HK: Tensor, *, scale: float | None = None, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Softmax attention without mask: ``out = softmax(scale * q k^T) v`` for each sample and head.

    Not differentiable (see ``scored_attention``).

    Reference: Vaswani et al., "Attention Is All You Need", NeurIPS 2017 (arXiv:1706.03762), eq. 1.

    Args:
        qkv_BN3HK: q, k and v side by side, ``(B, N, 3, H, K)``, fp32/fp64/bf16/fp16, any strides
            (a head's dims are copied together first when they are not adjacent).
        scale: factor of the logits; None for ``K ** -0.5``.
        backend: implementation to run; an explicit choice never falls back.

    Returns:
        The output, ``(B, N, H, K)``, contiguous, of the input's dtype; and the natural logarithm
        of each row's normaliser, ``(B, H, N)``, fp64 for fp64 inputs and else fp32, which is also
        what is accumulated in. A sample's and head's results depend on its own numbers alone;
        those of our kernels have the same bits for any batch, threads and repetition.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: a shape or dtype is out of range.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    check_qkv("attention", qkv_BN3HK)
    form = _forms[choose_attention(_OP, qkv_BN3HK, backend)]
    return _run(qkv_BN3HK.detach(), factor_of_logits(scale, qkv_BN3HK), form)


def attention_score(
    grad_out_BNHK: Tensor,
    qkv_BN3HK: Tensor,
    out_BNHK: Tensor,
    lse_BHN: Tensor,
    *,
    scale: float | None = None,
    per_token: bool = False,
    needs: Collection[str] = NEEDS,
    backend: Backend = "auto",
) -> AttentionScore:
    """Backward of ``attention``, with the first-order scores of its units for each sample.

    A score is the derivative of the loss along scaling the unit: ``head = sum_n delta_n`` with
    ``delta_n = sum_k out * dout``, ``v_dim = sum_n out * dout`` and ``qk_dim = sum_n q * dq``
    (equal to ``sum_n k * dk``). With ``per_token`` each token's term counts by its magnitude:
    ``head = sum_n |delta_n|``, and so on. Not differentiable.

    Reference: Michel et al., "Are Sixteen Heads Really Better than One?", NeurIPS 2019
    (arXiv:1905.10650), eq. 2; ``delta`` is that of Dao, "FlashAttention-2" (arXiv:2307.08691),
    algorithm 2, so a head's score costs one sum of what backward computes anyway.

    Args:
        grad_out_BNHK: gradient of the loss w.r.t. the output; of its shape, dtype and device.
        qkv_BN3HK: what ``attention`` was given.
        out_BNHK: its output.
        lse_BHN: its normalisers.
        scale: what ``attention`` was given; None for ``K ** -0.5``.
        per_token: whether scores sum the magnitudes of the tokens' terms.
        needs: which of ``"qkv", "head", "qk_dim", "v_dim"`` to compute. Without the first and
            the third no attention matrix is computed at all.
        backend: implementation to run; an explicit choice never falls back.

    Returns:
        The gradient of packed qkv in its dtype, and scores in fp64 for fp64 inputs and else fp32,
        which is also what is accumulated in; scores are in units of the loss. Row ``b`` depends
        on row ``b`` of the inputs alone; the bits of our kernels do not depend on the batch, the
        threads or the repetition.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: shapes, dtypes or devices disagree, or ``needs`` holds an unknown name.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    check_qkv(_OP, qkv_BN3HK)
    batch, num_tokens, _, num_heads, _ = qkv_BN3HK.shape
    like_out = qkv_BN3HK[:, :, 0]
    for name, value in (("grad_out_BNHK", grad_out_BNHK), ("out_BNHK", out_BNHK)):
        _checks.require_like(_OP, name, value, "q in qkv_BN3HK", like_out)
    shape = (batch, num_heads, num_tokens)
    check_wide(_OP, "lse_BHN", lse_BHN, shape, "", "qkv_BN3HK", qkv_BN3HK)
    unknown = sorted(set(needs) - set(NEEDS))
    _checks.require(not unknown, _OP, "needs", f"hold only {', '.join(NEEDS)}", unknown)
    qkv, head, qk_dim, v_dim = (name in needs for name in NEEDS)
    wanted = (qkv, head, qk_dim, v_dim)
    gradients = _run_score(
        grad_out_BNHK.detach(),
        qkv_BN3HK.detach(),
        out_BNHK.detach(),
        lse_BHN.detach(),
        factor_of_logits(scale, qkv_BN3HK),
        per_token,
        wanted,
        choose_attention(_OP, qkv_BN3HK, backend),
    )
    return AttentionScore(
        *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    )


def scored_attention(
    qkv_BN3HK: Tensor,
    head_BH: Tensor | None = None,
    qk_dim_BHK: Tensor | None = None,
    v_dim_BHK: Tensor | None = None,
    *,
    scale: float | None = None,
    per_token: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Differentiable ``attention`` whose backward leaves scores in the gradients of its probes.

    A probe stands for one gate of value 1 per sample and unit; it is never read, and its gradient
    is the unit's per-sample score, as in ``attention_score``. What needs no gradient is not
    computed: without a ``qk_dim`` probe and with a ``qkv`` that needs none, no attention matrix.

    Args:
        qkv_BN3HK: as in ``attention``.
        head_BH: probe of the heads, fp64 for fp64 inputs and else fp32; or None.
        qk_dim_BHK: probe of the q/k dims, as above.
        v_dim_BHK: probe of the v dims, as above.
        scale: factor of the logits; None for ``K ** -0.5``.
        per_token: whether scores sum the magnitudes of the tokens' terms.
        backend: implementation to run, forward and backward; an explicit choice never falls back.

    Returns:
        The output, ``(B, N, H, K)``, contiguous. It can be differentiated once.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: shapes, dtypes or devices disagree.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    op = "scored_attention"
    check_qkv(op, qkv_BN3HK)
    batch, _, _, num_heads, head_dim = qkv_BN3HK.shape
    per_dim = (batch, num_heads, head_dim)
    probes = (
        ("head_BH", head_BH, (batch, num_heads)),
        ("qk_dim_BHK", qk_dim_BHK, per_dim),
        ("v_dim_BHK", v_dim_BHK, per_dim),
    )
    for name, probe, shape in probes:
        if probe is not None:
            why = ", one number per sample and unit of qkv_BN3HK"
            check_wide(op, name, probe, shape, why, "qkv_BN3HK", qkv_BN3HK)
    factor = factor_of_logits(scale, qkv_BN3HK)
    # chosen here for the backward too
    chosen = choose_attention(_OP, qkv_BN3HK, backend)
    return _scored(qkv_BN3HK, head_BH, qk_dim_BHK, v_dim_BHK, factor, per_token, chosen)[0]
