"""Locks in Redis: redis-py's ``Lock``, with a value that says who holds it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from kombu import Connection
from redis import Redis
from redis.exceptions import LockError, RedisError, ResponseError

from ws_celery.exceptions import LocksUnavailable
from ws_celery.locks.holding import Held, Holder, LockStore
from ws_celery.masking import masked_text

if TYPE_CHECKING:
    from redis.client import Pipeline
    from redis.commands.core import Script
    from redis.lock import Lock

    from ws_celery.app import PyramidCelery

__all__ = ("RedisStore",)

#: Takes a lock that is free, and returns the value of whoever has it then; nothing if that is no
#: text, because somebody else has made it. redis-py's own ``Lock.acquire`` cannot take a lock and
#: give it a fencing token in one step. A second try of a call whose answer got lost finds its own
#: lock. Tokens follow the clock, so that they grow on when Redis has lost its data, and are greater
#: than the last one, so that they grow when the clock jumps back.
#: KEYS: lock, last token. ARGV: what the holder says of itself, milliseconds.
_ACQUIRE = """
if redis.call('EXISTS', KEYS[1]) == 0 then
  local time = redis.call('TIME')
  local now = time[1] * 1000000 + time[2]
  local last = tonumber(redis.call('MGET', KEYS[2])[1] or '0') or 0
  local token = string.format('%.0f', math.max(last + 1, now))
  local fields = string.format('{"token": %s, "since": %.0f, ', token, now)
  redis.call('SET', KEYS[2], token)
  redis.call('SET', KEYS[1], fields .. ARGV[1], 'PX', ARGV[2])
end
return redis.call('MGET', KEYS[1])[1]
"""

#: Answers of PTTL: if a key has no time to live, and if there is no such key.
_FOR_EVER, _NO_KEY = -1, -2


class RedisStore(LockStore):
    """Keeps each lock as a key that expires, which only its owner renews and deletes.

    :param app: the Celery app, whose configuration has options for the connection.
    :param url: of the Redis.
    """

    def __init__(self, app: PyramidCelery, url: str) -> None:
        conf = app.conf
        if url == conf.result_backend:
            options, ssl = conf.result_backend_transport_options, conf.redis_backend_use_ssl
        else:
            options, ssl = conf.broker_transport_options, conf.broker_use_ssl
        timeout = app.publisher.timeout
        options = {"socket_connect_timeout": timeout, "socket_timeout": timeout, **(options or {})}
        # Kombu's default is ten connections; a pool of threads has more runs than that.
        options["max_connections"] = 2**31
        # Kombu reads URLs of Sentinel, TLS and sockets.
        self._connection = Connection(url, transport_options=options, ssl=ssl or False)
        prefix = options.get("global_keyprefix", "")
        self._prefix = f"{prefix}ws_celery:lock:"
        self._last_token = f"{prefix}ws_celery:lock-token"
        #: By owner.
        self._locks: dict[str, Lock] = {}

    @cached_property
    def _client(self) -> Redis:
        return Redis(connection_pool=self._connection.channel().pool)

    @cached_property
    def _acquire(self) -> Script:
        return self._client.register_script(_ACQUIRE)

    def acquire(self, held: Held) -> Holder | None:
        name = self._prefix + held.key
        description = json.dumps({"owner": held.owner, **held.description()})[1:]
        with self._answering():
            arguments = (description, round(held.timeout * 1000))
            value = self._acquire((name, self._last_token), arguments)
            if value is None or not value.endswith(description.encode()):
                return _holder(held.key, value)
            # The thread that renews it is not the one that has taken it.
            lock = self._client.lock(name, timeout=held.timeout, thread_local=False)
        lock.local.token = value
        held.token = json.loads(value)["token"]
        self._locks[held.owner] = lock
        return None

    def renew(self, held: Held) -> bool:
        lock = self._locks.get(held.owner)
        return lock is not None and self._is_owner(lock.reacquire)

    def release(self, held: Held) -> bool:
        lock = self._locks.pop(held.owner, None)
        return lock is not None and self._is_owner(lock.release)

    def _is_owner(self, change: Callable[[], object]) -> bool:
        """Change a lock that its owner still has; return whether he has it."""
        with self._answering():
            try:
                change()
            except LockError:
                return False
            except ResponseError as error:
                if "WRONGTYPE" in str(error):  # somebody else has overwritten it
                    return False
                raise
        return True

    def holders(self) -> list[Holder]:
        # Searched for among all keys of the database: an index would be work for each run.
        pattern = re.sub(r"[*?\[\]\\]", r"\\\g<0>", self._prefix) + "*"
        with self._answering():
            names = {*self._client.scan_iter(pattern, count=1000)}
        keys = sorted(name.decode(errors="replace").removeprefix(self._prefix) for name in names)
        return [holder for holder in self._holders(keys) if holder is not None]

    def holder_of(self, key: str) -> Holder | None:
        return self._holders([key])[0]

    def _holders(self, keys: Sequence[str]) -> list[Holder | None]:
        names = [self._prefix + key for key in keys]
        with self._answering(), self._client.pipeline() as pipeline:
            pipeline.time()
            for name in names:
                pipeline.mget(name)
                pipeline.pttl(name)
            (seconds, micros), *answers = pipeline.execute()
        now = seconds * 1_000_000 + micros
        return [
            None if left == _NO_KEY else _holder(key, value, now, left)
            for key, (value,), left in zip(keys, answers[::2], answers[1::2], strict=True)
        ]

    def free(self, holder: Holder) -> bool:
        name = self._prefix + holder.key

        def delete(pipeline: Pipeline) -> None:
            (value,) = pipeline.mget(name)
            pipeline.multi()
            if _holder(holder.key, value).token == holder.token:
                pipeline.delete(name)

        with self._answering():
            deleted = self._client.transaction(delete, name)
        return any(deleted or ())

    def close(self) -> None:
        if "_client" in vars(self):
            self._client.connection_pool.disconnect()
            self._connection.close()

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except (RedisError, OSError, *self._connection.connection_errors) as error:
            raise LocksUnavailable(f"Redis: {masked_text(str(error))}") from error


def _holder(
    key: str, value: bytes | str | None, now: int | None = None, left: int = _FOR_EVER
) -> Holder:
    found = Holder.described_by(value, now) or Holder(key)
    return replace(found, key=key, time_left=None if left < 0 else left / 1000)
