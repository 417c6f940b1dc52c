"""Taking the lock of a run, keeping it, and giving it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from time import monotonic, sleep
from typing import Any

from celery import Task, states

from ws_celery.events import LockLost, TaskSkipped, tell
from ws_celery.exceptions import Duplicate, LockHeld, Skipped
from ws_celery.locks.choice import store_of
from ws_celery.locks.holding import Held, Holder, Store
from ws_celery.locks.renewal import Renewal
from ws_celery.locks.rule import OneInstance
from ws_celery.masking import logger_of

__all__ = ("SKIPPED", "Locks")

log = logger_of(__name__)

#: The state of a task that another one with its key has kept from running.
SKIPPED = "SKIPPED"

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
            context.ws_celery_settled = True  # its row is that of the other run
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
