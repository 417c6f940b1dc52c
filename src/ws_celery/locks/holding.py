"""The lock of one run, who holds a lock, and what a store of locks has to do."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import count
from time import monotonic
from typing import Any, Protocol
from uuid import uuid4

from kombu import Connection
from zope.interface import implementer

from ws_celery.exceptions import ConfigurationError, LockGone, LocksUnavailable
from ws_celery.interfaces import ILockStore
from ws_celery.masking import logger_of
from ws_celery.settings import our_setting

__all__ = (
    "Held",
    "Holder",
    "MemoryStore",
    "Store",
    "store_of",
)

log = logger_of(__name__)

#: Seconds that the end of a run waits at most for a store that does not answer.
_PATIENCE = 5.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lock; what nobody knows is ``None``.

    :param key: the key of the lock.
    :param token: the fencing token of the run; ``None`` if it is not told yet.
    :param task: the name of the task.
    :param id: the id of the task.
    :param host: the machine that it runs on.
    :param pid: the process there that runs it.
    :param age: for how long it has had the lock, in seconds.
    :param time_left: when the lock is free if the holder stays silent, in seconds; ``None`` where
        the lock ends with the holder's connection.
    """

    key: str
    token: int | None = None
    task: str | None = None
    id: str | None = None
    host: str | None = None
    pid: int | None = None
    age: float | None = None
    time_left: float | None = None

    def __str__(self) -> str:
        if self.task is None and self.host is None:
            return "an unknown holder"
        return f"{self.task}[{self.id}] on {self.host}, process {self.pid}"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)


class Store(Protocol):
    """Where locks are: all the workers of an application see the same.

    Its methods raise :exc:`ws_celery.exceptions.LocksUnavailable` if it does not answer.
    """

    def acquire(self, held: Held) -> Holder | None:
        """Take the lock and set ``held.token``, or return who has it."""

    def renew(self, held: Held) -> bool:
        """Let it be held for another ``held.timeout`` seconds; return whether it still was."""

    def release(self, held: Held) -> bool:
        """Give it back; return whether it still was held."""

    def holders(self) -> list[Holder]:
        """Return who holds locks, in the order of their keys."""

    def holder_of(self, key: str) -> Holder | None:
        """Return who holds the lock of a key, if somebody does."""

    def free(self, holder: Holder) -> bool:
        """Take the lock away from this holder; return whether he still had it."""

    def abandon(self, held: Held) -> None:
        """Let nobody wait any longer for what was asked about the lock: it is given up."""

    def close(self) -> None:
        """Close the connections that no run holds a lock with."""


@dataclass(eq=False)
class Held:
    """The lock of one run: ``request.one_instance`` in its function.

    :param key: the key of the lock.
    :param timeout: seconds after which the lock is free if nothing is heard of this run.
    :param store: where the lock is.
    :param raises: whether a run that has lost the lock has to fail.
    :param on_loss: called once, with a sentence, if the run turns out to have lost it.
    """

    key: str
    timeout: float
    task: str
    id: str | None
    store: Store = field(repr=False)
    on_loss: Callable[[Held, str], None] = field(repr=False)
    raises: bool = False
    #: A number that is greater than that of every earlier holder of the key.
    token: int = 0
    owner: str = field(default_factory=lambda: uuid4().hex, repr=False)
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        self._mutex = threading.Lock()
        self._lost = self._over = self._failing = False
        self.renewed(monotonic())

    @property
    def lost(self) -> bool:
        """Whether the lock is known to be lost, or was not heard of for its whole timeout."""
        return self._lost or (not self._over and monotonic() >= self._good_until)

    @property
    def patience(self) -> float:
        """Seconds that the end of the run waits for a store that does not answer."""
        return min(self.timeout / 4, _PATIENCE)

    def renewed(self, since: float) -> None:
        """Take note that the lock is held from ``since`` on."""
        self._good_until = since + self.timeout
        self._failing = False
        self._see_to_it(since + self.timeout / 4)

    def _see_to_it(self, due: float) -> None:
        """Let the process renew the lock then, by the monotonic clock, or give it up."""
        if not self._over:
            self.due = due
            self._busy = False

    def begin(self) -> bool:
        """Tell whether it is to be renewed now; else it is to be given up.

        A process that stood still has not asked yet, and may find that it still has the lock.
        """
        now = monotonic()
        if self._over or self._busy or (self._failing and now >= self._good_until):
            return False
        self._busy = True
        self.due = max(self._good_until, now + self.timeout / 4)
        return True

    def give_up(self) -> None:
        """Wait no longer for the store, which does not answer."""
        if not self._over:
            self._lose(f"it could not be renewed for {self.timeout:g} seconds")
        self.store.abandon(self)

    def ending(self) -> None:
        """Take note that the run is over, and is not to wait for the store without end."""
        self._over = True
        self.due = monotonic() + self.patience

    def check(self) -> None:
        """Make sure that the lock is still held, and renew it.

        :raises LockGone: if it is not.
        :raises LocksUnavailable: if nobody can tell, because the store does not answer.
        """
        before = monotonic()
        if not self._lost and self.store.renew(self):
            self.renewed(before)
            return
        self._lose("somebody else has freed it, or it has run out")
        raise LockGone(self.task, self.id, self.key)

    def ensure(self) -> None:
        """Do what :meth:`check` does, if the run is not to commit without the lock."""
        if self.raises:
            self.check()

    def keep(self) -> bool:
        """Renew the lock in the background; return whether it is to be renewed again."""
        before = monotonic()
        try:
            kept = self.store.renew(self)
        except LocksUnavailable as error:
            return self._keep_trying(error)
        if kept:
            self.renewed(before)
        elif not self._over:
            self._lose("somebody else has freed it, or it has run out")
        return kept

    def _keep_trying(self, error: LocksUnavailable) -> bool:
        now = monotonic()  # it may have taken long to fail
        self._failing = True
        if now >= self._good_until:
            self.give_up()
            return False
        log.warning("The lock %r could not be renewed: %s", self.key, error)
        self._see_to_it(min(now + self.timeout / 16, self._good_until))
        return True

    def failed(self) -> None:
        """Take note that an error has come which nobody expects; it is tried again."""
        self._see_to_it(monotonic() + self.timeout / 4)

    def end(self) -> None:
        """Give the lock back; the run is over, whatever happens here."""
        self._over = True
        try:
            released = self.store.release(self)
        except LocksUnavailable as error:
            log.warning("The lock %r is left to run out: %s", self.key, error)
            return
        if not released:
            self._lose("it had run out, or somebody else had freed it, before the run was over")

    def _lose(self, reason: str) -> None:
        with self._mutex:
            if self._lost:
                return
            self._lost = True
        self.on_loss(self, reason)


@implementer(ILockStore)
class MemoryStore:
    """Keeps locks in this process: no other one sees them, and none outlives it."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._tokens = count(1)
        self._held: dict[str, tuple[Held, float]] = {}

    def acquire(self, held: Held) -> Holder | None:
        """Take the lock, or return who has it."""
        with self._mutex:
            other = self._held.get(held.key)
            if other is not None:
                return _holder(*other)
            held.token = next(self._tokens)
            self._held[held.key] = held, monotonic()
            return None

    def renew(self, held: Held) -> bool:
        """Return whether it is still held: nothing runs out here."""
        return self._held.get(held.key, (None,))[0] is held

    def release(self, held: Held) -> bool:
        """Give it back; return whether it still was held."""
        with self._mutex:
            if not self.renew(held):
                return False
            del self._held[held.key]
            return True

    def abandon(self, held: Held) -> None:
        """Do nothing: nobody waits here."""

    def holders(self) -> list[Holder]:
        """Return who holds locks, in the order of their keys."""
        with self._mutex:
            return [_holder(*self._held[key]) for key in sorted(self._held)]

    def holder_of(self, key: str) -> Holder | None:
        """Return who holds the lock of a key, if somebody does."""
        found = self._held.get(key)
        return None if found is None else _holder(*found)

    def free(self, holder: Holder) -> bool:
        """Take the lock away from this holder; return whether he still had it."""
        with self._mutex:
            found = self._held.get(holder.key)
            if found is None or found[0].token != holder.token:
                return False
            del self._held[holder.key]
            return True

    def close(self) -> None:
        """Do nothing: there is no connection."""


def _holder(held: Held, since: float) -> Holder:
    age = monotonic() - since
    return Holder(held.key, held.token, held.task, held.id, held.host, held.pid, age)


_REDIS = ("redis", "rediss", "sentinel", "valkey", "valkeys")


def store_of(app: Any) -> Store:
    """Return the store that ``ws_celery.locks`` names.

    If it is not set: the Redis of the broker, else that of the results, else the database; this
    process where the broker is ``memory://``.
    """
    conf = app.conf
    wanted = our_setting(app.registry.settings, "ws_celery.locks", "auto")
    if wanted == "auto":
        wanted = _default(conf)
    if wanted == "memory":
        return MemoryStore()
    if wanted == "database":
        from ws_celery.locks.postgresql import PostgresqlStore  # needs SQLAlchemy

        return PostgresqlStore(app)
    if wanted == conf.result_backend:
        options, ssl = conf.result_backend_transport_options, conf.redis_backend_use_ssl
    else:
        options, ssl = conf.broker_transport_options, conf.broker_use_ssl
    return _redis_store(app, wanted, dict(options or {}), ssl)


def _default(conf: Any) -> Any:
    broker = conf.broker_write_url or conf.broker_url
    for url in (broker, conf.result_backend):
        if _is_redis(url):
            return url
    return "memory" if _scheme(broker) == "memory" else "database"


def _redis_store(app: Any, url: str, options: dict[str, Any], ssl: Any) -> Store:
    try:
        from ws_celery.locks.redis_store import RedisStore
    except ImportError as error:
        raise ConfigurationError(
            f"The locks are in Redis, and redis-py is missing ({error}). "
            "Install `ws-celery[redis]`, or set `ws_celery.locks = database`."
        ) from error
    prefix = options.get("global_keyprefix", "")
    for option in ("socket_connect_timeout", "socket_timeout"):
        options.setdefault(option, app.publisher.timeout)
    connection = Connection(url, transport_options=options, ssl=ssl or False)
    return RedisStore(connection, prefix)


def _is_redis(url: Any) -> bool:
    return _scheme(url) in _REDIS


def _scheme(url: Any) -> str:
    first = url[0] if isinstance(url, (list, tuple)) and url else url
    return str(first or "").partition("://")[0].partition("+")[0]
