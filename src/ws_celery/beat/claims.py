"""Claiming ticks: what is due is sent, each tick once, whoever else looks at the same entries."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any

from celery import states
from celery.backends.base import DisabledBackend
from celery.beat import BeatLazyFunc

from ws_celery.beat.ticks import due_tick
from ws_celery.events import SKIPPED
from ws_celery.masking import logger_of
from ws_celery.outages import Service
from ws_celery.recording import Publication, RecordingProducer

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from ws_celery.app import PyramidCelery
    from ws_celery.beat.entries import Entry, Known
    from ws_celery.beat.store import Store

__all__ = (
    "ENTRY_HEADER",
    "TICK_HEADER",
    "Claim",
    "Claims",
    "is_unfinished",
    "why_end_is_unknown",
)

log = logger_of(__name__)

#: Headers that tell a task which entry it is run for, and which tick, in UTC.
ENTRY_HEADER, TICK_HEADER = "ws_celery_entry", "ws_celery_tick"


@dataclass
class Claim:
    """One entry that this beat has locked, and what is to become of it.

    :param entry: the entry.
    :param known: what the database knows of it.
    :param last: what is stored as the last tick.
    :param task_id: the id of the task that was sent last.
    :param sent_at: when that was.
    :param tick: what is sent, if anything is.
    :param waits: whether it was requested to run now, and its last run is not finished.
    :param error: what its schedule has raised.
    """

    entry: Entry
    known: Known
    last: datetime | None
    task_id: str | None
    sent_at: datetime | None
    tick: datetime | None = None
    waits: bool = False
    error: Exception | None = None

    @property
    def is_new(self) -> bool:
        """Whether it has to be stored."""
        if self.error is not None:
            return False
        requested = self.known.run_requested_at is not None and not self.waits
        return requested or self.known.seen_at is None or self.last != self.known.last_run_at

    @property
    def row(self) -> dict[str, Any]:
        """What is stored, as :meth:`Store.advance` takes it."""
        return {
            "entry": self.entry.name,
            "last_run_at": self.last,
            "task_id": self.task_id,
            "sent_at": self.sent_at,
            "run_requested_at": self.known.run_requested_at if self.waits else None,
        }


def _claim(entry: Entry, known: Known, now: datetime, ready: datetime | None) -> Claim:
    claim = Claim(entry, known, known.last_run_at, known.task_id, known.sent_at)
    try:
        if entry.ticks:
            claim.tick, claim.last = due_tick(entry, claim.last, now, ready)
    except Exception as error:  # noqa: BLE001 - one schedule must not stop the others
        claim.error = error
    else:
        if known.run_requested_at is not None and claim.tick is None:
            claim.tick = now
    return claim


class Claims:
    """Claims ticks and sends their tasks.

    The last tick of an entry and the row of its task in the outbox are written by one transaction.
    Without an outbox the message is sent right after it: a beat that dies in between, or a broker
    that is down then, loses it, and nothing is sent twice.

    :param app: the Celery app.
    :param store: its schedule in the database.
    """

    def __init__(self, app: PyramidCelery, store: Store) -> None:
        self._app = app
        self._store = store
        self._outbox = app.outbox if app.eager is None else None
        self._broker_failed = False
        self._results = Service("Beat", "result backend")
        self._ask_results_at = 0.0

    def send(
        self, entries: Mapping[str, Entry], names: Iterable[str], ready: Mapping[str, datetime]
    ) -> dict[str, Claim]:
        """Send what is due of these entries.

        :param ready: since when this beat has waited for their ticks.
        :return: what was claimed, by name; entries that another beat has locked are missing.
        :raises Exception: if the database or, without an outbox, the broker does not answer.
        """
        self._check_broker()
        publications: list[Publication] = []
        with self._store.begin() as connection:
            now, known = self._store.lock(connection, names)
            claims = [
                _claim(entries[name], each, now, ready.get(name))
                for name, each in known.items()
                if name in entries  # a collation that ignores case finds rows of other names, too
            ]
            self._drop_overlapping(connection, claims, now)
            for claim in claims:
                publications += self._record(claim, now)
            self._store.advance(connection, [claim.row for claim in claims if claim.is_new])
            if self._outbox is not None:
                self._outbox.keep(connection, publications)
        self._publish(publications)
        return {claim.entry.name: claim for claim in claims}

    def _check_broker(self) -> None:
        # Before the next ticks are claimed: they wait for it, and are caught up as entries say.
        # A declaration is a write: a demoted Redis answers, and takes nothing.
        if self._broker_failed:
            self._app.publisher.declare_all()
            self._broker_failed = False

    def _drop_overlapping(
        self, connection: Connection, claims: Iterable[Claim], now: datetime
    ) -> None:
        """Take back the ticks of entries that are not to overlap, and whose last run goes on."""
        asked = [
            claim
            for claim in claims
            if claim.tick and claim.entry.overlap == "skip" and claim.task_id
        ]
        with_row = {claim.task_id for claim in asked if _has_row(self._app, claim.entry)}
        waiting = self._app.outbox.rows.waiting(connection, with_row) if with_row else ()
        for claim in asked:
            if claim.task_id in with_row:
                unfinished = claim.task_id in waiting
            else:
                unfinished = self._is_unfinished(claim, now)
            if unfinished:
                claim.waits = claim.known.run_requested_at is not None
                level = logging.DEBUG if claim.waits else logging.INFO  # that is every second
                log.log(level, "%s is not sent: its last run is not finished", claim.entry.name)
                claim.tick = None

    def _is_unfinished(self, claim: Claim, now: datetime) -> bool:
        if monotonic() < self._ask_results_at:
            return True
        since = claim.known.sent_at or claim.known.last_run_at or now
        try:
            unfinished = is_unfinished(self._app, str(claim.task_id), since, now)
        except Exception as error:  # noqa: BLE001 - whatever a backend raises
            # It is not asked for the other entries at once: each might wait until it gives up.
            self._ask_results_at = monotonic() + self._results.failed(error)
            return True
        self._results.works()
        return unfinished

    def _record(self, claim: Claim, now: datetime) -> list[Publication]:
        if claim.tick is None:
            return []
        entry = claim.entry
        try:
            claim.task_id, publications = _recorded(self._app, entry, claim.tick)
        except Exception:
            # The tick is over: what cannot be sent now could not be sent a moment later.
            log.exception("The entry %s cannot be sent; others can", entry.name)
            claim.tick = None
            return []
        claim.sent_at = now
        log.info("%s is sent: %s[%s]", entry.name, entry.task, claim.task_id)
        return publications

    def _publish(self, publications: list[Publication]) -> None:
        if not publications:
            return
        if self._outbox is not None or self._app.eager is not None:
            self._app.publish(publications)
            return
        self._broker_failed = True
        self._app.publisher.flush(publications)
        self._broker_failed = False


def _recorded(app: PyramidCelery, entry: Entry, tick: datetime) -> tuple[str, list[Publication]]:
    """Return the id of the task of a tick, and its messages, which the caller sends."""
    publications: list[Publication] = []
    options = dict(entry.options)
    headers = {
        **(options.pop("headers", None) or {}),
        "celery_beat_task": True,  # as Celery's own beat says it
        ENTRY_HEADER: entry.name,
        TICK_HEADER: tick.isoformat(),
    }
    result = app.tasks[entry.task].apply_async(
        tuple(map(_evaluated, entry.args)),
        {key: _evaluated(value) for key, value in entry.kwargs.items()},
        producer=RecordingProducer(app.producer_pool.connections.connection, publications),
        headers=headers,
        **options,
    )
    return result.id, publications


def _evaluated(value: object) -> object:
    """Return an argument; one of those that Celery's users let beat make at each tick, made."""
    return value() if isinstance(value, BeatLazyFunc) else value


# --- Whether the last run has ended -------------------------------------------------------------

#: Celery's own ends, and that of a run that another one has kept from running.
_ENDED = states.READY_STATES | {SKIPPED}


def why_end_is_unknown(app: PyramidCelery, entry: Entry) -> str | None:
    """Return why it cannot be known when the task of an entry has ended; ``None`` if it can.

    :param entry: its task is one of the application's.
    """
    if app.eager is not None or _has_row(app, entry):
        return None
    if isinstance(app.backend, DisabledBackend):
        return "the application has no result_backend"
    if entry.options.get("ignore_result", app.tasks[entry.task].ignore_result):
        return f"the results of {entry.task} are ignored"
    return None


def _has_row(app: PyramidCelery, entry: Entry) -> bool:
    """Tell whether the task of an entry has a row in the outbox until it has ended."""
    if app.outbox is None or app.eager is not None:
        return False
    return bool(getattr(app.tasks.get(entry.task), "outbox", True))


def is_unfinished(app: PyramidCelery, task_id: str, since: datetime, now: datetime) -> bool:
    """Tell by its result whether a task waits, or runs.

    A result that has not come within ``result_expires`` is not waited for any longer: the task was
    lost.

    :param since: when it was sent.
    """
    longest = app.conf.result_expires or timedelta(days=1)
    if not isinstance(longest, timedelta):
        longest = timedelta(seconds=longest)
    if now - since > longest:
        return False
    return app.AsyncResult(task_id).state not in _ENDED
