"""Who holds an advisory lock of PostgreSQL: a comment in the last statement of his connection."""

from __future__ import annotations

import json
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, text

from ws_celery.locks.holding import Held, Holder

__all__ = ("HOLDERS", "find", "holder_in", "holder_of", "number_of", "told")

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
