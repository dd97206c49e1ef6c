"""Activation x gradient of the cross-entropy with the given labels."""

from __future__ import annotations

from contextlib import AbstractContextManager

from ..criterion import Asked, Criterion
from ..stream import ScoreBatch
from ..taylor import check_per_token, scorer


def measure(asked: Asked) -> AbstractContextManager[ScoreBatch]:
    """``square`` = mean g^2, ``abs`` = mean |g|, ``signed`` = mean g, ``token_abs``: per token.

    Michel et al. 2019 (arXiv:1905.10650), whose code has ``token_abs``; Molchanov et al. 2019
    (arXiv:1906.10771), equation 8, for the square.
    """
    per_token = asked.reduction == "token_abs"
    if per_token:
        check_per_token(asked.axes)
    return scorer(
        asked.model,
        asked.structure,
        asked.axes,
        path=asked.path,
        per_token=per_token,
        loss_scale=asked.loss_scale,
        cuda_graph=asked.cuda_graph,
    )


CRITERION = Criterion(measure, reductions=("square", "abs", "signed", "token_abs"), gradients=True)
