"""Which entry is next: a heap of names by the time of their next tick."""

from __future__ import annotations

import heapq

__all__ = ("Agenda",)


class Agenda:
    """When to look at which entry; each name has one time at most.

    Times are seconds since the epoch, by the clock that all beats share.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []
        self._times: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._times)

    def put(self, name: str, time: float) -> None:
        """Look at an entry at this time, and not when it was said before."""
        self._times[name] = time
        heapq.heappush(self._heap, (time, name))

    def drop(self, name: str) -> None:
        """Do not look at an entry any more."""
        self._times.pop(name, None)

    def next(self) -> float | None:
        """Return the time of the next entry, or ``None`` if there is none."""
        heap = self._heap
        while heap and self._times.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def take(self, now: float, limit: int) -> list[str]:
        """Take the entries whose time has come out of it, the earliest first."""
        names: list[str] = []
        while len(names) < limit and (time := self.next()) is not None and time <= now:
            name = heapq.heappop(self._heap)[1]
            del self._times[name]
            names.append(name)
        return names

    def overdue(self, since: float) -> int:
        """Return for how many entries the time came before ``since``."""
        time = self.next()
        if time is None or time >= since:
            return 0
        return sum(each < since for each in self._times.values())
