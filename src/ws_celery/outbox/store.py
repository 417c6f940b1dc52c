"""The outbox of one application: which dispatches it keeps, and how they become rows and messages.

A row is written in the transaction that dispatches, by the session of its request: a
:class:`Journal` sees to that.
"""

from __future__ import annotations

import json as plain_json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import MAXYEAR, MINYEAR, datetime, timezone
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar
from uuid import UUID, uuid4

from celery.utils.time import maybe_iso8601
from kombu.utils import json
from zope.interface import implementer

from ws_celery.compat import resources_of
from ws_celery.converters import aware
from ws_celery.exceptions import BrokenRow, ConfigurationError, SessionError
from ws_celery.interfaces import IOutbox
from ws_celery.masking import logger_of
from ws_celery.outbox.rows import Rows
from ws_celery.outbox.runs import Runs, row_id_in
from ws_celery.outbox.tables import LONGEST_NAME, Database, join, outbox_table, place_of
from ws_celery.outbox.worker import Reader, Reception, Settlement
from ws_celery.publishing import bare_key
from ws_celery.recording import Publication
from ws_celery.worker import Request as WorkerRequest

if TYPE_CHECKING:
    from celery import Task
    from kombu.entity import Queue
    from pyramid.request import Request
    from sqlalchemy import Connection, Row
    from sqlalchemy.orm import Session
    from transaction import Transaction

    from ws_celery.app import PyramidCelery
    from ws_celery.outbox.relay import Relay

__all__ = ("Journal", "Outbox")

log = logger_of(__name__)

P = ParamSpec("P")
T = TypeVar("T")

#: What is not kept: how the first publisher tried, and what is computed anew.
_PASSING = ("declare", "exchange", "expiration", "retry", "retry_policy")

#: How often the flush of a session may lead to another one.
_FLUSHES = 100


@implementer(IOutbox)
class Outbox(Database):
    """Keeps each dispatch of an application as a row of its database until it has taken effect.

    :param app: the Celery app.
    :param table: name of the table.
    :param lease: seconds until an unfinished message is sent again.
    :param max_deliveries: how often the relay sends a message before it is a dead letter.
    """

    #: Publishes what is due, in beat or alone.
    relay: Relay

    def __init__(
        self,
        app: PyramidCelery,
        *,
        table: str = "ws_celery_outbox",
        lease: float = 300.0,
        max_deliveries: int = 10,
    ) -> None:
        super().__init__(app, outbox_table(table))
        self.rows = Rows(self.table)
        self.runs = Runs(self)
        self.lease = lease
        self.max_deliveries = max_deliveries
        #: What identifies this outbox among all others, if it is known.
        self.place: str | None = None
        self.settlement = Settlement(self)
        if "worker_consumer" not in app.conf.table(with_defaults=False):
            app.conf.worker_consumer = f"{Reader.__module__}:{Reader.__name__}"

    def _connect(self) -> Connection:
        connection = super()._connect()
        dialect = connection.dialect
        if dialect.name == "mysql" and not getattr(dialect, "is_mariadb", True):
            connection.close()
            raise ConfigurationError(
                "The outbox cannot be in a database of MySQL, which refuses a DELETE whose "
                "subquery reads the same table. Use MariaDB 10.6 or later, PostgreSQL or SQLite."
            )
        return connection

    def find_place(self, connection: Connection) -> None:
        """Find out what identifies this outbox; the database is asked once."""
        if self.place is None:
            self.place = place_of(connection, self.table)

    def attempt(
        self,
        statement: Callable[Concatenate[Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T | None:
        """Run a statement in a transaction of our own, or log why not; the lease repairs it.

        It does not raise: the caller's transaction has ended.
        """
        try:
            return self.execute(statement, *args, **kwargs)
        except self.errors:
            log.exception("The outbox could not be written; the relay will look at it later")
            return None

    def set_defaults(self, task: type[Task]) -> None:
        """Let the messages of a class of TransactionalTasks survive the worker that runs them.

        What the class or the configuration says of ``acks_late`` and ``reject_on_worker_lost``
        counts more.
        """
        configured = self.app.conf.table(with_defaults=False)
        for option in ("acks_late", "reject_on_worker_lost"):
            if getattr(task, option) is None and f"task_{option}" not in configured:
                setattr(task, option, True)
        if task.Request == f"{WorkerRequest.__module__}:{WorkerRequest.__name__}":  # not its own
            task.Request = f"{Reception.__module__}:{Reception.__name__}"

    # Dispatch

    def journal(self, txn: Transaction, publications: Iterable[Publication]) -> Journal:
        """Return what writes the rows of a transaction before it commits."""
        return Journal(self, txn, publications)

    def admit(self, publications: Iterable[Publication]) -> list[Publication]:
        """Give a row to each message that is to be kept: events are not, nor tasks that opted out.

        :return: those that are.
        """
        tasks, kept = self.app.tasks, []
        for publication in publications:
            headers = publication.options.get("headers") or {}
            name = headers.get("task")
            if headers.get("id") is None or not getattr(tasks.get(name), "outbox", True):
                continue
            publication.row_id = uuid4()
            publication.anonymous = name not in tasks
            kept.append(publication)
        return kept

    def keep(self, connection: Connection, publications: Iterable[Publication]) -> None:
        """Write the rows of messages that are to be kept, in the transaction of a connection."""
        if kept := self.admit(publications):
            self.write(connection, kept)

    def write(self, connection: Connection, publications: Sequence[Publication]) -> None:
        """Write the rows of messages that have been given theirs."""
        self.find_place(connection)
        self.rows.insert(connection, [self.row_of(publication) for publication in publications])

    def keep_late(self, publications: Iterable[Publication]) -> None:
        """Write the rows of messages whose own transaction is over, or send them without a row."""
        try:
            self.execute(self.keep, publications)
        except self.errors:
            log.exception("The outbox could not be written; the tasks are sent without a row")
            for publication in publications:
                publication.row_id, publication.waits = None, False

    def when_due(self, eta: datetime | None) -> tuple[bool, float]:
        """Return whether a message waits in the outbox for its eta, not in a worker's memory.

        :return: that, and in how many seconds the relay is to look at it: shortly before the eta if
            it waits; else a lease after it may run.
        """
        wait = 0.0 if eta is None else max(_seconds_until(eta), 0.0)
        far = wait > self.lease
        return far, wait - self.lease / 10 if far else wait + self.lease

    # Messages

    def check(self, publication: Publication) -> None:
        """Refuse, at the call, a message whose row could not be written.

        :raises ValueError: if ``eta`` or ``expires`` is no time, or a name does not fit its column.
        """
        options = publication.options
        _times_of(options)
        for column, name in _names_of(options, {}).items():
            if name is not None and not _fits(name):
                raise ValueError(
                    f"{name!a:.60} is no {column.replace('_', ' ')} that the outbox can keep. "
                    f"Pass text of at most {LONGEST_NAME} characters, without NUL."
                )

    def row_of(self, publication: Publication) -> dict[str, Any]:
        """Return the row of a message, as :meth:`Rows.insert` takes it."""
        options, payload = publication.options, publication.payload
        exchange = options.get("exchange")
        kept = {key: value for key, value in options.items() if key not in _PASSING}
        kept |= {
            "declare": [entity.name for entity in options.get("declare") or ()],
            "exchange": getattr(exchange, "name", exchange),
            "text": isinstance(payload, str),
            "anonymous": publication.anonymous,
        }
        times = _times_of(options)
        publication.outbox = self.place
        # Decided once: the clock may jump between here and the publish.
        publication.waits, due = self.when_due(times["eta"])
        return {
            "id": publication.row_id,
            **_names_of(options, self.app.amqp.queues),
            "body": payload.encode() if isinstance(payload, str) else payload,
            "options": json.dumps(kept),
            **times,
            "lease": self.lease,
            "due": due,
        }

    def publication_of(self, row: Row[Any]) -> Publication:
        """Make the message of a row again.

        :raises BrokenRow: if the row does not hold one.
        """
        queues = self.app.amqp.queues
        try:
            options = _loads(row.options)
            payload = row.body.decode() if options.pop("text") else row.body
            anonymous = options.pop("anonymous", False)
            # A queue that is not there any more is not declared.
            options["declare"] = [queues[name] for name in options["declare"] if name in queues]
            same = options["headers"]["id"] == row.task_id
        except Exception as error:
            raise BrokenRow(row.id, f"{type(error).__name__}: {error}") from error
        if not same:
            raise BrokenRow(row.id, "its headers are of another task")
        if row.expires is None:
            options["headers"]["expires"] = None  # or it began in time, and is run to its end
        else:
            options["expiration"] = max(_seconds_until(row.expires), 0)
        publication = Publication(payload, options)
        publication.row_id = row.id
        publication.anonymous = anonymous
        publication.outbox = self.place
        return publication

    # After the commit

    def published(self, publications: Iterable[Publication]) -> None:
        """Delete the rows of tasks that no class of this application runs: they were sent."""
        # Not asked anew: the relay may know other tasks than the process that has dispatched.
        foreign = [each.row_id for each in publications if each.anonymous and each.row_id]
        if foreign:
            self.attempt(self.rows.delete, foreign)

    def not_published(self, publications: Iterable[Publication]) -> None:
        """Leave what could not be published to the relay, at once."""
        if ids := [each.row_id for each in publications if each.row_id]:
            self.attempt(self.rows.make_due, ids)

    # What is not to run

    def discard(self, headers: Iterable[Mapping[str, Any]]) -> int:
        """Delete the rows of messages that were purged; return how many.

        :param headers: those of each message, which may have no row.
        """
        ids = self.row_ids(headers)
        return self.execute(self.rows.delete, ids) if ids else 0

    def row_ids(self, headers: Iterable[Mapping[str, Any]]) -> list[UUID]:
        """Return the ids of the rows that messages with these headers belong to."""
        return [row_id for each in headers if (row_id := row_id_in(each))]

    def revoke(self, task_ids: Sequence[str]) -> int:
        """Delete the rows of tasks, unless they are running; return how many."""
        return self.attempt(self.rows.delete_tasks, task_ids) or 0


class Journal:
    """Writes what one transaction has dispatched into the outbox, before it commits.

    :param outbox: the outbox.
    :param txn: the transaction.
    :param publications: its messages, kept by the data manager: those of a savepoint that is rolled
        back are taken out of it.
    """

    def __init__(
        self, outbox: Outbox, txn: Transaction, publications: Iterable[Publication]
    ) -> None:
        self._outbox = outbox
        self._txn = txn
        self._publications = publications
        self._written: set[UUID | None] = set()
        self._session: Session
        self._hooked = False
        self._late: list[Publication] = []

    def admit(self, publications: Iterable[Publication], request: Request) -> None:
        """Give a row to messages that are to be kept.

        :param request: the request whose session they are written with.
        :raises ValueError: if ``eta`` or ``expires`` is no time, or a name does not fit the table.
        :raises SessionError: if it has no session, or one that the transaction does not commit.
        """
        kept = self._outbox.admit(publications)
        if not kept:
            return
        if not hasattr(self, "_session"):
            self._session = self._joined(request, str(kept[0].task_name))
        for publication in kept:
            self._outbox.check(publication)
        if self._txn.status == "Committing":
            self._admit_late(kept)
        elif not self._hooked:
            self._hooked = True
            self._txn.addBeforeCommitHook(self._flush_and_write)

    def _admit_late(self, publications: list[Publication]) -> None:
        resources = resources_of(self._txn)
        mine = (each for each in resources if getattr(each, "session", None) is self._session)
        if any(each.tx.is_active for each in mine):
            self._insert(publications)  # a listener of the flush that the commit itself makes
        else:  # a listener of the session's commit, which takes no statement any more
            self._late += publications

    def write_late(self) -> None:
        """Write what the session was too late for in a transaction of our own, after the commit."""
        if self._late:
            self._outbox.keep_late(self._late)

    def _joined(self, request: Request, task: str) -> Session:
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
            [
                publication
                for publication in self._publications
                if publication.row_id
                and publication.row_id not in self._written
                and publication not in self._late
            ]
        )

    def _insert(self, publications: list[Publication]) -> None:
        if publications:
            self._written.update(publication.row_id for publication in publications)
            outbox = self._outbox
            outbox.execute_in_session(self._session, self._txn, outbox.write, publications)


def _fits(name: object) -> bool:
    if not isinstance(name, str) or len(name) > LONGEST_NAME or "\0" in name:
        return False
    # No database keeps half of a pair.
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def _names_of(options: Mapping[str, Any], queues: Mapping[str, Queue]) -> dict[str, Any]:
    reply_to, headers = options.get("reply_to"), options.get("headers") or {}
    declared = [each for each in options.get("declare") or () if each.name != reply_to]
    key = options.get("routing_key")
    return {
        "task_id": headers.get("id"),
        "task": headers.get("task"),
        "queue": declared[0].name if declared else _queue_of(key, queues),
    }


def _queue_of(routing_key: object, queues: Mapping[str, Queue]) -> object:
    """Return the queue of a routing key, which names none if RabbitMQ delays the message."""
    key = bare_key(routing_key) if isinstance(routing_key, str) else routing_key
    if key == routing_key:
        return key
    return next((queue.name for queue in queues.values() if queue.routing_key == key), key)


def _times_of(options: Mapping[str, Any]) -> dict[str, datetime | None]:
    """Return the ``eta`` and ``expires`` of a message, in UTC.

    :param options: of its publish.
    :raises ValueError: if one of them is no time, or one that no database's driver may read.
    """
    return {name: _time(options["headers"].get(name)) for name in ("eta", "expires")}


def _time(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        time = aware(maybe_iso8601(text))  # UTC without a zone, as the worker reads it
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


def _loads(text: str) -> dict[str, Any]:
    # Only kombu makes times and the like of objects with this key, which takes three times as long.
    loaded: dict[str, Any] = json.loads(text) if "__type__" in text else plain_json.loads(text)
    return loaded


def _seconds_until(time: datetime) -> float:
    return (aware(time) - datetime.now(timezone.utc)).total_seconds()
