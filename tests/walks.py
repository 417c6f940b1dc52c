"""The runs of a crontab, found by looking at every minute."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from celery.schedules import crontab

__all__ = ("walk",)

_MINUTE = timedelta(minutes=1)


def walk(schedule: crontab, zone: str, first: datetime, last: datetime) -> Iterator[datetime]:
    """Yield the runs from ``first`` to ``last``, in UTC, as the documentation has them."""
    every_hour = len(schedule.hour) == 24
    moment = first.replace(second=0, microsecond=0) - _MINUTE
    shown = moment.astimezone(ZoneInfo(zone)).replace(tzinfo=None)
    while (moment := moment + _MINUTE) <= last:
        local = moment.astimezone(ZoneInfo(zone))
        before, shown = shown, local.replace(tzinfo=None)
        left_out = () if every_hour else range(1, (shown - before) // _MINUTE)
        matches = _matches(schedule, local) and (every_hour or not local.fold)
        late = any(_matches(schedule, shown - n * _MINUTE) for n in left_out)
        if (matches or late) and moment >= first:
            yield moment


def _matches(schedule: crontab, local: datetime) -> bool:
    return (
        local.minute in schedule.minute
        and local.hour in schedule.hour
        and local.day in schedule.day_of_month
        and local.month in schedule.month_of_year
        and local.isoweekday() % 7 in schedule.day_of_week
    )
