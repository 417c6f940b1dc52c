"""Two sides of a case, measured in turns in one run, so that a busy machine disturbs both alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

from benchmarks.services import Services

__all__ = ("Case", "Measurement", "Sides", "measure", "stopwatch")


class Sides(NamedTuple):
    """What is compared; each call makes one measurement and returns its seconds."""

    ours: Callable[[], float]
    plain: Callable[[], float]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    :param name: for the command line.
    :param title: what is done, for the reader.
    :param goal: the ratio to reach: at most, or for a ``rate`` at least.
    :param open: makes the two sides, ready to be measured.
    :param rounds: how often each side is measured.
    :param work: how many pieces of work one measurement is, to show a rate.
    :param rate: how many of them in a second our side has to reach as well.
    :param warm: whether the first round is thrown away.
    """

    name: str
    title: str
    goal: float
    open: Callable[[Services], AbstractContextManager[Sides]]
    rounds: int
    work: int | None = None
    rate: float = 0
    warm: bool = True


@dataclass(frozen=True)
class Measurement:
    """The seconds of both sides of a case, round by round."""

    case: Case
    ours: tuple[float, ...]
    plain: tuple[float, ...]

    @property
    def medians(self) -> tuple[float, float]:
        """Seconds of our side and of the plain one; pieces of work per second for a rate."""
        ours, plain = statistics.median(self.ours), statistics.median(self.plain)
        work = self.case.work
        return (work / ours, work / plain) if work else (ours, plain)

    @property
    def ratio(self) -> float:
        """Our median by the plain one."""
        ours, plain = self.medians
        return ours / plain

    @property
    def spread(self) -> tuple[float, float]:
        """Between which ratios the middle half of the rounds lies."""
        pairs = zip(self.ours, self.plain, strict=True)
        ratios = [plain / ours if self.case.work else ours / plain for ours, plain in pairs]
        if len(ratios) < 2:
            return ratios[0], ratios[0]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high

    @property
    def reached(self) -> bool:
        """Whether the goal is reached, to the two digits that it is given with."""
        ratio, case = round(self.ratio, 2), self.case
        if case.work is None:
            return ratio <= case.goal
        return ratio >= case.goal and self.medians[0] >= case.rate


def measure(case: Case, services: Services, rounds: int | None = None) -> Measurement:
    """Measure both sides of a case in turns; who begins alternates.

    :param rounds: how often each side is measured; the case's own number if not given.
    """
    taken: dict[str, list[float]] = {"ours": [], "plain": []}
    with case.open(services) as sides:
        for side in sides if case.warm else ():
            side()
        order = ["ours", "plain"]
        for _ in range(rounds or case.rounds):
            for name in order:
                taken[name].append(getattr(sides, name)())
            order.reverse()
    return Measurement(case, tuple(taken["ours"]), tuple(taken["plain"]))


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Yield what tells the seconds since the beginning, until the end of the block."""
    begin = perf_counter()
    end: list[float] = []
    yield lambda: (end[0] if end else perf_counter()) - begin
    end.append(perf_counter())
