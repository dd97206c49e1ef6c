"""Plans, predicted costs and pruned models are what they were, bit for bit (see ``golden.py``)."""

from __future__ import annotations

import json

import pytest

from tests.golden import CASES, EVERYWHERE, FILE, Case, outcome


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_changed(case: Case) -> None:
    found = outcome(case)
    assert {part: found[part] for part in EVERYWHERE} == json.loads(FILE.read_text())[case.name]
