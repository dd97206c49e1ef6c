"""The table of what is supported says what is found by trying."""

from __future__ import annotations

import json

import pytest

from . import support

SAID = json.loads(support.FILE.read_text())


def test_the_table_names_all_families() -> None:
    assert [*SAID] == [*support.FAMILIES]
    assert all([*able] == [*support.VERBS, "export"] for able in SAID.values())


@pytest.mark.parametrize("verb", support.VERBS)
def test_a_part_of_it_is_so(verb: str) -> None:
    family = "transformers DINOv2"
    for kind in ("head", "embed"):
        assert support.works(support.VERBS[verb], family, kind) == (kind in SAID[family][verb])


@pytest.mark.slow
@pytest.mark.parametrize("family", support.FAMILIES)
def test_all_of_it_is_so(family: str) -> None:
    """`python -m tests.support` puts this right, and `python bench/table.py` the README."""
    assert support.found(family) == SAID[family]
