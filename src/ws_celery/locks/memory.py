"""Locks of one process, where its broker is its own memory: tests."""

from __future__ import annotations

import threading
from itertools import count
from time import monotonic

from ws_celery.locks.holding import Held, Holder

__all__ = ("MemoryStore",)


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
