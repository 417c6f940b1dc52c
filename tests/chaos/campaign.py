"""One run of one system: dispatches all the time, faults one after another, then the counts."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.chaos.faults import Fault, faults_of
from tests.chaos.site import Site
from tests.chaos.tally import Counts

__all__ = ("BACKLOG", "MIXED", "Campaign", "Line", "failures")

MIXED = "all of them at random, one upon the other"
BACKLOG = "broker emptied while 1,000 tasks wait"

#: Part of the faults that come at random after each kind has had its turn.
_MIXED_PART = 0.3


@dataclass(frozen=True)
class Line:
    """What one kind of fault has done to a system."""

    fault: str
    faults: int
    dispatches: int
    lost: int
    duplicates: int
    phantoms: int
    #: Seconds from the last fault to the last effect; ``None`` if some never came.
    converged: float | None


@dataclass
class _Phase:
    faults: int = 0
    windows: list[tuple[float, float]] = field(default_factory=list)
    converged: float | None = 0.0


class Campaign:
    """Faults of all kinds, a number of each, and dispatches meanwhile.

    :param site: the system, not started yet.
    :param database: its kind.
    :param dispatches: how many there are to be at least.
    :param faults: likewise.
    :param seed: of the order and the times of the faults.
    :param say: is told of the progress.
    :param only: part of the names of the kinds of faults to inject.
    """

    def __init__(
        self,
        site: Site,
        database: str,
        *,
        dispatches: int,
        faults: int,
        seed: int,
        say: Callable[[str], None],
        only: str = "",
    ) -> None:
        self._site = site
        self._kinds = [kind for kind in faults_of(site.system, database) if only in kind.name]
        self._dispatches = dispatches
        self._faults = faults
        self._rng = random.Random(f"{seed} {site.system}")
        self._say = say
        self._phases: dict[str, _Phase] = defaultdict(_Phase)
        self._done = 0
        # Other systems lose for good what they lose: waiting does not help.
        self._patience = site.lease + 60 if site.system == "outbox" else 6.0

    def run(self) -> list[Line]:
        """Inject the faults, wait for the effects, and count."""
        self._site.start()
        mixed = int(self._faults * _MIXED_PART)
        each = max(-(-(self._faults - mixed - 1) // len(self._kinds)), 1)
        for kind in self._rng.sample(self._kinds, len(self._kinds)):
            with self._phase(kind.name):
                for _ in range(each):
                    self._inject(kind, kind.name)
                    self._site.fleet.wait(self._rng.uniform(0.2, 1.5))
        self._empty_backlog()
        with self._phase(MIXED):
            while self._done < self._faults:
                self._inject(self._rng.choice(self._kinds), MIXED)
            self._top_up()
        # What was not acknowledged is delivered again after the broker's visibility timeout.
        self._site.settle(max(self._patience, 40))
        return [self._line(name) for name in (*(kind.name for kind in self._kinds), BACKLOG, MIXED)]

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows that the outbox has left; there should be none."""
        return self._site.tally.rows()

    def _inject(self, kind: Fault, phase: str) -> None:
        if kind.inject(self._site, self._rng):
            self._done += 1
            self._phases[phase].faults += 1
        else:
            self._say(f"{self._site.system}: not reached: {kind.name}")
        tally = self._site.tally
        self._say(
            f"{self._site.system}: {self._done} faults, {tally.dispatches()} dispatches, "
            f"{tally.outstanding()} effects to come: {kind.name}"
        )

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begun = time.time()
        self._site.go_on()
        yield
        self._site.pause()
        last_fault = time.monotonic()
        self._site.fleet.wait(0.3)  # the request that is going on
        phase = self._phases[name]
        settled = self._site.settle(self._patience, begun)
        phase.converged = time.monotonic() - last_fault if settled else None
        if not settled and self._site.outbox is not None:
            rows = self._site.tally.rows()
            self._say(f"not converged: {name}: {len(rows)} rows, such as {rows[:3]}")
        phase.windows.append((begun, time.time()))

    def _top_up(self) -> None:
        while (missing := self._dispatches - self._site.tally.dispatches()) > 0:
            self._site.fleet.wait(min(max(missing / 100, 0.1), 5))

    def _empty_backlog(self) -> None:
        """Let 1,000 tasks wait for a worker, empty the broker, and see them run."""
        site, fleet = self._site, self._site.fleet
        with self._phase(BACKLOG):
            fleet.stop("web")
            fleet.stop("worker")
            fleet.run("burst")
            site.broker.kill()
            site.broker.start()
            self._phases[BACKLOG].faults += 1
            self._done += 1
            fleet.start("worker")
        fleet.start("web")

    def _line(self, name: str) -> Line:
        phase = self._phases[name]
        counts: Counts = self._site.tally.counts(phase.windows)
        return Line(name, phase.faults, **asdict(counts), converged=phase.converged)


def failures(lines: list[Line], rows: list[Any]) -> dict[str, Any]:
    """Return what should not be there after a run with the outbox."""
    found = {
        "lost": sum(line.lost for line in lines),
        "duplicates": sum(line.duplicates for line in lines),
        "phantoms": sum(line.phantoms for line in lines),
        "not converged": [line.fault for line in lines if line.converged is None],
        "rows left": rows,
    }
    return {what: number for what, number in found.items() if number}
