"""The soak sees what it is to see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bench import soak
from vitprune_fast.data import open_data


def test_a_short_soak_sees_every_image_once_and_leaves_nothing(tmp_path: Path) -> None:
    soak.write(tmp_path, 1000)
    data = open_data(f"folder:{tmp_path / 'data'}", image_size=soak.SIDE, channels=3)
    report = soak.soak(data, 1)
    assert report.images == (1000, 16 * 20)
    assert len(report.memory) == 16 and min(report.memory) > 0
    # so short a run says nothing of memory
    assert not replace(report, memory=(1.0,)).faults


def test_faults_are_named() -> None:
    fine = soak.Report((1, 1), 1.0, (50.0, 100.0, 104.0, 101.0, 103.0), (9, 9), 0)
    assert fine.faults == [] and "(4.0%)" in str(fine)
    grown = replace(fine, memory=(50.0, 100.0, 104.0, 101.0, 106.0))
    assert grown.faults == ["memory grew by 6.0%, more than 5%"]
    left = replace(fine, files=(9, 11), processes=2)
    assert left.faults == ["2 more files are open than before", "2 processes are left"]
