"""The activations of an MLP and their derivatives, for use inside kernels; the tiles of those."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _logistic(z):
    """``1 / (1 + exp(z))`` and ``1 / (1 + exp(-z))`` for z >= 0."""
    e = tl.exp(-z)
    upper = 1.0 / (1.0 + e)
    return e * upper, upper


# columns of one tile: 128 of them are 256 bytes of a bf16 row, one full request of a warp
TILE_COLUMNS = 128
TILE_TOKENS = 8
# log2 of the upper tail of the normal distribution as a polynomial in a >= 0, the constant first.
# Its error x tail x max(1, a), which is what slope and value see, is at most 1.5e-8, a quarter of
# fp32's unit roundoff. It falls for ever, so the tail is 0 where nothing was fitted.
LOG2_TAIL = tl.constexpr(
    (
        -1.0,
        -1.1511059999465942,
        -0.45919859409332275,
        -0.052532777190208435,
        0.007125782314687967,
        -0.000190950624528341,
        -0.00016158036305569112,
        3.379388726898469e-05,
        -2.3393490664602723e-06,
    )
)
DEGREE = tl.constexpr(8)


def num_warps(itemsize: int, tensors: int = 3) -> int:
    """Warps of one tile: few registers of each thread, hence many programs at once.

    A thread has eight elements of a tensor; four of fp64, or of fp32 where there are five tensors.
    """
    return 8 if itemsize * tensors >= 20 else 4


@triton.jit
def _normal_tail(a):
    """The share of the normal distribution above a >= 0."""
    if a.dtype == tl.float64:
        tail = 0.5 - 0.5 * tl.erf(a * 0.7071067811865476)
    else:
        # erf takes more instructions than there is time for while memory delivers
        exponent = LOG2_TAIL[DEGREE] * a
        for k in tl.static_range(1, DEGREE):
            exponent = (exponent + LOG2_TAIL[DEGREE - k]) * a
        tail = tl.exp2(exponent + LOG2_TAIL[0])
    return tail


@triton.jit
def value_and_slope(x, ACTIVATION: tl.constexpr):
    """An activation and its derivative, elementwise, in the dtype of ``x`` (fp32 or fp64).

    All but relu and sigmoid are x times a distribution function, so with a = |x|, the upper tail
    T(a) of the distribution and its density p: ``h = max(x, 0) - a T`` and ``h' = D`` below 0 and
    ``1 - D`` above it, with ``D = T - a p``. NaN stays NaN.
    """
    below = x <= 0.0
    positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    # the tail is 0 from here on, so nothing is lost, and infinity times 0 does not come up
    a = tl.minimum(tl.abs(x), 1e4, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "relu":
        value = positive
        slope = tl.where(below, 0.0, 1.0).to(x.dtype)
    elif ACTIVATION == "sigmoid":
        lower, upper = _logistic(a)
        value = tl.where(below, lower, upper)
        slope = lower * upper
    else:
        if ACTIVATION == "gelu":
            tail = _normal_tail(a)
            slope_below = tail - (a * 0.3989422804014327) * tl.exp2(a * a * -0.7213475204444817)
        elif ACTIVATION == "gelu_tanh":
            # (1 + tanh(z / 2)) / 2 is the logistic function of z
            square = a * a
            tail, upper = _logistic(a * (1.5957691216057308 + 0.07135481627260025 * square))
            slope_of_z = 1.5957691216057308 + 0.21406444881780073 * square
            slope_below = tail * (1.0 - a * slope_of_z * upper)
        elif ACTIVATION == "silu":
            tail, upper = _logistic(a)
            slope_below = tail * (1.0 - a * upper)
        else:
            tl.static_assert(ACTIVATION == "quick_gelu", "no such activation")
            z = 1.702 * a
            tail, upper = _logistic(z)
            slope_below = tail * (1.0 - z * upper)
        value = positive - a * tail
        slope = tl.where(below, slope_below, 1.0 - slope_below)
    return value, slope
