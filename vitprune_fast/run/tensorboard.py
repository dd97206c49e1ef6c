"""The curves of `metrics.jsonl` for TensorBoard, each point once however often the run was killed.

The event files of a step are rewritten from the metrics file whenever it is taken up, after that
file was cut back to the checkpoint, and then grow with it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vitprune_fast.config.distill import LOSSES
from vitprune_fast.errors import BackendUnavailable
from vitprune_fast.registry import names

CURVES = ("loss", "ce", "bce", "kd", "lr", "val_loss", "val_top1", "val_agreement", *names(LOSSES))


class Board:
    """Event files in `folder/STEP`, so that TensorBoard shows the steps as curves of one plot."""

    def __init__(self, folder: Path) -> None:
        """Raises BackendUnavailable without the tensorboard package."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise BackendUnavailable(
                f"--tensorboard needs {error.name}; install vitprune_fast[tensorboard], or "
                "leave the flag out: report.html has the same curves"
            ) from None
        self.folder = folder
        self._open = SummaryWriter
        self._writer: Any = None

    def restart(self, stage: str, lines: list[dict[str, Any]]) -> None:
        """Rewrites the points of a step from the lines of the metrics file."""
        self.close()
        shutil.rmtree(self.folder / stage, ignore_errors=True)
        self._writer = self._open(str(self.folder / stage))
        self.add(*(line for line in lines if line.get("stage") == stage))

    def close(self) -> None:
        """Ends the open step; without one it does nothing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def add(self, *lines: dict[str, Any]) -> None:
        """Adds the points of more lines; the step was restarted before."""
        for line in lines:
            for name in line if line.get("event") in ("start", "epoch") else ():
                # a loss of one of several teachers is TEACHER:LOSS
                if name.rpartition(":")[2] in CURVES and line[name] is not None:
                    self._writer.add_scalar(name, line[name], line["step"])
        self._writer.flush()
