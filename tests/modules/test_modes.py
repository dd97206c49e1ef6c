"""Modes: every module gets back its own, not its parent's."""

from __future__ import annotations

import pytest
from torch import nn

from vitprune_fast.modules.modes import evaluating, keeping_modes


def test_each_module_gets_its_own_mode_back() -> None:
    inner = nn.Sequential(nn.Dropout(), nn.Identity()).eval()
    model = nn.Sequential(nn.Dropout(), inner)
    inner[1].train()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluating(model, None):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before
    with keeping_modes(model):
        model.train()
    assert [module.training for module in model.modules()] == before
