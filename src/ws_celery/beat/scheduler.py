"""Beat with a database: any number of them, none leads, and edits are seen while they run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from celery import beat

from ws_celery.beat.claims import Claims, Outcome
from ws_celery.beat.sources import entries_of, entry_of, install
from ws_celery.beat.store import Listener, Store
from ws_celery.beat.ticks import Agenda, due_tick, next_tick
from ws_celery.masking import logger_of
from ws_celery.outages import Service
from ws_celery.settings import our_setting

if TYPE_CHECKING:
    from ws_celery.beat.entries import Entry, Known

__all__ = (
    "DatabaseScheduler",
    "HealthFile",
)

log = logger_of(__name__)

#: Seconds between two times that it is written.
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
        """Take note of a tick that was sent."""
        self._last_tick = datetime.now(timezone.utc)

    def write(self, entries: int, overdue: int) -> None:
        """Tell that beat is alive.

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


#: How many entries one transaction claims.
BATCH = 1000
#: Seconds between two rounds: what is due at about the same time is claimed together. There is no
#: pause while more is due than one transaction claims.
ROUND = 0.5
#: Seconds until an entry that another beat holds is looked at again.
HELD = 0.3
#: Seconds until an entry is asked again that could not tell its next tick.
AGAIN = 60
#: Seconds until an entry that is wanted now is looked at again while its last run is unfinished.
UNFINISHED = 1.0
#: Seconds between two looks at everything: an edit by hand may not have counted its version.
EVERYTHING = 60.0
#: Seconds by which the clock may drift; more is a jump, after which everything is looked at.
JUMP = 2.0
#: Seconds after which a tick that nobody has sent is overdue.
OVERDUE = 10.0
#: Seconds that one turn waits at most, to see that the process is to end.
LONGEST = 1.0
#: Seconds by which a wait may be longer than it was to be; else the process stood still meanwhile.
STOOD_STILL = 2.0


class DatabaseScheduler(beat.Scheduler):
    """Sends what is due by the schedule in the database.

    Times are the database's: between two answers of it they are counted from the last one.

    :param app: the Celery app.

    The other parameters are those of :class:`celery.beat.Scheduler`.
    """

    def __init__(self, app: Any, **options: Any) -> None:
        self._store: Store = app.schedule
        self._claims = Claims(app, self._store)
        self._listener = Listener(self._store)
        self._agenda = Agenda()
        self._entries: dict[str, Entry] = {}
        self._known: dict[str, Known] = {}
        self._ready: dict[str, datetime] = {}
        self._revision: Any = None
        self._ahead: float | None = None
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

    def tick(self, *_: Any, **__: Any) -> float:
        """Send what is due, and wait until something is; no error ends it."""
        try:
            wait = self._turn()
            self._service.works()
            self._health.write(len(self._agenda), self._agenda.overdue(self._time() - OVERDUE))
        except Exception as error:  # noqa: BLE001  whatever the database or the broker raises
            self._begin_anew()
            wait = self._service.failed(error)
        asleep = monotonic()
        if self._listener.wait(min(max(wait, 0.0), LONGEST, self.max_interval)):
            self._look_at = 0.0
        if monotonic() - asleep > LONGEST + STOOD_STILL:
            self._begin_anew()
        return 0.0

    def _begin_anew(self) -> None:
        # The time is not known any more, and it was not there for what was due meanwhile.
        self._revision = self._ahead = None
        self._look_at = 0.0

    def should_sync(self) -> bool:
        """Nothing is kept in this process."""
        return False

    def close(self) -> None:
        """Let go of the connections."""
        self._listener.close()
        self.app.publisher.close()
        super().close()

    def _turn(self) -> float:
        """Return how many seconds to wait."""
        if monotonic() >= self._look_at:
            self._look()
        if monotonic() >= self._round_at:
            self._send()
        due = self._agenda.next()
        until_due = LONGEST if due is None else due - self._time()
        return min(max(until_due, self._round_at - monotonic()), self._look_at - monotonic())

    def _time(self) -> float:
        return monotonic() + (self._ahead or 0.0)

    def _set_clock(self, now: datetime) -> bool:
        """Take over the database's time; return whether it has jumped."""
        ahead, before = now.timestamp() - monotonic(), self._ahead
        self._ahead = ahead
        return before is None or abs(ahead - before) > JUMP

    # What was edited

    def _look(self) -> None:
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

    def _reload(self, connection: Any, now: datetime, *, everything: bool) -> None:
        known = self._store.load(connection)
        if not self._entries:
            self._entries = entries_of(self.app, known)
            changed: Iterable[str] = list(self._entries)
            self._tell_problems()
        else:
            changed = self._take_over(known)
        self._known = known
        origins = {name: entry.origin for name, entry in self._entries.items()}
        new = {name: origin for name, origin in origins.items() if name not in known}
        self._store.register(connection, new)
        for name in self._entries if everything else changed:
            self._plan(name, now)

    def _take_over(self, known: dict[str, Known]) -> list[str]:
        """Merge anew what was edited; return the names."""
        names = {*known, *self._known}
        changed = [name for name in names if _edit(known.get(name)) != _edit(self._known.get(name))]
        for name in changed:
            before, entry = self._entries.get(name), entry_of(self.app, name, known.get(name))
            if entry is None:
                self._entries.pop(name, None)
                self._ready.pop(name, None)
                self._agenda.drop(name)
                log.info("The entry %s was removed", name)
            else:
                self._entries[name] = entry
                self._tell_change(before, entry, known.get(name))
        return [name for name in changed if name in self._entries]

    def _tell_problems(self) -> None:
        for entry in self._entries.values():
            if entry.problem and entry.enabled:
                self._tell(entry)

    def _tell_change(self, before: Entry | None, entry: Entry, known: Known | None) -> None:
        if entry != before:
            self._tell(entry, "added" if before is None else "edited")
        elif known and known.run_requested_at:
            log.info("The entry %s is to be sent now, whatever its schedule says", entry.name)

    def _tell(self, entry: Entry, what: str = "edited") -> None:
        if entry.problem:
            log.error("The entry %s is set aside: %s", entry.name, entry.problem)
        else:
            state = "ticks" if entry.ticks else "is orphaned" if entry.orphaned else "is off"
            log.info("The entry %s was %s: %s, %s", entry.name, what, entry.words, state)

    def _plan(self, name: str, now: datetime) -> None:
        """Put an entry on the agenda, where it belongs there; wait for its ticks from now on."""
        self._ready[name] = now
        try:
            self._put(name, now)
        except Exception as error:  # noqa: BLE001 - one schedule must not stop the others
            self._put_off(name, error)

    def _put(self, name: str, now: datetime) -> None:
        entry, known = self._entries[name], self._known.get(name)
        if known and known.run_requested_at and entry.problem is None and not entry.orphaned:
            self._agenda.put(name, now.timestamp())
            return
        if not entry.ticks:
            self._agenda.drop(name)
            return
        last = known.last_run_at if known else None
        tick, kept = due_tick(entry, last, now)
        unseen = known is None or known.seen_at is None
        if tick is not None or kept != last or unseen:
            self._agenda.put(name, now.timestamp())
        else:
            self._put_next(entry, kept)

    def _put_off(self, name: str, error: Exception) -> None:
        log.error(
            "The entry %s cannot tell its next tick, and is asked again in %d s; others can: %r",
            name,
            AGAIN,
            error,
        )
        self._agenda.put(name, self._time() + AGAIN)

    def _put_next(self, entry: Entry, last: datetime | None) -> None:
        tick = next_tick(entry, last) if entry.ticks and last is not None else None
        if tick is None:
            self._agenda.drop(entry.name)
        else:
            self._agenda.put(entry.name, tick.timestamp())

    # What is due

    def _send(self) -> None:
        names = self._agenda.take(self._time(), BATCH)
        if not names:
            return
        if len(names) < BATCH:
            self._round_at = monotonic() + ROUND
        outcome = self._claims.send(self._entries, names, self._ready)
        for name in names:
            self._plan_after(name, outcome)
        if outcome.sent:
            self._health.ticked()

    def _plan_after(self, name: str, outcome: Outcome) -> None:
        if name in outcome.failed:
            self._put_off(name, outcome.failed[name])
        elif name not in outcome.last:
            self._agenda.put(name, self._time() + HELD)
        elif name in outcome.wanted:
            self._agenda.put(name, self._time() + UNFINISHED)
        else:
            try:
                self._put_next(self._entries[name], outcome.last[name])
            except Exception as error:  # noqa: BLE001 - likewise
                self._put_off(name, error)


def _edit(known: Known | None) -> Any:
    return known and (known.fields, known.problem, known.origin, known.run_requested_at)
