"""SIGINT, SIGTERM and SIGUSR1 (a scheduler's warning) end a command.

Training and the sweep finish their step and write a checkpoint; all else ends at once.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE_S = 20.0
"""Seconds a step may still take after the signal, before the run ends without a new checkpoint."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(BaseException):
    """One of `SIGNALS` arrived; no handler of ordinary errors may swallow it.

    Attributes:
        number: of the signal.
        resumes: a checkpoint was written from which the same command goes on.
    """

    def __init__(self, number: int, *, resumes: bool = False) -> None:
        super().__init__(number)
        self.number, self.resumes = number, resumes


def listen() -> None:
    """Makes these signals end the command at once, by raising `Interrupted`."""

    def end(number: int, frame: FrameType | None) -> None:
        # a second signal while we clean up ends the process
        signal.signal(number, signal.SIG_DFL)
        raise Interrupted(number)

    for number in SIGNALS:
        signal.signal(number, end)


class Stopper:
    """Tells a run to stop: pass it as `stop`, and its `watch` as (part of) `on_event`.

    While a training or a sweep steps, the first signal only sets a flag, so that a checkpoint can
    be written; a second one, or a step longer than `PATIENCE_S`, ends the run at once.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._training = False
        for number in SIGNALS:
            signal.signal(number, self._arrived)
        signal.signal(signal.SIGALRM, self._too_slow)

    def __call__(self) -> bool:
        return self.number is not None

    def watch(self, event: dict) -> None:
        """Notes from the events of a run whether it is training, or refits."""
        going = ("resume", "start", "step", "epoch", "checkpoint", "sweep")
        self._training = event.get("event") in going

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self._training and self.number is None:
            self.number = number
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
            return
        signal.signal(number, signal.SIG_DFL)
        raise Interrupted(number)

    def _too_slow(self, number: int, frame: FrameType | None) -> None:
        raise Interrupted(self.number or number)


@contextmanager
def stoppable(
    listener: Callable[[dict], None],
    stopped: type[Exception],
    *,
    stage: str = "",
    resumes: bool = True,
) -> Iterator[tuple[Callable[[dict], None], Stopper]]:
    """Lets signals end the work in the body with a checkpoint.

    Args:
        listener: hears every event of it.
        stopped: what the work raises when it was asked to stop.
        stage: its name, added to its events; it begins at once. Without one they have their own.
        resumes: a checkpoint is then written, from which the same command goes on.

    Yields:
        The work's `on_event` and its `stop`.
    """
    stop = Stopper()

    def on_event(event: dict) -> None:
        stop.watch(event)
        listener({**event, "stage": stage} if stage else event)

    if stage:
        on_event({"event": "stage", "state": "start"})
    try:
        yield on_event, stop
    except stopped:
        assert stop.number is not None
        raise Interrupted(stop.number, resumes=resumes) from None
