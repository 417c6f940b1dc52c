"""When an entry of the schedule is to run: pure functions of the entry, its last tick and the time.

A *tick* is the nominal time of a run, in UTC. Several beats that look at the same entry at slightly
different times find the same tick, so that one of them can claim it for all.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from celery import states
from celery.backends.base import DisabledBackend
from celery.schedules import BaseSchedule, crontab, schedule

from ws_celery.events import SKIPPED
from ws_celery.schedules import Clocked, ZonedCrontab

if TYPE_CHECKING:
    from ws_celery.beat.entries import Entry

__all__ = (
    "LATE",
    "Agenda",
    "due_tick",
    "is_kept",
    "is_unfinished",
    "next_tick",
    "nothing_tells",
    "ticks_between",
    "unfinished_rows",
)


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


#: Celery's own ends, and that of a run that another one has kept from running.
_ENDED = states.READY_STATES | {SKIPPED}


def is_kept(app: Any, entry: Entry) -> bool:
    """Tell whether the row that the task of an entry has in the outbox tells its end."""
    if app.outbox is None or app.eager is not None:
        return False
    return bool(getattr(app.tasks.get(entry.task), "outbox", True))


def nothing_tells(app: Any, entry: Entry) -> str | None:
    """Return why nothing can tell when the task of an entry has ended; ``None`` if something can.

    :param entry: its task is one of the application's.
    """
    if app.eager is not None or is_kept(app, entry):
        return None
    if isinstance(app.backend, DisabledBackend):
        return "the application has no result_backend"
    if entry.options.get("ignore_result", app.tasks[entry.task].ignore_result):
        return f"the results of {entry.task} are ignored"
    return None


def unfinished_rows(app: Any, connection: Any, task_ids: Mapping[str, str]) -> set[str]:
    """Return which tasks still have their row: they wait, or run.

    :param task_ids: name of the entry to the id of the task.
    """
    if not task_ids:
        return set()
    waiting = app.outbox.rows.waiting(connection, task_ids.values())
    return {name for name, task_id in task_ids.items() if task_id in waiting}


def is_unfinished(app: Any, task_id: str, since: datetime, now: datetime) -> bool:
    """Tell by its result whether a task waits, or runs.

    A result that has not come within ``result_expires`` is not waited for any longer: the task was
    lost.

    :param since: when it was sent.
    """
    longest = app.conf.result_expires or timedelta(days=1)
    if not isinstance(longest, timedelta):
        longest = timedelta(seconds=longest)
    if now - since > longest:
        return False
    return app.AsyncResult(task_id).state not in _ENDED


#: By how much a tick may be late and is still run like any other; later ones have been missed.
LATE = timedelta(seconds=5)
#: A last tick that is ahead of the clock by more than this is the work of a clock that was wrong.
_WRONG = timedelta(days=1)
#: How far apart two events of the sun are at least: their times are found by approximation.
_APART = timedelta(seconds=1)
_MOMENT = timedelta(microseconds=1)


def next_tick(entry: Entry, after: datetime) -> datetime | None:
    """Return the first tick of an entry after a time, in UTC; ``None`` if there is none.

    :param after: any time; for a period without ``starts_at`` an earlier tick, as the next one is
        counted from it.
    :raises Exception: what the schedule itself raises, such as a crontab whose day never comes.
    """
    after = after.astimezone(timezone.utc)
    every = _period(entry.schedule)
    if every is not None:
        tick = _on_grid(every, entry.starts_at or after, after)
    else:
        tick = _following(entry.schedule, max(after, (entry.starts_at or after) - _MOMENT))
    return None if tick and entry.expires and tick >= entry.expires else tick


def due_tick(
    entry: Entry, last: datetime | None, now: datetime, ready: datetime | None = None
) -> tuple[datetime | None, datetime]:
    """Return the tick that is to run now, if any, and what to keep as the last tick.

    A tick that is late by up to :data:`LATE` runs. If there are older ones, the latest runs for all
    of them where somebody was ready for it, and had too much to do. Else they were missed: all are
    forgotten, or, with ``catch_up = "once"``, run as one, the latest.

    :param last: what was kept; ``None`` for an entry that is new.
    :param now: the time by the clock that all beats share.
    :param ready: since when the one who asks has waited for ticks of this entry; since now if not
        since before.
    """
    ready = now if ready is None else min(ready, now)
    if last is None:
        last = _beginning(entry.schedule, now)
    elif last - now > _WRONG and not isinstance(entry.schedule, Clocked):
        last = now
    tick = next_tick(entry, last)
    if tick is None or tick > now:
        return None, last
    if now - tick <= LATE:
        return tick, tick
    tick = _latest(entry, tick, now)
    over = entry.expires is not None and now - entry.expires > LATE
    if ready - tick <= LATE or (entry.catch_up == "once" and not over):
        return tick, tick
    return None, tick


def ticks_between(
    entry: Entry, last: datetime | None, now: datetime, until: datetime
) -> Iterator[datetime]:
    """Yield the ticks that an entry will have from ``now`` on, if nothing stops beat.

    :param last: its last tick; ``None`` for an entry that is new.
    """
    tick, last = due_tick(entry, last, now)
    if tick is None:
        tick = next_tick(entry, last)
    while tick is not None and tick <= until:
        yield tick
        tick = next_tick(entry, tick)


def _beginning(timing: Any, now: datetime) -> datetime:
    """Return the time that the first tick of a new entry comes after."""
    # Not a time to come: the one run may be moved to an earlier one.
    return min(now, timing.at - _MOMENT) if isinstance(timing, Clocked) else now


def _period(timing: Any) -> timedelta | None:
    """Return the period of a schedule that is nothing else."""
    if type(timing) is schedule and not timing.relative:
        every: timedelta = timing.run_every
        return every
    return None


def _on_grid(every: timedelta, origin: datetime, after: datetime) -> datetime | None:
    try:
        return origin if after < origin else origin + every * ((after - origin) // every + 1)
    except OverflowError:
        return None


def _following(timing: Any, after: datetime) -> datetime | None:
    if isinstance(timing, Clocked):
        return timing.at if timing.at > after else None
    tick = _as_told(timing, after, after)
    if isinstance(timing, crontab) or tick - after >= _APART:
        return tick
    return _as_told(timing, after + 60 * _APART, after)


def _as_told(timing: BaseSchedule, last: datetime, now: datetime) -> datetime:
    """Return the tick after ``last`` as the schedule itself tells it, which asks for the time."""
    # A copy whose clock stands still; Celery's own crontab does not know of summer time.
    kind = ZonedCrontab if type(timing) is crontab else type(timing)
    stopped = object.__new__(kind)
    # Local, as Celery's own beat has them: what is rounded to days is rounded by them.
    vars(stopped).update(vars(timing), nowfun=lambda: now.astimezone(stopped.tz))
    if kind is not type(timing):
        stopped.zone = None
    tick: datetime = now + stopped.remaining_estimate(last.astimezone(stopped.tz))
    return tick.astimezone(timezone.utc)


def _latest(entry: Entry, tick: datetime, now: datetime) -> datetime:
    """Return the last tick up to ``now``, of which ``tick`` is an earlier one."""
    every = _period(entry.schedule)
    end = now if entry.expires is None else min(now, entry.expires - _MOMENT)
    if every is not None:
        return tick + every * ((end - tick) // every)
    # Halved, because a crontab can only tell what comes next, and there may be very many.
    none_after = end
    while (following := next_tick(entry, tick)) is not None and following <= end:
        tick = following
        middle = tick + (none_after - tick) / 2
        following = next_tick(entry, middle)
        if following is not None and following <= end:
            tick = following
        else:
            none_after = middle
    return tick
