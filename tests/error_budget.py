"""The tolerance of every fast op, derived from the error of plain torch in the same arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Largest error of ``got`` <= 2 x that of ``eager`` + 2 ulp at the largest exact magnitude.

    ``exact`` is of higher precision than both; the ulp is that of the dtype of ``got``.
    """
    assert got.shape == exact.shape
    if exact.numel() == 0:
        return
    largest = exact.abs().max().to(got.dtype)
    ulp = (torch.nextafter(largest, largest.new_tensor(torch.inf)) - largest).double().item()
    error = (got.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    budget = 2 * eager_error + 2 * ulp
    assert error <= budget, f"error {error:.2e} > {budget:.2e} = 2 x {eager_error:.2e} + 2 ulp"
