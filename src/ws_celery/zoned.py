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
#: No change of the clock is longer.
_LONGEST_CHANGE = timedelta(hours=3)


class ZonedCrontab(crontab):
    """A crontab in a time zone of its own, which need not be the application's.

    Where the clock goes back, a crontab for every hour runs through both passes of the repeated
    hour, and one for certain hours runs in the first only. Where it goes forward, what falls into
    the missing hour runs right after it, once.

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
        _, delta, _ = self.remaining_delta(start, ffwd=ffwd)
        return self._following(start, start + delta) - now.astimezone(timezone.utc)

    def maybe_make_aware(self, dt: datetime, *args: Any, **options: Any) -> datetime:
        """Return ``dt`` in the zone of the fields."""
        # Before 5.7 Celery leaves an aware time in the zone that it came in, or takes the wrong
        # offset near a change.
        aware = super().maybe_make_aware(dt, *args, **options) if dt.tzinfo is None else dt
        return aware.astimezone(self.tz)

    def _following(self, start: datetime, wall: datetime) -> datetime:
        after = start.astimezone(timezone.utc)
        due = _instant(wall, after)
        changes = start.utcoffset() != wall.utcoffset() and due - after <= _LONGEST_CHANGE
        if len(self.hour) == 24 and changes:
            # Celery looks for the next hour on the clock: not for the one that comes twice.
            moment = after.replace(second=0, microsecond=0) + _MINUTE
            while moment < due:
                if self._matches(moment.astimezone(self.tz)):
                    return moment
                moment += _MINUTE
        return due

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


def _instant(wall: datetime, after: datetime) -> datetime:
    """Return when a clock shows ``wall``: the first time that is later than ``after``."""
    first = wall.replace(fold=0).astimezone(timezone.utc)
    if first > after:
        # A time that the clock leaves out becomes the one that far after the gap.
        return first
    # The clock shows it twice, and the first time is over; or it does not, and both are the same.
    return wall.replace(fold=1).astimezone(timezone.utc)
