"""Locks in PostgreSQL: an advisory lock of a connection that the run has for nothing else."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from time import sleep
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import QueuePool
from zope.interface import implementer

from ws_celery.exceptions import LocksUnavailable
from ws_celery.interfaces import ILockStore
from ws_celery.locks.holding import Held, Holder
from ws_celery.masking import masked_text
from ws_celery.request import task_request

__all__ = (
    "HOLDERS",
    "PostgresqlStore",
    "find",
    "holder_in",
    "holder_of",
    "number_of",
    "told",
)

#: The connections that hold advisory locks, and their last statements.
HOLDERS = text(
    """
    SELECT * FROM (
        SELECT l.classid::bigint << 32 | l.objid::bigint AS number, a.pid, a.query,
            extract(epoch FROM clock_timestamp())::float AS now
        FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
        WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
            AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    ) held WHERE CAST(:number AS bigint) IS NULL OR number = :number
    """
)
_TOLD = re.compile(r"/\* ws_celery:([\w=-]+) \*/")

#: PostgreSQL shows the first 1024 bytes of a statement: of key, task and id so many bytes are told.
_LONGEST = 160


def number_of(key: str) -> int:
    """Return the number that PostgreSQL knows a key by."""
    digest = sha256(f"ws_celery:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def told(held: Held, now: float) -> str:
    """Return a statement that tells who holds a lock, since ``now``."""
    holder = {
        "key": _cut(held.key),
        "task": _cut(held.task),
        "id": held.id and _cut(held.id),
        "host": _cut(held.host, 64),
        "pid": held.pid,
        "token": held.token,
        "since": now,
    }
    fields = json.dumps(holder, ensure_ascii=False, separators=(",", ":"))
    # Encoded: a key is made of arguments, and must not be able to end the comment.
    return f"SELECT 1 /* ws_celery:{urlsafe_b64encode(fields.encode()).decode()} */"


def _cut(text: str, most: int = _LONGEST) -> str:
    """Return the beginning of a text that takes so many bytes, as JSON writes it."""
    while len(json.dumps(text, ensure_ascii=False).encode()) - 2 > most:
        text = text[: most if len(text) > most else -1]
    return text


def find(connection: Connection, key: str) -> Holder | None:
    """Return who holds the lock of a key, if somebody does."""
    row = connection.execute(HOLDERS, {"number": number_of(key)}).first()
    return None if row is None else holder_of(row, key)


def holder_of(row: Any, key: str) -> Holder:
    """Return who holds the lock of a key by a row of :data:`HOLDERS`."""
    holder = holder_in(row.query, row.now)
    return Holder(key) if holder is None else replace(holder, key=key)  # it may be cut there


def holder_in(query: str, now: float) -> Holder | None:
    """Return the holder that a statement tells of, if it is one of ours."""
    match = _TOLD.search(query or "")
    if match is None:
        return None
    with suppress(ValueError, TypeError, LookupError, AttributeError):  # not by us
        told = json.loads(urlsafe_b64decode(match[1]))
        return Holder(age=now - told.pop("since"), **told)
    return None


#: The number of a transaction is a fencing token: it grows, and needs no table.
_ACQUIRE = text(
    "SELECT CASE WHEN pg_try_advisory_lock(:number) THEN txid_current() END AS token,"
    " extract(epoch FROM clock_timestamp())::float AS now"
)
_RELEASE = text("SELECT pg_advisory_unlock(:number)")

#: A machine that has lost its power does not close its connections.
_KEEPALIVE = text(
    "SELECT set_config('tcp_keepalives_idle', :seconds, false),"
    " set_config('tcp_keepalives_interval', :seconds, false),"
    " set_config('tcp_keepalives_count', '2', false),"
    " set_config('tcp_user_timeout', :milliseconds, false)"
)

#: The same for our end; not every system has all of them.
_OPTIONS = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")

_TERMINATE = text("SELECT pg_terminate_backend(:pid)")

#: Seconds between two looks whether it has ended.
_MOMENTS = (0.001, 0.01, *[0.05] * 40)


class _Session:
    """The connection that has the lock of one run."""

    def __init__(self, connection: Connection, held: Held) -> None:
        self._connection = connection
        self._mutex = threading.Lock()  # the run and the threads that renew use it
        self._limit = held.timeout
        self._number = number_of(held.key)
        self._line = _line(connection, held)
        self._abandoned = False
        self._told = ""

    def take(self, held: Held) -> Holder | None:
        """Take the lock, or return who has it and end."""
        connection = self._connection
        try:
            token, now = connection.execute(_ACQUIRE, {"number": self._number}).one()
            if token is None:
                holder = find(connection, held.key) or Holder(held.key)  # it has just gone
                self._close()
                return holder
            held.token = token
            connection.execute(_KEEPALIVE, _keepalive(held))
            self._told = told(held, now)
            connection.exec_driver_sql(self._told)
        except BaseException:
            connection.invalidate()
            self._close()
            raise
        return None

    def renew(self) -> bool:
        """Tell again who holds the lock; return whether the connection is still there."""
        with self._alone():
            if self._connection.closed or self._connection.invalidated:
                return False
            try:
                self._connection.exec_driver_sql(self._told)
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise
                return False
        return True

    def release(self) -> bool:
        """Give the lock and the connection back; return whether it still was held."""
        with self._alone():
            try:
                number = {"number": self._number}
                return bool(self._connection.execute(_RELEASE, number).scalar_one())
            except SQLAlchemyError as error:
                self._connection.invalidate()  # the lock ends with its connection
                if self._abandoned:
                    raise LocksUnavailable("the database does not answer") from error
                return False
            finally:
                self._close()

    def abandon(self) -> None:
        """End the connection, so that whoever waits for its server waits no longer."""
        self._abandoned = True
        if self._line is not None:
            with suppress(OSError):  # it has been closed just now
                self._line.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._mutex.acquire(timeout=self._limit):
            raise LocksUnavailable("the database does not answer")
        try:
            yield
        finally:
            self._mutex.release()

    def _close(self) -> None:
        if self._line is not None:
            self._line.close()
        if self._abandoned:
            self._connection.invalidate()  # none for the pool
        self._connection.close()


@implementer(ILockStore)
class PostgresqlStore:
    """Keeps each lock as an advisory lock of a connection of its own.

    The connection ends with its process, and so does the lock.

    :param app: the Celery app, whose requests have a session of the database.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._sessions: dict[str, _Session] = {}

    @cached_property
    def _engine(self) -> Engine:
        app = self._app
        with task_request(app.registry, app.propagation, {}) as request:
            session = getattr(request, app.session_attribute, None)
            if session is None:
                raise LocksUnavailable(
                    f"the request of a task has no SQLAlchemy session as its attribute "
                    f"{app.session_attribute!r} (ws_celery.dbsession)"
                )
            bind = session.get_bind()
        engine = getattr(bind, "engine", bind)
        if engine.dialect.name != "postgresql":
            raise LocksUnavailable(
                f"the database is {engine.dialect.name}, and only Redis and PostgreSQL keep them"
            )
        # A pool of its own: a run has a connection here and one for its transaction, and runs that
        # wait for the second of one pool would wait for each other.
        pool = engine.pool.recreate()
        if isinstance(pool, QueuePool):
            # It keeps as many as the application's; a run beyond them opens one and closes it.
            pool._max_overflow = -1
        own = Engine(pool, engine.dialect, engine.url)
        return own.execution_options(isolation_level="AUTOCOMMIT")

    def acquire(self, held: Held) -> Holder | None:
        """Take the lock, or return who has it."""
        with _answering():
            session = _Session(self._engine.connect(), held)
            holder = session.take(held)
        if holder is None:
            self._sessions[held.owner] = session
        return holder

    def renew(self, held: Held) -> bool:
        """Tell again who holds the lock; return whether its connection is still there."""
        session = self._sessions.get(held.owner)
        with _answering():
            return session is not None and session.renew()

    def release(self, held: Held) -> bool:
        """Give it back; return whether it still was held."""
        try:
            return self._sessions[held.owner].release()
        finally:
            del self._sessions[held.owner]

    def abandon(self, held: Held) -> None:
        """End its connection: nobody has to wait any longer for what was asked by it."""
        if (session := self._sessions.get(held.owner)) is not None:
            session.abandon()

    def holders(self) -> list[Holder]:
        """Return who holds locks, in the order of their keys."""
        with _answering(), self._engine.connect() as connection:
            rows = connection.execute(HOLDERS, {"number": None}).all()
        found = [holder_in(row.query, row.now) for row in rows]
        return sorted((holder for holder in found if holder), key=lambda holder: holder.key)

    def holder_of(self, key: str) -> Holder | None:
        """Return who holds the lock of a key, if somebody does."""
        with _answering(), self._engine.connect() as connection:
            return find(connection, key)

    def free(self, holder: Holder) -> bool:
        """End the connection of this holder; return whether he still had the lock."""
        with _answering(), self._engine.connect() as connection:
            row = connection.execute(HOLDERS, {"number": number_of(holder.key)}).first()
            if row is None or holder_of(row, holder.key).token != holder.token:
                return False
            ended = bool(connection.execute(_TERMINATE, {"pid": row.pid}).scalar_one())
            _wait_for_end(connection, row)
            return ended

    def close(self) -> None:
        """Close the connections that no run holds a lock with."""
        if "_engine" in vars(self):
            self._engine.dispose()


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise LocksUnavailable(f"the database: {masked_text(str(error))}") from error


def _wait_for_end(connection: Connection, row: Any) -> None:
    """Wait until a connection that is told to end has let go of its lock: moments."""
    for pause in _MOMENTS:
        now = connection.execute(HOLDERS, {"number": row.number}).first()
        if now is None or now.pid != row.pid:
            return
        sleep(pause)


def _line(connection: Connection, held: Held) -> socket.socket | None:
    """Return the socket of a connection, which notices a network that has fallen silent.

    It is a duplicate: the driver may close its own, and the system give its number to another one.
    """
    fileno = getattr(connection.connection.driver_connection, "fileno", None)
    if fileno is None:
        return None
    line = socket.socket(fileno=os.dup(fileno()))
    third = _third(held)
    with suppress(OSError):  # a Unix socket has none of this
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in zip(_OPTIONS, (third, third, 2, _ms(held)), strict=True):
            if hasattr(socket, name):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return line


def _keepalive(held: Held) -> dict[str, str]:
    return {"seconds": str(_third(held)), "milliseconds": str(_ms(held))}


def _third(held: Held) -> int:
    return max(round(held.timeout / 3), 1)


def _ms(held: Held) -> int:
    return round(held.timeout * 1000)
