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
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, Row, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import QueuePool

from ws_celery.compat import limit_no_overflow
from ws_celery.exceptions import LocksUnavailable
from ws_celery.locks.holding import Held, Holder, LockStore
from ws_celery.masking import masked_text
from ws_celery.request import task_request

if TYPE_CHECKING:
    from ws_celery.app import PyramidCelery

__all__ = ("PostgresqlStore", "number_of")

#: The number of a transaction is a fencing token: it grows, and needs no table. A machine that has
#: lost its power does not close its connections: the server gives them up after the timeout.
_ACQUIRE = text(
    """
    SELECT CASE WHEN pg_try_advisory_lock(:number) THEN txid_current() END,
        (extract(epoch FROM clock_timestamp()) * 1000000)::bigint,
        set_config('tcp_keepalives_idle', :third, false),
        set_config('tcp_keepalives_interval', :third, false),
        set_config('tcp_keepalives_count', '2', false),
        set_config('tcp_user_timeout', :milliseconds, false)
    """
)
_RELEASE = text("SELECT pg_advisory_unlock(:number)")

#: The connections that hold advisory locks, and their last statements.
_HOLDERS = text(
    """
    SELECT * FROM (
        SELECT l.classid::bigint << 32 | l.objid::bigint AS number, a.pid, a.query,
            (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS now
        FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
        WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
            AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    ) held WHERE CAST(:number AS bigint) IS NULL OR number = :number
    """
)
#: Returns when the connection has ended, and its lock is free; or after five seconds.
_TERMINATE = text("SELECT pg_terminate_backend(:pid, 5000)")

_DESCRIPTION = re.compile(r"/\* ws_celery:([\w=-]+) \*/")

#: PostgreSQL shows the first 1024 bytes of a statement: so many, before they are encoded, are for
#: each of key, task, id and host.
_LONGEST = 150


class PostgresqlStore(LockStore):
    """Keeps each lock as an advisory lock of a connection of its own.

    The connection ends with its process, and so does the lock.

    :param app: the Celery app, whose requests have a session of the database.
    """

    def __init__(self, app: PyramidCelery) -> None:
        self._app = app
        #: By owner.
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
            engine = session.get_bind().engine
        if engine.dialect.name != "postgresql":
            raise LocksUnavailable(
                f"the database is {engine.dialect.name}, and only Redis and PostgreSQL keep them"
            )
        # A pool of its own: a run has a connection here and one for its transaction, and runs that
        # wait for the second of one pool would wait for each other.
        pool = engine.pool.recreate()
        if isinstance(pool, QueuePool):
            # It keeps as many as the application's; a run beyond them opens one and closes it.
            limit_no_overflow(pool)
        own = Engine(pool, engine.dialect, engine.url)
        return own.execution_options(isolation_level="AUTOCOMMIT")

    def acquire(self, held: Held) -> Holder | None:
        with _answering():
            session = _Session(self._engine.connect(), held)
            holder = session.take()
        if holder is None:
            self._sessions[held.owner] = session
        return holder

    def renew(self, held: Held) -> bool:
        session = self._sessions.get(held.owner)
        with _answering():
            return session is not None and session.renew()

    def release(self, held: Held) -> bool:
        try:
            return self._sessions[held.owner].release()
        finally:
            del self._sessions[held.owner]

    def abandon(self, held: Held) -> None:
        if (session := self._sessions.get(held.owner)) is not None:
            session.abandon()

    def holders(self) -> list[Holder]:
        with _answering(), self._engine.connect() as connection:
            rows = connection.execute(_HOLDERS, {"number": None}).all()
        found = filter(None, map(_described, rows))
        # Advisory locks of other programs have no key.
        return sorted((each for each in found if each.key), key=lambda holder: holder.key)

    def holder_of(self, key: str) -> Holder | None:
        with _answering(), self._engine.connect() as connection:
            row = _find(connection, key)
        return None if row is None else _holder(row, key)

    def free(self, holder: Holder) -> bool:
        with _answering(), self._engine.connect() as connection:
            row = _find(connection, holder.key)
            if row is None or _holder(row, holder.key).token != holder.token:
                return False
            return bool(connection.execute(_TERMINATE, {"pid": row.pid}).scalar_one())

    def close(self) -> None:
        if "_engine" in vars(self):
            self._engine.dispose()


class _Session:
    """The connection that has the lock of one run."""

    def __init__(self, connection: Connection, held: Held) -> None:
        self._connection = connection
        self._held = held
        self._mutex = threading.Lock()  # the run and the threads that renew use it
        self._socket = _socket_of(connection, held)
        self._abandoned = False

    def take(self) -> Holder | None:
        """Take the lock, or return who has it and close the connection."""
        held, connection = self._held, self._connection
        try:
            token, now, *_ = connection.execute(_ACQUIRE, _arguments(held)).one()
            if token is None:
                row = _find(connection, held.key)
                self._close()
                return Holder(held.key) if row is None else _holder(row, held.key)
            held.token = token
            self._description = _describe(held, now)
            connection.exec_driver_sql(self._description)
        except BaseException:
            connection.invalidate()
            self._close()
            raise
        return None

    def renew(self) -> bool:
        """Describe again who holds the lock; return whether the connection is still there."""
        with self._alone():
            if self._connection.closed or self._connection.invalidated:
                return False  # it would connect anew, without the lock
            try:
                self._connection.exec_driver_sql(self._description)
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise
                return False
        return True

    def release(self) -> bool:
        """Give the lock and the connection back; return whether it still was held."""
        number = {"number": number_of(self._held.key)}
        with self._alone():
            try:
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
        if self._socket is not None:
            with suppress(OSError):  # it has been closed just now
                self._socket.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._mutex.acquire(timeout=self._held.timeout):
            raise LocksUnavailable("the database does not answer")
        try:
            yield
        finally:
            self._mutex.release()

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._abandoned:
            self._connection.invalidate()  # none for the pool
        self._connection.close()


def _arguments(held: Held) -> dict[str, int | str]:
    """Return the arguments of :data:`_ACQUIRE`; those of ``set_config`` are texts."""
    return {
        "number": number_of(held.key),
        "third": str(max(round(held.timeout / 3), 1)),
        "milliseconds": str(round(held.timeout * 1000)),
    }


def _socket_of(connection: Connection, held: Held) -> socket.socket | None:
    """Return the socket of a connection, which notices a network that has fallen silent.

    A duplicate: the driver may close its own, and the system give its number to another one.
    """
    fileno = getattr(connection.connection.driver_connection, "fileno", None)
    if fileno is None:
        return None
    found = socket.socket(fileno=os.dup(fileno()))
    with suppress(OSError, AttributeError):  # a Unix socket and some systems do not have it
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(held.timeout * 1000))
    return found


def number_of(key: str) -> int:
    """Return the number that PostgreSQL knows a key by."""
    digest = sha256(f"ws_celery:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _describe(held: Held, now: int) -> str:
    """Return a statement by which ``pg_stat_activity`` shows who holds a lock, since ``now``."""
    fields = {"key": held.key, **held.description(), "token": held.token, "since": now}
    short = {k: _cut(each) if isinstance(each, str) else each for k, each in fields.items()}
    description = json.dumps(short, ensure_ascii=False, separators=(",", ":"))
    # Encoded: a key is made of arguments, and must not be able to end the comment.
    return f"SELECT 1 /* ws_celery:{urlsafe_b64encode(description.encode()).decode()} */"


def _cut(text: str) -> str:
    """Return the beginning of a text that is not too long in JSON."""
    text = text[:_LONGEST]
    while len(json.dumps(text, ensure_ascii=False).encode()) > _LONGEST:
        text = text[:-1]
    return text


def _find(connection: Connection, key: str) -> Row[Any] | None:
    """Return the row of the connection that holds the lock of a key, if one does."""
    return connection.execute(_HOLDERS, {"number": number_of(key)}).first()


def _holder(row: Row[Any], key: str) -> Holder:
    """Return who holds the lock of a key; the key in the description may be cut."""
    return replace(_described(row) or Holder(key), key=key)


def _described(row: Row[Any]) -> Holder | None:
    """Return the holder that the last statement of a connection describes, if it is one of ours."""
    match = _DESCRIPTION.search(row.query or "")
    with suppress(ValueError):  # it is not encoded: not by us
        return Holder.described_by(urlsafe_b64decode(match[1] if match else ""), row.now)
    return None


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise LocksUnavailable(f"the database: {masked_text(str(error))}") from error
