"""Keeping the locks of the runs of one process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

from ws_celery.locks.holding import Held
from ws_celery.masking import logger_of

__all__ = ("Renewal",)

log = logger_of(__name__)


class Renewal:
    """A thread that looks after all locks which runs of this process hold; it ends with the last.

    It asks the store nothing itself, because that may not answer: each renewal is a short thread
    of its own, so that one that waits does not keep the other locks from being renewed, and the
    loss of its own from being told. Where gevent or eventlet have patched the standard library,
    they are greenlets.
    """

    def __init__(self) -> None:
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        self._condition = threading.Condition()
        self._held: set[Held] = set()
        self._thread: threading.Thread | None = None
        self._wakes_at = 0.0

    def add(self, held: Held) -> None:
        """Renew a lock from now on."""
        if self._pid != os.getpid():
            self._begin_anew()  # threads and their locks do not survive a fork
        with self._condition:
            self._held.add(held)
            if self._thread is None:
                thread = _thread(self._run)
                thread.start()  # it may fail, and is to be tried again by the next run then
                self._thread = thread
            elif held.due < self._wakes_at:
                self._condition.notify()

    def end(self, held: Held) -> None:
        """Give a lock back, and do not wait for its store without end."""
        with self._condition:
            held.ending()
            if held.due < self._wakes_at:
                self._condition.notify()
        held.end()

    def remove(self, held: Held) -> None:
        """Renew it no more."""
        with self._condition:
            self._held.discard(held)

    def _run(self) -> None:
        while due := self._wait():
            for held in due:
                try:
                    self._see_to(held)
                except Exception:  # no more threads, or what a subscriber does
                    log.exception("The lock %r could not be renewed", held.key)
                    held.failed()

    def _see_to(self, held: Held) -> None:
        if held.begin():
            _thread(self._keep, held).start()
        else:
            self.remove(held)
            held.give_up()

    def _keep(self, held: Held) -> None:
        try:
            kept = held.keep()
        except Exception:
            log.exception("The lock %r could not be renewed", held.key)
            held.failed()
            kept = True
        with self._condition:
            if not kept:
                self._held.discard(held)
            self._condition.notify()  # it is due at another time

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


def _thread(target: Callable[..., None], *args: Any) -> threading.Thread:
    return threading.Thread(target=target, args=args, name="ws_celery locks", daemon=True)
