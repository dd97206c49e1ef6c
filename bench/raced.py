"""Races of the package as tests, so that they are selected, kept and compared like others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from vitprune_fast.benches.place import CPU, Place, on_gpu
from vitprune_fast.ops import Backend

Cases = Callable[[Place], dict[str, Callable]]


def as_tests(cases: Cases, backend: Backend = "cpu") -> tuple[Callable, Callable]:
    """A test of every case on a CPU, and one of every case on a GPU.

    Args:
        cases: a place -> the name of every case there and what runs it.
        backend: of ours on a CPU; ``"auto"`` where plain torch is what is raced.
    """
    here = replace(CPU, backend=backend)

    @pytest.mark.timeout(600)
    @pytest.mark.parametrize("case", cases(here))
    def on_cpu(race, case):
        cases(here)[case](race)

    @pytest.mark.gpu
    @pytest.mark.timeout(600)
    @pytest.mark.parametrize("case", cases(on_gpu(tiny=True, compiled=False)))
    def on_a_gpu(race, gpu, case):
        cases(gpu)[case](race)

    return on_cpu, on_a_gpu
