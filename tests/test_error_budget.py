"""The budget forgives rounding in any order, and nothing else; N tokens, F columns, K head dim."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from attention_sums import attention_sums
from error_budget import Rounded, assert_within_budget
from torch import Tensor

FP32, FP64 = torch.float32, torch.float64


def terms_and_sums(tokens: int = 197, columns: int = 64) -> tuple[Tensor, Rounded]:
    x, grad = torch.randn(2, tokens, columns)
    sums = (Rounded.of(x, FP32) * Rounded.of(grad, FP32)).sum(0)
    return x * grad, sums


def one_by_one(terms: Tensor) -> Tensor:
    """The least lucky order: each term to the sum of all before it."""
    return torch.from_numpy(np.cumsum(terms.numpy(), 0)[-1])


def test_a_sum_in_any_order_is_within_the_budget_of_a_lucky_eager() -> None:
    for tokens in (1, 2, 197, 5003):
        terms, sums = terms_and_sums(tokens)
        assert sums.value.dtype == FP64 and terms.dtype == FP32
        # torch without any error at all, as it is at times where there are few numbers
        lucky = sums.value.float()
        for got in (one_by_one(terms), one_by_one(terms.flip(0)), terms.sum(0)):
            assert_within_budget(got, lucky, sums.value, sums)


WRONG_SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "the last term is missing": lambda terms: terms[:-1].sum(0),
    "a sign is wrong": lambda terms: terms.sum(0) - 2 * terms[7],
    "the first term counts twice": lambda terms: terms.sum(0) + terms[0],
    "terms are rounded to bf16": lambda terms: terms.bfloat16().float().sum(0),
    "terms are rounded to fp16": lambda terms: terms.half().float().sum(0),
    "the sum is in bf16": lambda terms: sum(terms.bfloat16(), terms.new_zeros(64).bfloat16()),
}


@pytest.mark.parametrize("wrong", WRONG_SUMS.values(), ids=WRONG_SUMS)
def test_a_wrong_sum_is_not_within_the_budget(wrong: Callable[[Tensor], Tensor]) -> None:
    terms, sums = terms_and_sums()
    eager = terms.sum(0)
    assert_within_budget(eager, eager, sums.value, sums)
    with pytest.raises(AssertionError, match=r"error .* > .* \+ 2 ulp"):
        assert_within_budget(wrong(terms).float(), eager, sums.value, sums)


def test_without_a_sum_the_budget_is_that_of_eager_and_of_the_result() -> None:
    exact = torch.tensor([1.0, 3.0], dtype=FP64)
    ulp = 2.0**-22
    eager = exact.float()
    assert_within_budget(eager + 2 * ulp, eager, exact)
    with pytest.raises(AssertionError):
        assert_within_budget(eager + 3 * ulp, eager, exact)
    assert_within_budget(eager + 4 * ulp, eager - ulp, exact)
    with pytest.raises(AssertionError):
        assert_within_budget(torch.full((2,), torch.nan), eager, exact)


def attention_and_gradient(qkv: Tensor, grad: Tensor, wrong: str = "") -> tuple[Tensor, Tensor]:
    """The formulas in the dtype of ``qkv``, with one mistake."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    dout, scale = grad.transpose(1, 2), qkv.shape[-1] ** -0.5
    logits = scale * q @ k.mT
    if wrong == "a key is forgotten":
        logits[..., -1] = -torch.inf
    p = logits.softmax(-1)
    if wrong == "weights are rounded to bf16":
        p = p.bfloat16().to(p.dtype)
    out = p @ v
    delta = (out * dout).sum(-1, keepdim=True)
    if wrong == "delta lacks a dim":
        delta -= (out * dout)[..., -1:]
    ds = scale * p * (dout @ v.mT - delta)
    if wrong == "the gradient of the logits is rounded to fp16":
        ds = ds.half().to(ds.dtype)
    gradients = [ds @ k, ds.mT @ q, p.mT @ dout]
    if wrong == "the last query is forgotten":
        gradients[1] -= ds[..., -1:, :].mT @ q[..., -1:, :]
    if wrong == "a query's gradient has the other sign":
        gradients[0][..., 3, :] *= -1
    return out.transpose(1, 2), torch.stack([x.transpose(1, 2) for x in gradients], 2)


MISTAKES = [
    "a key is forgotten",
    "weights are rounded to bf16",
    "delta lacks a dim",
    "the gradient of the logits is rounded to fp16",
    "the last query is forgotten",
    "a query's gradient has the other sign",
]


def judge(tokens: int, wrong: str = "") -> None:
    qkv, grad = torch.randn(2, tokens, 3, 3, 64), torch.randn(2, tokens, 3, 64)
    exact = attention_and_gradient(qkv.double(), grad.double())
    sums = attention_sums(qkv, grad, 64**-0.5)
    got = attention_and_gradient(qkv, grad, wrong)
    for one, truth, its_sums in zip(got, exact, (sums.out, sums.dqkv), strict=True):
        torch.testing.assert_close(its_sums.value, truth)
        # torch without any error at all
        assert_within_budget(one, truth.float(), truth, its_sums)


@pytest.mark.parametrize("tokens", [1, 2, 50, 197])
def test_attention_is_within_the_budget_of_a_lucky_eager(tokens: int) -> None:
    judge(tokens)


@pytest.mark.parametrize("tokens", [50, 197])
@pytest.mark.parametrize("wrong", MISTAKES)
def test_a_mistake_in_attention_is_not_within_the_budget(wrong: str, tokens: int) -> None:
    with pytest.raises(AssertionError, match=r"error .* > .* \+ 2 ulp"):
        judge(tokens, wrong)
