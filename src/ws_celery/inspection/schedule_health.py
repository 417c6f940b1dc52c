"""Whether beats send the ticks of the schedule, as the database knows it: for probes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from ws_celery.beat.entry import Entry, Known
from ws_celery.beat.sources import entries_of
from ws_celery.beat.ticks import next_tick
from ws_celery.exceptions import ScheduleNotOn
from ws_celery.inspection.schedule import as_json, look

__all__ = ("ScheduleHealth", "schedule_health")


@dataclass(frozen=True)
class ScheduleHealth:
    """Whether beats do their work, by what the database says.

    :param last_tick: when the last task of all entries was sent.
    :param age: how many seconds ago that was.
    :param overdue: names of entries with a tick, or a wanted run, that nobody has sent in time.
    :param unseen: names of entries that no beat has looked at yet.
    :param entries: how many are on.
    """

    last_tick: datetime | None
    age: float | None
    overdue: tuple[str, ...]
    unseen: tuple[str, ...]
    entries: int

    @property
    def is_healthy(self) -> bool:
        """Whether all ticks are sent; not, if there are entries and no beat has seen any."""
        return not self.overdue and (not self.entries or len(self.unseen) < self.entries)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return as_json({**asdict(self), "is_healthy": self.is_healthy})


def schedule_health(source: Any, late: timedelta = timedelta(minutes=1)) -> ScheduleHealth:
    """Look whether beats send the ticks of the schedule in time.

    :param late: by how much a tick may be late.
    :raises ScheduleNotOn: if the application keeps no schedule in its database, so that nobody but
        beat itself knows; ``ws-celery beat --health-file`` is for that.
    """
    app, known, now = look(source)
    if app.schedule is None:
        raise ScheduleNotOn
    entries = [entry for entry in entries_of(app, known).values() if entry.ticks]
    seen = {name for name, each in known.items() if each.seen_at}
    last = max((each.sent_at for each in known.values() if each.sent_at), default=None)
    return ScheduleHealth(
        last_tick=last,
        age=None if last is None else max((now - last).total_seconds(), 0.0),
        overdue=tuple(entry.name for entry in entries if _is_late(entry, known, now - late)),
        unseen=tuple(entry.name for entry in entries if entry.name not in seen),
        entries=len(entries),
    )


def _is_late(entry: Entry, known: Mapping[str, Known], since: datetime) -> bool:
    """Tell whether somebody should have sent an entry before ``since``."""
    if entry.name not in known:
        return False
    last, wanted = known[entry.name].last_run_at, known[entry.name].run_requested_at
    if entry.overlap == "skip":
        wanted = None  # it waits until the last run is finished, however long that takes
    tick = last and next_tick(entry, last)
    return any(time is not None and time < since for time in (tick, wanted))
