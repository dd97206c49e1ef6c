"""Activation x gradient of the cross-entropy with the given labels, or of a loss that is given.

``square`` = mean g^2, ``abs`` = mean |g|, ``signed`` = mean g, ``token_abs``: magnitudes per token.
Michel et al. 2019 (arXiv:1905.10650), whose code has ``token_abs``; Molchanov et al. 2019
(arXiv:1906.10771), equation 8, for the square. Of features the targets are drawn, as for
``fisher``: ``signed`` then has the mean zero, and says nothing.
"""

from __future__ import annotations

from ..criterion import Criterion, by_gradients

CRITERION = Criterion(
    by_gradients(),
    reductions=("square", "abs", "signed", "token_abs"),
    gradients=True,
    targets=True,
    features=True,
)
