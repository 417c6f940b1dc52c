"""The outbox of one application: which dispatches it keeps, and where their rows are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import scoped_session
from zope.interface import implementer

from ws_celery.exceptions import (
    ConfigurationError,
    Part,
    SessionError,
    TableError,
    Unavailable,
    WsCeleryError,
)
from ws_celery.interfaces import IDatabase, IOutbox
from ws_celery.masking import logger_of, masked_text
from ws_celery.outbox.journal import Journal, publication_of, row_id_in, row_of, times_of
from ws_celery.outbox.rows import Rows
from ws_celery.outbox.runs import Claim, Unclaimed
from ws_celery.outbox.tables import (
    aware,
    check_table,
    create_table,
    may_be_the_table,
    outbox_table,
    place_of,
    read_only_reason,
)
from ws_celery.outbox.worker import Reader, Reception, Settlement
from ws_celery.recording import (
    OUTBOX_HEADER,
    ROW_HEADER,
    Publication,
    holding,
    withheld,
)
from ws_celery.request import task_request
from ws_celery.worker import Request

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, Table

__all__ = (
    "Database",
    "Outbox",
)

log = logger_of(__name__)


@implementer(IDatabase)
class Database:
    """The database of the application's sessions, for one table of ours.

    :param app: the Celery app.
    :param table: the table.
    """

    #: What it is for.
    part: Part = "outbox"
    #: What may go wrong with the database.
    errors = (SQLAlchemyError, WsCeleryError)

    def __init__(self, app: Any, table: Table) -> None:
        self.app = app
        self.table = table

    @cached_property
    def engine(self) -> Engine:
        """The engine of the application's sessions, for transactions of our own.

        They run ``READ COMMITTED``: with a stricter level, a row that is gone meanwhile would be an
        error instead of nothing.
        """
        with task_request(self.app.registry, self.app.propagation, {}) as request:
            bind = self.session_of(request, f"the {self.part}").get_bind(clause=self.table)
        engine: Engine = getattr(bind, "engine", bind)
        if engine.dialect.name == "sqlite":
            return engine
        return engine.execution_options(isolation_level="READ COMMITTED")

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """Open a transaction of our own, and commit it at the end.

        :raises TableError: if the table is not there, or another one, or cannot be written.
        :raises Unavailable: if it cannot be connected to.
        """
        with self.explaining(), self._connect() as connection, connection.begin():
            yield connection

    def _connect(self) -> Connection:
        try:
            return self.engine.connect()
        except OperationalError as error:
            raise Unavailable(self.part, masked_text(str(error.orig))) from error

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Let the database's error say what to do, where we know it."""
        try:
            yield
        except DBAPIError as error:
            if (reason := read_only_reason(error)) is not None:
                raise TableError(self.part, self.table.fullname, reason, "read-only") from error
            if may_be_the_table(error):
                self._blame_table(error)
            raise

    def _blame_table(self, cause: DBAPIError) -> None:
        with suppress(SQLAlchemyError, Unavailable):
            try:
                self.check_table()
            except TableError as error:
                raise error from cause

    def check_table(self) -> None:
        """Compare the table with its definition.

        :raises TableError: if it is not there, or another one.
        """
        with self._connect() as connection:
            check_table(connection, self.table, self.part)

    def create_table(self) -> bool:
        """Create the table if it is missing; return whether it was.

        :raises TableError: if there is another one of its name.
        """
        with self.begin() as connection:
            return create_table(connection, self.table, self.part)

    def session_of(self, request: Any, task: str) -> Any:
        """Return the session of a request.

        :raises SessionError: if it has none.
        """
        session = getattr(request, self.app.session_attribute, None)
        if session is None:
            raise SessionError.missing(self.part, task, self.app.session_attribute)
        return session() if isinstance(session, scoped_session) else session


@implementer(IOutbox)
class Outbox(Database):
    """Keeps each dispatch of an application as a row of its database until it has taken effect.

    :param app: the Celery app.
    :param table: name of the table.
    :param lease: seconds until an unfinished message is sent again.
    :param max_deliveries: how often the relay sends a message before it is a dead letter.
    """

    def __init__(
        self,
        app: Any,
        *,
        table: str = "ws_celery_outbox",
        lease: float = 300.0,
        max_deliveries: int = 10,
    ) -> None:
        super().__init__(app, outbox_table(table))
        self.rows = Rows(self.table)
        self.lease = lease
        self.max_deliveries = max_deliveries
        #: Publishes what is due, in beat or alone.
        self.relay: Any = None
        #: What tells this outbox from all others, if it is known.
        self.place: str | None = None
        self._settlement = Settlement(self)
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

    def look(self, connection: Connection) -> None:
        """Find out what tells this outbox from all others; the database is asked once."""
        if self.place is None:
            self.place = place_of(connection, self.table)

    def set_defaults(self, task: Any) -> None:
        """Let the messages of a class of TransactionalTasks survive the worker that runs them.

        What the class or the configuration says of ``acks_late`` and ``reject_on_worker_lost``
        counts more.
        """
        configured = self.app.conf.table(with_defaults=False)
        for option in ("acks_late", "reject_on_worker_lost"):
            if getattr(task, option) is None and f"task_{option}" not in configured:
                setattr(task, option, True)
        if task.Request == f"{Request.__module__}:{Request.__name__}":  # not one of its own
            task.Request = f"{Reception.__module__}:{Reception.__name__}"

    # Dispatch

    def journal(self, txn: Any, publications: Iterable[Any]) -> Journal:
        """Return what writes the rows of a transaction before it commits."""
        return Journal(self, txn, publications)

    def keeps(self, publication: Publication) -> bool:
        """Tell whether a message is to be kept: events are not, nor tasks that opted out."""
        if publication.task_id is None:
            return False
        return bool(getattr(self.app.tasks.get(publication.task_name), "outbox", True))

    def keep(self, connection: Connection, publications: Iterable[Publication]) -> None:
        """Write the rows of messages that are to be kept, in the transaction of a connection."""
        kept = [publication for publication in publications if self.keeps(publication)]
        for publication in kept:
            self.number(publication)
        if kept:
            self.write(connection, kept)

    def write(self, connection: Connection, publications: Sequence[Publication]) -> None:
        """Write the rows of messages that have been given theirs."""
        self.look(connection)
        self.rows.insert(connection, [self.row(publication) for publication in publications])

    def keep_late(self, publications: Iterable[Publication]) -> None:
        """Write the rows of messages whose own transaction is over, or send them without a row."""
        try:
            with self.begin() as connection:
                self.keep(connection, publications)
        except self.errors:
            log.exception("The outbox could not be written; the tasks are sent without a row")
            for publication in publications:
                publication.row_id, publication.waits = None, False

    def number(self, publication: Publication) -> None:
        """Give a message that is to be kept its row."""
        publication.row_id = uuid4()
        publication.anonymous = self.is_foreign(publication)

    def row(self, publication: Publication) -> dict[str, Any]:
        """Return the row of a message, as :meth:`Rows.insert` takes it."""
        row = row_of(publication, self.app.amqp.queues)
        publication.outbox = self.place
        # Told once: the clock may jump between here and the publish.
        publication.waits, due = self.when_due(row["eta"])
        return {**row, "lease": self.lease, "due": due}

    def when_due(self, eta: datetime | None) -> tuple[bool, float]:
        """Tell whether a message waits in the outbox for its eta, not in a worker's memory.

        :return: that, and in how many seconds the relay is to look at it: shortly before the eta if
            it waits; else a lease after it may run.
        """
        wait = 0.0 if eta is None else max(_seconds_until(eta), 0.0)
        far = wait > self.lease
        return far, wait - self.lease / 10 if far else wait + self.lease

    def is_foreign(self, publication: Publication) -> bool:
        """Tell whether no class of this application runs the task of a message."""
        return publication.task_name not in self.app.tasks

    def publication_of(self, row: Any) -> Publication:
        """Return the message of a row.

        :raises BrokenRow: if it does not hold one.
        """
        publication = publication_of(row, self.app.amqp.queues, datetime.now(timezone.utc))
        publication.outbox = self.place
        return publication

    # After the commit

    def published(self, publications: Iterable[Publication]) -> None:
        """Let go of the rows of tasks that no class of this application runs: they were sent."""
        # Not asked anew: the relay may know other tasks than the process that has dispatched.
        foreign = self._ids(each for each in publications if each.anonymous)
        if foreign:
            self._try(self.rows.delete, foreign)

    def not_published(self, publications: Iterable[Publication]) -> None:
        """Leave what could not be published to the relay, at once."""
        if ids := self._ids(publications):
            self._try(self.rows.hasten, ids)

    # A run

    def row_id_of(self, context: Any) -> UUID | None:
        """Return the id of the row of a run, by Celery's context of it, or ``None``."""
        return row_id_in(context.headers)

    def owner_of(self, context: Any) -> str | None:
        """Return which other outbox the message of a run belongs to, or ``None``.

        Only for one that has no row here: after a move of the database, messages that were sent
        before it name the old place.
        """
        told: str | None = context.headers.get(OUTBOX_HEADER)
        return None if self.place is None or told == self.place else told

    def claim(self, task: Any) -> Claim | None:
        """Return the claim of the current run of ``task``, if its message has a row."""
        row_id = self.row_id_of(task.request)
        return None if row_id is None else Claim(self, task, row_id)

    def unclaimed(self, task: Any) -> Unclaimed | None:
        """Return the current run of a task without a transaction, if its message has a row."""
        row_id = self.row_id_of(task.request)
        return None if row_id is None else Unclaimed(self, task, row_id)

    def retry(self, context: Any, publications: Sequence[Publication]) -> None:
        """Let a run's row hold its retry, and send it; the run's transaction has ended.

        Who catches what ``retry()`` raises can ask for more than one; those have rows of their own.
        If the database fails the row keeps the message of the run that wanted the retry, and it is
        sent again after its lease. If the row has gone, another run has had the effect.

        :param context: Celery's context of the run.
        :param publications: the messages of the retries.
        """
        settled = getattr(context, "ws_celery_settled", False)
        context.ws_celery_settled = True  # the row is the retry's
        row_id = None if settled else self.row_id_of(context)
        if self._try(self._keep_retries, row_id, publications):
            self.app.publish(publications)

    def _keep_retries(
        self, connection: Connection, row_id: UUID | None, publications: Sequence[Publication]
    ) -> bool:
        others = list(publications)
        if row_id is not None:
            first = others.pop(0)
            first.row_id = uuid4()
            self.look(connection)
            row = self.row(first)
            due = row.pop("due")
            if not self.rows.rewrite(connection, row_id, row, due):
                return False
        self.keep(connection, others)
        return True

    def retry_of(self, context: Any, publications: Sequence[Publication]) -> Publication | None:
        """Return what is the retry of a run; send the rest, of subscribers and events, at once.

        :param context: Celery's context of the run.
        :param publications: what was sent while the retry was.
        :raises ValueError: if the retry has an ``eta`` or ``expires`` that cannot be kept.
        """
        retries = [each for each in publications if each.task_id == context.id]
        for retry in retries:
            times_of(retry)
        if others := [each for each in publications if each not in retries]:
            self.app.publish(others)
        return retries[-1] if retries else None

    @contextmanager
    def keeping_retries(self, headers: dict[str, Any], task_id: str | None) -> Iterator[None]:
        """Let the row of a run hold the retry that a class of Celery's own sends inside.

        Such a message has the headers of the run that it repeats, and the row's among them; it is
        taken out, because a message has the row that it is given.

        :param headers: of the call.
        :param task_id: the id that the call was given.
        """
        named = row_id_in({ROW_HEADER: headers.pop(ROW_HEADER, None)})
        run = self.app.current_worker_task
        if not named or withheld.get() is not None or not run or run.request.id != task_id:
            yield
            return
        with holding() as held:
            yield
        if retry := self.retry_of(run.request, held):
            self.retry(run.request, [retry])

    def bury(self, row_id: UUID, error: str) -> bool:
        """Keep the row of a run that has failed for good as a dead letter.

        :return: whether it was there, and not locked.
        """
        return bool(self._try(self.rows.bury, row_id, error))

    def count_loss(self, row_id: UUID, error: str) -> None:
        """Count a run that has taken its process with it: it must not do so for ever."""
        self._try(self.rows.count_loss, row_id, self.max_deliveries, error)

    def delete(self, row_id: UUID) -> bool:
        """Let go of the row of a run that has ended well.

        :return: whether it was there, and not locked.
        """
        return bool(self._try(self._delete, row_id))

    def _delete(self, connection: Connection, row_id: UUID) -> int:
        self.look(connection)
        return self.rows.delete(connection, [row_id])

    def delete_expired(self, row_id: UUID) -> None:
        """Let go of a row whose message came too late, unless a run has begun in time."""
        self._try(self.rows.delete_expired, row_id)

    def begun(self, row_id: UUID) -> None:
        """Take note that a run which does not lock its row has begun in time."""
        self._try(self.rows.forget_expiry, row_id)

    def is_there(self, row_id: UUID) -> bool:
        """Tell whether a row is there, and no dead letter."""
        return bool(self._try(self.rows.is_there, row_id))

    # What is not to run

    def discard(self, headers: Iterable[Any]) -> int:
        """Let go of the rows of messages that were taken away; return how many.

        :param headers: those of each message, which may have no row.
        """
        ids = self.row_ids(headers)
        if not ids:
            return 0
        with self.begin() as connection:
            return self.rows.delete(connection, ids)

    def row_ids(self, headers: Iterable[Any]) -> list[UUID]:
        """Return the ids of the rows that messages with these headers belong to."""
        return [row_id for each in headers if (row_id := row_id_in(each))]

    def revoke(self, task_ids: Sequence[str]) -> int:
        """Let go of the rows of tasks, unless they are running; return how many."""
        return self._try(self.rows.delete_tasks, task_ids) or 0

    def _try(self, statement: Any, *args: Any) -> Any:
        # Nobody can be told: the caller's transaction has ended. The lease mends it.
        try:
            with self.begin() as connection:
                return statement(connection, *args)
        except self.errors:
            log.exception("The outbox could not be written; the relay will look at it later")
            return None

    def _ids(self, publications: Iterable[Publication]) -> Sequence[UUID]:
        return [found for publication in publications if (found := publication.row_id)]


def _seconds_until(time: datetime) -> float:
    return (aware(time) - datetime.now(timezone.utc)).total_seconds()
