"""Tasks that run in the calling process (``task_always_eager``): after the commit all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import transaction
from celery import states
from celery.result import EagerResult

from ws_celery.exceptions import NotRunYet

__all__ = ("DeferredResult", "EagerCall")


class DeferredResult(EagerResult):
    """The result of a task that runs when the transaction commits: ``PENDING`` until then.

    If the transaction aborts it stays so.
    """

    def __init__(self, task_id: str, name: str) -> None:
        super().__init__(task_id, None, states.PENDING, name=name)

    def settle(self, result: EagerResult) -> None:
        """Take over the result of the run."""
        self._result, self._state = result.result, result.state
        self._traceback = result.traceback

    def ready(self) -> bool:
        """Tell whether the task has run."""
        return self._state in states.READY_STATES

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the task has returned, or raise what it has raised.

        :raises NotRunYet: before the commit: nothing could be waited for.
        """
        if not self.ready():
            raise NotRunYet(self.name, self.id)
        return super().get(*args, **kwargs)

    wait = get


@dataclass(frozen=True)
class EagerCall:
    """A call that waits for the commit among the publications of its transaction."""

    run: Callable[[], EagerResult]
    result: DeferredResult
    session_transactions: tuple[Any, ...] = ()

    @property
    def task_id(self) -> str:
        """Id of the task."""
        return self.result.id

    @property
    def task_name(self) -> str:
        """Name of the task."""
        return self.result.name

    def perform(self, txn: Any) -> None:
        """Run the task in a transaction of its own, while ``txn``, committed, is put aside."""
        with _put_aside(txn):
            self.result.settle(self.run())


@contextmanager
def _put_aside(txn: Any) -> Iterator[None]:
    # In an after-commit hook the transaction is committed, but still its manager's: the task could
    # not begin another one. The thread's manager is the only one that task and caller share.
    manager = transaction.manager.manager
    if manager._txn is not txn:
        yield
        return
    manager.free(txn)
    try:
        yield
    finally:
        manager._txn = txn
