"""The forms that reading photographs is compared with read the same photographs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import data_path
from vitprune_fast.cli.data_rates import make_photographs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("photographs")
    for part in ("train", "val", "test"):
        make_photographs(folder / part, 4)
    return data_path.opened(folder)


@pytest.mark.parametrize("path", ["training", "RandAugment"])
def test_libraries_alone_show_the_windows_that_we_do(images, path: str) -> None:
    augment = data_path.augments()[path]
    read = data_path.as_read(images, augment)().numpy()
    out = {
        form: data_path.made(form, images, augment)().numpy()
        for form in (data_path.PILLOW, data_path.TORCHVISION)
    }
    assert data_path.agreement(out[data_path.PILLOW], read) == "same bits"
    # other rounding of windows to pixels, and no other windows
    shuffled = np.abs(read.astype(float) - read[::-1]).mean()
    apart = np.abs(out[data_path.TORCHVISION].astype(float) - read).mean()
    assert 0 < apart < shuffled / 4


def test_both_forms_of_ours_hold_the_same_pixels(images) -> None:
    read = data_path.as_read(images, None)()
    normalised = data_path.in_batches(images, None)()
    assert torch.equal(images.normalisation(read), normalised)


def test_names_are_those_of_as_many_images() -> None:
    names = [*data_path.generated(3000)]
    assert len({*names}) == 3000 and len({name.split("/")[1] for name in names}) == 1000
    source = data_path.Generated(3000)
    assert source.names[2999] == names[2999] and len(source.labels) == 3000


def test_the_committed_file_compares_every_form(
    committed: Path = data_path.ROOT / "bench" / "results",
) -> None:
    (file,) = sorted(committed.glob("*_data.json"))[-1:]
    found = json.loads(file.read_text())
    assert {*found["paths"]} == {*data_path.PATHS} == {*found["images_per_s_per_core"]}
    for forms in found["paths"].values():
        assert tuple(forms) == data_path.FORMS
        assert forms[data_path.BEFORE]["times"] == 1
