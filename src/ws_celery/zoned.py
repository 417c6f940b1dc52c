"""A crontab with a time zone, right for the hours that summer time repeats or leaves out."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone, tzinfo
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

from celery.schedules import crontab
from celery.utils.time import ffwd

__all__ = ("ZonedCrontab",)

_MINUTE = timedelta(minutes=1)


class ZonedCrontab(crontab):
    """A crontab in a time zone of its own, which need not be the application's.

    A crontab for every hour runs whenever the clock shows its minutes: in both passes of an hour
    that comes twice, and not in one that is left out. One for certain hours runs in the first pass
    only; if it has any runs in an hour that is left out, it runs once instead, at the first moment
    after it.

    :param zone: name of the time zone; the application's by default.
    :param nowfun: returns the current time, for tests.
    :param app: the Celery app.

    The other parameters are those of :class:`celery.schedules.crontab`.
    """

    def __init__(
        self,
        *fields: Any,
        zone: str | None = None,
        nowfun: Callable[[], datetime] | None = None,
        app: Any = None,
        **named: Any,
    ) -> None:
        self.zone = zone
        super().__init__(*fields, nowfun=nowfun, app=app, **named)

    @property
    def tz(self) -> tzinfo:
        """The time zone that the fields are meant in."""
        return ZoneInfo(self.zone) if self.zone else self.app.timezone

    def now(self) -> datetime:
        """Return the current time, in the zone where it has one."""
        if self.nowfun or not self.zone:
            return super().now()
        return datetime.now(self.tz)

    def remaining_estimate(self, last_run_at: datetime, ffwd: type = ffwd) -> timedelta:
        """Return the time from now to the run that follows ``last_run_at``; negative if past."""
        start, now = (self.maybe_make_aware(moment) for moment in (last_run_at, self.now()))
        return self._following(start, ffwd) - now.astimezone(timezone.utc)

    def maybe_make_aware(self, dt: datetime, *args: Any, **options: Any) -> datetime:
        """Return ``dt`` in the zone of the fields."""
        # Before 5.7 Celery leaves an aware time in the zone that it came in, or takes the wrong
        # offset near a change.
        aware = super().maybe_make_aware(dt, *args, **options) if dt.tzinfo is None else dt
        # By way of UTC, as a time in this very zone may be one that the clock leaves out.
        return aware.astimezone(timezone.utc).astimezone(self.tz)

    def _following(self, start: datetime, ffwd: type) -> datetime:
        """Return the instant, in UTC, of the run that follows ``start``."""
        every_hour = len(self.hour) == 24
        if start.fold or (every_hour and _offset(start, 0) != _offset(start, 1)):
            # Celery reads the clock, which does not tell the passes of a repeated hour apart.
            moment = _next_minute(start)
            while _offset(local := moment.astimezone(self.tz), 0) != _offset(local, 1):
                if every_hour and self._matches(local):
                    return moment
                moment += _MINUTE
            start = local - _MINUTE
        _, delta, _ = self.remaining_delta(start, ffwd=ffwd)
        wall = (start + delta).replace(fold=0)
        due: datetime = wall.astimezone(timezone.utc)
        if _is_shown(wall):
            return due
        # The clock leaves it out: ``due`` is after the gap, and this is before it.
        moment = wall.replace(fold=1).astimezone(timezone.utc)
        while moment.astimezone(self.tz).utcoffset() == wall.utcoffset():
            moment += _MINUTE
        if not every_hour:
            return moment
        # Walked because Celery before 5.7 reads the day of ``now``, too, which may be another one.
        for _ in range(60):
            if self._matches(moment.astimezone(self.tz)):
                return moment
            moment += _MINUTE
        return self._following((moment - _MINUTE).astimezone(self.tz), ffwd)

    def _matches(self, local: datetime) -> bool:
        return (
            local.minute in self.minute
            and local.month in self.month_of_year
            and local.day in self.day_of_month
            and local.isoweekday() % 7 in self.day_of_week
        )

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (
            self._orig_minute,
            self._orig_hour,
            self._orig_day_of_week,
            self._orig_day_of_month,
            self._orig_month_of_year,
        )
        return partial(type(self), zone=self.zone, nowfun=self.nowfun), fields

    def __eq__(self, other: object) -> bool:
        same = super().__eq__(other)
        if same is not True:
            return same
        return bool(getattr(other, "zone", None) == self.zone)

    __hash__ = None  # type: ignore[assignment]


def _offset(local: datetime, fold: int) -> timedelta | None:
    return local.replace(fold=fold).utcoffset()


def _next_minute(moment: datetime) -> datetime:
    return moment.astimezone(timezone.utc).replace(second=0, microsecond=0) + _MINUTE


def _is_shown(wall: datetime) -> bool:
    """Return whether the clock ever shows ``wall``, or leaves it out."""
    there = wall.astimezone(timezone.utc).astimezone(wall.tzinfo)
    return there.replace(tzinfo=None) == wall.replace(tzinfo=None)
