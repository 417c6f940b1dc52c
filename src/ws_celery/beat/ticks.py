"""When an entry of the schedule is to run: pure functions of the entry, its last tick and the time.

A *tick* is the nominal time of a run, in UTC. Several beats that look at the same entry at slightly
different times find the same tick, so that one of them can claim it for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

from celery.schedules import BaseSchedule, crontab, schedule

from ws_celery.beat.entries import Entry
from ws_celery.schedules import Clocked, ZonedCrontab

__all__ = (
    "LATE",
    "due_tick",
    "next_tick",
    "ticks_between",
)

#: By how much a tick may be late and is still run like any other; later ones have been missed.
LATE = timedelta(seconds=5)
#: A last tick that is ahead of the clock by more than this is the work of a clock that was wrong.
_WRONG = timedelta(days=1)
#: How far apart two events of the sun are at least: their times are found by approximation.
_APART = timedelta(seconds=1)
_MOMENT = timedelta(microseconds=1)


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


def _beginning(timing: BaseSchedule, now: datetime) -> datetime:
    """Return the time that the first tick of a new entry comes after."""
    # Not a time to come: the one run may be moved to an earlier one.
    return min(now, timing.at - _MOMENT) if isinstance(timing, Clocked) else now


def _period(timing: BaseSchedule) -> timedelta | None:
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


def _following(timing: BaseSchedule, after: datetime) -> datetime | None:
    if isinstance(timing, Clocked):
        return timing.at if timing.at > after else None
    tick = _estimated(timing, after)
    if isinstance(timing, crontab) or tick - after >= _APART:
        return tick
    return _estimated(timing, after, after + 60 * _APART)


def _estimated(timing: BaseSchedule, now: datetime, last: datetime | None = None) -> datetime:
    """Return the tick after ``last``, which is ``now`` if not given, by Celery's estimate."""
    # A copy whose clock stands still; Celery's own crontab does not know of summer time.
    kind = ZonedCrontab if type(timing) is crontab else type(timing)
    stopped = object.__new__(kind)
    # Local, as Celery's own beat has them: what is rounded to days is rounded by them.
    vars(stopped).update(vars(timing), nowfun=lambda: now.astimezone(stopped.tz))
    if kind is not type(timing):
        stopped.zone = None
    tick: datetime = now + stopped.remaining_estimate((last or now).astimezone(stopped.tz))
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
