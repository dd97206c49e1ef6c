"""Every error a user can cause or meet; the command line prints these as one sentence."""

from __future__ import annotations


class VitpruneError(Exception):
    """Base of all errors raised on purpose."""


class InvalidInput(VitpruneError, ValueError):
    """An argument or an input file has a value that cannot be used."""


class InfeasibleBudget(InvalidInput):
    """No plan meets the budget; the message names the smallest feasible one."""


class UnsupportedArchitecture(VitpruneError, NotImplementedError):
    """The model belongs to no supported family, or has a part without a layout."""


class BackendUnavailable(VitpruneError, RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""


class NotEnoughMemory(VitpruneError, MemoryError):
    """Memory does not hold the smallest piece of work there is."""


class DamagedFile(VitpruneError, ValueError):
    """A file is truncated, altered, of another format, or outside the limits."""


class RunFolderError(VitpruneError, RuntimeError):
    """A run folder is locked, belongs to another configuration, or cannot be written."""


class StageFailed(VitpruneError, RuntimeError):
    """A step finished but its own check did not hold."""
