"""What happens after the commit: one flush to the broker, which waits for a bounded time."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from time import monotonic
from typing import TYPE_CHECKING, Any

from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.time import maybe_iso8601
from kombu import Connection, Producer
from kombu.exceptions import OperationalError
from kombu.transport.native_delayed_delivery import MAX_NUMBER_OF_BITS_TO_USE as BITS

from ws_celery.converters import aware
from ws_celery.events import TasksPublished, notify
from ws_celery.exceptions import BrokerUnavailable
from ws_celery.recording import OUTBOX_HEADER, ROW_HEADER, Publication
from ws_celery.settings import our_setting
from ws_celery.spool import Spool

if TYPE_CHECKING:
    from kombu.transport.virtual import Channel
    from redis.client import Pipeline

    from ws_celery.app import PyramidCelery

__all__ = (
    "Attempt",
    "PartlyRefused",
    "Publisher",
    "bare_key",
    "batch",
    "connect",
    "delay_anew",
    "lighten",
    "publish",
)


#: Seconds by which each message lengthens the flush: a long list is no sign of a slow broker.
PER_MESSAGE = 0.001

#: How many messages are sent together at most.
BATCH = 1000

#: How many commands kombu may gather before it sends them by itself: more than there will be, since
#: one would not know then what was sent.
_NO_PARTS = 1_000_000

#: Options with which redis-py would try again, and kombu not send a batch.
_REDIS_RETRIES = ("retry", "retry_on_error", "retry_on_timeout")


@dataclass
class Attempt:
    """How far a flush came: of its messages some were sent, some may have been, the rest was not.

    :param sent: how many of the first ones have certainly been sent.
    :param begun: how many of the first ones may have been sent, those included.
    :param error: what ended it; of the broker, as a rule.
    :param down: whether that was an error of the connection.
    """

    sent: int = 0
    begun: int = 0
    error: BaseException | None = None
    down: bool = False

    @property
    def refused(self) -> bool:
        """Whether the broker answers, and takes the next message not."""
        return self.error is not None and not self.down and self.begun == self.sent == 0


class Publisher:
    """Hands what a transaction has dispatched to the broker, after the commit.

    It has connections of its own, whose sockets wait half of ``ws_celery.publish_timeout`` (2 s)
    for an answer, and after that half it begins nothing but its first step: so a flush ends in time
    whatever the broker does. A broker whose connection has failed is left alone for
    ``ws_celery.publish_cooldown`` (5 s), in which nobody waits for it.

    What has certainly not been sent, and has no row in the outbox, is spooled.

    :param app: the Celery app whose broker it is; its registry has the settings.
    """

    def __init__(self, app: PyramidCelery) -> None:
        settings = app.registry.settings
        self.timeout = our_setting(settings, "ws_celery.publish_timeout", 2.0)
        self.cooldown = our_setting(settings, "ws_celery.publish_cooldown", 5.0)
        self.spool = Spool(app, self)
        self._app = app
        self._down_until: float | None = None
        self._idle: deque[Producer] = deque()
        self._inherited: list[deque[Producer]] = []
        self._pid = os.getpid()

    def publish(self, publications: Sequence[Publication]) -> None:
        """Hand ``publications`` to the broker in one flush; no broker makes it raise.

        The database has committed when this runs, so that an error could only mislead the caller.
        It is logged with the names and ids of the tasks, and events say what became of them. What
        interrupts the process, such as a time limit, is raised.
        """
        reason = self._reason_to_wait()
        attempt = Attempt(error=reason) if reason else self.attempt(publications)
        self.conclude(publications, attempt)
        if attempt.error is not None and _interrupts(attempt.error):
            raise attempt.error

    def flush(self, publications: Sequence[Publication]) -> None:
        """Hand ``publications`` to the broker in one flush, or raise; a part may have left then.

        :raises Exception: the broker's error, after at most ``ws_celery.publish_timeout``.
        """
        attempt = self.attempt(publications)
        if attempt.error is not None:
            raise attempt.error

    def attempt(self, publications: Sequence[Publication]) -> Attempt:
        """Try once to hand ``publications`` to the broker; return how far it came."""
        attempt = Attempt()
        deadline = monotonic() + self.timeout / 2 + PER_MESSAGE * len(publications)
        try:
            producer = self._acquire()
        except BaseException as error:  # noqa: BLE001 - the caller decides
            attempt.error, attempt.down = error, not _interrupts(error)
            return attempt
        try:
            _declare_once(producer, publications, deadline)
            connect(producer.channel)
            _send(producer, publications, deadline, attempt)
        except BaseException as error:  # noqa: BLE001 - likewise
            _judge(error, producer.connection, attempt)
            producer.connection.collect()
        else:
            self._idle.append(producer)
        return attempt

    def conclude(
        self, publications: Sequence[Publication], attempt: Attempt, *, late: bool = False
    ) -> None:
        """Notify of what was sent, and see to it that the rest will be.

        :param late: whether they come from the spool, and what was not sent goes back there.
        """
        if attempt.error is None:
            self._down_until = None
        else:
            if attempt.down:
                self._down_until = monotonic() + self.cooldown
            self.spool.conclude_failure(publications, attempt, attempt.error, late=late)
        if sent := publications[: attempt.sent]:
            if any(publication.anonymous for publication in sent):
                self._app.outbox.published(sent)
            notify(TasksPublished(self._app, sent, late=late))

    def end(self) -> None:
        """Wait ``ws_celery.publish_timeout`` for what is spooled, at the end of the process."""
        self.spool.end(self.timeout)

    def declare_all(self) -> None:
        """Declare the application's queues anew, on a connection that does not remember them.

        :raises Exception: the broker's error; one that answers may still take nothing, such as a
            Redis that was demoted.
        """
        self.close()  # the idle connections remember what has been declared
        connection = self.connect()
        try:
            for queue in list(self._app.amqp.queues.values()):
                queue(connection.default_channel).declare()
        finally:
            connection.collect()

    def close(self) -> None:
        """Close the connections that are not in use."""
        if self._pid != os.getpid():
            self._forget_inherited()
        with suppress(IndexError):
            while True:
                self._idle.pop().connection.release()

    def _reason_to_wait(self) -> BrokerUnavailable | None:
        """Return why nothing is sent now, if so: the next message would be late, or fail."""
        if self.spool.waiting or self.spool.in_hand:
            return BrokerUnavailable(
                "The broker has not taken yet what was dispatched before, and nothing overtakes "
                "it. Start the broker."
            )
        down_until = self._down_until  # another thread may find the broker up meanwhile
        if down_until is None:
            return None
        if monotonic() < down_until:
            return BrokerUnavailable(
                "The broker has not answered a moment ago. Nothing is sent to it for "
                f"ws_celery.publish_cooldown = {self.cooldown} seconds; start the broker."
            )
        # This flush tries; those of other threads need not wait with it.
        self._down_until = monotonic() + self.timeout
        return None

    def _acquire(self) -> Producer:
        if self._pid != os.getpid():
            self._forget_inherited()
        with suppress(IndexError):
            while True:
                producer = self._idle.pop()
                if _is_alive(producer):
                    return producer
        producer = Producer(self.connect(), auto_declare=False)
        lighten(producer.channel)
        return producer

    def _forget_inherited(self) -> None:
        # Kept, not closed: that would shut down what the parent process still uses.
        self._inherited.append(self._idle)
        self._idle = deque()
        self._pid = os.getpid()

    def connect(self) -> Connection:
        """Open a connection whose sockets wait half of ``ws_celery.publish_timeout``.

        :raises Exception: the broker's error, within that time.
        """
        connection = self._app.connection_for_write()
        brokers = len(connection.alt or ()) or 1
        patience = self.timeout / 2 / brokers
        connection.connect_timeout = min(patience, connection.connect_timeout or patience)
        if connection.transport.driver_type == "redis":
            _bound_redis(connection.transport_options, patience)
        try:
            connection.ensure_connection(max_retries=brokers - 1, interval_start=0, interval_step=0)
        except BaseException:
            connection.collect()
            raise
        if connection.transport.driver_type == "amqp":
            connection.connection.sock.settimeout(patience)
        return connection


def _bound_redis(options: dict[str, Any], patience: float) -> None:
    for option in ("socket_connect_timeout", "socket_timeout"):
        options[option] = min(patience, options.get(option) or patience)
    for option in _REDIS_RETRIES:
        options.pop(option, None)


def publish(producer: Producer, publication: Publication, **overrides: Any) -> None:
    """Hand a message to the broker, now.

    :param overrides: options of the publish that take the place of its own.
    """
    options = {**publication.options, **overrides}
    delay_anew(options)
    if publication.row_id is not None and not publication.anonymous:
        row = {ROW_HEADER: str(publication.row_id), OUTBOX_HEADER: publication.outbox}
        options["headers"] = {**options["headers"], **row}
    producer.publish(publication.payload, **options)


#: The exchange that messages with a delay go to, on RabbitMQ.
_DELAYING_EXCHANGE = f"celery_delayed_{BITS - 1}"

_DELAY = re.compile(rf"(?:[01]\.){{{BITS}}}")


def bare_key(routing_key: str) -> str:
    """Return a routing key without the delay that it may have."""
    return _DELAY.sub("", routing_key, count=1)


def delay_anew(options: dict[str, Any]) -> None:
    """Let a message that RabbitMQ delays wait for what is left until its ``eta``.

    :param options: of the publish; what has no delay stays as it is.
    """
    exchange, key = options.get("exchange"), options.get("routing_key")
    eta = (options.get("headers") or {}).get("eta")
    if getattr(exchange, "name", exchange) != _DELAYING_EXCHANGE or not (key and eta):
        return
    left = aware(maybe_iso8601(eta)) - datetime.now(timezone.utc)
    # With no delay at all it passes through all levels to its queue.
    delay = f"{max(int(left.total_seconds()), 0):0{BITS}b}"
    options["routing_key"] = ".".join((*delay, bare_key(key)))


def batch(producer: Producer, publications: Sequence[Publication]) -> AbstractContextManager[Any]:
    """Let what is published inside leave together where that can be: in one pipeline of Redis."""
    if len(publications) > 1 and hasattr(producer, "batch"):
        return producer.batch(max_size=_NO_PARTS)
    return nullcontext()


def _send(
    producer: Producer, publications: Sequence[Publication], deadline: float, attempt: Attempt
) -> None:
    # Nothing is retried: a part may have been delivered.
    together = len(publications) > 1 and getattr(producer, "supports_batch_publish", False)
    send = _send_together if together else _send_each
    send(producer, publications, deadline, attempt)
    if attempt.sent < len(publications):
        raise BrokerUnavailable(
            "The broker is too slow for ws_celery.publish_timeout. Raise it, or dispatch less in "
            "one transaction."
        )


def _send_together(
    producer: Producer, publications: Sequence[Publication], deadline: float, attempt: Attempt
) -> None:
    for start in range(0, len(publications), BATCH):
        if start and monotonic() > deadline:
            return
        part = publications[start : start + BATCH]
        with batch(producer, part):
            for publication in part:
                publish(producer, publication, declare=None, retry=False)
            attempt.begun += len(part)  # it leaves at the end of the block
        attempt.sent = attempt.begun


def _send_each(
    producer: Producer, publications: Sequence[Publication], deadline: float, attempt: Attempt
) -> None:
    answers = producer.connection.transport.driver_type != "amqp"
    for publication in publications:
        if attempt.begun and monotonic() > deadline:
            break
        attempt.begun += 1
        publish(producer, publication, declare=None, retry=False)
        if answers:
            attempt.sent = attempt.begun
    if not answers:
        # A publish has no answer on RabbitMQ: a dead broker would be noticed by nobody. It
        # answers methods in their order: one that changes nothing shows that all has arrived.
        producer.channel.flow(active=True)
        attempt.sent = attempt.begun


def _judge(error: BaseException, connection: Connection, attempt: Attempt) -> None:
    """Record in an attempt what its error says about how far it came."""
    cause = error.__cause__ if _is_of_batch(error) else error
    attempt.error = cause if isinstance(cause, BaseException) else error
    attempt.down = isinstance(attempt.error, (OperationalError, *connection.connection_errors))
    if attempt.down or _interrupts(error) or isinstance(attempt.error, PartlyRefused):
        return
    # The broker has said no. RabbitMQ says so to all that it was sent, though one may be to blame.
    if connection.transport.driver_type != "amqp" or attempt.begun == 1:
        attempt.begun = attempt.sent


def _is_of_batch(error: BaseException) -> bool:
    # By its name: kombu has the class from 5.7.
    return type(error).__name__ == "BatchPublishError"


def _interrupts(error: BaseException) -> bool:
    return isinstance(error, SoftTimeLimitExceeded) or not isinstance(error, Exception)


def _in_time(deadline: float) -> None:
    if monotonic() > deadline:
        raise BrokerUnavailable(
            "The broker is too slow for ws_celery.publish_timeout. Raise it, or send to less "
            "queues in one transaction."
        )


def _declare_once(producer: Producer, publications: Iterable[Publication], deadline: float) -> None:
    # Once per flush instead of once per message: maybe_declare was half the cost of a message.
    entities = {
        (type(entity), entity.name): entity
        for publication in publications
        for entity in publication.declare
    }
    declared = producer.connection.declared_entities
    for number, entity in enumerate(entities.values()):
        # kombu looks there, too, but first makes a copy of the entity for the channel.
        if not (entity.can_cache_declaration and hash(entity) in declared):
            if number:
                _in_time(deadline)
            producer.maybe_declare(entity)


def _is_alive(producer: Producer) -> bool:
    """Return whether an idle connection is still one; redis-py looks for itself."""
    connection = producer.connection
    if connection.transport.driver_type != "amqp":
        return True
    try:
        connection.drain_events(timeout=0)  # a broker that has gone has said so
    except TimeoutError:
        return True
    except (OSError, *connection.connection_errors, *connection.channel_errors):
        connection.collect()
        return False
    return bool(connection.connected)


class PartlyRefused(Exception):
    """A Redis has refused some of the commands that it was sent together, and obeyed others."""


def connect(channel: Channel) -> None:
    """Connect a channel to Redis, also if the server has hung up: nothing was sent until then.

    Channels to other brokers are left alone.

    :raises Exception: if the server does not answer.
    """
    if hasattr(channel, "conn_or_acquire"):
        with channel.conn_or_acquire() as client:
            pool = client.connection_pool
            try:
                connection = pool.get_connection()
            except TypeError:  # redis-py before 5.3, with Celery 5.5, asks for a command
                connection = pool.get_connection("_")
            pool.release(connection)


def lighten(channel: Channel) -> None:
    """Let ``channel`` keep one client, and push what is published together by one command.

    kombu makes a client of redis-py for each publish, which costs more than all the rest of it, and
    adds a command to the pipeline for each message. Nothing else changes: the messages arrive in
    their order, and the client takes its connections from the same pool. Channels to other brokers
    are left alone.

    :param channel: on which no two threads publish at a time.
    """
    if not hasattr(channel, "conn_or_acquire"):
        return
    with channel.conn_or_acquire() as kept:
        channel.conn_or_acquire = lambda client=None: nullcontext(client or kept)
    if hasattr(channel, "create_publish_batch"):  # kombu 5.7
        create_batch = channel.create_publish_batch

        def create_publish_batch(max_size: int) -> Any:
            batch = create_batch(max_size)
            batch.pipeline = _Pushes(batch.pipeline)
            return batch

        channel.create_publish_batch = create_publish_batch


class _Pushes:
    """A pipeline in which what is pushed onto one list, one after the other, is one command.

    :param pipeline: redis-py's.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._key = ""
        self._values: list[bytes] = []

    def lpush(self, key: str, *values: bytes) -> None:
        if key != self._key:
            self._push()
            self._key = key
        self._values += values

    def execute(self) -> None:
        """Send all; what is refused is an error.

        :raises PartlyRefused: if not all was refused.
        """
        self._push()
        answers = self._pipeline.execute(raise_on_error=False)
        if errors := [answer for answer in answers if isinstance(answer, Exception)]:
            if len(errors) < len(answers):
                raise PartlyRefused(f"{len(errors)} of {len(answers)} commands: {errors[0]}")
            raise errors[0]

    def reset(self) -> None:
        self._values = []
        self._pipeline.reset()

    def __getattr__(self, name: str) -> Any:
        # Any other command, and the execution: what was pushed comes first.
        self._push()
        return getattr(self._pipeline, name)

    def _push(self) -> None:
        if self._values:
            self._pipeline.lpush(self._key, *self._values)
            self._values = []
