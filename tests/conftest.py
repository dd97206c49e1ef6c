"""Seeds, threads, no deadlines, the Triton interpreter, and the guard over skipped tests."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from skip_guard import SkipGuard, is_controller

# before any test imports triton; on a GPU the kernels run for real
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.pop("VITPRUNE_BACKEND", None)
# workers share the cores, so each has one thread; child processes inherit it
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# an example may take as long as a busy machine needs for it; a folder of the test is shared by all
settings.register_profile(
    "any machine",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("any machine")


def pytest_configure(config: pytest.Config) -> None:
    if is_controller(config):
        config.pluginmanager.register(SkipGuard(), "skip-guard")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs a GPU where there is none: it is counted, and never looks like a pass.

    Of the others those that are given the most time come first: no process is left with one of them
    when the rest has ended.
    """
    items.sort(key=_time_given, reverse=True)
    if torch.cuda.is_available():
        return
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu:
        items[:] = [item for item in items if item not in set(needs_gpu)]
        config.hook.pytest_deselected(items=needs_gpu)


def _time_given(item: pytest.Item) -> int:
    marker = item.get_closest_marker("timeout")
    return marker.args[0] if marker else 0


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Every test starts from the same generators, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
