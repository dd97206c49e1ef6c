"""First-order importance of each unit, per sample: the sum of activation x gradient.

B batch, N tokens, F columns, U units of ``group_size`` adjacent columns each.
"""

from __future__ import annotations

from torch import Tensor

from vitprune_fast import _checks
from vitprune_fast._checks import DTYPES
from vitprune_fast.ops._dispatch import Backend, choose
from vitprune_fast.ops._forms import Forms
from vitprune_fast.reference.taylor_score import taylor_score as _eager
from vitprune_fast.wide import wide_dtype


def _fake(activation_BNF: Tensor, gradient_BNF: Tensor, group_size: int, per_token: bool) -> Tensor:
    batch, _, columns = activation_BNF.shape
    return activation_BNF.new_empty(batch, columns // group_size, dtype=wide_dtype(activation_BNF))


_forms = Forms("taylor_score", _fake, _eager, triton="taylor_score:taylor_score_fwd", cpu=True)


def taylor_score(
    activation_BNF: Tensor,
    gradient_BNF: Tensor,
    group_size: int = 1,
    *,
    per_token: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """First-order importance of each unit for each sample.

    ``s[b, u] = sum_n sum_k a[b, n, u * group_size + k] * g[b, n, u * group_size + k]``, the
    derivative of the loss along scaling unit ``u`` of sample ``b``. With ``per_token`` the tokens
    cannot cancel each other: ``sum_n |sum_k a * g|``. Not differentiable.

    Reference: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019
    (arXiv:1906.10771): the first-order criterion before its square, with a gate on each unit. Per
    token as in the code of Michel et al., "Are Sixteen Heads Really Better than One?", NeurIPS
    2019 (arXiv:1905.10650).

    Args:
        activation_BNF: activations, ``(B, N, F)``, fp32/fp64/bf16/fp16; samples and tokens may
            lie anywhere, columns are copied together first when they are not adjacent.
        gradient_BNF: gradient of the loss w.r.t. ``activation_BNF``; same shape, dtype, device.
        group_size: adjacent columns that make one unit (1 for neurons, head_dim for heads).
        per_token: sum the magnitude of each token's share instead of the share.
        backend: implementation to run (``"cpu"`` is the C++ kernel); an explicit choice never
            falls back.

    Returns:
        ``(B, F // group_size)``, fp64 for fp64 inputs and else fp32, which is also what is
        accumulated in; signed (>= 0 with ``per_token``), in units of the loss. Row ``b`` depends
        on row ``b`` of the inputs alone; the bits of our kernels do not depend on the batch, the
        threads or the repetition.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: shapes, dtypes or devices disagree, or ``group_size`` does not divide F.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    op = "taylor_score"
    _checks.require_input(op, "activation_BNF", activation_BNF, 3, DTYPES)
    _checks.require_like(op, "gradient_BNF", gradient_BNF, "activation_BNF", activation_BNF)
    columns = activation_BNF.shape[2]
    if group_size < 1 or columns % group_size:
        rule = f"be at least 1 and divide the {columns} columns of activation_BNF"
        _checks.require(False, op, "group_size", rule, group_size)
    form = _forms[choose(op, activation_BNF, backend)]
    return form(activation_BNF.detach(), gradient_BNF.detach(), group_size, per_token)
