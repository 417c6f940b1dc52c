"""The schedulers of beat, and the health file that they write for probes.

With the schedule in the database any number of beats may run, none leads, and edits are seen while
they run. Without it, beat is Celery's own persistent scheduler.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from celery import beat

from ws_celery.beat.claims import Claim, Claims
from ws_celery.beat.sources import check_sources, entries_of, entry_of, install
from ws_celery.beat.ticks import due_tick, next_tick
from ws_celery.masking import logger_of
from ws_celery.outages import Service
from ws_celery.settings import our_setting

if TYPE_CHECKING:
    from celery.result import AsyncResult
    from sqlalchemy import Connection

    from ws_celery.app import PyramidCelery
    from ws_celery.beat.entries import Entry, Known
    from ws_celery.beat.store import Store

__all__ = (
    "DatabaseScheduler",
    "FileScheduler",
    "HealthFile",
)

log = logger_of(__name__)

#: How many entries one transaction claims.
BATCH = 1000
#: Seconds between two rounds: what is due at about the same time is claimed together. There is no
#: pause while more is due than one transaction claims.
ROUND = 0.5
#: Seconds until an entry that another beat has locked is looked at again.
LOCKED = 0.3
#: Seconds until an entry whose schedule has raised an error is looked at again.
BROKEN = 60
#: Seconds until a requested run is looked at again while the last run is unfinished.
UNFINISHED = 1.0
#: Seconds between two looks at everything: an edit by hand may not have counted its version.
EVERYTHING = 60.0
#: Seconds by which the clock may drift; more is a jump, after which everything is looked at.
JUMP = 2.0
#: Seconds after which a tick that nobody has sent is overdue.
OVERDUE = 10.0
#: Seconds that one turn waits at most, to see that the process is to end; without the database
#: where a probe looks at the health file.
LONGEST = 1.0
#: Seconds by which a wait may be longer than it was to be; else the process stood still meanwhile.
STOOD_STILL = 2.0


class DatabaseScheduler(beat.Scheduler):
    """Sends what is due by the schedule in the database.

    Times are the database's: between two answers of it they are counted from the last one.

    :param app: the Celery app.

    The other parameters are those of :class:`celery.beat.Scheduler`.
    """

    def __init__(self, app: PyramidCelery, **options: Any) -> None:
        self._store: Store = app.schedule
        self._claims = Claims(app, self._store)
        self._listener = self._store.listener()
        self._agenda = Agenda()
        self._entries: dict[str, Entry] = {}
        self._known: dict[str, Known] = {}
        #: Since when this beat waits for the ticks of an entry.
        self._ready: dict[str, datetime] = {}
        #: The store's revision when its edits were last read; None: all are to be read.
        self._revision: object = None
        #: By how much the database's clock is ahead of this process's; None if it is not known.
        self._ahead: float | None = None
        #: By this process's clock: the next look at edits, and at everything, and the next round.
        self._look_at = self._everything_at = self._round_at = 0.0
        self._service = Service("Beat", "database or broker")
        self._health = HealthFile(app.beat_health_file)
        super().__init__(app, **options)
        poll = our_setting(app.registry.settings, "ws_celery.beat.poll", 2.0)
        self._poll = min(poll, self.max_interval)

    def setup_schedule(self) -> None:
        """Collect what code declares; the database is asked at the first tick."""
        install(self.app)

    @property
    def info(self) -> str:
        """What beat prints as it starts."""
        return f"    . schedule -> table {self._store.table.fullname}"

    def should_sync(self) -> bool:
        """Nothing is kept in this process."""
        return False

    def close(self) -> None:
        """Close the connections."""
        self._listener.close()
        self.app.publisher.close()
        super().close()

    def tick(self, *_: object, **__: object) -> float:
        """Read what was edited, send what is due, and wait until something is; no error ends it."""
        try:
            if monotonic() >= self._look_at:
                self._read_changes()
            if monotonic() >= self._round_at:
                self._send_due()
            wait = self._until_next()
            self._health.heartbeat(len(self._agenda), self._agenda.overdue(self._time() - OVERDUE))
            self._service.works()
        except Exception as error:  # noqa: BLE001  whatever the database or the broker raises
            self._start_over()
            wait = self._service.failed(error)
        asleep = monotonic()
        if self._listener.wait(min(max(wait, 0.0), LONGEST, self.max_interval)):
            self._look_at = 0.0
        if monotonic() - asleep > LONGEST + STOOD_STILL:
            self._start_over()
        return 0.0

    def _start_over(self) -> None:
        # The time is unknown, and what was due meanwhile was missed: all entries are planned again.
        self._revision = self._ahead = None
        self._look_at = 0.0

    def _until_next(self) -> float:
        """Return how many seconds to wait."""
        due = self._agenda.next()
        until_due = LONGEST if due is None else due - self._time()
        return min(max(until_due, self._round_at - monotonic()), self._look_at - monotonic())

    def _time(self) -> float:
        return monotonic() + (self._ahead or 0.0)

    # What was edited

    def _read_changes(self) -> None:
        """See which edits there are, and what the time is."""
        self._listener.open()
        with self._store.begin() as connection:
            revision, now = self._store.revision(connection)
            jumped = self._set_clock(now)
            if jumped or revision != self._revision or monotonic() >= self._everything_at:
                self._reload(connection, now, everything=jumped)
                # What was asked before: an edit that has come since is seen at the next look.
                self._revision = revision
                self._everything_at = monotonic() + EVERYTHING
        self._look_at = monotonic() + self._poll

    def _set_clock(self, now: datetime) -> bool:
        """Take over the database's time; return whether it has jumped."""
        ahead, before = now.timestamp() - monotonic(), self._ahead
        self._ahead = ahead
        return before is None or abs(ahead - before) > JUMP

    def _reload(self, connection: Connection, now: datetime, *, everything: bool) -> None:
        known = self._store.load(connection)
        if self._entries:
            changed = self._merge_edited(known)
        else:
            self._entries = entries_of(self.app, known)
            changed = list(self._entries)
            for entry in self._entries.values():
                if entry.problem and entry.enabled:
                    _log_entry(entry)
        self._known = known
        origins = {name: entry.origin for name, entry in self._entries.items()}
        new = {name: origin for name, origin in origins.items() if name not in known}
        self._store.register(connection, new)
        for name in self._entries if everything else changed:
            self._ready[name] = now  # it waits for ticks from now on
            self._plan(name, partial(self._first_look, name, now))

    def _merge_edited(self, known: dict[str, Known]) -> list[str]:
        """Merge those entries again that were edited; return their names."""
        names = {*known, *self._known}
        changed = [name for name in names if _edit(known.get(name)) != _edit(self._known.get(name))]
        for name in changed:
            before, entry = self._entries.get(name), entry_of(self.app, name, known.get(name))
            if entry is None:
                self._entries.pop(name, None)
                self._ready.pop(name, None)
                self._agenda.put(name, None)
                log.info("The entry %s was removed", name)
            else:
                self._entries[name] = entry
                _log_change(before, entry, known.get(name))
        return [name for name in changed if name in self._entries]

    def _first_look(self, name: str, now: datetime) -> datetime | None:
        """Return when to look at an entry that is new, or was edited."""
        entry, known = self._entries[name], self._known.get(name)
        if known and known.run_requested_at and entry.problem is None and not entry.orphaned:
            return now
        if not entry.ticks:
            return None
        last = known.last_run_at if known else None
        tick, kept = due_tick(entry, last, now)
        unseen = known is None or known.seen_at is None
        return now if tick is not None or kept != last or unseen else next_tick(entry, kept)

    def _plan(self, name: str, next_look: Callable[[], datetime | None]) -> None:
        """Put an entry on the agenda for the time that ``next_look`` returns."""
        try:
            time = next_look()
        except Exception as error:  # noqa: BLE001 - one schedule must not stop the others
            self._postpone(name, error)
        else:
            self._agenda.put(name, None if time is None else time.timestamp())

    def _postpone(self, name: str, error: Exception) -> None:
        log.error(
            "The entry %s cannot tell its next tick, and is asked again in %d s; others can: %r",
            name,
            BROKEN,
            error,
        )
        self._agenda.put(name, self._time() + BROKEN)

    # What is due

    def _send_due(self) -> None:
        names = self._agenda.take(self._time(), BATCH)
        if not names:
            return
        if len(names) < BATCH:
            self._round_at = monotonic() + ROUND
        claims = self._claims.send(self._entries, names, self._ready)
        for name in names:
            self._plan_after(name, claims.get(name))
        if any(claim.tick for claim in claims.values()):
            self._health.ticked()

    def _plan_after(self, name: str, claim: Claim | None) -> None:
        if claim is None:
            self._agenda.put(name, self._time() + LOCKED)
        elif claim.error is not None:
            self._postpone(name, claim.error)
        elif claim.waits:
            self._agenda.put(name, self._time() + UNFINISHED)
        else:
            self._plan(name, partial(_following, claim.entry, claim.last))


def _following(entry: Entry, last: datetime | None) -> datetime | None:
    return next_tick(entry, last) if entry.ticks and last is not None else None


def _edit(known: Known | None) -> object:
    return known and (known.fields, known.problem, known.origin, known.run_requested_at)


def _log_change(before: Entry | None, entry: Entry, known: Known | None) -> None:
    if entry != before:
        _log_entry(entry, "added" if before is None else "edited")
    elif known and known.run_requested_at:
        log.info("The entry %s is to be sent now, whatever its schedule says", entry.name)


def _log_entry(entry: Entry, change: str = "edited") -> None:
    if entry.problem:
        log.error("The entry %s is set aside: %s", entry.name, entry.problem)
    else:
        state = "ticks" if entry.ticks else "is orphaned" if entry.orphaned else "is off"
        log.info("The entry %s was %s: %s, %s", entry.name, change, entry.words, state)


class Agenda:
    """When to look at which entry; each name has one time at most.

    Times are seconds since the epoch, by the clock that all beats share.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []
        self._times: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._times)

    def put(self, name: str, time: float | None) -> None:
        """Look at an entry at this time only; at none if it is ``None``."""
        if time is None:
            self._times.pop(name, None)
        else:
            self._times[name] = time
            heapq.heappush(self._heap, (time, name))

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


class FileScheduler(beat.PersistentScheduler):
    """Celery's persistent scheduler as it is, where the schedule is not in the database.

    It gets the entries of code and INI, and writes the health file.

    :param app: the Celery app.

    The other parameters are those of :class:`celery.beat.PersistentScheduler`.
    """

    def __init__(self, app: PyramidCelery, **options: Any) -> None:
        self._health = HealthFile(app.beat_health_file)
        super().__init__(app, **options)

    def setup_schedule(self) -> None:
        """Let Celery have what code and INI say.

        :raises ConfigurationError: if it would not obey.
        """
        check_sources(self.app)
        install(self.app)
        log.info("The last runs are kept in the file %s", Path(self.schedule_filename).absolute())
        super().setup_schedule()

    def install_default_entries(self, data: object) -> None:
        """Add nothing: what Celery would add is an entry of code, which can be switched off."""

    def tick(self, *args: Any, **options: Any) -> float:
        """Send what is due; returns how many seconds to wait."""
        seconds: float = super().tick(*args, **options)
        self._health.heartbeat(len(self.schedule), 0)
        return seconds if self.app.beat_health_file is None else min(seconds, LONGEST)

    def apply_async(self, *args: Any, **options: Any) -> AsyncResult:
        """Send the task of an entry."""
        result = super().apply_async(*args, **options)
        self._health.ticked()
        return result


#: Seconds between two times that the health file is written.
_EVERY = 1.0


class HealthFile:
    """Written after each turn in which what beat needs has answered, at most once a second.

    A probe looks at its age; what it holds is for people.

    :param path: the file; none is written without.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._service = Service("Beat", "health file")
        self._written = datetime.min.replace(tzinfo=timezone.utc)
        self._last_tick: datetime | None = None

    def ticked(self) -> None:
        """Remember that a tick was sent now."""
        self._last_tick = datetime.now(timezone.utc)

    def heartbeat(self, entries: int, overdue: int) -> None:
        """Write that beat is alive, unless that was written a moment ago.

        :param entries: how many entries tick.
        :param overdue: how many of them should have been sent already.
        """
        now = datetime.now(timezone.utc)
        if self._path is None or abs((now - self._written).total_seconds()) < _EVERY:
            return
        self._written = now
        age = self._last_tick and round((now - self._last_tick).total_seconds(), 3)
        text = json.dumps(
            {"at": now.isoformat(), "last_tick_age": age, "entries": entries, "overdue": overdue}
        )
        try:
            beside = self._path.with_name(f".{self._path.name}.new")
            beside.write_text(text + "\n")
            beside.replace(self._path)  # whole, whenever it is read
        except OSError as error:
            self._service.failed(error)
        else:
            self._service.works()
