"""The queues of an application: how much waits in them, what it is, and emptying them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

from kombu.serialization import loads as loads_body
from kombu.serialization import prepare_accept_content
from kombu.utils.json import loads

from ws_celery.app import get_celery_app
from ws_celery.control import headers_in, purge
from ws_celery.exceptions import BrokenRow, NotFound, NotSupported
from ws_celery.inspection.brokers import Broker, Depth, connected
from ws_celery.inspection.tasks import queue_of
from ws_celery.shown_arguments import shown_arguments

__all__ = (
    "Peeked",
    "Purged",
    "QueueState",
    "WaitingMessage",
    "delete_queue",
    "message_of",
    "oldest_dispatch",
    "peek_queue",
    "purge_queue",
    "queue_state",
    "queue_states",
    "time_of",
    "told",
    "waiting_dispatches",
)


@dataclass(frozen=True)
class WaitingMessage:
    """A message that waits in a queue.

    :param id: the id of the task, as ``AsyncResult`` has it; ``None`` if it is not Celery's.
    :param task: the name of the task.
    :param eta: before when it is not to run, if the call said so.
    :param expires: after when it is not to run, if the call said so.
    :param retries: how often the task has asked to be tried again.
    :param origin: process and host that sent it.
    :param priority: as the broker was given it.
    :param redelivered: whether a worker has had it before.
    :param arguments: ``args`` and ``kwargs``, their secrets masked; ``None`` if unreadable.
    :param problem: what is wrong with it.
    """

    id: str | None = None
    task: str | None = None
    eta: datetime | None = None
    expires: datetime | None = None
    retries: int = 0
    origin: str | None = None
    priority: int | None = None
    redelivered: bool = False
    arguments: Mapping[str, Any] | None = field(default=None, repr=False)
    problem: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        times = {"eta": self.eta, "expires": self.expires}
        return {**asdict(self), **{key: time and time.isoformat() for key, time in times.items()}}


def message_of(app: Any, channel: Any, raw: Any) -> WaitingMessage:
    """Return what a message of a virtual transport says, from the JSON that lies in the queue."""
    try:
        stored = loads(raw)
        message = channel.Message(stored, channel=channel)
        message.accept = prepare_accept_content(app.conf.accept_content)
    except Exception as error:  # noqa: BLE001  anybody may have written there anything
        return WaitingMessage(problem=f"no message of Celery: {_said(error)}")
    try:
        body, problem = message.decode(), None
    except Exception as error:  # noqa: BLE001
        body, problem = None, f"its arguments cannot be read: {_said(error)}"
    return told(app, message.headers, body, problem, message.properties)


def told(
    app: Any,
    headers: Any,
    body: Any,
    problem: str | None = None,
    properties: Mapping[str, Any] | None = None,
) -> WaitingMessage:
    """Return what a message says, from its headers and its body, decoded.

    :param problem: why there is no body.
    """
    known = headers if isinstance(headers, Mapping) else {}
    if "task" not in known and isinstance(body, Mapping) and "task" in body:
        # task_protocol = 1 has all in the body.
        known, body = body, (body.get("args"), body.get("kwargs"))
    properties = properties or {}
    priority = properties.get("priority")
    if not isinstance(known.get("task"), str):
        return WaitingMessage(priority=priority, problem=problem or "no message of Celery")
    call = body if isinstance(body, (list, tuple)) and len(body) > 1 else None
    return WaitingMessage(
        id=str(known.get("id")),
        task=known["task"],
        eta=time_of(known.get("eta")),
        expires=time_of(known.get("expires")),
        retries=known.get("retries") or 0,
        origin=known.get("origin"),
        priority=priority,
        redelivered=bool(known.get("redelivered")),
        arguments=shown_arguments(app, known["task"], *call[:2]) if call else None,
        problem=problem or (None if call else "its body holds no arguments"),
    )


def time_of(value: Any) -> datetime | None:
    """Return a time of a message in UTC; ``None`` if there is none, or it is none."""
    try:
        found = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return found.astimezone(timezone.utc) if found.tzinfo else found.replace(tzinfo=timezone.utc)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def oldest_dispatch(app: Any, messages: Mapping[str, Sequence[Any]]) -> dict[str, datetime]:
    """Return when the first of some messages was dispatched.

    :param messages: the headers of messages, by anything.
    :return: the times by the same, without those that have no row.
    """
    wanted = {key: app.outbox.row_ids(headers) for key, headers in messages.items()}
    columns = app.outbox.rows.table.c
    ids = [row_id for found in wanted.values() for row_id in found]
    if not ids:
        return {}
    statement = app.outbox.rows.select().with_only_columns(columns.id, columns.created_at)
    with app.outbox.begin() as connection:
        found = connection.execute(statement.where(columns.id.in_(ids))).all()
    times = {row_id: _utc(time) for row_id, time in found}
    return {
        key: min(times[row_id] for row_id in row_ids if row_id in times)
        for key, row_ids in wanted.items()
        if times.keys() & set(row_ids)
    }


def waiting_dispatches(app: Any, queue: str, limit: int) -> list[WaitingMessage]:
    """Return the unfinished dispatches to a queue, the oldest first."""
    columns = app.outbox.rows.table.c
    statement = app.outbox.rows.select(dead=False).where(columns.queue == queue).limit(limit)
    with app.outbox.begin() as connection:
        return [_told(app, row) for row in connection.execute(statement)]


def _told(app: Any, row: Any) -> WaitingMessage:
    try:
        publication = app.outbox.publication_of(row)
    except BrokenRow as error:
        return WaitingMessage(id=row.task_id, task=row.task, problem=error.problem)
    options = publication.options
    accept = prepare_accept_content(app.conf.accept_content)
    content = options["content_type"], options["content_encoding"]
    try:
        body, problem = loads_body(publication.payload, *content, accept=accept), None
    except Exception as error:  # noqa: BLE001  whatever was written there; it is shown, not run
        body, problem = None, f"its arguments cannot be read: {type(error).__name__}: {error}"
    return told(app, options["headers"], body, problem, options)


def _utc(time: datetime) -> datetime:
    # Not all databases keep the zone.
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)


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

    :raises NotFound: if there is none of this name.
    """
    app = get_celery_app(source)
    with connected(app) as broker:
        return _state(app, broker, name)


def peek_queue(source: Any, name: str, limit: int = 10) -> Peeked:
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
            return Peeked(waiting_dispatches(app, name, limit), "outbox")
        return Peeked([message_of(app, broker.channel, raw) for raw in found], "broker")


def purge_queue(source: Any, name: str, progress: Progress | None = None) -> Purged:
    """Throw away what waits in a queue, for ever.

    With the outbox, the rows of these messages go as well; what waits there for its eta stays.

    :param progress: is told how many messages each step has taken.
    :raises NotFound: if there is none of this name.
    :raises Unavailable: if the rows cannot be deleted.
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
    raise NotFound("queue", name)


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
