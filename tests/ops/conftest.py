"""Fresh memory is full of NaN, so a forgotten element is found out; and other processors."""

from __future__ import annotations

import pytest
import torch
from processors import Processors


@pytest.fixture(scope="session")
def processors(tmp_path_factory):
    """Every instruction set that this processor has."""
    with Processors(tmp_path_factory.mktemp("processors")) as found:
        yield found


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
