"""The fit under the sweep, against torch's own solver and sums written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vitprune_fast.surgery.sweep import least_squares
from vitprune_fast.surgery.sweep.least_squares import Products, fit, means


def data(
    rows: int, inputs: int, outputs: int, seed: int = 0, noise: float = 0.1
) -> tuple[Tensor, Tensor]:
    """a with means and correlations, and y that is linear in it up to noise."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    mixing, truth = normal(inputs, inputs), normal(outputs, inputs)
    a = normal(rows, inputs) @ mixing + 3 * normal(inputs)
    return a, a @ truth.T + noise * normal(rows, outputs) + normal(outputs)


def products_of(a: Tensor, y: Tensor, pieces: int = 3) -> Products:
    products = Products()
    for piece in zip(a.chunk(pieces), y.chunk(pieces), strict=True):
        products.origin = products.origin or means(*piece)
        products.add(products.of(*piece))
    return products


@pytest.mark.parametrize("inputs", [5, 300])
def test_moments_are_those_of_all_rows(inputs: int) -> None:
    a, y = data(700, inputs, 4)
    products = products_of(a, y)
    second = products.second()
    gram, cross = second.gram, second.cross
    centred = a - a.mean(0)
    size = centred.square().sum() / len(a)
    for got, want in ((gram, centred.T @ centred), (cross, (y - y.mean(0)).T @ centred)):
        assert (got - want / len(a)).abs().max() <= 1e-12 * size
    raw = products.second(centred=False)
    assert torch.allclose(raw.gram, a.T @ a / len(a), rtol=1e-10)
    assert raw.a.abs().max() == raw.y.abs().max() == 0
    assert torch.equal(gram, gram.T)
    for got, want in ((second.a, a.mean(0)), (second.y, y.mean(0))):
        assert torch.allclose(got, want, rtol=1e-12)
    assert torch.allclose(second.square, y.var(0, correction=0), rtol=1e-10)
    assert (products.rows, products.inputs, products.outputs) == (700, inputs, 4)


def test_the_error_is_the_one_of_all_rows() -> None:
    a, y = data(200, 6, 3)
    weight, bias = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    residual = y - a @ weight.T - bias
    second = products_of(a, y).second()
    want = float(residual.square().sum(1).mean())
    assert second.error(weight, bias) == pytest.approx(want, rel=1e-10)
    assert second.error(weight, bias, weight @ second.gram) == pytest.approx(want, rel=1e-10)
    raw = products_of(a, y).second(centred=False)
    want = float((y - a @ weight.T).square().sum(1).mean())
    assert raw.error(weight, bias * 0) == pytest.approx(want, rel=1e-10)
    some = slice(None, None, 2)
    want = float(residual[:, some].square().sum(1).mean())
    assert second.of(some).error(weight[some], bias[some]) == pytest.approx(want, rel=1e-10)


def test_float32_loses_no_variance_to_a_large_mean() -> None:
    """One product of raw float32 numbers would: the mean here is 3,000 times the spread."""
    a, y = data(4000, 8, 2)
    a = a / a.std(0) + 3000
    got = products_of(a.float(), y.float()).second().gram
    want = torch.cov(a.float().double().T, correction=0)
    # a sum of 4,000 rounded products of numbers of about unit size
    assert (got - want).abs().max() <= math.sqrt(4000) * 2**-24 * float(want.diagonal().max())


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_fit_is_the_least_for_its_ridge(
    has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against lstsq on the rows of the data and of the ridge."""
    monkeypatch.setattr(least_squares, "_LARGEST", 0.0)
    a, y = data(300, 7, 3)
    products, ridge = products_of(a, y), 0.03
    start = torch.randn(3, 7, dtype=torch.float64)
    bias = torch.zeros(3, dtype=torch.float64)
    found = fit(products, products, start, bias, ridge, smallest=ridge, has_bias=has_bias)
    assert found.ridge == ridge
    x = a - a.mean(0) if has_bias else a
    target = (y - y.mean(0) if has_bias else y) - x @ start.T
    strength = math.sqrt(ridge * float(x.square().mean()) * len(x))
    rows = torch.cat([x, strength * torch.eye(7, dtype=torch.float64)])
    targets = torch.cat([target, torch.zeros(7, 3, dtype=torch.float64)])
    want = start + torch.linalg.lstsq(rows, targets).solution.T
    assert torch.allclose(found.weight, want, rtol=1e-8, atol=1e-10)
    residual = y - a @ found.weight.T - found.bias
    assert found.after == pytest.approx(float(residual.square().sum(1).mean()), rel=1e-8)
    if has_bias:
        assert residual.mean(0).abs().max() <= 1e-10
    else:
        assert torch.equal(found.bias, bias)


def test_held_out_rows_choose_the_ridge() -> None:
    """With few noisy rows a strong pull to a good start wins, with many a weak one."""
    truth = data(10, 40, 3, noise=0.0)
    start = torch.linalg.lstsq(truth[0] - truth[0].mean(0), truth[1] - truth[1].mean(0))
    weight = start.solution.T.contiguous()

    def chosen(rows: int, noise: float) -> float | None:
        a, y = data(rows, 40, 3, noise=noise)
        train, held_out = products_of(a, y), products_of(*data(4000, 40, 3, noise=noise))
        return fit(train, held_out, weight * 0, weight[:, 0] * 0, 1e-3).ridge

    few, many = chosen(60, 3.0), chosen(4000, 1e-6)
    assert few is not None and many is not None
    assert many <= 1e-7 < few


def test_a_map_that_cannot_be_bettered_is_left_alone() -> None:
    a, y = data(400, 6, 3, noise=0.0)
    solution = torch.linalg.lstsq(torch.cat([a, torch.ones(400, 1, dtype=a.dtype)], 1), y).solution
    weight, bias = solution[:-1].T.contiguous(), solution[-1]
    other = data(400, 6, 3, seed=1)
    found = fit(products_of(*other), products_of(a, y), weight, bias, 1e-3)
    assert found.ridge is None
    assert torch.equal(found.weight, weight) and torch.equal(found.bias, bias)
    assert found.before == found.after


def test_outputs_that_may_not_change_do_not() -> None:
    a, y = data(400, 6, 3)
    products, rows = products_of(a, y), torch.tensor([True, False, True])
    weight, bias = torch.zeros(3, 6, dtype=a.dtype), torch.zeros(3, dtype=a.dtype)
    found = fit(products, products, weight, bias, 1e-6, may_change=rows)
    assert found.weight[1].abs().max() == 0 == found.bias[1]
    free = fit(products, products, weight, bias, 1e-6)
    assert torch.allclose(found.weight[rows], free.weight[rows], rtol=1e-6)


def test_inputs_that_never_change_leave_the_bias() -> None:
    a, y = torch.ones(50, 4, dtype=torch.float64), data(50, 4, 2)[1]
    products = products_of(a, y)
    weight = torch.randn(2, 4, dtype=torch.float64)
    found = fit(products, products, weight, weight[:, 0] * 0, 1e-3)
    assert found.ridge == math.inf
    assert torch.equal(found.weight, weight)
    assert torch.allclose(found.weight.sum(1) + found.bias, y.mean(0))
    none = products_of(a[:, :0], y)
    only_bias = fit(none, none, weight[:, :0], weight[:, 0] * 0, 1e-3)
    assert torch.allclose(only_bias.bias, y.mean(0))
