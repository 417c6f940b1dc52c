"""Whether the database has a table of ours, and the one that this version needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    Column,
    Connection,
    DateTime,
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
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from ws_celery.compat import type_affinity
from ws_celery.exceptions import TableError

if TYPE_CHECKING:
    from sqlalchemy.exc import DBAPIError

    from ws_celery.exceptions import Part

__all__ = (
    "LONGEST_NAME",
    "LongText",
    "Time",
    "aware",
    "check_table",
    "create_table",
    "may_be_the_table",
    "outbox_table",
    "place_of",
    "read_only_reason",
    "seconds_from_now",
)

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


def aware(time: datetime) -> datetime:
    """Return a time of the database with its zone, UTC, which not all databases keep."""
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)


class seconds_from_now(FunctionElement[Any]):  # noqa: N801 - it is written like a function of SQL
    """The database's own time, so many seconds from now: the clocks of two machines differ.

    It is the time of the statement, not of the beginning of the transaction.
    """

    type = Time
    name = "seconds_from_now"
    inherit_cache = True


@compiles(seconds_from_now, "postgresql")
def _on_postgresql(element: Any, compiler: Any, **options: Any) -> str:
    # Not clock_timestamp(): it is volatile, and an index is of no use for a comparison with it.
    seconds = compiler.process(element.clauses, **options)
    return f"statement_timestamp() + make_interval(secs => {seconds})"


@compiles(seconds_from_now, "sqlite")
def _on_sqlite(element: Any, compiler: Any, **options: Any) -> str:
    # As SQLAlchemy stores times there: UTC, six digits.
    seconds = compiler.process(element.clauses, **options)
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', {seconds} || ' seconds')"


@compiles(seconds_from_now, "mysql")
@compiles(seconds_from_now, "mariadb")
def _on_mariadb(element: Any, compiler: Any, **options: Any) -> str:
    seconds = compiler.process(element.clauses, **options)
    return f"UTC_TIMESTAMP(6) + INTERVAL 1000000 * ({seconds}) MICROSECOND"


#: Classes of the standard's codes: a conflict, or no connection, is never the table's fault.
_PASSING = ("08", "40", "57")


def place_of(connection: Connection, table: Table) -> str | None:
    """Return what tells a table from all others, by whatever URL it is reached.

    A copy of the database is another place, so that this is asked for, and not kept in it.

    :return: ``None`` if the table is not there, or nobody can tell.
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


def create_table(connection: Connection, table: Table, part: Part) -> bool:
    """Create the table if it is missing.

    :param part: what it is the table of.
    :return: ``False`` if it was there.
    :raises TableError: if there is another one of its name.
    """
    if not inspect(connection).has_table(table.name, schema=table.schema):
        table.create(connection)
        return True
    check_table(connection, table, part)
    return False


def check_table(connection: Connection, table: Table, part: Part) -> None:
    """Compare the table of the database with its definition.

    :param part: what it is the table of.
    :raises TableError: if it is missing, or has other columns.
    """
    inspector = inspect(connection)
    if not inspector.has_table(table.name, schema=table.schema):
        raise TableError(part, table.fullname, "it does not exist", "missing")
    columns = inspector.get_columns(table.name, schema=table.schema)
    found = {column["name"]: column for column in columns}
    if problems := list(_differences(table, found)):
        raise TableError(part, table.fullname, "; ".join(problems))


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


def may_be_the_table(error: DBAPIError) -> bool:
    """Tell whether a missing or different table may be why a statement has failed."""
    code = getattr(error.orig, "sqlstate", None)
    if code is not None:
        return str(code)[:2] not in _PASSING
    return not (error.connection_invalidated or str(error.orig).endswith(" is locked"))


def read_only_reason(error: DBAPIError) -> str | None:
    """Return what the database says if it takes no changes, else ``None``."""
    text = " ".join(str(error.orig).split())
    return text if "read-only" in text.lower() or "readonly" in text.lower() else None
