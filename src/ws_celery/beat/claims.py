"""What is due is sent: each tick once, whoever else looks at the same entries."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from celery.beat import BeatLazyFunc

from ws_celery.beat.ticks import due_tick, is_kept, is_unfinished, unfinished_rows
from ws_celery.masking import logger_of
from ws_celery.outages import Service
from ws_celery.recording import Publication, RecordingProducer

if TYPE_CHECKING:
    from ws_celery.beat.entries import Entry, Known
    from ws_celery.beat.store import Store

__all__ = (
    "ENTRY_HEADER",
    "TICK_HEADER",
    "Claims",
    "Outcome",
    "record",
)

log = logger_of(__name__)

#: Headers that tell a task which entry it is run for, and which tick, in UTC.
ENTRY_HEADER, TICK_HEADER = "ws_celery_entry", "ws_celery_tick"


def record(app: Any, entry: Entry, tick: datetime) -> tuple[str, list[Publication]]:
    """Return the id of the task of a tick, and its messages, which the caller sends.

    :param tick: the nominal time.
    """
    publications: list[Publication] = []
    options = dict(entry.options)
    headers = {
        **(options.pop("headers", None) or {}),
        "celery_beat_task": True,  # as Celery's own beat says it
        ENTRY_HEADER: entry.name,
        TICK_HEADER: tick.isoformat(),
    }
    result = app.tasks[entry.task].apply_async(
        _evaluated(entry.args),
        _evaluated(entry.kwargs),
        producer=RecordingProducer(app.producer_pool.connections.connection, publications),
        headers=headers,
        **options,
    )
    return result.id, publications


def _evaluated(values: Any) -> Any:
    """Return arguments, with those that Celery's users let beat make at each tick."""
    if isinstance(values, Mapping):
        return {key: _value(value) for key, value in values.items()}
    return tuple(map(_value, values))


def _value(value: Any) -> Any:
    return value() if isinstance(value, BeatLazyFunc) else value


@dataclass
class _Claim:
    """One entry in the hands of this beat."""

    entry: Entry
    known: Known
    #: What is sent, if anything is.
    tick: datetime | None
    #: What is stored as the last tick.
    last: datetime | None
    task_id: str | None
    #: When that was sent.
    sent_at: datetime | None
    #: Whether somebody wants it to be run now, and its last run is not finished.
    waits: bool = False


class Outcome(NamedTuple):
    """What one transaction has done.

    :param now: the time by the database's clock.
    :param last: the last tick of each entry; those that another beat holds are missing.
    :param sent: how many tasks were sent.
    :param failed: what entries have raised that cannot tell which tick is due.
    :param wanted: entries that are to be run as soon as their last run is finished.
    """

    now: datetime
    last: dict[str, datetime | None]
    sent: int
    failed: dict[str, Exception]
    wanted: set[str]


class Claims:
    """Claims ticks and sends their tasks.

    The last tick of an entry and the row of its task in the outbox are written by one transaction.
    Without an outbox the message is sent right after it: a beat that dies in between, or a broker
    that is down then, loses it, and nothing is sent twice.

    :param app: the Celery app.
    :param store: its schedule in the database.
    """

    def __init__(self, app: Any, store: Store) -> None:
        self._app = app
        self._store = store
        self._outbox = app.outbox if app.eager is None else None
        self._broker_failed = False
        self._results = Service("Beat", "result backend")
        self._ask_results_at = 0.0

    def send(
        self, entries: Mapping[str, Entry], names: Iterable[str], ready: Mapping[str, datetime]
    ) -> Outcome:
        """Send what is due of these entries.

        :param ready: since when this beat has waited for their ticks.
        :raises Exception: if the database or, without an outbox, the broker does not answer.
        """
        self._make_sure_of_broker()
        publications: list[Publication] = []
        failed: dict[str, Exception] = {}
        with self._store.begin() as connection:
            now, known = self._store.lock(connection, names)
            # A collation that ignores case finds rows of other names, too.
            mine = {name: each for name, each in known.items() if name in entries}
            claims = list(_claimed(entries, mine, now, ready, failed))
            self._drop_overlapping(connection, claims, now)
            for claim in claims:
                publications += self._record(claim, now)
            self._store.advance(connection, [_row(claim) for claim in claims if _is_new(claim)])
            if self._outbox is not None:
                self._outbox.keep(connection, publications)
        if publications:
            self._publish(publications)
        sent = sum(claim.tick is not None for claim in claims)
        last = {claim.entry.name: claim.last for claim in claims}
        wanted = {claim.entry.name for claim in claims if claim.waits}
        return Outcome(now, last, sent, failed, wanted)

    def _drop_overlapping(self, connection: Any, claims: list[_Claim], now: datetime) -> None:
        asked = [
            claim
            for claim in claims
            if claim.tick and claim.entry.overlap == "skip" and claim.known.task_id
        ]
        kept = {
            claim.entry.name: str(claim.known.task_id)
            for claim in asked
            if is_kept(self._app, claim.entry)
        }
        waiting = unfinished_rows(self._app, connection, kept)
        for claim in asked:
            name, since = claim.entry.name, claim.known.sent_at or claim.known.last_run_at or now
            if name in waiting or (name not in kept and self._is_unfinished(claim, since, now)):
                claim.waits = claim.known.run_requested_at is not None
                level = logging.DEBUG if claim.waits else logging.INFO  # it is asked every second
                log.log(level, "%s is not sent: its last run is not finished", name)
                claim.tick = None

    def _is_unfinished(self, claim: _Claim, since: datetime, now: datetime) -> bool:
        if monotonic() < self._ask_results_at:
            return True
        try:
            unfinished = is_unfinished(self._app, str(claim.known.task_id), since, now)
        except Exception as error:  # noqa: BLE001 - whatever a backend raises
            # It is not asked for the other entries at once: each might wait until it gives up.
            self._ask_results_at = monotonic() + self._results.failed(error)
            return True
        self._results.works()
        return unfinished

    def _record(self, claim: _Claim, now: datetime) -> list[Publication]:
        if claim.tick is None:
            return []
        entry = claim.entry
        try:
            claim.task_id, publications = record(self._app, entry, claim.tick)
        except Exception:
            # The tick is over: what cannot be sent now could not be sent a moment later.
            log.exception("The entry %s cannot be sent; others can", entry.name)
            claim.tick = None
            return []
        claim.sent_at = now
        log.info("%s is sent: %s[%s]", entry.name, entry.task, claim.task_id)
        return publications

    def _publish(self, publications: list[Publication]) -> None:
        if self._outbox is not None or self._app.eager is not None:
            self._app.publish(publications)
            return
        self._broker_failed = True
        self._app.publisher.flush(publications)
        self._broker_failed = False

    def _make_sure_of_broker(self) -> None:
        # Before the next ticks are claimed: they wait for it, and are caught up as entries say.
        # A declaration is a write: a demoted Redis answers, and takes nothing.
        if self._broker_failed:
            self._app.publisher.declare_all()
            self._broker_failed = False


def _claimed(
    entries: Mapping[str, Entry],
    known: Mapping[str, Known],
    now: datetime,
    ready: Mapping[str, datetime],
    failed: dict[str, Exception],
) -> Iterator[_Claim]:
    """Yield what is due of entries; put into ``failed`` what those raise that cannot tell."""
    for name, each in known.items():
        try:
            yield _claim(entries[name], each, now, ready.get(name))
        except Exception as error:  # noqa: BLE001 - one schedule must not stop the others
            failed[name] = error


def _claim(entry: Entry, known: Known, now: datetime, ready: datetime | None) -> _Claim:
    tick, last = None, known.last_run_at
    if entry.ticks:
        tick, last = due_tick(entry, last, now, ready)
    if known.run_requested_at is not None and tick is None:
        tick = now
    return _Claim(entry, known, tick, last, known.task_id, known.sent_at)


def _is_new(claim: _Claim) -> bool:
    known = claim.known
    wanted = known.run_requested_at is not None and not claim.waits
    edited = wanted or known.seen_at is None
    return edited or claim.last != known.last_run_at


def _row(claim: _Claim) -> dict[str, Any]:
    return {
        "entry": claim.entry.name,
        "last_run_at": claim.last,
        "task_id": claim.task_id,
        "sent_at": claim.sent_at,
        "run_requested_at": claim.known.run_requested_at if claim.waits else None,
    }
