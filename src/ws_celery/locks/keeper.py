"""Taking the lock of a run, keeping it, and giving it back."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from celery import Task, states

from ws_celery.events import SKIPPED, LockLost, TaskSkipped, tell
from ws_celery.exceptions import Duplicate, LockHeld, Skipped
from ws_celery.locks.holding import Held, Holder, Store, store_of
from ws_celery.locks.rule import rule_of
from ws_celery.masking import logger_of
from ws_celery.worker import run_of

if TYPE_CHECKING:
    from ws_celery.locks.rule import OneInstance

__all__ = (
    "Locks",
    "Renewal",
)

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


#: Seconds between two tries to take a lock: the first time, and at most.
_PAUSES = 0.01, 0.25


class Locks:
    """The one-instance locks of an application.

    :param app: its Celery app.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._renewal = Renewal()

    @cached_property
    def store(self) -> Store:
        """Where the locks are."""
        return store_of(self._app)

    def check_key(
        self, task: Task | None, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None
    ) -> None:
        """Check that the key of a run can be made, when the task is called.

        :param task: what is called, as far as this process knows it.
        :raises TypeError: if it cannot.
        """
        if task is not None and (rule := rule_of(task)) is not None and rule.fields:
            rule.key_of(task, args or (), kwargs or {})

    def close(self) -> None:
        """Close the connections that no run holds a lock with."""
        if "store" in vars(self):
            self.store.close()

    @contextmanager
    def hold(
        self, task: Task, rule: OneInstance, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Iterator[Held]:
        """Hold the lock of a run of ``task``; it is ``task.request.one_instance`` meanwhile.

        :param args: the positional arguments of the message.
        :param kwargs: its keyword arguments.
        :raises Skipped: if another task holds it.
        :raises Duplicate: if another run of the same task holds it: the message has come twice.
        :raises LockHeld: if another task holds it, and this run is an item of a ``map()``.
        :raises LocksUnavailable: if nobody can tell.
        """
        context = task.request
        held = Held(
            rule.key_of(task, args, kwargs),
            rule.timeout,
            task=str(task.name),
            id=context.id,
            store=self.store,
            raises=rule.on_lost == "raise",
            on_loss=lambda held, reason: self._tell_loss(task, held, reason),
        )
        holder = _take(held, rule.wait)
        if holder is not None:
            raise self._unable(task, held, holder)
        try:
            self._renewal.add(held)
            context.one_instance = held
            yield held
        finally:
            context.one_instance = None
            try:
                self._renewal.end(held)
            finally:
                self._renewal.remove(held)

    def _unable(self, task: Task, held: Held, holder: Holder) -> Exception:
        context = task.request
        if context.id is None:
            return LockHeld(held.task, held.key, holder)
        if holder.id == context.id:
            run_of(context).is_settled = True  # its row is that of the other run
            return Duplicate(f"{task.name}[{context.id}] runs elsewhere: {holder}")
        skipped = Skipped(held.task, context.id, held.key, holder)
        log.info("%s", skipped)
        _keep_result(task, skipped)
        tell(TaskSkipped(self._app, task, context.id, held.key, holder))
        return skipped

    def _tell_loss(self, task: Task, held: Held, reason: str) -> None:
        log.error("%s[%s] has lost the lock %r: %s", held.task, held.id, held.key, reason)
        tell(LockLost(self._app, task, held.id, held.key, held.token, reason))


def _take(held: Held, wait: float) -> Holder | None:
    """Take the lock, or return who has it after ``wait`` seconds."""
    begun = monotonic()
    pause, longest = _PAUSES
    while True:
        now = monotonic()
        holder = held.store.acquire(held)
        if holder is None:
            held.renewed(now)
            return None
        # Its own task: a run that was killed, whose message has come again, or one that is about
        # to end and has sent its retry. One that lives is still there when the lock would be free.
        patience = wait + held.timeout if holder.id and holder.id == held.id else wait
        left = begun + patience - now
        if left <= 0:
            return holder
        sleep(min(pause, left))
        pause = min(pause * 2, longest)


def _keep_result(task: Task, skipped: Skipped) -> None:
    context = task.request
    wanted = task.store_eager_result if context.is_eager else True
    # What the call says, if it does: the context's class has a default that says nothing.
    ignored = vars(context).get("ignore_result")
    if wanted and not (task.ignore_result if ignored is None else ignored):
        with _at_its_end(task.backend) as backend:
            backend.store_result(context.id, skipped.as_dict(), SKIPPED, request=context)
    if context.chord:
        # Its body would wait for ever.
        error = LockHeld(str(task.name), skipped.key, skipped.holder)
        task.backend.on_chord_part_return(context, states.FAILURE, error)


@contextmanager
def _at_its_end(backend: Any) -> Iterator[Any]:
    """Let a backend store when a skipped run has ended: Celery cleans up a database by that."""
    backend.READY_STATES = states.READY_STATES | {SKIPPED}
    try:
        yield backend
    finally:
        backend.READY_STATES = states.READY_STATES
