"""The queues of an application: how much waits in them, what it is, and emptying them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from ws_celery.app import PyramidCelery, get_celery_app
from ws_celery.control import headers_in, purge
from ws_celery.exceptions import NotFound, NotSupported
from ws_celery.inspection.brokers import Broker, Depth, connected
from ws_celery.inspection.messages import (
    Record,
    Source,
    WaitingMessage,
    message_of_outbox,
    message_of_queue,
    time_of,
)
from ws_celery.inspection.tasks import queue_of

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
Progress = Callable[[int], object]


@dataclass(frozen=True)
class QueueState(Record):
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


def queue_states(source: Source) -> list[QueueState]:
    """Return what is in each queue: in those of the application, and in others bound beside them.

    Lengths are asked for, nothing is read, so that it takes no longer with a million messages.

    :param source: a registry, or what has one: a request, a Celery app.
    :raises BrokerUnavailable: if the broker does not answer; so do all functions here.
    """
    app = get_celery_app(source)
    with connected(app) as broker:
        used = _used(app)
        return _states(app, broker, used, sorted(used | _bound(app, broker, used)))


def queue_state(source: Source, name: str) -> QueueState:
    """Return what is in one queue.

    :raises NotFound: if there is none of this name.
    """
    app = get_celery_app(source)
    with connected(app) as broker:
        return _state(app, broker, name)


def peek_queue(source: Source, name: str, limit: int = 10) -> Peeked:
    """Look at the messages of a queue that are taken next, and leave them there.

    :param limit: how many at most.
    :raises NotFound: if there is none of this name.
    :raises NotSupported: if the broker cannot show them, and there is no outbox that can.
    """
    app = get_celery_app(source)
    with connected(app) as broker:
        _state(app, broker, name)
        try:
            found = broker.peek(name, limit)
        except NotSupported:
            if app.outbox is None:
                raise
            return Peeked(_unfinished(app, name, limit), "outbox")
        return Peeked([message_of_queue(app, broker.channel, raw) for raw in found], "broker")


def _unfinished(app: PyramidCelery, queue: str, limit: int) -> list[WaitingMessage]:
    """Return the dispatches to a queue that have not taken effect yet, the oldest first."""
    statement = app.outbox.rows.select(dead=False).where(app.outbox.rows.table.c.queue == queue)
    with app.outbox.begin() as connection:
        rows = connection.execute(statement.limit(limit))
        return [message_of_outbox(app, row) for row in rows]


def purge_queue(source: Source, name: str, progress: Progress | None = None) -> Purged:
    """Throw away what waits in a queue, for ever.

    With the outbox, the rows of these messages go as well; what waits there for its eta stays.

    :param progress: is called with how many messages each step has taken.
    :raises NotFound: if there is none of this name.
    :raises Unavailable: if the rows cannot be deleted.
    """
    return _purge(source, name, progress, delete=False)


def delete_queue(source: Source, name: str, progress: Progress | None = None) -> Purged:
    """Throw away a queue and what waits in it; see :func:`purge_queue`.

    A queue that the application uses is made again by the next worker or message.
    """
    return _purge(source, name, progress, delete=True)


def _purge(source: Source, name: str, progress: Progress | None, *, delete: bool) -> Purged:
    app = get_celery_app(source)
    messages = rows = 0
    with connected(app) as broker:
        if not _state(app, broker, name).exists:
            return Purged(0, 0)
        for taken, settled in purge(app, broker.connection, name):
            messages, rows = messages + taken, rows + settled
            if progress is not None:
                progress(taken)
        if delete:
            broker.delete(name)
    return Purged(messages, rows)


def _state(app: PyramidCelery, broker: Broker, name: str) -> QueueState:
    used = _used(app)
    (state,) = _states(app, broker, used, [name])
    if state.is_used or state.waiting or state.unacked:
        return state
    if state.exists if broker.keeps_queues else name in _bound(app, broker, used):
        return state
    raise NotFound("queue", name)


def _states(
    app: PyramidCelery, broker: Broker, used: set[str], names: list[str]
) -> list[QueueState]:
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


def _used(app: PyramidCelery) -> set[str]:
    """Return the queues that the application knows, or sends one of its tasks to."""
    routed = {queue_of(app, name) for name in app.declared}  # makes them known to kombu
    return {*app.amqp.queues, *filter(None, routed)}


def _bound(app: PyramidCelery, broker: Broker, used: set[str]) -> set[str]:
    """Return the queues that are bound beside those of the application."""
    exchanges = {app.amqp.queues[name].exchange.name for name in used}
    return {queue for exchange in exchanges for _, _, queue in broker.bound(exchange)}


def _since(app: PyramidCelery, depths: Mapping[str, Depth]) -> dict[str, datetime]:
    """Return since when the oldest message of each queue waits, where that is known."""
    found = {name: depth.since for name, depth in depths.items() if depth.since}
    if app.outbox is None:
        return found
    ids = {
        name: app.outbox.row_ids([headers_in(raw) for raw in depth.oldest])
        for name, depth in depths.items()
    }
    times = _dispatched(app, [row_id for each in ids.values() for row_id in each])
    oldest = {
        name: min(known)
        for name, each in ids.items()
        if (known := [times[row_id] for row_id in each if row_id in times])
    }
    return found | oldest


def _dispatched(app: PyramidCelery, ids: Collection[UUID]) -> dict[UUID, datetime]:
    """Return when the dispatches of rows were, without those of rows that are gone."""
    if not ids:
        return {}
    columns = app.outbox.rows.table.c
    statement = app.outbox.rows.select().with_only_columns(columns.id, columns.created_at)
    with app.outbox.begin() as connection:
        rows = connection.execute(statement.where(columns.id.in_(ids))).all()
    # Not all databases keep the zone.
    return {row_id: time for row_id, stored in rows if (time := time_of(stored))}
