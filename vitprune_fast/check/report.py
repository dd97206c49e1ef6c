"""What a check of a table found: a few plain values and a table to read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One thing that has to hold, and whether it does.

    Args:
        name: what has to hold.
        where: the axis, tensor, module or plan it broke on; empty where it holds.
        passed: whether it holds.
        detail: what was tried, or what was found in its place.
    """

    name: str
    where: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class StructureReport:
    """All that was checked, in order; what broke at several places has a line for each.

    Args:
        model: the class of the model.
        checks: what was checked.
    """

    model: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether all of it holds."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """What does not."""
        return tuple(check for check in self.checks if not check.passed)

    def __str__(self) -> str:
        width = max((len(check.name) for check in self.checks), default=0)
        failed = len(self.failures)
        verdict = f"{failed} check{'s' * (failed > 1)} failed" if failed else "ok"
        lines = [f"{self.model}: {verdict}"]
        for check in self.checks:
            verdict = "ok    " if check.passed else "FAILED"
            said = ": ".join(part for part in (check.where, check.detail) if part)
            lines.append(f"  {check.name:{width}s}  {verdict}  {said}")
        return "\n".join(lines)
