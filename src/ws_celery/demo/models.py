"""What the demo stores, and ``request.dbsession`` on SQLite, for many processes at once."""

from __future__ import annotations

import fcntl
import os
import re
import sqlite3
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import zope.sqlalchemy
from celery import Task
from pyramid.config import Configurator
from pyramid.request import Request
from sqlalchemy import (
    Connection,
    DateTime,
    Dialect,
    Engine,
    ForeignKey,
    TypeDecorator,
    delete,
    engine_from_config,
    event,
    select,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

__all__ = ("FailedOrder", "Order", "Receipt", "Report", "TaskRun", "includeme")

#: Seconds that a process waits for its turn to write; a turn takes milliseconds.
BUSY_TIMEOUT = 30


def now() -> datetime:
    """Return the time, with its zone."""
    return datetime.now(timezone.utc)


class UTCDateTime(TypeDecorator[datetime]):
    """A time with its zone; SQLite keeps it in UTC, without."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return None if value is None else value.astimezone(timezone.utc).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return None if value is None else value.replace(tzinfo=timezone.utc)


class Base(DeclarativeBase):
    """What all tables have: a number, the time, and the process that wrote the row."""

    type_annotation_map = {datetime: UTCDateTime}  # noqa: RUF012 - SQLAlchemy's name and form

    id: Mapped[int] = mapped_column(primary_key=True)
    pid: Mapped[int] = mapped_column(insert_default=os.getpid)
    time: Mapped[datetime] = mapped_column(insert_default=now)


class Order(Base):
    """An order, stored by the web process that took it."""

    __tablename__ = "orders"

    email: Mapped[str]
    item: Mapped[str]
    task_id: Mapped[str | None]
    receipt: Mapped[Receipt | None] = relationship(back_populates="order", lazy="joined")

    @property
    def status(self) -> str:
        """``done`` once there is a receipt."""
        return "done" if self.receipt else "waiting"

    def __json__(self, request: Request) -> dict[str, Any]:
        return {
            "id": self.id,
            "url": request.route_path("order", id=self.id),
            "email": self.email,
            "item": self.item,
            "web_pid": self.pid,
            "time": self.time,
            "task_id": self.task_id,
            "status": self.status,
            "receipt": self.receipt,
        }


class Receipt(Base):
    """A receipt, written by a worker; ``url`` is the link that the worker made."""

    __tablename__ = "receipts"

    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id), unique=True)
    url: Mapped[str]
    order: Mapped[Order] = relationship(back_populates="receipt")

    def __json__(self, _request: Request) -> dict[str, Any]:
        return {"order_id": self.order_id, "url": self.url, "pid": self.pid, "time": self.time}


class FailedOrder(Base):
    """What is left of an order whose request failed, stored after its transaction had aborted."""

    __tablename__ = "failed_orders"

    email: Mapped[str]
    item: Mapped[str]
    task_id: Mapped[str]

    def __json__(self, _request: Request) -> dict[str, Any]:
        return {
            "id": self.id,
            "email": self.email,
            "item": self.item,
            "web_pid": self.pid,
            "time": self.time,
            "task_id": self.task_id,
        }


class Report(Base):
    """A report that somebody asked for; how far it is, Celery's result backend knows."""

    __tablename__ = "reports"

    task_id: Mapped[str | None]

    def __json__(self, request: Request) -> dict[str, Any]:
        return {
            "id": self.id,
            "url": request.route_path("report", id=self.id),
            "web_pid": self.pid,
            "time": self.time,
            "task_id": self.task_id,
        }


class TaskRun(Base):
    """One run of a task: stored by the task itself, so that it proves that the run happened."""

    __tablename__ = "task_runs"

    task: Mapped[str] = mapped_column(index=True)
    task_id: Mapped[str] = mapped_column(index=True)
    sent_by: Mapped[int | None]

    @classmethod
    def of(cls, task: Task) -> TaskRun:
        """Return the row for the run that ``task``, as ``bind=True`` passes it, is in."""
        # Celery's messages tell where they come from: gen<pid>@<host>.
        sender = re.match(r"gen(\d+)@", task.request.origin or "")
        return cls(
            task=task.name, task_id=task.request.id, sent_by=int(sender[1]) if sender else None
        )

    @classmethod
    def forget_old(cls, session: Session, task: str, keep: int) -> None:
        """Delete the runs of ``task`` but the newest."""
        newest_to_go = (
            select(cls.id).where(cls.task == task).order_by(cls.id.desc()).offset(keep).limit(1)
        )
        session.execute(
            delete(cls).where(cls.task == task, cls.id <= newest_to_go.scalar_subquery()),
            execution_options={"synchronize_session": False},
        )

    def __json__(self, _request: Request) -> dict[str, Any]:
        return {
            "task": self.task,
            "id": self.task_id,
            "pid": self.pid,
            "sent_by": self.sent_by,
            "time": self.time,
        }


def includeme(config: Configurator) -> None:
    """Open the database of ``sqlalchemy.url``, and add ``request.dbsession``."""
    engine = engine_from_config(
        config.registry.settings, "sqlalchemy.", connect_args={"timeout": BUSY_TIMEOUT}
    )
    event.listen(engine, "connect", _leave_begin_to_us)
    event.listen(engine, "begin", _begin)
    _create_tables(engine)
    config.registry["engine"] = engine

    def dbsession(request: Request) -> Session:
        session = Session(engine)
        # It commits and aborts with the request: pyramid_tm's in a view, the task's in a task.
        zope.sqlalchemy.register(session, transaction_manager=request.tm)
        return session

    config.add_request_method(dbsession, reify=True)


def _leave_begin_to_us(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None


def _begin(connection: Connection) -> None:
    # Whoever reads first and writes later may find that another process wrote in between, and no
    # timeout helps then ("database is locked"). So everybody asks for the right to write at once.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _create_tables(engine: Engine) -> None:
    """Make directory, file and tables if they are missing, one process at a time."""
    directory = Path(str(engine.url.database)).absolute().parent
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with engine.connect() as connection:
            # Readers do not wait for writers. SQLite wants to hear this outside of a transaction.
            cursor = connection.connection.cursor()
            cursor.execute("PRAGMA journal_mode = WAL")
            cursor.close()
        with engine.begin() as connection:
            Base.metadata.create_all(connection)
    finally:
        os.close(lock)
        # A worker forks after this; no connection is open then.
        engine.dispose()
