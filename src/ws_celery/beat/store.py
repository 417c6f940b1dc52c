"""The schedule in the database: what was edited, and which ticks were sent.

Each method takes a connection, and works in its transaction; those that people call make a
transaction of their own without.
"""

from __future__ import annotations

import json
import selectors
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    Insert,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    bindparam,
    delete,
    false,
    func,
    insert,
    literal,
    text,
    update,
)
from sqlalchemy import select as select_
from sqlalchemy.dialects import mysql, postgresql, sqlite
from zope.interface import implementer

from ws_celery.beat.entries import LONGEST_NAME, Known
from ws_celery.converters import aware
from ws_celery.exceptions import NotFound, Part
from ws_celery.interfaces import IScheduleStore
from ws_celery.masking import logger_of
from ws_celery.outbox.tables import Database, LongText, Time, seconds_from_now

if TYPE_CHECKING:
    from ws_celery.app import PyramidCelery

__all__ = (
    "Listener",
    "Locked",
    "Store",
    "schedule_table",
)

log = logger_of(__name__)

#: Two names that differ in case are two entries, whatever the collation of the database says.
_Name = String(LONGEST_NAME).with_variant(
    mysql.VARCHAR(LONGEST_NAME, collation="utf8mb4_bin"), "mysql", "mariadb"
)


def schedule_table(name: str = "ws_celery_schedule", metadata: MetaData | None = None) -> Table:
    """Return the definition of the schedule's table.

    A row is what the database knows of one entry, wherever that comes from.

    :param name: name of the table; ``schema.name`` for another schema than the default one.
    :param metadata: where to define it: the application's, for Alembic and its tests; one of its
        own if not given.
    """
    schema, _, bare = name.rpartition(".")
    return Table(
        bare,
        MetaData() if metadata is None else metadata,
        Column("name", _Name, primary_key=True),
        Column("origin", String(8), nullable=False, comment="code, ini or database"),
        Column("fields", LongText, nullable=True, comment="what was edited; a JSON object"),
        Column("last_run_at", Time, nullable=True, comment="the tick that was sent last"),
        Column("task_id", String(255), nullable=True, comment="of the task that was sent last"),
        Column("sent_at", Time, nullable=True, comment="when that task was sent"),
        Column("seen_at", Time, nullable=True, comment="when a beat first looked at it"),
        Column("run_requested_at", Time, nullable=True, comment="to be sent now, once"),
        Column("version", Integer, nullable=False, comment="counts the edits"),
        Column("changed_at", Time, nullable=False, comment="by an edit"),
        schema=schema or None,
        comment="Entries of the schedule, and their last ticks: ws_celery",
    )


class Locked(NamedTuple):
    """Entries that no other beat can claim now.

    :param now: the time, by the database's clock.
    :param known: what is known of them; those that another beat has locked are missing.
    """

    now: datetime
    known: dict[str, Known]


@implementer(IScheduleStore)
class Store(Database):
    """The schedule of an application in its database.

    :param app: the Celery app.
    :param table: name of the table.
    """

    part: Part = "schedule"

    def __init__(self, app: PyramidCelery, table: str = "ws_celery_schedule") -> None:
        super().__init__(app, schedule_table(table))
        self._now = seconds_from_now(literal(0.0, Float))

    @cached_property
    def engine(self) -> Engine:
        """The engine of the application's sessions; that of the outbox, if there is one."""
        outbox = self.app.outbox
        engine: Engine = super().engine if outbox is None else outbox.engine
        return engine

    def listener(self) -> Listener:
        """Return what waits for an edit; it does not listen yet."""
        return Listener(self)

    @property
    def channel(self) -> str:
        """What PostgreSQL's NOTIFY calls changes of this table."""
        return f"ws_celery_{sha256(self.table.fullname.encode()).hexdigest()[:16]}"

    # What a beat reads and writes

    def revision(self, connection: Connection) -> tuple[Hashable, datetime]:
        """Return what changes with each edit, and the time by the database's clock."""
        columns = self.table.c
        found = select_(
            func.count(), func.sum(columns.version), func.max(columns.changed_at), self._now
        ).select_from(self.table)
        rows, versions, changed_at, now = connection.execute(found).one()
        return (rows, versions, changed_at), aware(now)

    def load(self, connection: Connection | None = None) -> dict[str, Known]:
        """Return what the database knows of each entry, by name."""
        with self._in(connection) as own:
            rows = own.execute(select_(self.table).order_by(self.table.c.name))
            return {row.name: _known(row) for row in rows}

    def register(self, connection: Connection, origins: Mapping[str, str]) -> None:
        """Make the rows of entries that the database does not know yet.

        :param origins: name to where the entry comes from.
        """
        made = {"version": 0, "changed_at": self._now}
        rows = [{"name": name, "origin": origins[name]} for name in sorted(origins)]
        if rows:
            connection.execute(_insert_missing(self.table, connection).values(**made), rows)

    def lock(self, connection: Connection, names: Iterable[str]) -> Locked:
        """Lock entries until the transaction ends, so that nobody else claims their ticks.

        What another beat has locked is left out: it is about to claim.
        """
        if connection.dialect.name == "sqlite":
            # It locks the database at the first statement that writes, and not at one that reads.
            connection.execute(delete(self.table).where(false()))
        columns = self.table.c
        found = select_(self.table).where(columns.name.in_(list(names)))
        rows = connection.execute(found.with_for_update(skip_locked=True)).all()
        now = connection.execute(select_(self._now)).scalar_one()
        known = {row.name: _known(row) for row in rows}
        return Locked(aware(now), known)

    def advance(self, connection: Connection, ticks: Sequence[Mapping[str, Any]]) -> None:
        """Store the last ticks of entries that are locked.

        :param ticks: ``entry``, ``last_run_at`` and ``task_id`` of each, and ``sent_at``; also
            ``run_requested_at``, if the run that somebody wants is still to come.
        """
        if ticks:
            statement = update(self.table).where(self.table.c.name == bindparam("entry"))
            statement = statement.values(
                last_run_at=bindparam("last_run_at"),
                task_id=bindparam("task_id"),
                sent_at=bindparam("sent_at", None),
                seen_at=func.coalesce(self.table.c.seen_at, self._now),
                run_requested_at=bindparam("run_requested_at", None),
            )
            connection.execute(statement, ticks)

    def now(self, connection: Connection | None = None) -> datetime:
        """Return the time by the database's clock."""
        with self._in(connection) as own:
            return aware(own.execute(select_(self._now)).scalar_one())

    def _in(self, connection: Connection | None) -> AbstractContextManager[Connection]:
        return self.begin() if connection is None else nullcontext(connection)

    # What people edit

    def save(
        self,
        name: str,
        /,
        *,
        origin: str = "database",
        connection: Connection | None = None,
        **fields: Any,
    ) -> None:
        """Edit fields of an entry; ``None`` takes back what was edited.

        :param name: of the entry.
        :param origin: where the entry comes from, if the database does not know it yet.
        :param fields: what JSON can hold, such as :meth:`Entry.as_fields` returns.
        """
        with self._in(connection) as own:
            edited = {**self._edited(own, name, origin), **fields}
            left = {key: value for key, value in edited.items() if value is not None}
            self._change(own, name, fields=json.dumps(left) if left else None)

    def request_run(
        self, name: str, *, origin: str = "database", connection: Connection | None = None
    ) -> None:
        """Let a beat send an entry now, once, whatever its schedule; see :meth:`save`."""
        with self._in(connection) as own:
            self._edited(own, name, origin)
            self._change(own, name, run_requested_at=self._now)

    def restart(self, name: str, origin: str, connection: Connection) -> None:
        """Count the ticks of an entry from now on: those before were not its own.

        :param origin: where it comes from; it may have come from elsewhere before.
        """
        self._change(connection, name, origin=origin, last_run_at=self._now)

    def remove(self, name: str, connection: Connection | None = None) -> None:
        """Forget an entry of the database, or what was edited of another one.

        :raises NotFound: if the database does not know it.
        """
        columns = self.table.c
        with self._in(connection) as own:
            found = select_(columns.origin).where(columns.name == name).with_for_update()
            origin = own.scalar(found)
            if origin is None:
                raise NotFound("entry", name)
            if origin == "database":
                own.execute(delete(self.table).where(columns.name == name))
                self._notify(own)
            else:
                self._change(own, name, fields=None)

    def _edited(self, connection: Connection, name: str, origin: str) -> Mapping[str, Any]:
        """Lock the row of an entry, and return what was edited; it is made if it is missing."""
        self.register(connection, {name: origin})
        found = select_(self.table).where(self.table.c.name == name).with_for_update()
        return _known(connection.execute(found).one()).fields

    def _change(self, connection: Connection, name: str, **values: Any) -> None:
        columns = self.table.c
        values.update(version=columns.version + 1, changed_at=self._now)
        connection.execute(update(self.table).where(columns.name == name).values(**values))
        self._notify(connection)

    def _notify(self, connection: Connection) -> None:
        if connection.dialect.name == "postgresql":
            connection.execute(select_(func.pg_notify(self.channel, "")))


def _insert_missing(table: Table, connection: Connection) -> Insert:
    """Return the statement that inserts rows, and does nothing to those that are there."""
    dialect = connection.dialect.name
    if dialect == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing()
    if dialect == "sqlite":
        return sqlite.insert(table).on_conflict_do_nothing()
    if dialect in ("mysql", "mariadb"):
        return mysql.insert(table).prefix_with("IGNORE")
    return insert(table)


def _known(row: Row[Any]) -> Known:
    fields, problem = _fields(row.fields)
    return Known(
        name=row.name,
        origin=row.origin,
        fields=fields,
        problem=problem,
        last_run_at=row.last_run_at and aware(row.last_run_at),
        task_id=row.task_id,
        sent_at=row.sent_at and aware(row.sent_at),
        seen_at=row.seen_at and aware(row.seen_at),
        run_requested_at=row.run_requested_at and aware(row.run_requested_at),
        version=row.version,
    )


def _fields(text: str | None) -> tuple[dict[str, Any], str | None]:
    """Return the fields that a text holds, and what is wrong with it: people write it by hand."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        return {}, f"fields in the database are no JSON ({error})"
    if not isinstance(found, dict):
        return {}, "fields in the database are no JSON object"
    return found, None


class Listener:
    """Listens to NOTIFY, on a connection of its own.

    :param store: the schedule in the database.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._connection: Connection | None = None
        self._driver: Any = None

    def open(self) -> None:
        """Begin to listen, unless it does; only PostgreSQL can notify."""
        engine = self._store.engine
        if self._connection is not None or engine.dialect.name != "postgresql":
            return
        connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        driver = connection.connection.driver_connection
        if not hasattr(driver, "fileno"):
            connection.close()  # a driver whose socket cannot be waited for
            return
        connection.execute(text(f'LISTEN "{self._store.channel}"'))
        self._connection, self._driver = connection, driver

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until an edit; return whether there was one."""
        if self._connection is None:
            time.sleep(seconds)
            return False
        try:
            with selectors.DefaultSelector() as selector:  # select() takes no descriptor above 1023
                selector.register(self._driver.fileno(), selectors.EVENT_READ)
                ready = selector.select(seconds)
            if ready:
                self._connection.execute(text("SELECT 1"))  # takes what has come off the socket
        except Exception as error:  # noqa: BLE001  whatever a driver raises: it is opened anew
            log.debug("Listening has ended: %s", error)
            self.close()
            return True
        return bool(ready)

    def close(self) -> None:
        """Stop listening."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()  # it listens: not for the pool
            connection.close()
