"""The lock of one run, the thread that renews locks, and what a store of locks has to do.

The thread and the run meet in :class:`Held`: ``due`` is when the thread acts next. It begins to
renew then, or gives up if that is still going on, or if the run is over and waits for the store.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from time import monotonic
from typing import Any
from uuid import uuid4

from zope.interface import implementer

from ws_celery.exceptions import LockGone, LocksUnavailable
from ws_celery.interfaces import ILockStore
from ws_celery.masking import logger_of

__all__ = ("Held", "Holder", "LockStore", "MemoryStore", "Renewal")

log = logger_of(__name__)

#: Seconds that the end of a run waits at most for a store that does not answer.
_PATIENCE = 5.0

_GONE = "somebody else has freed it, or it has run out"


@dataclass(frozen=True)
class Holder:
    """Who holds a lock; what nobody knows is ``None``.

    :param key: the key of the lock.
    :param token: the fencing token of the run.
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

    @classmethod
    def described_by(cls, description: str | bytes | None, now: int | None = None) -> Holder | None:
        """Return the holder of a description, which anybody may have written.

        :param now: the microseconds now, by the clock of ``since``.
        """
        with suppress(ValueError, RecursionError):
            fields = json.loads(description or b"null", parse_int=_number)
            if isinstance(fields, dict):
                known: dict[str, Any] = {
                    name: fields[name]
                    for name, type_ in _TYPES.items()
                    if isinstance(fields.get(name), type_)
                }
                since = known.pop("since", None)
                age = None if now is None or since is None else (now - since) / 1_000_000
                return cls(**{"key": "", **known}, age=age)
        return None


#: What a description may say of a holder.
_TYPES = {
    **dict.fromkeys(("key", "task", "id", "host"), str),
    **dict.fromkeys(("token", "pid", "since"), int),
}


def _number(digits: str) -> int | None:
    return int(digits) if len(digits) < 19 else None  # none of ours is longer


@implementer(ILockStore)
class LockStore(ABC):
    """Where locks are: all the workers of an application see the same.

    Its methods raise :exc:`ws_celery.exceptions.LocksUnavailable` if it does not answer.
    """

    @abstractmethod
    def acquire(self, held: Held) -> Holder | None:
        """Take the lock and set ``held.token``, or return who has it."""

    @abstractmethod
    def renew(self, held: Held) -> bool:
        """Let it be held for another ``held.timeout`` seconds; return whether it still was."""

    @abstractmethod
    def release(self, held: Held) -> bool:
        """Give it back; return whether it still was held."""

    def abandon(self, held: Held) -> None:  # noqa: B027 - most have time limits of their own
        """Make other threads that wait for an answer about this lock wait no longer."""

    @abstractmethod
    def holders(self) -> list[Holder]:
        """Return who holds locks, in the order of their keys."""

    @abstractmethod
    def holder_of(self, key: str) -> Holder | None:
        """Return who holds the lock of a key, if somebody does."""

    @abstractmethod
    def free(self, holder: Holder) -> bool:
        """Take the lock away from this holder; return whether he still had it."""

    def close(self) -> None:  # noqa: B027 - without a connection there is nothing to do
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
    store: LockStore = field(repr=False)
    on_loss: Callable[[Held, str], None] = field(repr=False)
    raises: bool = False
    #: A number that is greater than that of every earlier holder of the key.
    token: int = 0
    owner: str = field(default_factory=lambda: uuid4().hex, repr=False)
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        self._mutex = threading.Lock()
        self._lost = self._ended = False
        self.renewed(monotonic())

    @property
    def lost(self) -> bool:
        """Whether the lock is known to be lost, or was not heard of for its whole timeout."""
        return self._lost or (not self._ended and monotonic() >= self._good_until)

    def check(self) -> None:
        """Make sure that the lock is still held, and renew it.

        :raises LockGone: if it is not.
        :raises LocksUnavailable: if nobody can tell, because the store does not answer.
        """
        asked_at = monotonic()
        if self._lost or not self.store.renew(self):
            self._lose(_GONE)
            raise LockGone(self.task, self.id, self.key)
        self.renewed(asked_at)

    def ensure(self) -> None:
        """Do what :meth:`check` does, if the run is not to commit without the lock."""
        if self.raises:
            self.check()

    def description(self) -> dict[str, Any]:
        """Return what other processes see of the holder; see :meth:`Holder.described_by`."""
        return {"task": self.task, "id": self.id, "host": self.host, "pid": self.pid}

    def renewed(self, since: float) -> None:
        """Count the timeout from ``since`` on, and renew the lock after a quarter of it."""
        self._good_until = since + self.timeout
        self._schedule(since + self.timeout / 4)

    def _schedule(self, due: float) -> None:
        if not self._ended:
            self.due = due  # for Renewal, by the monotonic clock
            self._renewing = False

    def begin(self) -> bool:
        """Begin to renew what is due; return false if it is to be given up instead.

        A process that stood still has not asked yet, and may find that it still has the lock.
        """
        if self._ended or self._renewing:
            return False
        self._renewing = True
        self.due = max(self._good_until, monotonic() + self.timeout / 4)
        return True

    def renew(self) -> bool:
        """Renew the lock, beside its run; return whether it is to be renewed again."""
        asked_at = monotonic()
        try:
            kept = self.store.renew(self)
        except Exception as error:  # noqa: BLE001 - a lock that nobody renews is lost for any reason
            return self._retry(error)
        if kept:
            self.renewed(asked_at)
        elif not self._ended:
            self._lose(_GONE)
        return kept

    def _retry(self, error: Exception) -> bool:
        unexpected = not isinstance(error, LocksUnavailable)
        in_time = monotonic() < self._good_until  # it may have taken long to fail
        if in_time or unexpected:
            text = "The lock %r could not be renewed: %s"
            log.warning(text, self.key, error, exc_info=unexpected)
        if in_time:
            self.postpone()
        else:
            self.give_up()
        return in_time

    def postpone(self) -> None:
        """Try to renew again soon: this try has failed."""
        self._schedule(monotonic() + self.timeout / 16)

    def give_up(self) -> None:
        """Wait no longer for the store, which does not answer."""
        if not self._ended:
            self._lose(f"it could not be renewed for {self.timeout:g} seconds")
        self.store.abandon(self)

    def ending(self) -> None:
        """Renew no more; what is due now is the end of the patience with the store."""
        self._ended = True
        self.due = monotonic() + min(self.timeout / 4, _PATIENCE)

    def end(self) -> None:
        """Give the lock back; the run is over, whatever happens here."""
        self._ended = True
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


class Renewal:
    """One thread that keeps all the locks which runs of this process hold; it ends with the last.

    It asks the store nothing itself, because that may not answer: each renewal is a short thread
    of its own, so that one that waits delays neither the renewal of other locks nor the news of
    its own loss. Where gevent or eventlet have patched the standard library, they are greenlets.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._condition = threading.Condition()
        self._held: set[Held] = set()
        self._thread: threading.Thread | None = None
        self._wakes_at = 0.0

    def add(self, held: Held) -> None:
        """Renew a lock from now on."""
        if self._pid != os.getpid():
            self._reset()  # threads and their locks do not survive a fork
        with self._condition:
            self._held.add(held)
            if self._thread is None:
                thread = _thread(self._run)
                thread.start()  # it may fail, and is to be tried again by the next run then
                self._thread = thread
            elif held.due < self._wakes_at:
                self._condition.notify()

    def end(self, held: Held) -> None:
        """Give the lock of a run back, without waiting for ever for its store."""
        with self._condition:
            held.ending()
            if held.due < self._wakes_at:
                self._condition.notify()
        try:
            held.end()
        finally:
            self.remove(held)

    def remove(self, held: Held) -> None:
        """Renew it no more."""
        with self._condition:
            self._held.discard(held)

    def _run(self) -> None:
        while due := self._wait():
            for held in due:
                try:
                    self._renew_or_give_up(held)
                except Exception:  # no more threads, or what a subscriber does
                    log.exception("The lock %r could not be renewed", held.key)
                    held.postpone()

    def _wait(self) -> list[Held]:
        """Return what is due, as soon as something is; nothing if there is nothing to renew."""
        with self._condition:
            while self._held:
                now = monotonic()
                due = [held for held in self._held if held.due <= now]
                if due:
                    return due
                self._wakes_at = min(held.due for held in self._held)
                self._condition.wait(self._wakes_at - now)
            self._thread = None
            return []

    def _renew_or_give_up(self, held: Held) -> None:
        if held.begin():
            _thread(self._renew, held).start()
        else:
            self.remove(held)
            held.give_up()

    def _renew(self, held: Held) -> None:
        kept = held.renew()
        with self._condition:
            if not kept:
                self._held.discard(held)
            self._condition.notify()  # it is due at another time


def _thread(target: Callable[..., None], *args: Held) -> threading.Thread:
    return threading.Thread(target=target, args=args, name="ws_celery locks", daemon=True)


class MemoryStore(LockStore):
    """Keeps locks in this process: no other one sees them, and none outlives it or runs out."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._tokens = count(1)
        self._held: dict[str, tuple[Held, float]] = {}

    def acquire(self, held: Held) -> Holder | None:
        with self._mutex:
            if (other := self.holder_of(held.key)) is None:
                held.token = next(self._tokens)
                self._held[held.key] = held, monotonic()
            return other

    def renew(self, held: Held) -> bool:
        return self._held.get(held.key, (None,))[0] is held

    def release(self, held: Held) -> bool:
        with self._mutex:
            return self.renew(held) and self._held.pop(held.key) is not None

    def holders(self) -> list[Holder]:
        with self._mutex:
            return [_holder(*self._held[key]) for key in sorted(self._held)]

    def holder_of(self, key: str) -> Holder | None:
        found = self._held.get(key)
        return None if found is None else _holder(*found)

    def free(self, holder: Holder) -> bool:
        with self._mutex:
            found = self.holder_of(holder.key)
            if found is None or found.token != holder.token:
                return False
            del self._held[holder.key]
            return True


def _holder(held: Held, since: float) -> Holder:
    return Holder(held.key, held.token, age=monotonic() - since, **held.description())
