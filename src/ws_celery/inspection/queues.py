"""The queues of an application: how much waits in them, what it is, and emptying them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from ws_celery.applications import get_celery_app
from ws_celery.control import purge
from ws_celery.exceptions import CannotPeek, NoSuchQueue
from ws_celery.inspection.brokers import Broker, Depth, connected
from ws_celery.inspection.dispatches import oldest_dispatch, waiting_dispatches
from ws_celery.inspection.messages import WaitingMessage, message_of
from ws_celery.inspection.tasks import queue_of
from ws_celery.redis_queues import headers_in

__all__ = (
    "Peeked",
    "Purged",
    "QueueState",
    "delete_queue",
    "peek_queue",
    "purge_queue",
    "queue_state",
    "queue_states",
)


#: Is called with the number of messages of each step.
Progress = Callable[[int], Any]


@dataclass(frozen=True)
class QueueState:
    """What is in a queue.

    :param name: of the queue.
    :param exists: whether the broker has it; most have any queue, RabbitMQ what was declared.
    :param is_used: whether the application sends to it, or its workers take from it.
    :param waiting: how many messages no worker has taken.
    :param priorities: how many of them by step of priority, where Redis keeps a list for each.
    :param unacked: how many messages workers have in hand; ``None`` if the broker does not tell.
    :param consumers: how many workers' channels take from it; ``None`` if the broker does not tell.
    :param oldest: since when the oldest message waits; ``None`` if there is none, or nobody knows.
    """

    name: str
    exists: bool
    is_used: bool
    waiting: int = 0
    priorities: dict[int, int] = field(default_factory=dict)
    unacked: int | None = None
    consumers: int | None = None
    oldest: datetime | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return {**asdict(self), "oldest": self.oldest and self.oldest.isoformat()}


@dataclass(frozen=True)
class Peeked:
    """What :func:`peek_queue` has seen.

    :param messages: the next ones to be taken first.
    :param source: ``broker``, or ``outbox`` where the broker cannot show its messages: then they
        are the unfinished dispatches to this queue, and workers may have some of them.
    """

    messages: list[WaitingMessage]
    source: str


@dataclass(frozen=True)
class Purged:
    """What was thrown away.

    :param messages: how many messages.
    :param rows: how many rows of the outbox, so that these messages are not sent again.
    """

    messages: int
    rows: int


def queue_states(source: Any) -> list[QueueState]:
    """Return what is in each queue: in those of the application, and in others bound beside them.

    Lengths are asked for, nothing is read, so that it takes no longer with a million messages.

    :param source: a registry, or what has one: a request, a Celery app.
    :raises BrokerUnavailable: if the broker does not answer; so do all functions here.
    """
    app = get_celery_app(source)
    with connected(app) as broker:
        used = _used(app)
        return _states(app, broker, used, sorted(used | _bound(app, broker, used)))


def queue_state(source: Any, name: str) -> QueueState:
    """Return what is in one queue.

    :raises NoSuchQueue: if there is none of this name.
    """
    app = get_celery_app(source)
    with connected(app) as broker:
        return _state(app, broker, name)


def peek_queue(source: Any, name: str, limit: int = 10) -> Peeked:
    """Look at the messages of a queue that are taken next, and leave them there.

    :param limit: how many at most.
    :raises NoSuchQueue: if there is none of this name.
    :raises CannotPeek: if the broker cannot show them, and there is no outbox that can.
    """
    app = get_celery_app(source)
    with connected(app) as broker:
        _state(app, broker, name)
        try:
            found = broker.peek(name, limit)
        except CannotPeek:
            if app.outbox is None:
                raise
            return Peeked(waiting_dispatches(app, name, limit), "outbox")
        return Peeked([message_of(app, broker.channel, raw) for raw in found], "broker")


def purge_queue(source: Any, name: str, progress: Progress | None = None) -> Purged:
    """Throw away what waits in a queue, for ever.

    With the outbox, the rows of these messages go as well; what waits there for its eta stays.

    :param progress: is told how many messages each step has taken.
    :raises NoSuchQueue: if there is none of this name.
    :raises OutboxUnavailable: if the rows cannot be deleted.
    """
    app = get_celery_app(source)
    with connected(app) as broker:
        if not _state(app, broker, name).exists:
            return Purged(0, 0)
        return _purge(app, broker, name, progress)


def delete_queue(source: Any, name: str, progress: Progress | None = None) -> Purged:
    """Throw away a queue and what waits in it; see :func:`purge_queue`.

    A queue that the application uses is made again by the next worker or message.
    """
    app = get_celery_app(source)
    with connected(app) as broker:
        if not _state(app, broker, name).exists:
            return Purged(0, 0)
        purged = _purge(app, broker, name, progress)
        broker.delete(name)
        return purged


def _purge(app: Any, broker: Broker, name: str, progress: Progress | None) -> Purged:
    messages = rows = 0
    for taken, settled in purge(app, broker.connection, name):
        messages, rows = messages + taken, rows + settled
        if progress is not None:
            progress(taken)
    return Purged(messages, rows)


def _state(app: Any, broker: Broker, name: str) -> QueueState:
    used = _used(app)
    (state,) = _states(app, broker, used, [name])
    if state.is_used or state.waiting or state.unacked:
        return state
    if state.exists if broker.keeps_queues else name in _bound(app, broker, used):
        return state
    raise NoSuchQueue(name)


def _states(app: Any, broker: Broker, used: set[str], names: list[str]) -> list[QueueState]:
    depths = broker.depths(names)
    since = _since(app, depths)
    return [
        QueueState(
            name,
            exists=True,
            is_used=name in used,
            waiting=depth.waiting,
            priorities=dict(depth.priorities),
            unacked=depth.unacked,
            consumers=depth.consumers,
            oldest=since.get(name),
        )
        if (depth := depths.get(name))
        else QueueState(name, exists=False, is_used=name in used)
        for name in names
    ]


def _used(app: Any) -> set[str]:
    """Return the queues that the application knows, or sends one of its tasks to."""
    routed = {queue_of(app, name) for name in app.declared}  # makes them known to kombu
    return {*app.amqp.queues, *filter(None, routed)}


def _bound(app: Any, broker: Broker, used: set[str]) -> set[str]:
    """Return the queues that are bound beside those of the application."""
    exchanges = {app.amqp.queues[name].exchange.name for name in used}
    return {queue for exchange in exchanges for _, _, queue in broker.bound(exchange)}


def _since(app: Any, depths: dict[str, Depth]) -> dict[str, datetime]:
    found = {name: depth.since for name, depth in depths.items() if depth.since}
    if app.outbox is None:
        return found
    headers = {name: [headers_in(raw) for raw in each.oldest] for name, each in depths.items()}
    return {**found, **oldest_dispatch(app, headers)}
