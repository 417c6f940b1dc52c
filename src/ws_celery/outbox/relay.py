"""The relay: the loop that publishes what is due in the outbox; a thread of beat, or alone.

What is due was not published (the broker was down, the process died between commit and publish),
waits for its eta, or has not taken effect within its lease. Each batch is leased in one short
transaction, which counts the delivery and doubles the lease, and published after it. If the relay
dies in between, the lease brings the rows again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from random import uniform
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from celery import signals
from kombu import Connection as BrokerConnection
from kombu import Producer

from ws_celery.converters import aware
from ws_celery.events import listen
from ws_celery.exceptions import BrokenRow, BrokerUnavailable
from ws_celery.masking import logger_of, masked_text
from ws_celery.outages import BACKOFF, Service
from ws_celery.outbox.rows import UNREADABLE

if TYPE_CHECKING:
    from uuid import UUID

    from celery.beat import Service as Beat
    from sqlalchemy import Connection, Row

    from ws_celery.app import PyramidCelery
    from ws_celery.outbox.store import Outbox
    from ws_celery.recording import Publication

__all__ = (
    "BATCH",
    "Batch",
    "Canary",
    "Deliveries",
    "Relay",
)

log = logger_of(__name__)

#: How many rows one transaction leases, and one flush publishes.
BATCH = 1000

#: Seconds between two looks at the canary.
WATCH = 3.0

#: Answer of a broker that does not know a queue.
_NOT_FOUND = "404"

#: How many canaries there may be: several relays put one each.
_ENOUGH = 2

#: Transports that answer a passive declaration truthfully and at once. Others only estimate how
#: many messages there are.
_TRUTHFUL = ("amqp", "redis")

_TOO_OFTEN = (
    "sent {} times by the relay (ws_celery.outbox.max_deliveries), and no run has ended: it may "
    "kill its worker, take longer than the lease, or be taken from its queue by the workers of "
    "another application"
)


class Batch(NamedTuple):
    """What one transaction has leased.

    :param publications: what is to be published.
    :param leased: how many rows were due: none if other transactions have locked them all.
    """

    publications: list[Publication]
    leased: int


class Deliveries:
    """The relay's transactions: each is short, and none is open while the broker is talked to.

    :param outbox: the outbox.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._rows = outbox.rows

    def lease(self, limit: int, length: Callable[[str], int]) -> Batch:
        """Lease messages that are due; their delivery is counted, and their lease doubled, before.

        What cannot be sent ends here: a row that is broken or that nobody can read, and one that
        was sent too often, become dead letters, an expired one is deleted. What was sent before and
        still waits in its queue is left for another lease, uncounted; what has a far eta still,
        after a jump of the database's clock, until shortly before it.

        :param limit: how many at most.
        :param length: returns how many messages wait in a queue.
        :raises BrokerUnavailable: if the broker does not answer; nothing is counted then.
        """
        try:
            return self._lease(limit, length)
        except UNREADABLE:
            if not self._make_unreadable_dead_letters(limit):
                raise
            return Batch([], limit)

    def _lease(self, limit: int, length: Callable[[str], int]) -> Batch:
        with self._outbox.begin() as connection:
            rows = self._rows.lease_due(connection, limit)
            self._outbox.find_place(connection)
            early = self._early(rows)
            publications, ended = self._sorted([row for row in rows if row.id not in early])
            self._rows.postpone(connection, early)
            self._end(connection, ended)
        ids = {each.row_id for each in publications if each.row_id}
        try:
            waiting = self._waiting([row for row in rows if row.id in ids], length)
        except BrokerUnavailable:
            self.release(ids)
            raise
        if waiting:
            self.release(waiting, now=False)
        left = [each for each in publications if each.row_id not in waiting]
        return Batch(left, len(rows))

    def release(self, ids: Iterable[UUID], *, now: bool = True) -> None:
        """Undo the count of messages that were not sent; they are due now, or after their lease."""
        self._outbox.execute(self._rows.release, ids, now=now)

    def _early(self, rows: Sequence[Row[Any]]) -> dict[UUID, float]:
        """Return what waits for a far eta still: by id, in how many seconds it is due."""
        found = {row.id: self._outbox.when_due(row.eta) for row in rows if row.eta}
        return {row_id: due for row_id, (far, due) in found.items() if far}

    def _sorted(self, rows: Sequence[Row[Any]]) -> tuple[list[Publication], dict[UUID, str | None]]:
        """Return what can be sent, and why the others cannot: by id, ``None`` if expired."""
        now = datetime.now(timezone.utc)
        publications: list[Publication] = []
        ended: dict[UUID, str | None] = {}
        for row in rows:
            if row.expires is not None and aware(row.expires) <= now:
                ended[row.id] = None
            elif row.error is not None:  # the rest of a run that has committed by itself
                ended[row.id] = row.error
            elif row.deliveries >= self._outbox.max_deliveries:
                ended[row.id] = _TOO_OFTEN.format(row.deliveries)
            else:
                try:
                    publications.append(self._outbox.publication_of(row))
                except BrokenRow as error:
                    ended[row.id] = str(error)
        return publications, ended

    def _make_unreadable_dead_letters(self, limit: int) -> int:
        """Make rows that stop all others dead letters; return how many there were."""
        with self._outbox.begin() as connection:
            errors = self._rows.unreadable(connection, limit)
            for row_id, error in errors.items():
                reason = f"the row cannot be read: {error}"
                self._rows.make_unreadable_dead_letter(connection, row_id, reason)
        return len(errors)

    def _end(self, connection: Connection, ended: dict[UUID, str | None]) -> None:
        expired = [row_id for row_id, error in ended.items() if not error]
        if expired:
            self._rows.delete(connection, expired)
        for row_id, error in ended.items():
            if error:
                self._rows.make_dead_letter(connection, row_id, error)

    def _waiting(self, rows: Iterable[Row[Any]], length: Callable[[str], int]) -> set[UUID]:
        """Return the ids of what was sent before and still waits in its queue."""
        queues: dict[str, list[Row[Any]]] = {}
        for row in rows:
            if row.queue and _was_sent(row):
                queues.setdefault(row.queue, []).append(row)
        return {
            row.id
            for queue, sent in queues.items()
            for row in self._still_there(sent, queue, length(queue))
        }

    def _still_there(self, sent: list[Row[Any]], queue: str, length: int) -> list[Row[Any]]:
        # What is in a queue is what was sent last: as many of the youngest as it is long.
        if not length:
            return []
        outbox = self._outbox
        since = outbox.execute(self._rows.waiting_since, queue, length, outbox.lease)
        return [row for row in sent if since is None or row.created_at >= since]


def _was_sent(row: Row[Any]) -> bool:
    """Return whether a row is due because its lease has run out, not for the first time."""
    if row.deliveries:
        return True
    ready = max(filter(None, (row.created_at, row.eta)))
    waited: float = (row.due_at - ready).total_seconds()
    return waited > row.lease / 2


class Relay:
    """Publishes what is due in an outbox. Any number of relays may run, in any processes.

    :param outbox: the outbox.
    :param batch: how many rows one transaction leases, and one flush publishes.
    :param poll: seconds between two looks into the outbox.
    :param watch: seconds between two looks at the canary.
    :param health_file: is touched after each turn in which broker and database have answered.
    """

    def __init__(
        self,
        outbox: Outbox,
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
        self._watch_at = 0.0
        self._broker = Service("The relay", "broker")
        self._database = Service("The relay", "database")
        self._health = Service("The relay", "health file")
        listen(signals.beat_init, self.on_beat_init)

    def on_beat_init(self, sender: Beat, **_: Any) -> None:
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
        if "canary" in vars(self):
            self.canary.close()

    def turn(self, wanted: Callable[[], bool] = lambda: True) -> float:
        """Look at the broker, publish all that is due, and return how many seconds to wait then.

        What fails is logged once, until it works again.

        :param wanted: returns whether another batch is to be leased.
        """
        try:
            more = True
            while more and wanted():
                self._look()
                self._broker.works()
                more = self._publish_batch()
                self._database.works()
                self._touch_health_file()
            return self._wait()
        except BrokerUnavailable as error:
            return self._broker.failed(error)
        except self._outbox.errors as error:
            return self._database.failed(error)
        except Exception:
            log.exception("The relay has failed, and goes on")
            return BACKOFF[1]

    def _touch_health_file(self) -> None:
        if self.health_file is None:
            return
        try:
            self.health_file.touch()
        except OSError as error:
            self._health.failed(error)
        else:
            self._health.works()

    @cached_property
    def canary(self) -> Canary:
        """Shows whether the broker has lost its data; named after the outbox's database."""
        url, table = self._outbox.engine.url, self._outbox.rows.table.fullname
        place = f"{url.host}:{url.port}/{url.database}/{table}"
        name = sha256(place.encode()).hexdigest()[:16]
        return Canary(self._outbox.app, f"ws_celery_canary.{name}")

    # The broker

    def _look(self) -> None:
        if monotonic() < self._watch_at and not self._broker.error:
            return
        if not self.canary.is_there():
            self.canary.declare_all()
            outbox = self._outbox
            self._log_loss(outbox.execute(outbox.rows.make_all_due, outbox.lease))
            # Last: who dies before leaves the loss to be seen.
            self.canary.put()
        elif self._broker.error:
            self.canary.put()  # a demoted Redis answers, and takes nothing
        # Not all relays at the same time: the first one repairs a loss for all.
        self._watch_at = monotonic() + self.watch * uniform(0.5, 1)  # noqa: S311 - no secret

    def _log_loss(self, unfinished: int) -> None:
        if unfinished:
            log.warning(
                "The broker has lost its data, or is new: %d unfinished tasks are sent again",
                unfinished,
            )
        else:  # so it is whenever an outbox is new
            log.info("The broker is watched from now on; no task is unfinished")

    # The outbox

    def _publish_batch(self) -> bool:
        """Publish one batch; return whether there may be another one."""
        batch = self._deliveries.lease(self.batch, self.canary.length)
        if batch.publications:
            self._publish(batch.publications)
            log.debug("The relay has sent %d tasks", len(batch.publications))
        return batch.leased == self.batch

    def _wait(self) -> float:
        due = self._outbox.execute(self._outbox.rows.seconds_until_due)
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
            self._ensure_broker(publications)
            for number, publication in enumerate(publications):
                self._publish_alone(publication, publications[number:])

    def _publish_alone(self, publication: Publication, left: Sequence[Publication]) -> None:
        try:
            self._flush([publication])
        except Exception:
            self._ensure_broker(left)
            # It stays counted, and is tried again after its lease.
            name, task_id = publication.task_name, publication.task_id
            log.exception("%s[%s] cannot be sent; others can", name, task_id)

    def _ensure_broker(self, publications: Sequence[Publication]) -> None:
        try:
            self.canary.replace()
        except BrokerUnavailable:
            self._deliveries.release([each.row_id for each in publications if each.row_id])
            raise

    def _flush(self, publications: Sequence[Publication]) -> None:
        self._outbox.app.publisher.flush(publications)
        self._outbox.published(publications)


class Canary:
    """A message in a queue of its own that nobody consumes: without it, a broker has lost its data.

    A server that was emptied or came back without its data does not say so. Its queues are gone,
    and so is the canary. It has a connection of its own, bounded in time as those of the publisher.

    :param app: the Celery app whose broker it is.
    :param name: of the queue; applications that share a broker need one each.
    """

    def __init__(self, app: PyramidCelery, name: str) -> None:
        self.name = name
        self._app = app
        self._connection: BrokerConnection | None = None

    def is_there(self) -> bool:
        """Return whether the message is there; if the broker does not know, whether it answers.

        :raises BrokerUnavailable: if it does not.
        """
        with self._opened() as connection:
            truthful = connection.transport.driver_type in _TRUTHFUL
            return not truthful or self.length(self.name) > 0

    def length(self, queue: str) -> int:
        """Return how many messages wait in a queue: 0 if there is none, or it is not known.

        :raises BrokerUnavailable: if the broker does not answer.
        """
        with self._opened() as connection:
            if connection.transport.driver_type not in _TRUTHFUL:
                return 0
            try:
                return int(connection.default_channel.queue_declare(queue, passive=True)[1])
            except connection.channel_errors as error:
                if str(getattr(error, "reply_code", "")) != _NOT_FOUND:
                    raise
                self.close()  # RabbitMQ has closed the channel
                return 0

    def declare_all(self) -> None:
        """Declare the application's queues anew; see ``Publisher``.

        :raises BrokerUnavailable: if the broker does not answer.
        """
        self.close()
        with self._opened():
            self._app.publisher.declare_all()

    def put(self) -> None:
        """Put a message into the queue; an older one may go.

        :raises BrokerUnavailable: if the broker does not answer, or does not take it.
        """
        with self._opened() as connection:
            channel = connection.default_channel
            channel.queue_declare(self.name, durable=True, auto_delete=False)
            Producer(channel).publish("ws_celery", routing_key=self.name, delivery_mode=2)
            # Answered when what was sent before has arrived. Never empty: another relay may look.
            if channel.queue_declare(self.name, passive=True)[1] > _ENOUGH:
                channel.basic_get(self.name, no_ack=True)

    def replace(self) -> None:
        """Put another message into the queue: a broker that answers may still take none.

        :raises BrokerUnavailable: if it takes none; or the old one is lost, which is to be seen.
        """
        if not self.is_there():
            raise BrokerUnavailable("The broker has lost its data.")
        self.put()

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.collect()
            self._connection = None

    @contextmanager
    def _opened(self) -> Iterator[BrokerConnection]:
        try:
            if self._connection is None:
                self._connection = self._app.publisher.connect()
            yield self._connection
        except BrokerUnavailable:
            raise
        except Exception as error:
            self.close()
            said = masked_text(f"{type(error).__name__}: {error}")
            raise BrokerUnavailable(f"The broker does not answer: {said}") from error
