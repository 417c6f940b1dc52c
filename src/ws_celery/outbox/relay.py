"""The relay: the loop that publishes what is due in the outbox; a thread of beat, or alone.

What is due was not published (the broker was down, the process died between commit and publish),
waits for its eta, or has not taken effect within its lease. Each batch is claimed in one short
transaction, which counts the delivery and doubles the lease, and published after it. If the relay
dies in between, the lease brings the rows again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from random import uniform
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from celery import signals
from pyramid.config import PHASE3_CONFIG

from ws_celery.app import get_celery_app
from ws_celery.events import listen
from ws_celery.exceptions import BrokenRow, BrokerUnavailable
from ws_celery.masking import logger_of
from ws_celery.outages import BACKOFF, Service
from ws_celery.outbox.canary import Canary
from ws_celery.outbox.rows import UNREADABLE
from ws_celery.outbox.tables import aware
from ws_celery.settings import our_setting

if TYPE_CHECKING:
    from ws_celery.outbox.store import Outbox
    from ws_celery.recording import Publication

__all__ = (
    "BATCH",
    "Batch",
    "Deliveries",
    "Relay",
    "includeme",
)

log = logger_of(__name__)


class Batch(NamedTuple):
    """What one transaction has taken.

    :param publications: what is to be published.
    :param taken: how many rows were due: none if all are in the hands of somebody else.
    """

    publications: list[Publication]
    taken: int


class Deliveries:
    """The relay's transactions: each is short, and none is open while the broker is talked to.

    :param outbox: the outbox.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._rows = outbox.rows

    def take(self, limit: int, length: Callable[[str], int]) -> Batch:
        """Take messages that are due; their delivery is counted, and their lease doubled, before.

        What cannot be sent ends here: a row that is broken or that nobody can read, and one that
        was sent too often, become dead letters, an expired one is deleted. What was sent before and
        still waits in its queue is left for another lease, uncounted; what has a far eta still,
        after a jump of the database's clock, until shortly before it.

        :param limit: how many at most.
        :param length: returns how many messages wait in a queue.
        :raises BrokerUnavailable: if the broker does not tell; nothing is counted then.
        """
        try:
            return self._take(limit, length)
        except UNREADABLE:
            if not self._bury_unreadable(limit):
                raise
            return Batch([], limit)

    def _take(self, limit: int, length: Callable[[str], int]) -> Batch:
        with self._outbox.begin() as connection:
            rows = self._rows.take_due(connection, limit)
            self._outbox.look(connection)
            early = self._early(rows)
            publications, endings = self._sorted([row for row in rows if row.id not in early])
            self._rows.put_off(connection, early)
            self._end(connection, endings)
        ids = {publication.row_id for publication in publications}
        try:
            waiting = self._waiting([row for row in rows if row.id in ids], length)
        except BrokerUnavailable:
            self.give_back(ids)
            raise
        if waiting:
            self.give_back(waiting, now=False)
        left = [each for each in publications if each.row_id not in waiting]
        return Batch(left, len(rows))

    def give_back(self, ids: Iterable[Any], *, now: bool = True) -> None:
        """Undo the count of messages that were not sent; they are due now, or after their lease."""
        with self._outbox.begin() as connection:
            self._rows.give_back(connection, ids, now=now)

    def all_due(self) -> int:
        """Make all that is unfinished due now, but for far etas; return how many that are."""
        with self._outbox.begin() as connection:
            return self._rows.hasten_all(connection, self._outbox.lease)

    def seconds_until_due(self) -> float | None:
        """Return in how many seconds the next row is due, or ``None`` if there is none."""
        with self._outbox.begin() as connection:
            return self._rows.seconds_until_due(connection)

    def _early(self, rows: Sequence[Any]) -> dict[Any, float]:
        """Return what waits for a far eta still: by id, in how many seconds it is due."""
        found = {row.id: self._outbox.when_due(row.eta) for row in rows if row.eta}
        return {row_id: due for row_id, (far, due) in found.items() if far}

    def _sorted(self, rows: Sequence[Any]) -> tuple[list[Publication], dict[Any, str | None]]:
        """Return what can be sent, and why the others cannot: by id, ``None`` if expired."""
        now = datetime.now(timezone.utc)
        publications: list[Publication] = []
        endings: dict[Any, str | None] = {}
        most = self._outbox.max_deliveries
        for row in rows:
            if row.expires is not None and aware(row.expires) <= now:
                endings[row.id] = None
            elif row.error is not None:  # the rest of a run that has committed by itself
                endings[row.id] = row.error
            elif row.deliveries >= most:
                endings[row.id] = (
                    f"sent {row.deliveries} times by the relay (ws_celery.outbox.max_deliveries), "
                    "and no run has ended: it may kill its worker, take longer than the lease, or "
                    "be taken from its queue by the workers of another application"
                )
            else:
                try:
                    publications.append(self._outbox.publication_of(row))
                except BrokenRow as error:
                    endings[row.id] = str(error)
        return publications, endings

    def _bury_unreadable(self, limit: int) -> int:
        """Make a row that stops all others a dead letter; return how many there were."""
        with self._outbox.begin() as connection:
            errors = self._rows.unreadable(connection, limit)
            for row_id, error in errors.items():
                reason = f"the row cannot be read: {error}"
                self._rows.bury_unreadable(connection, row_id, reason)
        return len(errors)

    def _end(self, connection: Any, endings: dict[Any, str | None]) -> None:
        expired = [row_id for row_id, error in endings.items() if not error]
        if expired:
            self._rows.delete(connection, expired)
        for row_id, error in endings.items():
            if error:
                self._rows.bury(connection, row_id, error)

    def _waiting(self, rows: Iterable[Any], length: Callable[[str], int]) -> set[Any]:
        """Return the ids of what was sent before and still waits in its queue."""
        queues: dict[str, list[Any]] = {}
        for row in rows:
            if row.queue and _was_sent(row):
                queues.setdefault(row.queue, []).append(row)
        return {
            row.id
            for queue, sent in queues.items()
            for row in self._still_there(sent, queue, length(queue))
        }

    def _still_there(self, sent: list[Any], queue: str, length: int) -> list[Any]:
        # What is in a queue is what was sent last: as many of the youngest as it is long.
        if not length:
            return []
        with self._outbox.begin() as connection:
            since = self._rows.waiting_since(connection, queue, length, self._outbox.lease)
        return [row for row in sent if since is None or row.created_at >= since]


def _was_sent(row: Any) -> bool:
    """Tell whether a row is due because its lease has run out, not for the first time."""
    if row.deliveries:
        return True
    ready = max(filter(None, (row.created_at, row.eta)))
    waited: float = (row.due_at - ready).total_seconds()
    return waited > row.lease / 2


#: How many rows one transaction claims, and one flush publishes.
BATCH = 1000

#: Seconds between two looks at the canary.
WATCH = 3.0


def includeme(config: Any) -> None:
    """Let the application's beat publish what is due in its outbox."""
    config.action("ws_celery.outbox.relay", _make, args=(config,), order=PHASE3_CONFIG)


def _make(config: Any) -> None:
    outbox = get_celery_app(config.registry).outbox
    poll = our_setting(config.registry.settings, "ws_celery.outbox.poll", 1.0)
    outbox.relay = Relay(outbox, poll=poll)


class Relay:
    """Publishes what is due in an outbox. Any number of relays may run, in any processes.

    :param outbox: the outbox.
    :param batch: how many rows one transaction claims, and one flush publishes.
    :param poll: seconds between two looks into the outbox.
    :param watch: seconds between two looks at the canary.
    :param health_file: is touched after each turn in which broker and database have answered.
    """

    def __init__(
        self,
        outbox: Any,
        *,
        batch: int = BATCH,
        poll: float = 1.0,
        watch: float = WATCH,
        health_file: Path | None = None,
    ) -> None:
        self.batch = batch
        self.poll = poll
        self.watch = watch
        self.health_file = health_file
        self._outbox = outbox
        self._deliveries = Deliveries(outbox)
        self._canary: Canary | None = None
        self._watch_at = 0.0
        self._broker = Service("The relay", "broker")
        self._database = Service("The relay", "database")
        self._health = Service("The relay", "health file")
        listen(signals.beat_init, self.on_beat_init)

    def on_beat_init(self, sender: Any = None, **_: Any) -> None:
        """Start with beat, and end with the thread that it runs in."""
        if sender.app is self._outbox.app:
            self.start()

    def start(self) -> threading.Thread:
        """Run in a thread of its own until the calling thread ends; returns it.

        It is no daemon: at the end of the process the batch in hand is finished first.
        """
        thread = threading.Thread(target=self.run, args=(threading.current_thread(),), name="relay")
        thread.start()
        return thread

    def run(self, owner: threading.Thread) -> None:
        """Turn until ``owner`` has ended; no error ends it.

        :param owner: the thread to live as long as.
        """
        log.info("The relay of %s has started", self._outbox.rows.table.fullname)
        main = threading.main_thread()

        def wanted() -> bool:
            return owner.is_alive() and main.is_alive()

        while wanted():
            owner.join(self.turn(wanted))
        self.close()
        log.info("The relay has ended")

    def close(self) -> None:
        """Close the connections to the broker."""
        self._outbox.app.publisher.close()
        if self._canary is not None:
            self._canary.close()

    def turn(self, wanted: Callable[[], bool] = lambda: True) -> float:
        """Look at the broker, publish all that is due, and return how many seconds to wait then.

        What fails is logged once, until it works again.

        :param wanted: tells whether another batch is to be taken.
        """
        try:
            more = True
            while more and wanted():
                self._look()
                self._broker.works()
                more = self._sweep()
                self._database.works()
                self._tell_health()
            return self._wait()
        except BrokerUnavailable as error:
            return self._broker.failed(error)
        except self._outbox.errors as error:
            return self._database.failed(error)
        except Exception:
            log.exception("The relay has failed, and goes on")
            return BACKOFF[1]

    def _tell_health(self) -> None:
        if self.health_file is None:
            return
        try:
            self.health_file.touch()
        except OSError as error:
            self._health.failed(error)
        else:
            self._health.works()

    @property
    def canary(self) -> Canary:
        """What tells whether the broker has lost its data; named after the outbox's database."""
        if self._canary is None:
            url, table = self._outbox.engine.url, self._outbox.rows.table.fullname
            place = f"{url.host}:{url.port}/{url.database}/{table}"
            name = sha256(place.encode()).hexdigest()[:16]
            self._canary = Canary(self._outbox.app, f"ws_celery_canary.{name}")
        return self._canary

    # The broker

    def _look(self) -> None:
        if monotonic() < self._watch_at and not self._broker.error:
            return
        if not self.canary.lives():
            self.canary.declare_all()
            self._tell_of_loss(self._deliveries.all_due())
            # Last: who dies before leaves the loss to be seen.
            self.canary.lay()
        elif self._broker.error:
            self.canary.lay()  # a demoted Redis answers, and takes nothing
        # Not all relays at the same time: the first one mends a loss for all.
        self._watch_at = monotonic() + self.watch * uniform(0.5, 1)  # noqa: S311 - no secret

    def _tell_of_loss(self, unfinished: int) -> None:
        if unfinished:
            log.warning(
                "The broker has lost its data, or is new: %d unfinished tasks are sent again",
                unfinished,
            )
        else:  # so it is whenever an outbox is new
            log.info("The broker is watched from now on; no task is unfinished")

    # The outbox

    def _sweep(self) -> bool:
        """Publish one batch; return whether there may be another one."""
        batch = self._deliveries.take(self.batch, self.canary.length)
        if batch.publications:
            self._publish(batch.publications)
            log.debug("The relay has sent %d tasks", len(batch.publications))
        return batch.taken == self.batch

    def _wait(self) -> float:
        due = self._deliveries.seconds_until_due()
        # What is due still is locked by a task that runs.
        return self.poll if due is None or due <= 0 else min(due, self.poll)

    def _publish(self, publications: Sequence[Publication]) -> None:
        """Publish together, else each alone: one message that no broker takes stops no other.

        :raises BrokerUnavailable: if it was the broker; what was not sent is due, and not counted.
        """
        try:
            self._flush(publications)
        except Exception:
            log.debug("A batch of %d tasks was not sent", len(publications), exc_info=True)
            self._make_sure_of_broker(publications)
            for number, publication in enumerate(publications):
                self._publish_alone(publication, publications[number:])

    def _publish_alone(self, publication: Publication, left: Sequence[Publication]) -> None:
        try:
            self._flush([publication])
        except Exception:
            self._make_sure_of_broker(left)
            # It stays counted, and is tried again after its lease.
            name, task_id = publication.task_name, publication.task_id
            log.exception("%s[%s] cannot be sent; others can", name, task_id)

    def _make_sure_of_broker(self, publications: Sequence[Publication]) -> None:
        try:
            self.canary.replace()
        except BrokerUnavailable:
            self._deliveries.give_back([publication.row_id for publication in publications])
            raise

    def _flush(self, publications: Sequence[Publication]) -> None:
        self._outbox.app.publisher.flush(publications)
        self._outbox.published(publications)
