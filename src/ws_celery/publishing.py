"""What happens after the commit: one flush to the broker, which waits for a bounded time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from time import monotonic
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded
from kombu import Connection, Producer
from kombu.exceptions import OperationalError
from pyramid.registry import Registry

from ws_celery.dispatch import Publication
from ws_celery.events import PublishFailed, TasksPublished, tell
from ws_celery.exceptions import BrokerUnavailable
from ws_celery.masking import logger_of
from ws_celery.redis_channel import lighten
from ws_celery.settings import our_setting
from ws_celery.shown_arguments import described_arguments

__all__ = ("Publisher", "batch")

log = logger_of(__name__)

#: Seconds by which each message lengthens the flush: a long list is no sign of a slow broker.
PER_MESSAGE = 0.001

#: Options with which redis-py would try again, and kombu not send a batch.
_REDIS_RETRIES = ("retry", "retry_on_error", "retry_on_timeout")


class Publisher:
    """Hands what a transaction has dispatched to the broker, after the commit.

    It has connections of its own, whose sockets wait half of ``ws_celery.publish_timeout`` (2 s)
    for an answer, and it begins nothing after that half: so a flush ends in time whatever the
    broker does. A broker that has failed is left alone for ``ws_celery.publish_cooldown`` (5 s), in
    which nobody waits for it.

    :param app: the Celery app whose broker it is.
    :param registry: where the settings and the subscribers are.
    """

    def __init__(self, app: Any, registry: Registry) -> None:
        settings = registry.settings
        self.timeout = our_setting(settings, "ws_celery.publish_timeout", 2.0)
        self.cooldown = our_setting(settings, "ws_celery.publish_cooldown", 5.0)
        self._log_arguments = our_setting(settings, "ws_celery.log_arguments", default=False)
        self._app = app
        self._down_until: float | None = None
        self._idle: deque[Producer] = deque()
        self._inherited: list[deque[Producer]] = []
        self._pid = os.getpid()

    def publish(self, publications: Sequence[Publication]) -> None:
        """Hand ``publications`` to the broker in one flush; no broker makes it raise.

        The database has committed when this runs, so that an error could only mislead the caller.
        It is logged with the names and ids of the tasks that may not have been sent, and a
        :class:`~ws_celery.events.PublishFailed` is sent. What interrupts the process, such as a
        time limit, is raised.
        """
        try:
            self._refuse_while_down()
            self.flush(publications)
        except BaseException as error:
            self._fail(publications, error)
            if isinstance(error, SoftTimeLimitExceeded) or not isinstance(error, Exception):
                raise
        else:
            self._down_until = None
            if self._app.outbox is not None:
                self._app.outbox.published(publications)
            tell(TasksPublished(self._app, publications))

    def close(self) -> None:
        """Close the connections that are not in use."""
        with suppress(IndexError):
            while True:
                self._idle.pop().connection.release()

    def _refuse_while_down(self) -> None:
        down_until = self._down_until  # another thread may find the broker up meanwhile
        if down_until is None:
            return
        if monotonic() < down_until:
            raise BrokerUnavailable(
                "The broker has not answered a moment ago. Nothing is sent to it for "
                f"ws_celery.publish_cooldown = {self.cooldown} seconds; start the broker."
            )
        # This flush tries; those of other threads need not wait with it.
        self._down_until = monotonic() + self.timeout

    def flush(self, publications: Sequence[Publication]) -> None:
        """Hand ``publications`` to the broker in one flush, or raise; a part may have left then.

        :raises Exception: the broker's error, after at most ``ws_celery.publish_timeout``.
        """
        deadline = monotonic() + self.timeout / 2 + PER_MESSAGE * len(publications)
        producer = self._acquire()
        try:
            _declare_once(producer, publications, deadline)
            # Nothing is retried: a part may have been delivered.
            with batch(producer, publications):
                for publication in publications:
                    _in_time(deadline)
                    publication.publish(producer, declare=None, retry=False)
            _settle(producer, deadline)
        except BaseException as error:
            connection = producer.connection
            connection.collect()
            # The cause, too: kombu wraps the error of a batch in one that is of no such kind.
            if any(
                isinstance(each, connection.connection_errors) for each in (error, error.__cause__)
            ):
                raise OperationalError(str(error)) from error
            raise
        self._idle.append(producer)

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

    def _fail(self, publications: Sequence[Publication], error: BaseException) -> None:
        if isinstance(error, (OSError, OperationalError)):
            self._down_until = monotonic() + self.cooldown
        kept = [publication for publication in publications if publication.row_id]
        if kept:
            log.warning("The outbox keeps %d tasks for the relay: %s", len(kept), error)
            self._app.outbox.not_published(kept)
        # An event has neither a row nor a task that could be lost.
        if lost := [found for found in publications if found.task_id and not found.row_id]:
            self._report(lost, error)

    def _report(self, publications: Sequence[Publication], error: BaseException) -> None:
        event = PublishFailed(self._app, publications, error)
        log.error(
            "The transaction has committed, but these tasks may not have been sent: %s (%s)",
            ", ".join(map(self._described, publications)),
            str(error) or type(error).__name__,
            exc_info=None if isinstance(error, BrokerUnavailable) else error,
        )
        tell(event)

    def _described(self, publication: Publication) -> str:
        text = f"{publication.task_name}[{publication.task_id}]"
        if not self._log_arguments:
            return text
        args, kwargs = described_arguments(
            self._app, publication.task_name, publication.call, publication.told_arguments
        )
        return f"{text} args={args} kwargs={kwargs}"


def _bound_redis(options: dict[str, Any], patience: float) -> None:
    for option in ("socket_connect_timeout", "socket_timeout"):
        options[option] = min(patience, options.get(option) or patience)
    for option in _REDIS_RETRIES:
        options.pop(option, None)


def batch(producer: Producer, publications: Sequence[Publication]) -> AbstractContextManager[Any]:
    """Let what is published inside leave together where that can be: in one pipeline of Redis."""
    if len(publications) > 1 and hasattr(producer, "batch"):
        return producer.batch()
    return nullcontext()


def _in_time(deadline: float) -> None:
    if monotonic() > deadline:
        raise TimeoutError("the broker is too slow for ws_celery.publish_timeout")


def _declare_once(producer: Producer, publications: Iterable[Publication], deadline: float) -> None:
    # Once per flush instead of once per message: maybe_declare was half the cost of a message.
    entities = {
        (type(entity), entity.name): entity
        for publication in publications
        for entity in publication.declare
    }
    declared = producer.connection.declared_entities
    for entity in entities.values():
        # kombu looks there, too, but first makes a copy of the entity for the channel.
        if not (entity.can_cache_declaration and hash(entity) in declared):
            _in_time(deadline)
            producer.maybe_declare(entity)


def _settle(producer: Producer, deadline: float) -> None:
    """Wait until a RabbitMQ has read what it was sent.

    A publish has no answer there: a dead broker would be noticed by nobody. It answers methods in
    their order, so that one that changes nothing tells that all before has arrived.
    """
    if producer.connection.transport.driver_type == "amqp":
        _in_time(deadline)
        producer.channel.flow(active=True)


def _is_alive(producer: Producer) -> bool:
    """Tell whether an idle connection is still one; redis-py looks for itself."""
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
