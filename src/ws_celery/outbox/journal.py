"""Writing the rows of one transaction, through the session that the application works with."""

from __future__ import annotations

import json as plain_json
from collections.abc import Iterable, Mapping
from datetime import MAXYEAR, MINYEAR, datetime, timezone
from typing import TYPE_CHECKING, Any
from uuid import UUID

from celery.utils.time import maybe_iso8601
from kombu.entity import Queue
from kombu.utils import json
from zope.sqlalchemy import mark_changed

from ws_celery.compat import resources_of
from ws_celery.exceptions import BrokenRow, SessionError
from ws_celery.outbox.tables import LONGEST_NAME, aware
from ws_celery.recording import ROW_HEADER, Publication, bare_key

if TYPE_CHECKING:
    from ws_celery.outbox.store import Outbox

__all__ = (
    "Journal",
    "check_names",
    "connection_of",
    "join",
    "publication_of",
    "row_id_in",
    "row_of",
    "times_of",
)

#: What is not kept: how the first publisher tried, and what is computed anew.
_PASSING = ("declare", "exchange", "expiration", "retry", "retry_policy")


def row_of(publication: Publication, queues: Mapping[str, Queue]) -> dict[str, Any]:
    """Return what the columns of the message's row hold, by their names.

    :param publication: the message.
    :param queues: the app's queues by name.
    """
    options = publication.options
    declared = [entity.name for entity in publication.declare]
    exchange = options.get("exchange")
    payload = publication.payload
    kept = {key: value for key, value in options.items() if key not in _PASSING}
    kept |= {
        "declare": declared,
        "exchange": getattr(exchange, "name", exchange),
        "text": isinstance(payload, str),
        "anonymous": publication.anonymous,
    }
    return {
        "id": publication.row_id,
        **_names_of(publication, queues),
        "body": payload.encode() if isinstance(payload, str) else payload,
        "options": json.dumps(kept),
        **times_of(publication),
    }


def _names_of(publication: Publication, queues: Mapping[str, Queue]) -> dict[str, Any]:
    reply_to = publication.options.get("reply_to")
    declared = [each for each in publication.declare if each.name != reply_to]
    told = publication.options.get("routing_key")
    return {
        "task_id": publication.task_id,
        "task": publication.task_name,
        "queue": declared[0].name if declared else _queue_of(told, queues),
    }


def _queue_of(told: Any, queues: Mapping[str, Queue]) -> Any:
    """Return the queue of a routing key, which names none if RabbitMQ delays the message."""
    key = bare_key(told) if isinstance(told, str) else told
    if key == told:
        return told
    return next((queue.name for queue in queues.values() if queue.routing_key == key), key)


def check_names(publication: Publication) -> None:
    """Refuse a message whose names do not fit their columns: its row would not be written.

    :raises ValueError: if the id or the name of the task, or the queue, is no such text.
    """
    for column, name in _names_of(publication, {}).items():
        if name is not None and not _fits(name):
            raise ValueError(
                f"{name!a:.60} is no {column.replace('_', ' ')} that the outbox can keep. "
                f"Pass text of at most {LONGEST_NAME} characters, without NUL."
            )


def _fits(name: Any) -> bool:
    if not isinstance(name, str) or len(name) > LONGEST_NAME or "\0" in name:
        return False
    # No database keeps half of a pair.
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def times_of(publication: Publication) -> dict[str, datetime | None]:
    """Return the ``eta`` and ``expires`` of a message, in UTC.

    :raises ValueError: if one of them is no time, or one that no database's driver may read.
    """
    return {name: _time(publication.options["headers"].get(name)) for name in ("eta", "expires")}


def row_id_in(headers: Mapping[str, Any] | None) -> UUID | None:
    """Return the id of the row that a message with these headers belongs to, or ``None``."""
    value = (headers or {}).get(ROW_HEADER)
    try:
        return None if value is None else UUID(value)
    except (AttributeError, TypeError, ValueError):
        return None  # somebody else's header


def publication_of(row: Any, queues: Mapping[str, Queue], now: datetime) -> Publication:
    """Make the message of a row again.

    :param row: a row of the table.
    :param queues: the app's queues by name; what is not there is not declared.
    :param now: the time, to tell what is left until the message expires.
    :raises BrokenRow: if the row does not hold a message.
    """
    try:
        options = _loads(row.options)
        payload = row.body.decode() if options.pop("text") else row.body
        anonymous = options.pop("anonymous", False)
        options["declare"] = [queues[name] for name in options["declare"] if name in queues]
        same = options["headers"]["id"] == row.task_id
    except Exception as error:
        raise BrokenRow(row.id, f"{type(error).__name__}: {error}") from error
    if not same:
        raise BrokenRow(row.id, "its headers are of another task")
    if row.expires is None:
        options["headers"]["expires"] = None  # or it began in time, and is run to its end
    else:
        options["expiration"] = max((aware(row.expires) - now).total_seconds(), 0)
    publication = Publication(payload, options)
    publication.row_id = row.id
    publication.anonymous = anonymous
    return publication


def _loads(text: str) -> Any:
    # Only kombu makes times and the like of objects with this key, which takes three times as long.
    return json.loads(text) if "__type__" in text else plain_json.loads(text)


def _time(text: str | None) -> datetime | None:
    # As the worker reads it: a time without a zone is UTC for Celery, whatever its own zone is.
    if text is None:
        return None
    try:
        time = aware(maybe_iso8601(text))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{text!r} is no time for eta or expires. Pass a datetime, or a text such as "
            "2030-01-31T12:00:00+01:00."
        ) from error
    # A database may show a time in its own zone, where the first and the last ones are none.
    if not MINYEAR < time.year < MAXYEAR:
        raise ValueError(
            f"{text} is no time for eta or expires: it is outside of the years 2 to 9998. Leave "
            "the option out if no time is meant."
        )
    return time.astimezone(timezone.utc)


#: How often the flush of a session may lead to another one.
_FLUSHES = 100


class Journal:
    """Writes what one transaction has dispatched into the outbox, before it commits.

    :param outbox: the outbox.
    :param txn: the transaction.
    :param publications: its messages, kept by the data manager: those of a savepoint that is rolled
        back are taken out of it.
    """

    def __init__(self, outbox: Outbox, txn: Any, publications: Iterable[Any]) -> None:
        self._outbox = outbox
        self._txn = txn
        self._publications = publications
        self._written: set[Any] = set()
        self._session: Any = None
        self._hooked = False
        self._late: list[Publication] = []

    def admit(self, publications: Iterable[Publication], request: Any) -> None:
        """Give messages that are to be kept their row.

        :param request: the request whose session they are written with.
        :raises ValueError: if ``eta`` or ``expires`` is no time, or a name does not fit the table.
        :raises SessionError: if it has no session.
        :raises SessionError: if its session does not commit with the transaction.
        """
        kept = [publication for publication in publications if self._outbox.keeps(publication)]
        if not kept:
            return
        if self._session is None:
            self._session = self._joined(request, str(kept[0].task_name))
        for publication in kept:
            check_names(publication)  # what is wrong is told at the call
            times_of(publication)
            self._outbox.number(publication)
        if self._txn.status == "Committing":
            self._admit_late(kept)
        elif not self._hooked:
            self._hooked = True
            self._txn.addBeforeCommitHook(self._flush_and_write)

    def _admit_late(self, publications: list[Publication]) -> None:
        mine = (
            each
            for each in resources_of(self._txn)
            if getattr(each, "session", None) is self._session
        )
        if any(each.tx.is_active for each in mine):
            self._insert(publications)  # a listener of the flush that the commit itself makes
        else:  # a listener of the session's commit, which takes no statement any more
            self._late += publications

    def write_late(self) -> None:
        """Write what the session was too late for in a transaction of our own, after the commit."""
        if self._late:
            self._outbox.keep_late(self._late)

    def _joined(self, request: Any, task: str) -> Any:
        """Return the session of a request, which now belongs to the transaction.

        Else its row would be committed by somebody else, or nobody, and the message would find
        none.
        """
        session = self._outbox.session_of(request, task)
        manager = getattr(request, "tm", None)
        if manager is not None and self._outbox.app.transactions.begun(manager) is not self._txn:
            raise SessionError.detached(
                task, "the transaction of its request is not the one that is open"
            )
        join(session, self._txn, task)
        return session

    def _flush_and_write(self) -> None:
        # First the flush: its listeners may dispatch. What later hooks dispatch needs a hook again.
        for _ in range(_FLUSHES):
            self._session.flush()
            if not (self._session.new or self._session.dirty or self._session.deleted):
                break
        self._hooked = False
        self.write()

    def write(self) -> None:
        """Write what has no row yet."""
        self._insert(
            publication
            for publication in self._publications
            if isinstance(publication, Publication)
            and publication.row_id
            and publication.row_id not in self._written
            and publication not in self._late
        )

    def _insert(self, publications: Iterable[Publication]) -> None:
        if not (kept := list(publications)):
            return
        self._written.update(publication.row_id for publication in kept)
        with self._outbox.explaining():
            connection = connection_of(self._session, self._outbox.rows.table, self._txn)
            self._outbox.write(connection, kept)


def connection_of(session: Any, table: Any, txn: Any) -> Any:
    """Return the connection of a session, in its transaction, to write ``table`` with.

    :param txn: the transaction that commits the session; it would not commit what the ORM has not
        written, if nobody told.
    """
    join(session, txn, table.fullname)
    return session.connection(bind_arguments={"clause": table})


def join(session: Any, txn: Any, what: str) -> None:
    """Let a session belong to a transaction, and be committed by it; it begins nothing yet.

    :param what: what it is for, in messages.
    :raises SessionError: if it belongs to another one, or this one commits already.
    """
    try:
        mark_changed(session, _ManagerOf(txn))
    except ValueError as error:
        raise SessionError.detached(what, "the transaction commits already") from error
    if not any(getattr(resource, "session", None) is session for resource in resources_of(txn)):
        raise SessionError.detached(
            what, "the session of its request belongs to another transaction"
        )


class _ManagerOf:
    """A transaction manager that knows one transaction."""

    def __init__(self, txn: Any) -> None:
        self._txn = txn

    def get(self) -> Any:
        """Return the transaction."""
        return self._txn
