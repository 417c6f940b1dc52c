"""A table of ours in the application's database: connections to it, and errors that explain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

from sqlalchemy import Connection, Engine, Table
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import scoped_session

from ws_celery.exceptions import (
    OutboxReadOnly,
    OutboxTableError,
    OutboxUnavailable,
    OutboxUnreachable,
    ReadOnly,
    TableError,
    Unavailable,
    Unreachable,
    WsCeleryError,
)
from ws_celery.masking import masked_text
from ws_celery.outbox.schema import check_table, create_table, may_be_the_table, read_only_reason
from ws_celery.request import task_request

__all__ = ("Database",)


class Database:
    """The database of the application's sessions, for one table of ours.

    :param app: the Celery app.
    :param table: the table.
    """

    #: What it is for, in messages.
    name = "the outbox"
    #: What may go wrong with the database.
    errors = (SQLAlchemyError, WsCeleryError)
    table_error: type[TableError] = OutboxTableError
    read_only: type[ReadOnly] = OutboxReadOnly
    unavailable: type[Unavailable] = OutboxUnavailable
    unreachable: type[Unreachable] = OutboxUnreachable

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
            bind = self.session_of(request, self.name).get_bind(clause=self.table)
        engine: Engine = getattr(bind, "engine", bind)
        if engine.dialect.name == "sqlite":
            return engine
        return engine.execution_options(isolation_level="READ COMMITTED")

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """Open a transaction of our own, and commit it at the end.

        :raises TableError: if the table is not there, or another one.
        :raises ReadOnly: if the database takes no changes.
        :raises Unavailable: if it cannot be connected to.
        """
        with self.explaining(), self._connect() as connection, connection.begin():
            yield connection

    def _connect(self) -> Connection:
        try:
            return self.engine.connect()
        except OperationalError as error:
            raise self.unavailable(masked_text(str(error.orig))) from error

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Let the database's error say what to do, where we know it."""
        try:
            yield
        except DBAPIError as error:
            if (reason := read_only_reason(error)) is not None:
                raise self.read_only(self.table.fullname, reason) from error
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
            check_table(connection, self.table, self.table_error)

    def create_table(self) -> bool:
        """Create the table if it is missing; return whether it was.

        :raises TableError: if there is another one of its name.
        """
        with self.begin() as connection:
            return create_table(connection, self.table, self.table_error)

    def session_of(self, request: Any, task: str) -> Any:
        """Return the session of a request.

        :raises Unreachable: if it has none.
        """
        session = getattr(request, self.app.session_attribute, None)
        if session is None:
            raise self.unreachable(task, self.app.session_attribute)
        return session() if isinstance(session, scoped_session) else session
