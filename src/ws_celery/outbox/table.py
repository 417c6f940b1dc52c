"""The outbox's table, and times by the database's clock, in the dialects it runs on."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from sqlalchemy import (
    Column,
    DateTime,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    Uuid,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

__all__ = ("LONGEST_NAME", "LongText", "Time", "aware", "outbox_table", "seconds_from_now")

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
