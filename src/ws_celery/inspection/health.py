"""Whether what an application needs is alive; asked for by probes, so that no answer takes long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ws_celery.app import PyramidCelery, get_celery_app
from ws_celery.beat.sources import entries_of
from ws_celery.beat.ticks import next_tick
from ws_celery.exceptions import ConfigurationError, NotIncluded, WsCeleryError
from ws_celery.inspection.messages import Record, Source
from ws_celery.inspection.schedule import look
from ws_celery.masking import masked_text
from ws_celery.request import task_request

if TYPE_CHECKING:
    from ws_celery.beat.entries import Entry, Known

__all__ = (
    "HealthOfPart",
    "ScheduleHealth",
    "health",
    "schedule_health",
)


@dataclass(frozen=True)
class ScheduleHealth(Record):
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
        return {**super().as_dict(), "is_healthy": self.is_healthy}


def schedule_health(source: Source, late: timedelta = timedelta(minutes=1)) -> ScheduleHealth:
    """Look whether beats send the ticks of the schedule in time.

    :param late: by how much a tick may be late.
    :raises NotIncluded: if the application keeps no schedule in its database, so that nobody but
        beat itself knows; ``ws-celery beat --health-file`` is for that.
    """
    app, known, now = look(source)
    if app.schedule is None:
        raise NotIncluded("schedule")
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


@dataclass(frozen=True)
class HealthOfPart(Record):
    """Whether one part is alive.

    :param name: ``broker``, ``worker``, ``database``, ``relay`` or ``beat``.
    :param healthy: whether it is.
    :param detail: what was seen, or what is wrong; secrets are masked.
    :param seconds: how long the answer took.
    """

    name: str
    healthy: bool
    detail: str
    seconds: float


class _NotHealthy(WsCeleryError):
    """Why a part is not; its text is the detail."""


def health(  # noqa: PLR0913 - a probe says all of it in one line
    source: Source,
    *,
    parts: Sequence[str] = (),
    workers: Sequence[str] = (),
    relay_file: Path | None = None,
    beat_file: Path | None = None,
    max_age: float = 60.0,
    timeout: float = 2.0,
) -> list[HealthOfPart]:
    """Ask all parts at the same time; who has not answered in time is not healthy.

    The broker is connected to, any worker is sent a ping, the database is connected to. A relay is
    alive if it has touched its health file lately; without a file, if nothing in the outbox is due
    for long. A beat is asked for only where its file is named.

    :param source: a registry, or what has one.
    :param parts: the names of those to ask; all that the application has, if empty.
    :param workers: node names of those that have to answer; any one, if empty.
    :param relay_file: the health file of the relay.
    :param beat_file: the health file of beat.
    :param max_age: seconds that a file may be old, or a row of the outbox overdue.
    :param timeout: seconds that all may take together.
    :raises ConfigurationError: if one of ``parts`` is nothing that can be asked.
    """
    app = get_celery_app(source)
    probes: dict[str, Callable[[], str]] = {
        "broker": partial(_broker, app),
        "worker": partial(_worker, app, workers, timeout),
        "database": partial(_database, app),
    }
    if relay_file is not None:
        probes["relay"] = partial(_file, relay_file, max_age)
    elif app.outbox is not None:
        probes["relay"] = partial(_outbox, app, max_age)
    if beat_file is not None:
        probes["beat"] = partial(_file, beat_file, max_age)
    for part in parts:
        if part not in probes:
            raise _nothing_to_probe(part, probes)
    asked = [_Answer(name, probes[name]) for name in probes if not parts or name in parts]
    deadline = time.monotonic() + timeout
    return [answer.by(deadline, timeout) for answer in asked]


def _nothing_to_probe(part: str, parts: Iterable[str]) -> ConfigurationError:
    remedies = {
        "relay": " Without an outbox it needs the health file of a relay (--relay-file).",
        "beat": " It needs the health file of beat (--beat-file).",
    }
    return ConfigurationError(
        f"The part {part} cannot be asked whether it is healthy; those of this application: "
        f"{', '.join(parts)}.{remedies.get(part, '')} Name one of these, or leave it out."
    )


class _Answer:
    """What a probe finds out, in a thread that is waited for until a deadline only."""

    def __init__(self, name: str, probe: Callable[[], str]) -> None:
        self._name, self._probe = name, probe
        self._begun = time.monotonic()
        self._found: HealthOfPart | None = None
        self._thread = threading.Thread(target=self._ask, name=f"health of {name}", daemon=True)
        self._thread.start()

    def by(self, deadline: float, timeout: float) -> HealthOfPart:
        self._thread.join(max(deadline - time.monotonic(), 0))
        late = f"no answer within {timeout:g} seconds"
        return self._found or self._health(late, healthy=False)

    def _ask(self) -> None:
        try:
            self._found = self._health(self._probe(), healthy=True)
        except Exception as error:  # noqa: BLE001  each service has errors of its own
            self._found = self._health(_described(error), healthy=False)

    def _health(self, detail: str, *, healthy: bool) -> HealthOfPart:
        seconds = round(time.monotonic() - self._begun, 3)
        return HealthOfPart(self._name, healthy, masked_text(detail), seconds)


def _described(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, WsCeleryError) else f"{type(error).__name__}: {text}"


def _broker(app: PyramidCelery) -> str:
    app.publisher.declare_all()  # a write: a demoted Redis answers, and takes nothing
    connection = app.publisher.connect()
    try:
        uri: str = connection.as_uri()
        return uri
    finally:
        connection.collect()


def _worker(app: PyramidCelery, names: Sequence[str], timeout: float) -> str:
    wanted = {"destination": list(names)} if names else {"limit": 1}
    replies: list[dict[str, Any]] = app.control.ping(timeout=timeout, **wanted)
    answered = [name for reply in replies for name in reply]
    missing = sorted(set(names) - set(answered))
    if missing or not answered:
        raise _NotHealthy(f"no answer from {', '.join(missing) or 'any worker'}")
    return ", ".join(answered)


def _database(app: PyramidCelery) -> str:
    if app.outbox is not None:
        with app.outbox.begin() as connection:
            app.outbox.rows.now(connection)
        return str(app.outbox.engine.url)
    with task_request(app.registry, app.propagation, {}) as request:
        session = getattr(request, app.session_attribute, None)
        if session is None:
            return "none"
        engine = session.get_bind().engine
        engine.connect().close()  # not the session's: it would join a transaction
        return str(engine.url)


def _outbox(app: PyramidCelery, max_age: float) -> str:
    with app.outbox.begin() as connection:
        overdue: float = app.outbox.rows.seconds_overdue(connection)
    if overdue > max_age:
        raise _NotHealthy(f"nothing sends what is due in the outbox for {overdue:.0f} seconds")
    return "nothing in the outbox is overdue"


def _file(path: Path, max_age: float) -> str:
    try:
        age = time.time() - path.stat().st_mtime
    except OSError as error:
        raise _NotHealthy(f"{path}: {error.strerror}") from error
    detail = f"{path} was touched {max(age, 0):.0f} seconds ago"
    if age > max_age:
        raise _NotHealthy(detail)
    return detail
