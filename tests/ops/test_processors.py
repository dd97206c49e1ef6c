"""The children that stand in for other processors are what they say."""

from __future__ import annotations

import contextlib

import pytest
import torch
from processors import CAPABILITIES, Processors


def test_each_child_has_its_own_instruction_set(processors: Processors) -> None:
    processors.assert_same_bits("found = [2 * inputs]", torch.ones(3))
    script = """
import torch
found = [torch.tensor([*torch.backends.cpu.get_cpu_capability().encode()])]
"""
    several = len(CAPABILITIES) > 1
    with pytest.raises(AssertionError) if several else contextlib.nullcontext():
        processors.assert_same_bits(script, [])
    # every answer belongs to its own question, also after a difference
    for number in range(3):
        processors.assert_same_bits("found = [inputs]", torch.tensor(number))
