"""The database of the application's sessions, and our tables there: the outbox's, the schedule's.

Statements run in a transaction of our own, or in one of the application's, by way of its session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import (
    Column,
    Connection,
    DateTime,
    Engine,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    Uuid,
    inspect,
    text,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from zope.interface import implementer
from zope.sqlalchemy import mark_changed

from ws_celery.compat import resources_of, type_affinity
from ws_celery.exceptions import Part, SessionError, TableError, Unavailable, WsCeleryError
from ws_celery.interfaces import IDatabase
from ws_celery.masking import masked_text
from ws_celery.request import task_request

if TYPE_CHECKING:
    from pyramid.request import Request
    from transaction import Transaction

    from ws_celery.app import PyramidCelery

__all__ = (
    "LONGEST_NAME",
    "Database",
    "LongText",
    "Time",
    "join",
    "outbox_table",
    "place_of",
    "seconds_from_now",
)

P = ParamSpec("P")
T = TypeVar("T")

#: How many characters a task's id, its name and a queue may have.
LONGEST_NAME = 255

#: The type of columns that hold times, in UTC.
Time = DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")

#: The type of columns for texts of any length: MariaDB's ``TEXT`` ends at 64 KB.
LongText = Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")


def outbox_table(name: str = "ws_celery_outbox", metadata: MetaData | None = None) -> Table:
    """Return the definition of the outbox's table.

    A row is a message that has been dispatched and has not taken effect yet, or a dead letter.

    :param name: name of the table; ``schema.name`` for another schema than the default one.
    :param metadata: where to define it: the application's, for Alembic and its tests; one of its
        own if not given.
    """
    schema, _, bare = name.rpartition(".")
    return Table(
        bare,
        MetaData() if metadata is None else metadata,
        Column("id", Uuid, primary_key=True, comment="travels in the message's header"),
        Column("task_id", String(LONGEST_NAME), nullable=False),
        Column("task", String(LONGEST_NAME), nullable=False),
        Column("queue", String(LONGEST_NAME), nullable=True),
        Column("body", LargeBinary(2**24), nullable=False),
        Column("options", LongText, nullable=False, comment="how to publish it, its headers; JSON"),
        Column("created_at", Time, nullable=False),
        Column("eta", Time, nullable=True, comment="not to be run before"),
        Column("expires", Time, nullable=True, comment="not to be run after"),
        Column("due_at", Time, nullable=True, index=True, comment="NULL: a dead letter"),
        Column("lease", Float(53), nullable=False, comment="seconds until it is sent again"),
        Column("deliveries", Integer, nullable=False, comment="by the relay"),
        Column("died_at", Time, nullable=True),
        Column("error", LongText, nullable=True, comment="traceback of what made it a dead letter"),
        schema=schema or None,
        comment="Tasks that have been dispatched and have not taken effect yet: ws_celery",
    )


class seconds_from_now(FunctionElement[Any]):  # noqa: N801 - it is written like a function of SQL
    """The database's own time, so many seconds from now: the clocks of two machines differ.

    It is the time of the statement, not of the beginning of the transaction.
    """

    type = Time
    name = "seconds_from_now"
    inherit_cache = True


@compiles(seconds_from_now, "postgresql")
def _on_postgresql(element: seconds_from_now, compiler: SQLCompiler, **options: Any) -> str:
    # Not clock_timestamp(): it is volatile, and an index is of no use for a comparison with it.
    seconds = compiler.process(element.clauses, **options)
    return f"statement_timestamp() + make_interval(secs => {seconds})"


@compiles(seconds_from_now, "sqlite")
def _on_sqlite(element: seconds_from_now, compiler: SQLCompiler, **options: Any) -> str:
    # As SQLAlchemy stores times there: UTC, six digits.
    seconds = compiler.process(element.clauses, **options)
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', {seconds} || ' seconds')"


@compiles(seconds_from_now, "mysql")
@compiles(seconds_from_now, "mariadb")
def _on_mariadb(element: seconds_from_now, compiler: SQLCompiler, **options: Any) -> str:
    seconds = compiler.process(element.clauses, **options)
    return f"UTC_TIMESTAMP(6) + INTERVAL 1000000 * ({seconds}) MICROSECOND"


def place_of(connection: Connection, table: Table) -> str | None:
    """Return what identifies a table among all others, by whatever URL it is reached.

    A copy of the database is another place, so that this is asked for, and not kept in it.

    :return: ``None`` if the table is not there, or it is not known.
    """
    dialect = connection.dialect
    name = dialect.identifier_preparer.format_table(table)
    if dialect.name == "postgresql":
        return _place_in_postgresql(connection, name)
    if dialect.name in ("mysql", "mariadb"):
        found = text("SELECT concat_ws('/', @@hostname, @@port, DATABASE(), :name)")
        return connection.scalar(found, {"name": name})
    if dialect.name == "sqlite":
        file = connection.scalar(text("SELECT file FROM pragma_database_list WHERE name = 'main'"))
        return _place_in_file(Path(file), name) if file else None
    return None


def _place_in_file(file: Path, name: str) -> str | None:
    with suppress(FileNotFoundError):  # it was deleted, and is still open
        found = file.stat()
        return f"{found.st_dev}/{found.st_ino}/{name}"
    return None


def _place_in_postgresql(connection: Connection, name: str) -> str | None:
    found = text("SELECT current_database() || '/' || CAST(to_regclass(:name) AS oid)")
    place: str | None = connection.scalar(found, {"name": name})
    # A role may be kept from asking for the number of the server, and the transaction is another's.
    may_ask = text(
        "SELECT has_function_privilege("
        "CAST(to_regprocedure('pg_control_system()') AS oid), 'execute')"
    )
    if place and connection.scalar(may_ask):
        number = connection.scalar(text("SELECT system_identifier FROM pg_control_system()"))
        return f"{number}/{place}"
    return place


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

    def __init__(self, app: PyramidCelery, table: Table) -> None:
        self.app = app
        self.table = table

    @cached_property
    def engine(self) -> Engine:
        """The engine of the application's sessions, for transactions of our own.

        They run ``READ COMMITTED``: with a stricter level, a row that is gone meanwhile would be an
        error instead of nothing.
        """
        with task_request(self.app.registry, self.app.propagation, {}) as request:
            engine = self.session_of(request, f"the {self.part}").get_bind(clause=self.table).engine
        if engine.dialect.name == "sqlite":
            return engine
        return engine.execution_options(isolation_level="READ COMMITTED")

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """Open a transaction of our own, and commit it at the end.

        :raises TableError: if the table is not there, or another one, or cannot be written.
        :raises Unavailable: if it cannot be connected to.
        """
        try:
            with self._connect() as connection, connection.begin():
                yield connection
        except DBAPIError as error:
            self._explain(error)
            raise

    def execute(
        self,
        statement: Callable[Concatenate[Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run a statement in a transaction of our own, which commits it; see :meth:`begin`.

        :return: what ``statement(connection, ...)`` returns.
        """
        with self.begin() as connection:
            return statement(connection, *args, **kwargs)

    def _connect(self) -> Connection:
        try:
            return self.engine.connect()
        except OperationalError as error:
            raise Unavailable(self.part, masked_text(str(error.orig))) from error

    def _explain(self, error: DBAPIError) -> None:
        """Raise what says what to do about an error of the database, if we know it."""
        if (reason := _read_only_reason(error)) is not None:
            raise TableError(self.part, self.table.fullname, reason, "read-only") from error
        if _may_be_the_table(error):
            with suppress(SQLAlchemyError, Unavailable):
                try:
                    self.check_table()
                except TableError as problem:
                    raise problem from error

    def session_of(self, request: Request, task: str) -> Session:
        """Return the session of a request.

        :param task: what it is for, in messages.
        :raises SessionError: if it has none.
        """
        session = getattr(request, self.app.session_attribute, None)
        if session is None:
            raise SessionError.missing(self.part, task, self.app.session_attribute)
        found: Session = session() if isinstance(session, scoped_session) else session
        return found

    def execute_in_session(
        self,
        session: Session,
        txn: Transaction,
        statement: Callable[Concatenate[Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run a statement by the connection of a session, which ``txn`` commits.

        :return: what ``statement(connection, ...)`` returns.
        :raises SessionError: if the session belongs to another transaction.
        """
        try:
            join(session, txn, self.table.fullname)
            connection = session.connection(bind_arguments={"clause": self.table})
            return statement(connection, *args, **kwargs)
        except DBAPIError as error:
            self._explain(error)
            raise

    def check_table(self) -> None:
        """Compare the table of the database with its definition.

        :raises TableError: if it is missing, or has other columns.
        """
        with self._connect() as connection:
            self._check(connection)

    def create_table(self) -> bool:
        """Create the table if it is missing; return whether it was.

        :raises TableError: if there is another one of its name.
        """
        with self.begin() as connection:
            if not inspect(connection).has_table(self.table.name, schema=self.table.schema):
                self.table.create(connection)
                return True
            self._check(connection)
            return False

    def _check(self, connection: Connection) -> None:
        table, inspector = self.table, inspect(connection)
        if not inspector.has_table(table.name, schema=table.schema):
            raise TableError(self.part, table.fullname, "it does not exist", "missing")
        columns = inspector.get_columns(table.name, schema=table.schema)
        found = {column["name"]: column for column in columns}
        if problems := list(_differences(table, found)):
            raise TableError(self.part, table.fullname, "; ".join(problems))


def join(session: Session, txn: Transaction, what: str) -> None:
    """Let a session belong to a transaction, which commits it; it begins nothing yet.

    The transaction would not commit what the ORM has not written, if it did not know.

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

    def __init__(self, txn: Transaction) -> None:
        self._txn = txn

    def get(self) -> Transaction:
        return self._txn


def _differences(table: Table, found: Mapping[str, Any]) -> Iterator[str]:
    for name, column in table.columns.items():
        if name not in found:
            yield f"the column {name} is missing"
        elif not _is_like(column, found[name]):
            yield f"the column {name} is {_described(found[name])}"
        elif isinstance(found[name]["type"], mysql.TEXT):
            yield f"the column {name} is TEXT, which ends at 64 KB, and not LONGTEXT"
    for name in found.keys() - table.columns.keys():
        yield f"the column {name} is unknown"


def _is_like(column: Column[Any], found: Mapping[str, Any]) -> bool:
    # Some databases have no UUID, and keep it as text.
    wanted: Any = column.type
    accepted = {type_affinity(wanted)} | ({String} if isinstance(wanted, Uuid) else set())
    return type_affinity(found["type"]) in accepted and found["nullable"] == column.nullable


def _described(found: Mapping[str, Any]) -> str:
    return f"{found['type']!r}{'' if found['nullable'] else ' NOT NULL'}"


#: Classes of the standard's codes: a conflict, or no connection, is never the table's fault.
_PASSING = ("08", "40", "57")


def _may_be_the_table(error: DBAPIError) -> bool:
    """Return whether a missing or different table may be why a statement has failed."""
    code = getattr(error.orig, "sqlstate", None)
    if code is not None:
        return str(code)[:2] not in _PASSING
    return not (error.connection_invalidated or str(error.orig).endswith(" is locked"))


def _read_only_reason(error: DBAPIError) -> str | None:
    """Return what the database says if it takes no changes, else ``None``."""
    text = " ".join(str(error.orig).split())
    return text if "read-only" in text.lower() or "readonly" in text.lower() else None
