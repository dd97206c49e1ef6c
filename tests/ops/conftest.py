"""Fresh memory is full of NaN, so a kernel that forgets an element is found out."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what ``torch.empty`` returns with NaN (or the largest integer) during the test."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    # on by default, and needed here
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        assert torch.empty(3, device=device).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
