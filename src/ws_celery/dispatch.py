"""Deferred dispatch: what is published in a transaction is recorded, and leaves when it commits.

The way in is :class:`RecordingProducer`, which stands in for kombu's producer while a transaction
is open that somebody will finish. What it keeps belongs to a
:class:`~ws_celery.datamanager.DispatchDataManager`, which has joined that transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from uuid import UUID

from kombu import Connection, Producer, Queue
from kombu.serialization import dumps, loads

from ws_celery.delays import delay_anew
from ws_celery.envelope import freeze_envelope

__all__ = (
    "OUTBOX_HEADER",
    "ROW_HEADER",
    "Publication",
    "RecordingProducer",
    "held_publications",
    "holding",
    "immediately",
    "is_immediate",
)

#: Name of the message header with the id of the row that the message has in the outbox.
ROW_HEADER = "ws_celery_outbox"

#: Name of the message header that tells which outbox that is.
OUTBOX_HEADER = "ws_celery_outbox_place"

_held: ContextVar[list[Any] | None] = ContextVar("ws_celery_held", default=None)

_immediate: ContextVar[bool] = ContextVar("ws_celery_immediate", default=False)


@contextmanager
def immediately() -> Iterator[None]:
    """Send what is called inside at once, whatever transaction is open.

    The message leaves before the transaction commits, and stays sent if it aborts: the task may
    run before the data it needs is visible. Retries leave this way, because the transaction they
    are raised in is about to abort.
    """
    token = _immediate.set(True)
    try:
        yield
    finally:
        _immediate.reset(token)


def is_immediate() -> bool:
    """Tell whether the code runs inside :func:`immediately`."""
    return _immediate.get()


@contextmanager
def holding() -> Iterator[list[Any]]:
    """Keep what is sent inside, whatever transaction is open; the caller sends it."""
    held: list[Any] = []
    token = _held.set(held)
    try:
        yield held
    finally:
        _held.reset(token)


def held_publications() -> list[Any] | None:
    """Return what :func:`holding` keeps around the running code; ``None`` outside of it."""
    return _held.get()


class Publication:
    """One message, as :meth:`kombu.Producer.publish` takes it.

    :param payload: the serialised body.
    :param options: of the publish.
    """

    __slots__ = (
        *("_options", "anonymous", "outbox", "payload", "row_id", "session_transactions", "waits"),
    )

    def __init__(self, payload: str | bytes, options: dict[str, Any]) -> None:
        self.payload = payload
        self._options = options
        #: The transactions and savepoints of SQLAlchemy in which it was dispatched.
        self.session_transactions: tuple[Any, ...] = ()
        #: Id of the row that it has in the outbox.
        self.row_id: UUID | None = None
        #: Which outbox that is; ``None`` if it is not known.
        self.outbox: str | None = None
        #: Whether the message does not tell its row: another program has an outbox of its own.
        self.anonymous = False
        #: Whether it waits in the outbox for its eta, not in a worker's memory.
        self.waits = False

    @property
    def options(self) -> dict[str, Any]:
        """Options of the publish."""
        return self._options

    @property
    def declare(self) -> Sequence[Any]:
        """What has to be declared before the publish: queues and exchanges."""
        return self._options.get("declare") or ()

    @property
    def task_id(self) -> str | None:
        """Id of the task, or ``None`` for an event that travels along."""
        return self._header("id")

    @property
    def task_name(self) -> str | None:
        """Name of the task, or ``None`` for an event that travels along."""
        return self._header("task")

    @property
    def call(self) -> tuple[Any, Any] | None:
        """The ``args`` and ``kwargs`` of the call; ``None`` if they cannot be read."""
        kind = self.options.get("content_type"), self.options.get("content_encoding")
        try:
            args, kwargs, _ = loads(self.payload, *kind, accept={kind[0]})  # our own
        except Exception:  # noqa: BLE001 - serialisers raise anything
            return None
        return args, kwargs

    @property
    def told_arguments(self) -> tuple[Any, Any]:
        """The arguments as Celery shows them in logs: cut short, or what the call gave instead."""
        return self._header("argsrepr"), self._header("kwargsrepr")

    def _header(self, name: str) -> Any:
        return (self.options.get("headers") or {}).get(name)

    def publish(self, producer: Producer, **overrides: Any) -> None:
        """Hand the message to the broker."""
        options = {**self.options, **overrides}
        delay_anew(options)
        if self.row_id is not None and not self.anonymous:
            row = {ROW_HEADER: str(self.row_id), OUTBOX_HEADER: self.outbox}
            options["headers"] = {**options["headers"], **row}
        producer.publish(self.payload, **options)


class RecordingProducer:
    """Takes kombu's place while a transaction is open: ``publish()`` keeps instead of sending.

    The body is serialised at the call and the headers are copied, so that changing an argument
    afterwards changes nothing and a value that does not serialise fails where the caller can see
    it. Routing, headers and signals
    have happened by then: Celery and its instrumentations do them before they publish.

    :param connection: the connection that the message will leave by; it is never opened here.
    :param publications: where to keep what is published.
    :param session_transactions: what is open in the request's SQLAlchemy session.
    :param request: the request on whose behalf it is published.
    :param admit: is told of messages and the request before they are kept, and may refuse them.
    """

    #: No serializer of its own: Celery passes the task's with every message.
    serializer: str | None = None
    #: Where the result of the next message arrives, if a queue has to be declared for it.
    reply_queue: Queue | None = None

    def __init__(
        self,
        connection: Connection,
        publications: MutableSequence[Publication],
        session_transactions: tuple[Any, ...] = (),
        request: Any = None,
        admit: Callable[[Sequence[Publication], Any], None] | None = None,
    ) -> None:
        self.connection = connection
        self.session_transactions = session_transactions
        self.request = request
        self._publications = publications
        self._admit = admit

    def publish(self, body: Any, *, serializer: str | None = None, **options: Any) -> None:
        content_type, content_encoding, payload = dumps(body, serializer=serializer)
        options.update(content_type=content_type, content_encoding=content_encoding)
        if self.reply_queue is not None:
            options["declare"] = [*(options.get("declare") or ()), self.reply_queue]
            self.reply_queue = None
        freeze_envelope(options, self.connection.transport.driver_type)
        self.record([Publication(payload, options)])

    def record(self, publications: Sequence[Publication]) -> None:
        """Keep what is serialised already."""
        if self._admit is not None:
            self._admit(publications, self.request)
        for publication in publications:
            publication.session_transactions = self.session_transactions
            self._publications.append(publication)
