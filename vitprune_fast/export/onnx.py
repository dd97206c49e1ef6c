"""One file for ONNX Runtime, TensorRT and others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..errors import UnsupportedArchitecture
from ._subject import Format, Logits, Subject, needed

# what a file of Protocol Buffers holds, with room for the graph
MOST_BYTES = 2_000_000_000


def check(subject: Subject) -> None:
    """Refuse a dtype that ONNX Runtime does not compute in, and what has no runtime to judge it."""
    needed("onnx", "onnx", "onnxscript", "onnxruntime")
    if subject.dtype not in (torch.float32, torch.float16):
        raise UnsupportedArchitecture(
            f"export: model must be float32 or float16 for format onnx, got {subject.dtype}; "
            "export model.float()"
        )


def write(subject: Subject, path: Path) -> None:
    """Write the file, and where weights are above 2 GB a second one, ``.data`` behind its name."""
    model, images, sizes = subject.saying()
    program: Any = torch.onnx.export(
        model,
        images,
        dynamo=True,
        dynamic_shapes=sizes,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    # the exporter notes where the sources lie on this machine
    for graph in (program.model.graph, *(f.graph for f in program.model.functions.values())):
        for node in graph.all_nodes():
            node.metadata_props.clear()
        for value in (*graph.inputs, *graph.outputs):
            value.metadata_props.clear()
    for name, fact in subject.facts().items():
        program.model.metadata_props[name] = fact if isinstance(fact, str) else json.dumps(fact)
    size = sum(t.numel() * t.element_size() for t in subject.model.state_dict().values())
    program.save(path, external_data=size > MOST_BYTES)


def opened(path: Path) -> Logits:
    """By ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


FORMAT = Format(write, opened, ".onnx", check=check)
