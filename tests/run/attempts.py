"""Attempts at a run that end badly: killed, or with a disk that refuses to write.

``Attempts`` starts one process that imports everything once and forks a child for each attempt, so
that an attempt costs what the run costs. The child calls the command line's ``main``; what goes
wrong, and when, is said by a ``Fault``. Run as a script, this file is that process.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR
NEEDS_SPACE = ("create", "write", "fsync", "rename", "mkdir")


# what a training loop tells of
IN_TRAINING = ("resume", "start", "step", "epoch", "checkpoint")


@dataclass(frozen=True)
class Fault:
    """What happens at operation ``at`` (from 0) of the run's operations on its folder.

    Attributes:
        at: which one of those whose kind is in ``kinds``.
        when: ``before`` and ``after`` kill the process there, ``torn`` kills it when half of a
            write is on disk, ``error`` lets this operation and all later ones fail.
        number: the errno of ``error``.
        kinds: which operations count; None for all of them.
        after_step_of: count from the first training step of this stage on.
    """

    at: int
    when: str
    number: int = errno.ENOSPC
    kinds: tuple[str, ...] | None = None
    after_step_of: str | None = None


@dataclass
class Outcome:
    """How an attempt ended.

    Attributes:
        status: exit code, or minus the signal.
        out, err: what it printed.
        events: the run's events, as ``(event, stage, step, state)``.
        operations: ``kind name`` of every operation on the folder, in order.
    """

    status: int
    out: str
    err: str
    events: list[tuple[str, str, int, str]] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)

    @property
    def in_training(self) -> bool:
        """Whether the last thing heard of came from a training loop."""
        return bool(self.events) and self.events[-1][0] in IN_TRAINING


class Attempt:
    """A child at work."""

    def __init__(self, owner: Attempts, pid: int, log: Path) -> None:
        self.owner, self.pid, self.log = owner, pid, log

    def events(self) -> list[tuple[str, str, int, str]]:
        return [tuple(json.loads(line)) for line in _lines(self.log / "events")]

    def wait_for(self, wanted: Callable[[list[tuple[str, str, int, str]]], bool]) -> bool:
        """Waits until the events so far satisfy ``wanted``; False when the child ended first."""
        while not wanted(self.events()):
            if not alive(self.pid):
                return False
            time.sleep(0.001)
        return True

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> Outcome:
        self.signal(signal.SIGKILL)
        return self.wait()

    def wait(self) -> Outcome:
        status = self.owner.ask({"wait": self.pid})["status"]
        return Outcome(
            status,
            (self.log / "out").read_text(),
            (self.log / "err").read_text(),
            self.events(),
            _lines(self.log / "operations"),
        )


class Attempts:
    """The process that forks; a context."""

    def __init__(self, logs: Path) -> None:
        self.logs, self.count = logs, 0

    def __enter__(self) -> Attempts:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.run.attempts"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        words: Sequence[str],
        *,
        fault: Fault | None = None,
        hold: Path | None = None,
        disk: dict[str, str] | None = None,
        copies: Path | None = None,
    ) -> Attempt:
        """Starts ``vitprune-fast WORDS`` in a child.

        Args:
            words: the command line.
            fault: what goes wrong.
            hold: the run waits at its first stage until this file exists.
            disk: a small file system is mounted for the child alone: see ``_on_small_disk``.
            copies: a new folder, which gets a copy of the run's folder from every moment at which a
                kill could leave another one: ``0007-before`` operation 7, and ``0007-torn``, in the
                middle of it, where it is a write.
        """
        self.count += 1
        log = self.logs / f"{self.count:05}"
        log.mkdir(parents=True)
        reply = self.ask(
            {
                "words": list(words),
                "log": str(log),
                "fault": asdict(fault) if fault else None,
                "hold": str(hold) if hold else None,
                "disk": disk,
                "copies": str(copies) if copies else None,
            }
        )
        return Attempt(self, reply["pid"], log)

    def finish(self, words: Sequence[str], **options: Any) -> Outcome:
        """Starts an attempt and waits for its end."""
        return self.start(words, **options).wait()


def alive(pid: int) -> bool:
    """Whether the process still runs (a dead one that nobody waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _lines(path: Path) -> list[str]:
    # a killed child may have left half a line
    return path.read_text().split("\n")[:-1] if path.exists() else []


# in the forking process


class _Hooks:
    """Counts the run's operations on its folder, copies it, and lets the fault happen."""

    def __init__(self, folder: str, log: str, fault: Fault | None, copies: str | None) -> None:
        self.folder, self.fault, self.copies = folder, fault, copies
        self.counting = fault is None or fault.after_step_of is None
        self.seen = 0
        self.failing = False
        self.log = os.open(f"{log}/operations", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.logged = 0
        self.real = {
            name: getattr(os, name)
            for name in ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")
        }
        kinds = {"replace": "rename", "rmdir": "unlink"}
        for name in self.real:
            if name != "open":
                setattr(os, name, self.wrapped(name, kinds.get(name, name)))
        os.open = self.open  # type: ignore[assignment]

    def wrapped(self, name: str, kind: str) -> Callable[..., Any]:
        def operation(target: Any, *rest: Any, **options: Any) -> Any:
            real = self.real[name]
            # half of what a write was asked for is a legal result of it
            half = (lambda: real(target, rest[0][: len(rest[0]) // 2])) if name == "write" else None
            if self.copies and half is not None and self.holds(target):
                written = self.around(kind, target, half, None)
                self.copy("torn")
                return written + real(target, rest[0][written:])
            return self.around(kind, target, lambda: real(target, *rest, **options), half)

        return operation

    def open(self, path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if not flags & WRITING:
            return self.real["open"](path, flags, *rest, **options)
        return self.around(
            "create", path, lambda: self.real["open"](path, flags, *rest, **options), None
        )

    def holds(self, target: Any) -> str:
        """Its path where it lies in the run's folder, else an empty one."""
        name = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
        return name if name.startswith(self.folder) else ""

    def copy(self, when: str) -> None:
        """Keeps the folder as the last operation met or left it."""
        if os.path.isdir(self.folder):
            shutil.copytree(self.folder, f"{self.copies}/{self.logged - 1:04}-{when}")

    def around(self, kind: str, target: Any, act: Callable[[], Any], half: Any) -> Any:
        name = self.holds(target)
        if not name:
            return act()
        shown = re.sub(r"\.\d+-\d+\.tmp", ".tmp", name[len(self.folder) + 1 :])
        self.real["write"](self.log, f"{kind} {shown}\n".encode())
        self.logged += 1
        if self.copies:
            self.copy("before")
        fault = self.fault
        if fault is None or not self.counting or (fault.kinds and kind not in fault.kinds):
            return act()
        now, self.seen = self.seen == fault.at, self.seen + 1
        if now and fault.when == "before":
            _die()
        if now and fault.when == "torn":
            half()
            _die()
        if fault.when == "error" and (now or self.failing) and kind in NEEDS_SPACE:
            # the disk takes half of the first write, and then nothing
            first, self.failing = not self.failing, True
            if first and half is not None:
                return half()
            raise OSError(fault.number, os.strerror(fault.number), name)
        try:
            return act()
        finally:
            if now and fault.when == "after":
                _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _watch(log: str, hooks: _Hooks, hold: str | None) -> None:
    """Writes down every event of the run, through the one object that sees them all."""
    from vitprune_fast.cli.signals import Stopper

    handle = hooks.real["open"](f"{log}/events", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    original = Stopper.watch

    def watch(self: Stopper, event: dict) -> None:
        original(self, event)
        line = [event["event"], event.get("stage", ""), event.get("step", -1)]
        hooks.real["write"](handle, (json.dumps([*line, event.get("state", "")]) + "\n").encode())
        if hooks.fault and event["event"] == "step":
            hooks.counting |= event["stage"] == hooks.fault.after_step_of
        while hold and event["event"] == "stage" and not os.path.exists(hold):
            time.sleep(0.01)

    Stopper.watch = watch  # type: ignore[method-assign]


def _on_small_disk(disk: dict[str, str], words: list[str]) -> int:
    """Runs on a file system of the given size or read-only; then again without the obstacle.

    The mount is the child's own and goes with it, so the result is copied to ``disk["copy"]``.
    Returns 0 when the first attempt failed with code 2 and the second one succeeded.
    """
    import ctypes

    from vitprune_fast.cli.main import main

    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, remount, read_only = 0x00020000, 32, 1
    folder = disk["folder"].encode()

    def mount(flags: int, options: str) -> None:
        if libc.mount(b"none", folder, b"tmpfs", flags, options.encode()):
            raise OSError(ctypes.get_errno(), "mount")

    if libc.unshare(new_namespace) or libc.mount(b"none", b"/", None, (1 << 18) | (1 << 14), None):
        raise OSError(ctypes.get_errno(), "unshare")
    mount(0, f"size={disk['size']}")
    if disk["first"] == "read-only":
        mount(remount | read_only, f"size={disk['size']}")
    first = main(words)
    mount(remount, "size=64m")
    second = main(words)
    shutil.copytree(disk["folder"], disk["copy"], dirs_exist_ok=True)
    return 0 if (first, second) == (2, 0) else 100 + 10 * first + second


def _child(request: dict[str, Any]) -> int:
    log, words = request["log"], request["words"]
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}/{name}", os.O_WRONLY | os.O_CREAT), number)
    folder = words[words.index("--out") + 1]
    fault = Fault(**request["fault"]) if request["fault"] else None
    _watch(log, _Hooks(folder, log, fault, request["copies"]), request["hold"])
    if request["disk"]:
        return _on_small_disk(request["disk"], words)
    from vitprune_fast.cli.main import main

    return main(words)


def _serve() -> None:
    import contextlib
    import io

    import sklearn.datasets  # noqa: F401
    import torch

    import vitprune_fast
    import vitprune_fast.cli.display
    import vitprune_fast.run.chain
    from vitprune_fast.cli.run import main as parse_and_run
    from vitprune_fast.run.report import figures

    # public names are imported at first use, and so is the parser of options
    for name in vitprune_fast.__all__:
        getattr(vitprune_fast, name)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        parse_and_run(["--print-config"])
    # pictures cost as much as all the rest, and are not what is looked at here
    figures.drawn = lambda title, height, draw: "<svg></svg>"
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)
            continue
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = _child(request)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(json.dumps({"pid": child}), flush=True)


if __name__ == "__main__":
    _serve()
