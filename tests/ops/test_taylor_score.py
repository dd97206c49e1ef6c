"""taylor_score: B batch, N tokens, F columns, U units of K columns."""

from __future__ import annotations

import pytest
import torch

from tests.ops.contract import TAYLOR
from tests.ops.test_contract import assert_matches
from vitprune_fast import ops

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16

PER_TOKEN = pytest.mark.parametrize("per_token", [False, True], ids=["sum", "per-token"])


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [1, 64], ids=["neurons", "heads"])
@PER_TOKEN
def test_taylor_score_triton_bf16_matches_reference(group_size, per_token):
    inputs = TAYLOR.given((4, 197, 768), BF16, "triton")
    assert_matches(TAYLOR, inputs, "triton", group_size=group_size, per_token=per_token)


def test_taylor_score_per_token_lets_no_token_cancel_another():
    activation = torch.tensor([[[1.0, 2.0], [-1.0, -2.0]]])
    gradient = torch.ones_like(activation)
    assert ops.taylor_score(activation, gradient).tolist() == [[0.0, 0.0]]
    assert ops.taylor_score(activation, gradient, per_token=True).tolist() == [[2.0, 4.0]]
    # the columns of a unit do cancel
    activation[0, 1] = torch.tensor([-2.0, 2.0])
    assert ops.taylor_score(activation, gradient, 2, per_token=True).tolist() == [[3.0]]


@pytest.mark.gpu
@pytest.mark.slow
def test_taylor_score_handles_more_than_2_31_elements():
    activation = torch.ones(3, 1024, 720_000, device="cuda", dtype=FP16)
    assert activation.numel() > 2**31
    got = ops.taylor_score(activation, activation, 720, backend="triton")
    assert torch.equal(got, torch.full_like(got, 1024 * 720))


@pytest.mark.parametrize("backend", [name for name in TAYLOR.backends() if name != "triton"])
def test_taylor_score_reads_every_fp16_and_bf16_number(backend):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (FP16, BF16):
        # four tokens and a multiple of 16 columns: every number goes through the vector path;
        # 15 columns less, and the last ones go through the scalar tail; one token is scalar too
        numbers = bits.view(dtype)
        values = torch.stack([numbers, *[torch.zeros_like(numbers)] * 3])[None]
        for part in (values, values[..., 15:], values[:, :1]):
            got = ops.taylor_score(part, torch.ones_like(part), backend=backend)
            assert torch.equal(got.nan_to_num(3.0), part[:, 0].float().nan_to_num(3.0))


@pytest.mark.parametrize("backend", TAYLOR.backends())
@PER_TOKEN
def test_taylor_score_nan_stays_in_its_unit(backend, per_token):
    activation, gradient = TAYLOR.given((3, 20, 40), FP32, backend)
    assert activation is not None and gradient is not None
    want = ops.taylor_score(activation, gradient, 8, per_token=per_token, backend=backend)
    activation[1, 19, 17] = torch.nan
    got = ops.taylor_score(activation, gradient, 8, per_token=per_token, backend=backend)
    assert got.isnan().nonzero().tolist() == [[1, 2]]
    want[1, 2] = got[1, 2] = 0
    assert torch.equal(got, want)
