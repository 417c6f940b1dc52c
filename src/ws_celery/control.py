"""Celery's remote control, but that what it removes does not come back from the outbox."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from celery.app.control import Control as CeleryControl

from ws_celery.compat import priority_queue

if TYPE_CHECKING:
    from kombu import Connection
    from kombu.transport.base import StdChannel
    from kombu.transport.redis import Channel

    from ws_celery.app import PyramidCelery

__all__ = (
    "Control",
    "RedisQueues",
    "headers_in",
    "purge",
)

#: How many messages are removed, or read, in one step.
BATCH = 1000


class RedisQueues:
    """The queues of one kombu channel.

    A message is pushed at the head of its list and popped at the tail; lists of a higher priority,
    which is the lower number, are popped first.

    :param channel: of kombu's transport ``redis``.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._client = channel.client

    def lengths(self, queue: str) -> dict[int, int]:
        """Return how many messages wait in a queue, by their step of priority."""
        steps = self._channel.priority_steps
        with self._client.pipeline(transaction=False) as pipe:
            for key in self._keys("LLEN", queue):
                pipe.llen(key)
            return dict(zip(steps, pipe.execute(), strict=True))

    def next(self, queue: str, limit: int) -> list[bytes]:
        """Return the messages that are consumed next, as they are, and leave them there."""
        found: list[bytes] = []
        for key in self._keys("LRANGE", queue):
            if left := limit - len(found):
                found += reversed(self._client.lrange(key, -left, -1))
        return found

    def oldest(self, queue: str) -> list[bytes]:
        """Return the message of each priority that has waited longest."""
        with self._client.pipeline(transaction=False) as pipe:
            for key in self._keys("LINDEX", queue):
                pipe.lindex(key, -1)
            return [raw for raw in pipe.execute() if raw is not None]

    def remove(self, queue: str) -> Iterator[list[bytes]]:
        """Remove what waits in a queue, in batches; what comes meanwhile may stay."""
        for step, length in self.lengths(queue).items():
            name = priority_queue(self._channel, queue, step)
            for _ in range(0, length, BATCH):
                yield self._remove(name)

    def _remove(self, name: str) -> list[bytes]:
        # One transaction: a worker that pops at the same time gets other messages.
        with self._client.pipeline() as pipe:
            pipe.lrange(self._key("LRANGE", name), -BATCH, -1)
            pipe.ltrim(self._key("LTRIM", name), 0, -BATCH - 1)
            removed: list[bytes] = pipe.execute()[0]
        return removed

    def unacked(self, most: int) -> list[tuple[str, str]] | None:
        """Return exchange and routing key of each message that a worker has in hand.

        :param most: of how many; beyond, reading them all would take too long.
        :return: ``None`` if there are more.
        """
        name = self._channel.unacked_key
        if self._client.hlen(self._key("HLEN", name)) > most:
            return None
        return [tuple(json.loads(raw)[1:]) for raw in self._client.hvals(self._key("HVALS", name))]

    def _keys(self, command: str, queue: str) -> list[str]:
        channel = self._channel
        names = [priority_queue(channel, queue, step) for step in channel.priority_steps]
        return [self._key(command, name) for name in names]

    def _key(self, command: str, name: str) -> str:
        # With a global_keyprefix, kombu's client prefixes the keys of those commands only that
        # kombu itself uses.
        prefixed = getattr(self._client, "PREFIXED_SIMPLE_COMMANDS", ())
        return name if command in prefixed else f"{self._channel.global_keyprefix}{name}"


def headers_in(raw: str | bytes) -> Mapping[str, Any]:
    """Return the headers of a message as it lies in a queue; none if it is not kombu's."""
    try:
        headers = json.loads(raw)["headers"]
    except (KeyError, TypeError, ValueError):
        return {}
    return headers if isinstance(headers, Mapping) else {}


class Control(CeleryControl):
    """``app.control``: revoking and purging delete the rows of the outbox, if there is one."""

    def purge(self, connection: Connection | None = None) -> int:
        """Discard what waits in the queues that a worker would consume from, as in Celery.

        ``ws-celery worker --purge`` calls it.

        :return: how many messages.
        :raises Unavailable: before anything is lost, if the database does not answer.
        """
        if self.app.outbox is None:
            return super().purge(connection)
        with self.app.connection_or_acquire(connection) as connected:
            for queue in self.app.amqp.queues.consume_from.values():
                queue(connected.default_channel).declare()
            names = list(self.app.amqp.queues.consume_from)
            return sum(count for name in names for count, _ in purge(self.app, connected, name))

    discard_all = purge

    def revoke(
        self,
        task_id: str | Iterable[str],
        destination: Sequence[str] | None = None,
        **options: Any,
    ) -> Any:
        """Tell workers not to run a task, as in Celery.

        Workers forget what was revoked when they stop. With the outbox the task's row is deleted,
        unless it is running, so that no worker runs it later either.

        :param task_id: an id, or several.
        """
        outbox = self.app.outbox
        if outbox is not None and destination is None:
            outbox.revoke([task_id] if isinstance(task_id, str) else list(task_id))
        return super().revoke(task_id, destination, **options)


def purge(app: PyramidCelery, connection: Connection, queue: str) -> Iterator[tuple[int, int]]:
    """Discard what waits in a queue, step by step; with the outbox, its rows as well.

    :return: of each step, how many messages and how many rows.
    :raises Unavailable: before anything is lost, if the database does not answer.
    """
    channel = connection.default_channel
    if app.outbox is None:
        yield channel.queue_purge(queue) or 0, 0
        return
    app.outbox.check_table()
    for headers in _removed(channel, connection.transport.driver_type, queue):
        yield len(headers), app.outbox.discard(headers)


def _removed(channel: StdChannel, kind: str, queue: str) -> Iterator[list[Mapping[str, Any]]]:
    if kind == "redis":
        for messages in RedisQueues(channel).remove(queue):
            yield [headers_in(raw) for raw in messages]
        return
    waiting = channel.queue_declare(queue, passive=True)[1]
    for start in range(0, waiting, BATCH):
        yield list(_fetched(channel, queue, min(BATCH, waiting - start)))


def _fetched(channel: StdChannel, queue: str, most: int) -> Iterable[Mapping[str, Any]]:
    for _ in range(most):
        try:
            message = channel.basic_get(queue, no_ack=True)
        except (KeyError, TypeError, ValueError):
            yield {}  # removed, and not kombu's
            continue
        if message is None:
            return
        yield message.headers or {}
