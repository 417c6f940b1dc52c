"""A schedule of one run: ``type = clocked``."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

from celery.schedules import BaseSchedule, schedstate

__all__ = ("Clocked",)

#: For Celery's own schedulers, which want to know when to ask again: not in this life.
_NEVER = timedelta(days=36500)


class Clocked(BaseSchedule):
    """One run at a certain time, and no other.

    :param at: the time, with its zone.

    The other parameters are those of :class:`celery.schedules.BaseSchedule`.
    """

    def __init__(self, at: datetime, **options: Any) -> None:
        self.at = at.astimezone(timezone.utc)
        super().__init__(**options)

    def remaining_estimate(self, last_run_at: datetime) -> timedelta:
        """Return the time from now to the run; a very long one if it has been."""
        if self.maybe_make_aware(last_run_at) >= self.at:
            return _NEVER
        now: datetime = self.maybe_make_aware(self.now())
        return self.at - now

    def is_due(self, last_run_at: datetime) -> schedstate:
        """Tell whether it is due, and in how many seconds to ask again."""
        remaining = self.remaining_estimate(last_run_at)
        if remaining > timedelta(0):
            return schedstate(is_due=False, next=remaining.total_seconds())
        return schedstate(is_due=True, next=_NEVER.total_seconds())

    def __repr__(self) -> str:
        return f"<clocked: {self.at.isoformat()}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.at,)

    def __eq__(self, other: object) -> bool:
        return self.at == other.at if isinstance(other, Clocked) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.at)
