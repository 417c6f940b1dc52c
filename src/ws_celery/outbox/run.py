"""A run whose message has a row: what follows it, and how it ends without an effect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from celery.canvas import signature
from sqlalchemy.exc import DBAPIError, OperationalError

from ws_celery.exceptions import CutOff, Duplicate, ForeignMessage
from ws_celery.masking import logger_of

if TYPE_CHECKING:
    from ws_celery.outbox.store import Outbox

__all__ = ("Run",)

log = logger_of(__name__)


class Run:
    """One run of a task.

    :param outbox: the outbox.
    :param task: the task that runs.
    :param row_id: id of the row that the message names.
    """

    def __init__(self, outbox: Outbox, task: Any, row_id: UUID) -> None:
        self._outbox = outbox
        self._task = task
        self._row_id = row_id

    @property
    def name(self) -> str:
        """The task and its id, as messages tell them."""
        return f"{self._task.name}[{self._task.request.id}]"

    def follow_up(self, result: Any) -> None:
        """Dispatch the callbacks and the rest of the chain, which take the place of the run's row.

        Celery would do it when the row has gone: a crash in between would cut the chain.

        :param result: what the function has returned.
        """
        task, context = self._task, self._task.request
        callbacks, chain = context.callbacks or [], context.chain or []
        options: dict[str, Any] = {
            "parent_id": context.id,
            "root_id": context.root_id or context.id,
        }
        if task.app.conf.task_inherit_parent_priority:
            options["priority"] = (context.delivery_info or {}).get("priority")
        for callback in callbacks:
            signature(callback, app=task.app).apply_async((result,), **options)
        if chain:
            *rest, following = chain
            signature(following, app=task.app).apply_async((result,), chain=rest, **options)

    def close(self) -> None:
        """Take note of the commit: the row is gone, and what follows has been dispatched.

        Not before: a run whose commit fails is tried again, with its callbacks and its chain.
        """
        context = self._task.request
        context.ws_celery_settled = True
        context.callbacks = context.chain = None

    def is_cut_off(self, error: BaseException) -> bool:
        """Tell whether the database has gone: whether it has committed may be open then.

        The next try finds out, by its claim.
        """
        if isinstance(error, OperationalError) and error.statement is None:
            return True  # the error of no statement: the database is not there
        return isinstance(error, DBAPIError) and error.connection_invalidated

    def leave(self) -> CutOff:
        """Return the error that ends the run, and leaves the row to be sent after its lease."""
        self._task.request.ws_celery_settled = True
        log.warning("%s has lost its database; it is sent again after its lease", self.name)
        return CutOff(f"{self.name} has lost its database")

    def without_row(self, reason: str) -> Duplicate | ForeignMessage:
        """Return the error that ends a run whose row is not there: its effect is another one's."""
        context = self._task.request
        context.ws_celery_settled = True  # whoever has the row settles it
        if (owner := self._outbox.owner_of(context)) is None:
            return Duplicate(f"{self.name} {reason}")
        queue = (context.delivery_info or {}).get("routing_key")
        error = ForeignMessage(self.name, str(queue), owner, str(self._outbox.place))
        log.error("%s", error)
        return error
