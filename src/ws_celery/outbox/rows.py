"""The statements of the outbox; each runs on the connection, in the transaction, that it is given.

Rows that another transaction has locked are skipped wherever nobody may wait: the row of a running
task is deleted in the task's transaction, and is locked until it ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    Delete,
    Float,
    Row,
    Select,
    Table,
    Update,
    Uuid,
    and_,
    bindparam,
    case,
    delete,
    false,
    func,
    insert,
    literal,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.exc import DataError

from ws_celery.compat import values_of_row
from ws_celery.converters import aware
from ws_celery.outbox.tables import seconds_from_now

__all__ = ("UNREADABLE", "Rows")

Condition = ColumnElement[bool]

#: What a driver raises that cannot read a value, such as a time after the year 9999.
UNREADABLE = (DataError, TypeError, ValueError, OverflowError)

#: Longest lease, in seconds: what stays unfinished is sent again at least so often.
LONGEST_LEASE = 3600.0

#: How many characters of an error are kept: its beginning and its end.
LONGEST_ERROR = 200_000

#: A machine that has lost its power does not close its connections, and PostgreSQL would keep their
#: locks for hours. For the one transaction only: the connection is the application's.
_KEEPALIVE: list[ColumnElement[str]] = [
    literal_column(f"set_config('tcp_keepalives_{name}', '{value}', true)")
    for name, value in (("idle", 30), ("interval", 10), ("count", 3))
]


class Rows:
    """What can be done with the rows of one table.

    :param table: as :func:`~ws_celery.outbox.tables.outbox_table` defines it.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self._now = seconds_from_now(literal(0.0, Float))
        self._later = seconds_from_now(bindparam("seconds", type_=Float))
        # Made once: SQLAlchemy takes longer to make them than to run them.
        self._insert = insert(table).values(
            created_at=self._now,
            due_at=seconds_from_now(bindparam("due", type_=Float)),
            deliveries=0,
        )
        alive = self._is_alive(bindparam("row_id", type_=Uuid))
        self._claim = self._delete_one(alive)
        # Where the row is looked for, because RETURNING costs several times as much.
        kept_alive = (each.is_not(None) for each in _KEEPALIVE)
        self._guarded_claim = self._delete_one(and_(alive, *kept_alive))

    # Dispatch

    def insert(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows; ``due`` of each is in how many seconds the relay is to look at it."""
        connection.execute(self._insert, rows)

    def make_due(self, connection: Connection, ids: Iterable[UUID]) -> None:
        """Make rows due now: they could not be published. Dead letters stay what they are."""
        columns = self.table.c
        self._make_due(connection, and_(columns.id.in_(list(ids)), columns.due_at.is_not(None)))

    def make_all_due(self, connection: Connection, far: float) -> int:
        """Make all rows due now, except those whose eta is more than ``far`` seconds away.

        :return: how many.
        """
        return self._make_due(connection, and_(self.table.c.due_at > self._now, self._near(far)))

    def _make_due(self, connection: Connection, condition: Condition) -> int:
        return connection.execute(self._update(condition).values(due_at=self._now)).rowcount

    # A run

    def claim(self, connection: Connection, row_id: UUID) -> bool:
        """Delete a row, which is the right to the effect; it is back if the transaction aborts.

        :return: ``False`` if it is gone, a dead letter, or another transaction holds it.
        """
        is_postgresql = connection.dialect.name == "postgresql"
        claim = self._guarded_claim if is_postgresql else self._claim
        return connection.execute(claim, {"row_id": row_id}).rowcount == 1

    def _delete_one(self, condition: Condition) -> Delete:
        found = self._unlocked(condition).scalar_subquery()
        return delete(self.table).where(self.table.c.id == found)

    def is_there(self, connection: Connection, row_id: UUID) -> bool:
        """Return whether a row is there, and no dead letter."""
        found = select(self.table.c.id).where(self._is_alive(row_id))
        return connection.execute(found).first() is not None

    def forget_expiry(self, connection: Connection, row_id: UUID) -> None:
        """Let a row not expire any more: its run has begun in time, and does not lock it."""
        mine = and_(self.table.c.id == row_id, self.table.c.expires.is_not(None))
        connection.execute(update(self.table).where(mine).values(expires=None))

    def get(self, connection: Connection, row_id: UUID) -> Row[Any] | None:
        """Return a row, without a lock; ``None`` if it is not there."""
        return connection.execute(self.select().where(self.table.c.id == row_id)).first()

    def insert_rest(
        self, connection: Connection, row: Row[Any], row_id: UUID, lease: float, error: str
    ) -> None:
        """Write a row for what is left of a run that has committed: never sent, but an end.

        :param row: the row of the run; a dead letter has its message.
        :param error: what the relay makes it a dead letter with, after ``lease`` seconds.
        """
        values = {**values_of_row(row), "id": row_id, "expires": None, "error": error}
        values |= {"due_at": self._later, "deliveries": 0}
        connection.execute(insert(self.table).values(**values), {"seconds": lease})

    def delete(self, connection: Connection, ids: Iterable[UUID]) -> int:
        """Delete rows that are not locked; return how many."""
        return self._delete(connection, self.table.c.id.in_(list(ids)))

    def delete_expired(self, connection: Connection, row_id: UUID) -> int:
        """Delete a row that can expire, and is not locked; return whether it was there."""
        columns = self.table.c
        return self._delete(connection, and_(columns.id == row_id, columns.expires.is_not(None)))

    def delete_tasks(self, connection: Connection, task_ids: Iterable[str]) -> int:
        """Delete rows of these tasks that are not locked; return how many."""
        return self._delete(connection, self.table.c.task_id.in_(list(task_ids)))

    def _delete(self, connection: Connection, condition: Condition) -> int:
        found = self._unlocked(condition)
        return connection.execute(delete(self.table).where(self.table.c.id.in_(found))).rowcount

    def rewrite(
        self, connection: Connection, row_id: UUID, row: Mapping[str, Any], due: float
    ) -> bool:
        """Put another message into a row: a retry, whose deliveries count anew.

        :param row: what it holds then; with another id, so that no older message can claim it.
        :return: ``False`` if there is no such row.
        """
        statement = (
            update(self.table)
            .where(self.table.c.id == row_id)
            .values(due_at=self._later, deliveries=0, died_at=None, error=None, **row)
        )
        return connection.execute(statement, {"seconds": due}).rowcount == 1

    def make_dead_letter(self, connection: Connection, row_id: UUID, error: str) -> bool:
        """Make a row a dead letter; return whether it was there and not locked."""
        values = {"due_at": None, "died_at": self._now, "error": _storable(error)}
        statement = self._update(self.table.c.id == row_id).values(values)
        return connection.execute(statement).rowcount > 0

    def make_unreadable_dead_letter(self, connection: Connection, row_id: UUID, error: str) -> None:
        """Make a row a dead letter without the times that it had: one of them is none."""
        values = dict.fromkeys(("eta", "expires", "due_at"))
        found = self.table.c.id == row_id
        statement = update(self.table).where(found).values(**values, error=_storable(error))
        connection.execute(statement.values(created_at=self._now, died_at=self._now))

    def count_lost_run(self, connection: Connection, row_id: UUID, most: int, error: str) -> None:
        """Count a run that has taken its process with it, like a delivery.

        :param most: how many there may be; with the last one the row is a dead letter.
        """
        columns = self.table.c
        last = columns.deliveries + 1 >= most
        values = {
            "deliveries": columns.deliveries + 1,
            "due_at": case((last, None), else_=columns.due_at),
            "died_at": case((last, self._now), else_=None),
            "error": case((last, _storable(error)), else_=None),
        }
        connection.execute(self._update(self._is_alive(row_id)).values(values))

    # The relay

    def lease_due(self, connection: Connection, limit: int) -> Sequence[Row[Any]]:
        """Lock the rows that are due, and count their delivery before it is made.

        They are due again after their lease, which is doubled.

        :return: the rows as they were, the longest due first.
        """
        if connection.dialect.name == "postgresql":
            connection.execute(select(*_KEEPALIVE))
            due = self._due(limit).cte("due")
            leased = self._leased().where(self.table.c.id == due.c.id).returning(*due.c)
            return sorted(connection.execute(leased).all(), key=lambda row: row.due_at)
        if connection.dialect.name == "sqlite":
            # It locks the database at the first statement that writes, and not at one that reads.
            connection.execute(delete(self.table).where(false()))
        rows = connection.execute(self._due(limit)).all()
        if rows:
            ids = [row.id for row in rows]
            connection.execute(self._leased().where(self.table.c.id.in_(ids)))
        return rows

    def unreadable(self, connection: Connection, limit: int) -> dict[UUID, Exception]:
        """Lock the rows that are due, and return what makes some unreadable for the driver."""
        due = self._due(limit).with_only_columns(self.table.c.id)
        errors: dict[UUID, Exception] = {}
        for row_id in connection.execute(due).scalars().all():
            try:
                with connection.begin_nested():
                    connection.execute(self.select().where(self.table.c.id == row_id)).one()
            except UNREADABLE as error:
                errors[row_id] = error
        return errors

    def _due(self, limit: int) -> Select[Any]:
        due_at = self.table.c.due_at
        return (
            select(self.table)
            .where(due_at <= self._now)
            .order_by(due_at)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )

    def _leased(self) -> Update:
        columns = self.table.c
        longest = columns.lease * 2 > LONGEST_LEASE
        return update(self.table).values(
            deliveries=columns.deliveries + 1,
            lease=case((longest, LONGEST_LEASE), else_=columns.lease * 2),
            due_at=seconds_from_now(columns.lease),
        )

    def release(self, connection: Connection, ids: Iterable[UUID], *, now: bool) -> None:
        """Undo the count of a delivery that was not made, unless the row is a dead letter.

        :param now: make the rows due now; else they stay due after the lease that they had.
        """
        columns, values = self.table.c, self._released()
        if now:
            values["due_at"] = self._now
        alive = columns.due_at.is_not(None)
        leased = and_(columns.id.in_(list(ids)), columns.deliveries > 0, alive)
        connection.execute(self._update(leased).values(values))

    def postpone(self, connection: Connection, due: Mapping[UUID, float]) -> None:
        """Undo the count of a delivery that is too early.

        :param due: by id, in how many seconds the rows are due.
        """
        self._set_due(connection, due, **self._released())

    def _released(self) -> dict[str, Any]:
        columns = self.table.c
        return {"deliveries": columns.deliveries - 1, "lease": columns.lease / 2}

    def waiting_since(
        self, connection: Connection, queue: str, length: int, far: float
    ) -> datetime | None:
        """Return when the oldest of the ``length`` youngest messages of a queue was dispatched.

        :param far: seconds; what waits for an eta beyond has not been sent.
        :return: ``None`` if there are not so many.
        """
        columns = self.table.c
        soon = columns.due_at <= seconds_from_now(literal(LONGEST_LEASE, Float))
        return connection.scalar(
            select(columns.created_at)
            .where(columns.queue == queue, soon, self._near(far))
            .order_by(columns.created_at.desc())
            .offset(length - 1)
            .limit(1)
        )

    def _near(self, far: float) -> Condition:
        eta = self.table.c.eta
        return or_(eta.is_(None), eta <= seconds_from_now(literal(far, Float)))

    def seconds_until_due(self, connection: Connection) -> float | None:
        """Return in how many seconds the next row is due, or ``None`` if there is none."""
        next_due = select(func.min(self.table.c.due_at)).scalar_subquery()
        due, now = connection.execute(select(next_due, self._now)).one()
        return None if due is None else (due - now).total_seconds()

    # Looking inside

    def waiting(self, connection: Connection, task_ids: Iterable[str]) -> set[str]:
        """Return those of these tasks that have not come to their end."""
        columns = self.table.c
        found = select(columns.task_id).where(
            columns.task_id.in_(list(task_ids)), columns.due_at.is_not(None)
        )
        return set(connection.execute(found).scalars())

    def seconds_overdue(self, connection: Connection) -> float:
        """Return for how long the relay has left a row; that of a running task does not count."""
        due_at = connection.scalar(self._due(1).with_only_columns(self.table.c.due_at))
        return 0.0 if due_at is None else (self.now(connection) - aware(due_at)).total_seconds()

    def select(self, *, dead: bool | None = None) -> Select[Any]:
        """Return the statement that reads rows, the oldest first; with ``dead`` only those."""
        statement = select(self.table).order_by(self.table.c.created_at, self.table.c.id)
        if dead is None:
            return statement
        due_at = self.table.c.due_at
        return statement.where(due_at.is_(None) if dead else due_at.is_not(None))

    def count(self, connection: Connection) -> tuple[int, int]:
        """Return how many rows wait for their end, and how many are dead letters."""
        all_rows, waiting = func.count(), func.count(self.table.c.due_at)
        total, alive = connection.execute(select(all_rows, waiting).select_from(self.table)).one()
        return alive, total - alive

    def now(self, connection: Connection) -> datetime:
        """Return the time by the database's clock."""
        return aware(connection.execute(select(self._now)).scalar_one())

    def find(self, connection: Connection, name: str) -> Sequence[Row[Any]]:
        """Return the row of this id, or the rows of the task of this id, the oldest first."""
        condition = self.table.c.task_id == name
        with suppress(ValueError):
            condition = or_(condition, self.table.c.id == UUID(name))
        return connection.execute(self.select().where(condition)).all()

    def lock(self, connection: Connection, ids: Iterable[UUID]) -> Sequence[Row[Any]]:
        """Return those rows that are there and no other transaction has locked, and lock them."""
        found = self.select().where(self.table.c.id.in_(list(ids)))
        return connection.execute(found.with_for_update(skip_locked=True)).all()

    def requeue(self, connection: Connection, due: Mapping[UUID, float], lease: float) -> None:
        """Make rows such as they are right after their dispatch.

        :param due: by id, in how many seconds the relay is to look at them.
        :param lease: what they are given, in seconds.
        """
        self._set_due(connection, due, died_at=None, error=None, deliveries=0, lease=lease)

    def _set_due(self, connection: Connection, due: Mapping[UUID, float], **values: object) -> None:
        statement = (
            update(self.table)
            .where(self.table.c.id == bindparam("row_id"))
            .values(due_at=self._later, **values)
        )
        if due:
            rows = [{"row_id": row_id, "seconds": seconds} for row_id, seconds in due.items()]
            connection.execute(statement, rows)

    def _is_alive(self, row_id: UUID | BindParameter[UUID]) -> Condition:
        return and_(self.table.c.id == row_id, self.table.c.due_at.is_not(None))

    def _update(self, condition: Condition) -> Update:
        return update(self.table).where(self.table.c.id.in_(self._unlocked(condition)))

    def _unlocked(self, condition: Condition) -> Select[tuple[UUID]]:
        return select(self.table.c.id).where(condition).with_for_update(skip_locked=True)


def _storable(text: str) -> str:
    # PostgreSQL keeps no NUL, nobody half of a pair, and MariaDB nothing longer than its packets:
    # the dead letter is worth more.
    if len(text) > LONGEST_ERROR:
        half = LONGEST_ERROR // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half} characters ...\n{text[-half:]}"
    return text.encode(errors="backslashreplace").decode().replace("\0", r"\x00")
