"""The committed tables are those of the committed measurements."""

from __future__ import annotations

from bench import table


def test_tables_are_made_from_the_committed_files() -> None:
    page = table.page()
    assert (table.RESULTS / "README.md").read_text() == page
    assert page.count("| gather |") >= 3 and page.count("| taylor_score |") >= 3
