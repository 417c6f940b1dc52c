"""Celery's remote control, but that what it takes away does not come back from the outbox."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from celery.app.control import Control as CeleryControl

from ws_celery.redis_queues import BATCH, RedisQueues, headers_in

__all__ = ("Control", "purge")


class Control(CeleryControl):
    """``app.control``: revoking and purging settle the rows of the outbox, if there is one."""

    def purge(self, connection: Any = None) -> int:
        """Discard what waits in the queues that a worker would consume from, as in Celery.

        ``ws-celery worker --purge`` calls it.

        :return: how many messages.
        :raises OutboxUnavailable: before anything is lost, if the database does not answer.
        """
        if self.app.outbox is None:
            return super().purge(connection)
        with self.app.connection_or_acquire(connection) as connected:
            for queue in self.app.amqp.queues.consume_from.values():
                queue(connected.default_channel).declare()
            names = list(self.app.amqp.queues.consume_from)
            return sum(taken for name in names for taken, _ in purge(self.app, connected, name))

    discard_all = purge

    def revoke(self, task_id: Any, destination: Any = None, **options: Any) -> Any:
        """Tell workers not to run a task, as in Celery.

        Workers forget what was revoked when they stop. With the outbox the task's row is deleted,
        unless it is running, so that no worker runs it later either.

        :param task_id: an id, or several.
        """
        outbox = self.app.outbox
        if outbox is not None and destination is None:
            outbox.revoke([task_id] if isinstance(task_id, str) else list(task_id))
        return super().revoke(task_id, destination, **options)


def purge(app: Any, connection: Any, queue: str) -> Iterator[tuple[int, int]]:
    """Discard what waits in a queue, step by step; with the outbox, its rows as well.

    :return: of each step, how many messages and how many rows.
    :raises OutboxUnavailable: before anything is lost, if the database does not answer.
    """
    channel = connection.default_channel
    if app.outbox is None:
        yield channel.queue_purge(queue) or 0, 0
        return
    app.outbox.check_table()
    for headers in _taken(channel, connection.transport.driver_type, queue):
        yield len(headers), app.outbox.discard(headers)


def _taken(channel: Any, kind: str, queue: str) -> Iterator[list[Mapping[str, Any]]]:
    if kind == "redis":
        for messages in RedisQueues(channel).take(queue):
            yield [headers_in(raw) for raw in messages]
        return
    waiting = channel.queue_declare(queue, passive=True)[1]
    for start in range(0, waiting, BATCH):
        yield list(_got(channel, queue, min(BATCH, waiting - start)))


def _got(channel: Any, queue: str, most: int) -> Iterable[Mapping[str, Any]]:
    for _ in range(most):
        try:
            message = channel.basic_get(queue, no_ack=True)
        except (KeyError, TypeError, ValueError):
            yield {}  # taken, and not kombu's
            continue
        if message is None:
            return
        yield message.headers or {}
