"""What each kind of broker can tell of its queues, without taking anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kombu.exceptions import OperationalError

from ws_celery.compat import delete_virtual_queue, virtual_queue_size
from ws_celery.control import RedisQueues
from ws_celery.exceptions import BrokerUnavailable, NotSupported
from ws_celery.masking import masked_text

if TYPE_CHECKING:
    from kombu import Connection
    from kombu.transport.virtual import Channel

    from ws_celery.app import PyramidCelery

__all__ = ("Broker", "Depth", "connected")

#: Seconds that a broker may take to answer.
_PATIENCE = 5.0

#: How many unacknowledged messages are read, to count them by queue. Of more, which would take
#: long, the numbers are not known.
_UNACKED = 20_000


@dataclass(frozen=True)
class Depth:
    """How much is in one queue; ``None`` is what the broker does not tell.

    :param waiting: messages that no worker has taken.
    :param priorities: how many of them by priority, where it keeps lists of their own.
    :param unacked: messages that workers have taken and not acknowledged.
    :param consumers: how many channels take messages.
    :param oldest: the messages that have waited longest, as they lie there.
    :param since: when the message was written that has waited longest.
    """

    waiting: int
    priorities: Mapping[int, int] = field(default_factory=dict)
    unacked: int | None = None
    consumers: int | None = None
    oldest: list[Any] = field(default_factory=list)
    since: datetime | None = None


class Broker:
    """What any broker of kombu's tells: how many messages wait, by declaring the queue passively.

    :param app: the Celery app.
    :param connection: a connection to its broker.
    """

    #: Whether a queue is there before somebody uses it.
    keeps_queues = True

    def __init__(self, app: PyramidCelery, connection: Connection) -> None:
        self._app = app
        self.connection = connection
        self.kind = connection.transport.driver_name

    @property
    def channel(self) -> Channel:
        """The channel to look through."""
        return self.connection.default_channel

    def bound(self, _exchange: str) -> Iterable[tuple[str, str, str]]:
        """Return routing key, pattern and queue of each binding of an exchange, if it tells."""
        return ()

    def depths(self, names: Iterable[str]) -> dict[str, Depth]:
        """Return what is in those of the queues that are there."""
        found = {name: self._depth(name) for name in names}
        return {name: depth for name, depth in found.items() if depth is not None}

    def _depth(self, name: str) -> Depth | None:
        with self.connection.channel() as channel:
            try:
                _, waiting, consumers = channel.queue_declare(name, passive=True)
            except self.connection.channel_errors as error:
                if str(getattr(error, "reply_code", "")) != "404":
                    raise
                return None
        return Depth(waiting, consumers=consumers)

    def peek(self, _name: str, _limit: int) -> list[Any]:
        """Return the messages that are taken next, as they lie there.

        :raises NotSupported: if it cannot show them without taking them.
        """
        raise NotSupported("peek", self.kind)

    def delete(self, name: str) -> None:
        """Delete a queue and what is in it."""
        self.channel.queue_delete(name)


class _Virtual(Broker):
    """A broker that knows no queues: kombu keeps messages there by the name of their queue."""

    keeps_queues = False

    def bound(self, exchange: str) -> Iterable[tuple[str, str, str]]:
        try:
            return list(self.channel.get_table(exchange))
        except KeyError:  # of an exchange that this process has not declared
            return ()

    def _depth(self, name: str) -> Depth | None:
        return Depth(virtual_queue_size(self.channel, name))

    def delete(self, name: str) -> None:
        channel = self.channel
        channel.queue_purge(name)
        for queue in self._app.amqp.queues.values():
            for key, pattern, bound in self.bound(queue.exchange.name):
                if bound == name:
                    delete_virtual_queue(channel, name, queue.exchange.name, key, pattern)


class _Redis(_Virtual):
    def depths(self, names: Iterable[str]) -> dict[str, Depth]:
        unacked = self._unacked()
        return {
            name: self._depth_with(name, None if unacked is None else unacked[name])
            for name in names
        }

    def _depth_with(self, name: str, unacked: int | None) -> Depth:
        queues = RedisQueues(self.channel)
        lengths = queues.lengths(name)
        oldest = queues.oldest(name) if any(lengths.values()) else []
        return Depth(sum(lengths.values()), lengths, unacked, oldest=oldest)

    def _unacked(self) -> Counter[str] | None:
        found = RedisQueues(self.channel).unacked(_UNACKED)
        if found is None:
            return None
        counted: Counter[str] = Counter()
        for (exchange, key), number in Counter(found).items():
            for queue in self._queues_of(exchange, key):
                counted[queue] += number
        return counted

    def _queues_of(self, exchange: str, key: str) -> Iterable[str]:
        table = self.bound(exchange) if exchange else ()
        # A queue that was deleted meanwhile is not bound any more; most are named as their key.
        return {queue for bound, _, queue in table if bound == key} or {key}

    def peek(self, name: str, limit: int) -> list[Any]:
        return RedisQueues(self.channel).next(name, limit)


class _Sql(_Virtual):
    def _depth(self, name: str) -> Depth | None:
        return self._asked(name, lambda found: Depth(found.count()))

    def peek(self, name: str, limit: int) -> list[Any]:
        message = self.channel.message_cls
        return self._asked(
            name,
            lambda found: [
                each.payload for each in found.order_by(message.sent_at, message.id).limit(limit)
            ],
        )

    def _asked(self, name: str, ask: Callable[[Any], Any]) -> Any:
        message, queue = self.channel.message_cls, self.channel.queue_cls
        session = self.channel.session
        try:
            return ask(
                session.query(message)
                .join(queue, queue.id == message.queue_id)
                .filter(queue.name == name, message.visible.is_(True))
            )
        finally:
            session.rollback()  # nothing is open while people read


class _Files(_Virtual):
    def _depth(self, name: str) -> Depth | None:
        written = [found.stat().st_mtime for found in self._files(name)]
        since = datetime.fromtimestamp(min(written), timezone.utc) if written else None
        return Depth(len(written), since=since)

    def peek(self, name: str, limit: int) -> list[Any]:
        return [found.read_bytes() for found in self._files(name)[:limit]]

    def _files(self, name: str) -> list[Path]:
        folder = Path(self.channel.data_folder_in)
        return [each for each in sorted(folder.iterdir()) if each.name.endswith(f".{name}.msg")]


_KINDS: dict[str, type[Broker]] = {
    "amqp": Broker,
    "filesystem": _Files,
    "redis": _Redis,
    "sql": _Sql,
}


@contextmanager
def connected(app: PyramidCelery) -> Iterator[Broker]:
    """Connect to the broker of an application, for a few seconds at most.

    :raises BrokerUnavailable: if it does not answer.
    """
    with app.connection_for_write() as connection:
        connection.connect_timeout = min(connection.connect_timeout or _PATIENCE, _PATIENCE)
        try:
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
            yield _KINDS.get(connection.transport.driver_type, _Virtual)(app, connection)
        except (OperationalError, *connection.connection_errors) as error:
            raise BrokerUnavailable(
                f"The broker does not answer: {masked_text(str(error))}. Start it, or correct "
                "`broker_url` in [celery]."
            ) from error
