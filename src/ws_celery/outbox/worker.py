"""What becomes of a row when its message ends in another way than by the commit of its run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import signals, states
from celery.worker.consumer import Consumer

from ws_celery.events import listen
from ws_celery.masking import logger_of
from ws_celery.outbox.runs import row_id_in
from ws_celery.worker import Request, run_of

if TYPE_CHECKING:
    from billiard.einfo import ExceptionInfo
    from celery import Task
    from celery.app.task import Context
    from celery.worker import WorkController
    from kombu import Message
    from kombu.asynchronous.timer import Timer
    from sqlalchemy import Connection

    from ws_celery.outbox.store import Outbox

__all__ = (
    "Reader",
    "Reception",
    "Settlement",
)

log = logger_of(__name__)


class Reception(Request):
    """The message of a TransactionalTask: Celery's, but for lost processes and what expires.

    It counts the processes that it ends: with ``reject_on_worker_lost`` it goes back to its queue
    each time, and nobody else counts.
    """

    def on_failure(self, exc_info: ExceptionInfo, *args: Any, **options: Any) -> Any:
        """Handle an error of the run, as in Celery."""
        error = exc_info.exception
        error = getattr(error, "exc", error)
        row_id = row_id_in(self.message.headers)
        if row_id is not None and isinstance(error, (WorkerLostError, SystemExit)):
            reason = f"the process that ran it has ended too often; at last: {error!r}"
            self.app.outbox.settlement.count_lost_run(row_id, reason)
        return super().on_failure(exc_info, *args, **options)

    def maybe_expire(self) -> bool:
        """Return whether it has come too late.

        Celery revokes the task's id then; but a run that has begun in time may be sent again.
        """
        return bool(self.expires) and datetime.now(self.expires.tzinfo) > self.expires


class Reader(Consumer):
    """Consumes messages: Celery's consumer, but that it keeps what it cannot read.

    Celery takes such a message off its queue and logs it, and sends no signal.
    """

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        """Make the row of a message that is broken a dead letter."""
        self.app.outbox.settlement.reject(message, exc)
        super().on_decode_error(message, exc)


class Settlement:
    """Settles the rows of messages by Celery's signals in a worker.

    A run that has succeeded, and a task that was revoked or has expired, lose their row. A run that
    has failed for good, a rejected message and one that no task is registered for leave a dead
    letter. Of a run that was cut off the row stays: it is sent again after its lease.

    :param outbox: the outbox, whose app's tasks are meant.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        listen(signals.task_postrun, self.on_postrun)
        listen(signals.task_failure, self.on_failure)
        listen(signals.task_revoked, self.on_revoked)
        listen(signals.task_unknown, self.on_unknown)
        listen(signals.task_rejected, self.on_rejected)
        listen(signals.worker_ready, self.on_worker_ready)
        self._timer: Timer | None = None

    def on_worker_ready(self, sender: WorkController, **_: Any) -> None:
        """Keep the timer of the worker's main process."""
        if sender.app is self._outbox.app:
            self._timer = sender.timer

    def on_postrun(
        self, task: Task, state: str | None = None, retval: object = None, **_: Any
    ) -> None:
        """Settle the row of a run that is over, unless its own transaction has."""
        context = task.request
        if task.app is not self._outbox.app or run_of(context).is_settled:
            return
        if (row_id := row_id_in(context.headers)) is None:
            return
        if state in (states.SUCCESS, states.IGNORED):
            if not self.delete(row_id) and (owner := self._outbox.runs.owner_of(context)):
                log.error(
                    "%s[%s] has run here, and its row is in another outbox (%s), which sends it "
                    "again. Give each application queues of its own.",
                    *(task.name, context.id, owner),
                )
        elif state == states.REJECTED and not getattr(retval, "requeue", False):
            self.make_dead_letter(row_id, f"rejected: {getattr(retval, 'reason', None)}")

    def on_failure(
        self, sender: Task, exception: object = None, einfo: ExceptionInfo = None, **_: Any
    ) -> None:
        """Keep what has failed for good as a dead letter, with its traceback."""
        row_id = self._row_id(sender, sender.request.headers)
        if row_id is None or isinstance(exception, WorkerLostError):
            return  # of a run that was cut off the row stays
        if isinstance(exception, TimeLimitExceeded):
            reason = f"the hard time limit is exceeded: {exception!r}"
            self._when_free(row_id, partial(self.make_dead_letter, row_id, reason))
        elif not run_of(sender.request).is_settled:
            self.make_dead_letter(row_id, str(einfo and einfo.traceback))

    def on_revoked(
        self, sender: Task, request: Context = None, expired: bool = False, **_: Any
    ) -> None:
        """Delete the row of what is not to run, or to go on running: revoked, or expired."""
        row_id = self._row_id(sender, request.headers)
        if row_id is None:
            return
        if expired:
            # Unless a run has begun in time.
            self._outbox.attempt(self._outbox.rows.delete_expired, row_id)
        else:
            self._when_free(row_id, partial(self.delete, row_id))

    def on_unknown(
        self, sender: Consumer, message: Message, name: str | None = None, **_: Any
    ) -> None:
        """Keep the message of a task that is not registered as a dead letter."""
        if row_id := self._row_id(sender, message.headers):
            self.make_dead_letter(row_id, f"the task {name} is not registered in the worker")

    def on_rejected(
        self, sender: Consumer, message: Message, exc: Exception | None = None, **_: Any
    ) -> None:
        """Keep a message that is no call of a task as a dead letter."""
        if sender.app is self._outbox.app:
            self.reject(message, exc)

    def reject(self, message: Message, error: Exception | None) -> None:
        """Make the row of a message that the worker cannot read a dead letter."""
        if row_id := row_id_in(message.headers):
            self.make_dead_letter(row_id, f"the worker cannot read the message: {error}")

    def _row_id(self, sender: Task | Consumer, headers: Mapping[str, Any]) -> UUID | None:
        return row_id_in(headers) if sender.app is self._outbox.app else None

    def count_lost_run(self, row_id: UUID, error: str) -> None:
        """Count a run that has taken its process with it: it must not do so for ever."""
        outbox = self._outbox
        outbox.attempt(outbox.rows.count_lost_run, row_id, outbox.max_deliveries, error)

    def make_dead_letter(self, row_id: UUID, error: str) -> bool:
        """Keep a row as a dead letter; return whether it was there, and not locked."""
        return bool(self._outbox.attempt(self._outbox.rows.make_dead_letter, row_id, error))

    def delete(self, row_id: UUID) -> bool:
        """Delete a row; return whether it was there, and not locked."""
        return bool(self._outbox.attempt(self._delete_here, row_id))

    def _delete_here(self, connection: Connection, row_id: UUID) -> int:
        self._outbox.find_place(connection)
        return self._outbox.rows.delete(connection, [row_id])

    def _when_free(self, row_id: UUID, settle: Callable[[], bool], times: int = 60) -> None:
        # The process that is to end is killed after this, and holds the row until then.
        if settle() or not (self._timer and times):
            return
        if self._outbox.attempt(self._outbox.rows.is_there, row_id):
            self._timer.call_after(0.5, self._when_free, (row_id, settle, times - 1))
