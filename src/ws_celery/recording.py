"""Deferred dispatch: what is published in a transaction is recorded, and leaves when it commits.

The way in is :class:`RecordingProducer`, which stands in for kombu's producer while a transaction
is open that somebody will finish. What it keeps belongs to a
:class:`~ws_celery.transactions.DispatchDataManager`, which has joined that transaction. What cannot
be sent, or would be read as something else, is refused at the call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from uuid import UUID

from amqp.serialization import dumps as dumps_amqp
from celery.backends.base import Backend
from kombu import Connection, Exchange, Producer, Queue
from kombu.compression import get_encoder
from kombu.exceptions import EncodeError
from kombu.serialization import dumps, loads
from kombu.utils import json
from pyramid.request import Request

from ws_celery.exceptions import ArgumentNotSerializable, OptionNotSendable
from ws_celery.request import Args, Kwargs

if TYPE_CHECKING:
    from sqlalchemy.orm import SessionTransaction

    from ws_celery.outbox.store import Journal

__all__ = (
    "OUTBOX_HEADER",
    "ROW_HEADER",
    "Publication",
    "RecordingProducer",
    "blame_argument",
    "freeze_envelope",
    "holding",
    "immediate",
    "immediately",
    "not_while_recording",
    "refuse_misread",
    "withheld",
)

#: Name of the message header with the id of the row that the message has in the outbox.
ROW_HEADER = "ws_celery_outbox"

#: Name of the message header that says which outbox that is.
OUTBOX_HEADER = "ws_celery_outbox_place"

#: Whether the code runs inside :func:`immediately`.
immediate: ContextVar[bool] = ContextVar("ws_celery_immediate", default=False)

#: What :func:`holding` keeps around the running code; ``None`` outside of it.
withheld: ContextVar[list[Publication] | None] = ContextVar("ws_celery_held", default=None)


@contextmanager
def immediately() -> Iterator[None]:
    """Send what is called inside at once, whatever transaction is open.

    The message leaves before the transaction commits, and stays sent if it aborts: the task may
    run before the data it needs is visible. Retries leave this way, because the transaction they
    are raised in is about to abort.
    """
    token = immediate.set(True)
    try:
        yield
    finally:
        immediate.reset(token)


@contextmanager
def holding() -> Iterator[list[Publication]]:
    """Keep what is sent inside, whatever transaction is open; the caller sends it."""
    publications: list[Publication] = []
    token = withheld.set(publications)
    try:
        yield publications
    finally:
        withheld.reset(token)


class Publication:
    """One message, as :meth:`kombu.Producer.publish` takes it.

    :param payload: the serialised body.
    :param options: of the publish.
    """

    __slots__ = (
        *("anonymous", "declare", "options", "outbox", "payload", "row_id"),
        *("session_transactions", "task_id", "task_name", "waits"),
    )

    def __init__(self, payload: str | bytes, options: dict[str, Any]) -> None:
        headers = options.get("headers") or {}
        self.payload = payload
        self.options = options
        #: What has to be declared before the publish: queues and exchanges.
        self.declare: Sequence[Queue | Exchange] = options.get("declare") or ()
        #: Id and name of the task; ``None`` for an event that travels along.
        self.task_id: str | None = headers.get("id")
        self.task_name: str | None = headers.get("task")
        #: The transactions and savepoints of SQLAlchemy in which it was dispatched.
        self.session_transactions: tuple[SessionTransaction, ...] = ()
        #: Id of the row that it has in the outbox.
        self.row_id: UUID | None = None
        #: Which outbox that is; ``None`` if it is not known.
        self.outbox: str | None = None
        #: Whether the message does not name its row: another program has an outbox of its own.
        self.anonymous = False
        #: Whether it waits in the outbox for its eta, not in a worker's memory.
        self.waits = False

    def call(self) -> tuple[Any, Any]:
        """Return ``args`` and ``kwargs``, decoded from the body; of a message of our own.

        :raises Exception: what a serializer raises, or if it is the message of an event.
        """
        content_type = self.options["content_type"]
        encoding = self.options["content_encoding"]
        args, kwargs, _ = loads(self.payload, content_type, encoding, accept={content_type})
        return args, kwargs


class RecordingProducer:
    """Takes kombu's place while a transaction is open: ``publish()`` keeps instead of sending.

    The body is serialised at the call and the headers are copied, so that changing an argument
    afterwards changes nothing and a value that does not serialise fails where the caller can see
    it. Routing, headers and signals have happened by then: Celery and its instrumentations do them
    before they publish.

    :param connection: the connection that the message will leave by; it is never opened here.
    :param publications: where to keep what is published.
    :param session_transactions: what is open in the request's SQLAlchemy session.
    :param request: the request on whose behalf it is published.
    :param journal: gives messages their rows in the outbox before they are kept, or refuses them.
    """

    #: No serializer of its own: Celery passes the task's with every message.
    serializer: str | None = None
    #: Where the result of the next message arrives, if a queue has to be declared for it.
    reply_queue: Queue | None = None

    def __init__(
        self,
        connection: Connection,
        publications: MutableSequence[Publication],
        session_transactions: tuple[SessionTransaction, ...] = (),
        request: Request | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.connection = connection
        self.session_transactions = session_transactions
        self.request = request
        self._publications = publications
        self._journal = journal

    def publish(self, body: object, *, serializer: str | None = None, **options: Any) -> None:
        content_type, content_encoding, payload = dumps(body, serializer=serializer)
        options.update(content_type=content_type, content_encoding=content_encoding)
        if self.reply_queue is not None:
            options["declare"] = [*(options.get("declare") or ()), self.reply_queue]
            self.reply_queue = None
        freeze_envelope(options, self.connection.transport.driver_type)
        self.record([Publication(payload, options)])

    def record(self, publications: Sequence[Publication]) -> None:
        """Keep what is serialised already."""
        if self._journal is not None:
            self._journal.admit(publications, self.request)
        for publication in publications:
            publication.session_transactions = self.session_transactions
            self._publications.append(publication)


def not_while_recording(backend: Backend) -> None:
    """Keep a result backend from preparing for the result of a call that is recorded: too early.

    Redis would be contacted at the call: a SUBSCRIBE for each task, and 19 s of waiting if it is
    down. ``AsyncResult.get()`` subscribes by itself.
    """
    on_task_call = backend.on_task_call

    def unless_recording(producer: Producer | RecordingProducer, task_id: str) -> Any:
        if not isinstance(producer, RecordingProducer):
            # Signature.election() takes what is returned for a mapping.
            return on_task_call(producer, task_id) or {}
        producer.reply_queue = getattr(backend, "binding", None)  # rpc:// would declare it now
        return {}

    backend.on_task_call = unless_recording


#: What every broker takes and nobody can change.
_PLAIN = frozenset((str, bool, float, type(None)))

#: What keys have to be.
_TEXTS = frozenset((str,))

#: The smallest whole number that has no place in a header of AMQP.
_TOO_BIG = 2**63

#: Options of a publish that end in the message beside its headers, and what they have to be.
_NUMBERS: dict[str, type | tuple[type, ...]] = {"priority": int, "expiration": (int, float)}

#: Options of a publish that are not written into the message.
_OF_PUBLISH = frozenset(
    (
        *("declare", "exchange", "routing_key", "retry", "retry_policy", "delivery_mode"),
        *("mandatory", "immediate", "timeout", "confirm_timeout"),
        *("content_type", "content_encoding", "compression", "headers", *_NUMBERS),
    )
)


def freeze_envelope(options: dict[str, Any], driver: str) -> None:
    """Replace what could be changed after the call by copies of it.

    :param options: of a publish, as :meth:`kombu.Producer.publish` takes them.
    :param driver: the ``driver_type`` of the transport.
    :raises OptionNotSendable: if the broker's library could not write one of them.
    """
    headers = options.get("headers") or {}
    task = str(headers.get("task"))
    options["headers"] = _frozen(headers, headers, driver, f"{task}: the header")
    own = options.keys() - _OF_PUBLISH
    options.update(_frozen(options, own, driver, f"{task}: the option"))
    for name, kind in _NUMBERS.items():
        value = options.get(name)
        if value is not None and not isinstance(value, kind):
            raise OptionNotSendable(f"{task}: the option {name!r}", f"{value!r} is no number")
    if compression := options.get("compression"):
        try:
            get_encoder(compression)
        except (KeyError, TypeError):
            problem = f"{compression!r} is not known to kombu"
            raise OptionNotSendable(f"{task}: the option 'compression'", problem) from None


def _frozen(
    values: Mapping[str, Any], names: Iterable[str], driver: str, what: str
) -> dict[str, Any]:
    frozen = {}
    for name in names:
        value = values[name]
        if type(value) not in _PLAIN:
            try:
                value = _copy(value, driver)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
                raise OptionNotSendable(f"{what} {name!r}", problem) from error
        frozen[name] = value
    return frozen


def _copy(value: object, driver: str) -> object:
    if type(value) is int and -_TOO_BIG <= value < _TOO_BIG:
        return value
    if isinstance(value, dict) and _TEXTS.issuperset(map(type, value)):
        return {k: v if type(v) in _PLAIN else _copy(v, driver) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [v if type(v) in _PLAIN else _copy(v, driver) for v in value]
    if driver == "amqp":
        dumps_amqp("F", [{"": value}])  # numbers, times and the like: nobody changes them
        return value
    return json.loads(json.dumps(value))


#: The keys of an object that kombu writes for a UUID or a time, and reads as one.
_FORM = frozenset(("__type__", "__value__"))

_MISREAD = (
    "an object with the keys __type__ and __value__ only would be read as another value, or not "
    "at all"
)

#: What has no parts.
_WITHOUT_FORM = frozenset((str, int, bool, float, bytes, type(None)))


def blame_argument(
    error: EncodeError, task: str, args: Args, kwargs: Kwargs, serializer: str | None
) -> None:
    """Raise the error that says which argument is to blame for ``error``, if one is.

    :param serializer: its name; ``None`` for JSON.
    :raises ArgumentNotSerializable: an ``EncodeError``, too.
    """
    serializer = serializer or "json"
    for name, value in _named(args, kwargs):
        for culprit in _culprits(value, serializer):
            raise ArgumentNotSerializable(task, name, serializer, _advice(culprit)) from error


def refuse_misread(
    task: str, args: Args, kwargs: Kwargs, serializer: str | None, options: Mapping[str, Any]
) -> None:
    """Refuse what can be written as JSON and is read as something else; the worker would meet it.

    :param options: of the call; headers and callbacks travel, too.
    :raises ArgumentNotSerializable: if it is in an argument.
    :raises OptionNotSendable: if it is in an option.
    """
    if serializer in (None, "json") and _is_misread((args, kwargs)):
        # If none of the values is to blame, the two names of the keyword arguments are.
        misread = (name for name, value in _named(args, kwargs) if _is_misread(value))
        advice = f"{_MISREAD}. Name another key, or pass its text, by json.dumps()"
        raise ArgumentNotSerializable(task, next(misread, "argument '__type__'"), "json", advice)
    if _is_misread(options):
        name = next(name for name, value in options.items() if _is_misread(value))
        raise OptionNotSendable(f"{task}: the option {name!r}", _MISREAD)


def _is_misread(value: object) -> bool:
    try:
        return _has_form(value)
    except RecursionError:
        return False  # it is its own part, and cannot be written


def _has_form(value: object) -> bool:
    if isinstance(value, dict):
        if len(value) == len(_FORM) and value.keys() == _FORM:
            return True
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return False
    for each in value:  # noqa: SIM110 - at each call, and this is half of what any() takes
        if type(each) not in _WITHOUT_FORM and _has_form(each):
            return True
    return False


def _named(args: Args, kwargs: Kwargs) -> Iterator[tuple[str, Any]]:
    for number, value in enumerate(args or (), 1):
        yield f"argument {number}", value
    for name, value in (kwargs or {}).items():
        yield f"argument {name!r}", value


def _culprits(value: object, serializer: str, around: tuple[object, ...] = ()) -> Iterator[object]:
    """Yield what does not serialise, the smallest parts of it."""
    try:
        dumps(value, serializer=serializer)
    except Exception:  # noqa: BLE001 - values have encoders of their own, which may raise anything
        around = (*around, value)
        # What is a part of itself has no smallest one.
        parts = [part for part in _parts(value) if not any(part is each for each in around)]
        culprits = [found for part in parts for found in _culprits(part, serializer, around)]
        yield from culprits or [value]


def _parts(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return [*value, *value.values()]
    return value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else ()


def _advice(value: object) -> str:
    kind = type(value).__name__
    sqlalchemy = sys.modules.get("sqlalchemy")
    state: Any = sqlalchemy and sqlalchemy.inspect(value, raiseerr=False)
    if hasattr(state, "identity_key") and hasattr(state, "mapper"):
        keys = ", ".join(column.key for column in state.mapper.primary_key)
        return (
            f"a {kind} is a row of the database. Pass its key ({keys}), and load it in the task; "
            "a new one has its key after session.flush()"
        )
    return f"it has a {kind}. Pass numbers, texts, lists and dictionaries"
