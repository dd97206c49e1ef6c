"""The report of the doctor."""

from __future__ import annotations

import json
import sys

import torch

from vitprune_fast import ops
from vitprune_fast._extension import extension_status
from vitprune_fast.doctor import doctor
from vitprune_fast.ops._dispatch import IMPLEMENTED


def test_doctor_reports_versions_devices_and_every_backend():
    report = doctor()
    text = str(report)
    assert report.versions["torch"] == torch.__version__.partition("+")[0]
    assert extension_status() in text
    assert {(choice.op, choice.device) for choice in report.backends} == {
        (op, device) for op in IMPLEMENTED for device in ("cpu", "cuda")
    }
    for choice in ops.backends():
        assert choice.why in text
    assert json.loads(json.dumps(report.as_dict()))["backends"][0]["op"] in IMPLEMENTED


def test_doctor_says_what_a_forced_backend_does(monkeypatch):
    monkeypatch.setenv("VITPRUNE_BACKEND", "triton")
    report = doctor()
    assert report.settings["VITPRUNE_BACKEND"] == "triton"
    gather = [choice for choice in report.backends if choice.op == "gather_all"]
    assert {choice.backend for choice in gather} == {"none"}
    assert all("there is no Triton kernel of this op" in choice.why for choice in gather)


def test_doctor_says_what_decodes_photographs(monkeypatch):
    assert doctor().tools["JPEG decoder"].startswith("simplejpeg")
    # "is it installed?" is answered with no
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert doctor().tools["JPEG decoder"].startswith("Pillow: the package simplejpeg")


def test_doctor_names_a_toolkit_of_another_cuda(monkeypatch, tmp_path):
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").write_text("")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 9.1, V9.1.85'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert any("nvcc 9.1 cannot build" in sentence for sentence in doctor().warnings)
