"""Forms of a race as entries of pytest-benchmark; benches run where it is not installed too.

pytest-benchmark times one function after another. Our forms take turns, so they are timed first;
then its timer gives the seconds that were measured, round by round, and its statistics, tables,
files and comparisons are about those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from vitprune_fast.doctor import doctor


class Replay:
    """Timer and target of pytest-benchmark: each round as it was, then the form for a profiler.

    Args:
        seconds: that were measured, a number per round.
        clock: what measured them, as the entry names its timer.
        call: of the form; None where it cannot be called alone.
    """

    def __init__(self, seconds: Sequence[float], clock: str, call: Callable[[], object] | None):
        # every round is between two readings
        self._readings = (reading for taken in seconds for reading in (0.0, taken))
        self._rounds = iter(seconds)
        self._call = call
        self.timer: Callable[[], float] = lambda: next(self._readings)
        self.timer.__name__ = clock

    def target(self) -> None:
        """Nothing, as often as there are rounds; after them one call."""
        if next(self._rounds, None) is None and self._call:
            self._call()


class Entries:
    """The entries of one test.

    Args:
        request: of the test.
        benchmark: fixture of pytest-benchmark; None where there is no such plugin.

    Attributes:
        timed: whether anything may be timed: not under ``--benchmark-disable``.
    """

    def __init__(self, request: pytest.FixtureRequest, benchmark: Any = None):
        self._node, self._benchmark = request.node, benchmark
        self._config: Any = request.config
        self.timed: bool = benchmark is None or benchmark.enabled

    def add(
        self,
        form: str,
        group: str,
        seconds: Sequence[float],
        facts: dict[str, Any],
        clock: str,
        call: Callable[[], object] | None = None,
    ) -> None:
        """Hand one form to pytest-benchmark, if it is there.

        Args:
            form: becomes a parameter of the test: ``bench_x[FORM]`` or ``bench_x[case-FORM]``.
            group: whose entries stand in one table.
            seconds: that were measured, a number per round.
            facts: what else is known of it (``extra_info``).
            clock: what measured them.
            call: of the form, for ``--benchmark-cprofile``.
        """
        if self._benchmark is None:
            return
        from pytest_benchmark.utils import NameWrapper

        session = self._config._benchmarksession
        replay = Replay(seconds, clock, call)
        # as its own fixture is made, for a test that has the form as one more parameter
        entry = type(self._benchmark)(
            self._with_form(form),
            add_stats=session.benchmarks.append,
            logger=session.logger,
            warner=self._node.warn,
            disabled=session.disabled,
            **{**session.options, "group": group, "timer": NameWrapper(replay.timer)},
        )
        entry.extra_info.update(facts)
        entry.pedantic(replay.target, rounds=len(seconds))

    def _with_form(self, form: str) -> Any:
        case = getattr(self._node, "callspec", SimpleNamespace(id="", params={}))
        label = f"{case.id}-{form}" if case.id else form
        file = self._node.nodeid.rpartition("::")[0]
        name = f"{self._node.originalname}[{label}]"
        params = {**{key: str(value) for key, value in case.params.items()}, "form": form}
        call = SimpleNamespace(id=label, params=params)
        # older versions of pytest-benchmark read the private name
        node = f"{file}::{name}"
        return SimpleNamespace(name=name, nodeid=node, _nodeid=node, callspec=call)


class WithBenchmark:
    """A plugin of pytest where pytest-benchmark is one."""

    @pytest.fixture
    def entries(self, request: pytest.FixtureRequest, benchmark: Any) -> Iterator[Entries]:
        """Entries of this test; it counts as a benchmark by asking for ``benchmark``."""
        yield Entries(request, benchmark)
        # every form has a fixture of its own; that of the test is used up without an entry
        benchmark.disabled = True
        benchmark.pedantic(lambda: None)

    def pytest_benchmark_update_machine_info(self, machine_info: dict[str, Any]) -> None:
        """What decides about our times, besides what pytest-benchmark knows of the machine."""
        found = doctor()
        machine_info.update(devices=found.devices, versions=found.versions, native=found.native)


class WithoutBenchmark:
    """A plugin of pytest where pytest-benchmark is none."""

    @pytest.fixture
    def entries(self, request: pytest.FixtureRequest) -> Entries:
        """No entries."""
        return Entries(request)
