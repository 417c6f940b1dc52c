"""Locks in Redis: a key with a time to live, which only its owner renews and deletes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kombu import Connection
from redis import Redis
from redis.exceptions import RedisError
from zope.interface import implementer

from ws_celery.exceptions import LocksUnavailable
from ws_celery.interfaces import ILockStore
from ws_celery.locks.holding import Held, Holder
from ws_celery.masking import masked_text

if TYPE_CHECKING:
    from redis.commands.core import Script

__all__ = ("RedisStore",)

#: A lock that somebody else has made may be anything.
_FIELD = """
local function field(name)
  return redis.call('TYPE', KEYS[1]).ok == 'hash' and redis.call('HGET', KEYS[1], name)
end
"""

#: KEYS: lock, index, last token. ARGV: owner, milliseconds, holder. A second try of a call whose
#: answer got lost finds its own lock. Tokens follow the clock, so that they grow on when Redis has
#: lost its data, and are greater than the last one, so that they grow when the clock jumps back.
_ACQUIRE = (
    _FIELD
    + """
if field('owner') == ARGV[1] then return {1, field('token'), false} end
if redis.call('EXISTS', KEYS[1]) == 1 then return {0, field('token'), field('holder')} end
local time = redis.call('TIME')
local last = tonumber(redis.call('GET', KEYS[3]) or '0') or 0
local token = string.format('%.0f', math.max(last + 1, time[1] * 1000000 + time[2]))
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('SET', KEYS[3], token)
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'token', token, 'since', now, 'holder', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('ZADD', KEYS[2], now + ARGV[2], KEYS[1])
return {1, token, false}
"""
)

#: What has run out is taken off the index here, not by each run.
_RENEW = (
    _FIELD
    + """
if field('owner') ~= ARGV[1] then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('ZADD', KEYS[2], now + ARGV[2], KEYS[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
return 1
"""
)

#: KEYS: lock, index. ARGV: owner.
_RELEASE = (
    _FIELD
    + """
if field('owner') ~= ARGV[1] then return 0 end
redis.call('ZREM', KEYS[2], KEYS[1])
return redis.call('DEL', KEYS[1])
"""
)

#: KEYS: lock, index. ARGV: token; empty for a holder that nobody knows, who has none of ours.
_FREE = (
    _FIELD
    + """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local token = field('token') or ''
if #token > 18 or not string.find(token, '^[1-9]%d*$') then token = '' end
if token ~= ARGV[1] then return 0 end
redis.call('ZREM', KEYS[2], KEYS[1])
return redis.call('DEL', KEYS[1])
"""
)

_WHOLE = re.compile(rb"[1-9][0-9]{0,17}")

#: What a hash tells of its holder, and what each of it has to be.
_TOLD = {"task": str, "id": str, "host": str, "pid": int}


@implementer(ILockStore)
class RedisStore:
    """Keeps each lock as a hash that expires, beside an index of all locks.

    :param connection: a connection of kombu's, for its reading of URLs: Sentinel, TLS, sockets.
    :param prefix: what the names of the keys begin with.
    """

    def __init__(self, connection: Connection, prefix: str = "") -> None:
        # Kombu's default is ten connections; a pool of threads has more runs than that.
        connection.transport_options["max_connections"] = 2**31
        self._connection = connection
        self._prefix = f"{prefix}ws_celery:lock:"
        self._index = f"{prefix}ws_celery:locks"
        self._last_token = f"{prefix}ws_celery:lock-token"

    @cached_property
    def _client(self) -> Redis:
        return Redis(connection_pool=self._connection.channel().pool)

    @cached_property
    def _scripts(self) -> dict[str, Script]:
        texts = {"acquire": _ACQUIRE, "renew": _RENEW, "release": _RELEASE, "free": _FREE}
        return {name: self._client.register_script(text) for name, text in texts.items()}

    def acquire(self, held: Held) -> Holder | None:
        """Take the lock, or return who has it."""
        holder = json.dumps({name: getattr(held, name) for name in _TOLD})
        keys = (self._name(held.key), self._index, self._last_token)
        arguments = (held.owner, _ms(held), holder)
        with self._answering():
            taken, token, found = self._scripts["acquire"](keys, arguments)
        if taken:
            held.token = int(token)
            return None
        return _holder(held.key, {b"token": token, b"holder": found})

    def renew(self, held: Held) -> bool:
        """Let it be held for another ``held.timeout`` seconds; return whether it still was."""
        return self._call("renew", held.key, held.owner, _ms(held))

    def release(self, held: Held) -> bool:
        """Give it back; return whether it still was held."""
        return self._call("release", held.key, held.owner)

    def free(self, holder: Holder) -> bool:
        """Take the lock away from this holder; return whether he still had it."""
        return self._call("free", holder.key, str(holder.token or ""))

    def abandon(self, held: Held) -> None:
        """Do nothing: the sockets have time limits."""

    def holders(self) -> list[Holder]:
        """Return who holds locks, in the order of their keys."""
        with self._answering():
            names: Any = self._client.zrange(self._index, 0, -1)
        keys = sorted(name.decode(errors="replace").removeprefix(self._prefix) for name in names)
        return [holder for holder in self._holders(keys) if holder is not None]

    def holder_of(self, key: str) -> Holder | None:
        """Return who holds the lock of a key, if somebody does."""
        return self._holders([key])[0]

    def _holders(self, keys: Sequence[str]) -> list[Holder | None]:
        with self._answering(), self._client.pipeline(transaction=False) as pipeline:
            pipeline.time()
            for key in keys:
                pipeline.hgetall(self._name(key))
                pipeline.pttl(self._name(key))
            answers = pipeline.execute(raise_on_error=False)
            (seconds, micros), *answers = map(_told_or_raised, answers)
        now = seconds * 1000 + micros // 1000
        return [
            None if fields == {} else _holder(key, fields or {}, now, left)
            for key, fields, left in zip(keys, answers[::2], answers[1::2], strict=True)
        ]

    def close(self) -> None:
        """Close the connections."""
        if "_client" in vars(self):
            self._client.connection_pool.disconnect()
            self._connection.close()

    def _name(self, key: str) -> str:
        return self._prefix + key

    def _call(self, script: str, key: str, *arguments: Any) -> bool:
        with self._answering():
            return bool(self._scripts[script]((self._name(key), self._index), arguments))

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except (RedisError, OSError, *self._connection.connection_errors) as error:
            raise LocksUnavailable(f"Redis: {masked_text(str(error))}") from error


def _ms(held: Held) -> int:
    return round(held.timeout * 1000)


def _told_or_raised(answer: Any) -> Any:
    """Return an answer; ``None`` for the fields of what has none, because it is no hash."""
    if not isinstance(answer, Exception):
        return answer
    if "WRONGTYPE" in str(answer):
        return None
    raise answer


def _holder(
    key: str,
    fields: Mapping[bytes, bytes | None],
    now: int | None = None,
    left: int | None = None,
) -> Holder:
    token, since = _whole(fields.get(b"token")), _whole(fields.get(b"since"))
    return Holder(
        key,
        token,
        **_told(fields.get(b"holder")),
        age=None if now is None or since is None else (now - since) / 1000,
        time_left=None if left is None or left < 0 else left / 1000,
    )


def _whole(text: bytes | None) -> int | None:
    return int(text) if text and _WHOLE.fullmatch(text) else None


def _told(text: bytes | None) -> dict[str, Any]:
    """Return what is known of a holder: a lock may be made by somebody else, in any way."""
    told: Any = None
    with suppress(ValueError):
        told = json.loads(text or b"null")
    if not isinstance(told, dict):
        return {}
    return {name: told[name] for name, kind in _TOLD.items() if isinstance(told.get(name), kind)}
