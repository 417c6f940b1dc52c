"""What becomes of a row when its message has come to an end that no transaction of a task tells."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import signals, states
from celery.worker.consumer import Consumer

from ws_celery.events import listen
from ws_celery.masking import logger_of
from ws_celery.outbox.journal import row_id_in
from ws_celery.worker import Request

if TYPE_CHECKING:
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

    def on_failure(self, exc_info: Any, *args: Any, **options: Any) -> Any:
        """Take note of an error of the run, as in Celery."""
        error = exc_info.exception
        error = getattr(error, "exc", error)
        row_id = row_id_in(self.message.headers)
        if row_id is not None and isinstance(error, (WorkerLostError, SystemExit)):
            reason = f"the process that ran it has ended too often; at last: {error!r}"
            self.app.outbox.count_loss(row_id, reason)
        return super().on_failure(exc_info, *args, **options)

    def maybe_expire(self) -> bool:
        """Tell whether it has come too late.

        Celery revokes the task's id then; but a run that has begun in time may be sent again.
        """
        return bool(self.expires) and datetime.now(self.expires.tzinfo) > self.expires


class Reader(Consumer):
    """Takes messages from the broker: Celery's, but that it keeps what it cannot read.

    Celery takes such a message off its queue and logs it, and sends no signal.
    """

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Make the row of a message that is broken a dead letter."""
        if row_id := row_id_in(message.headers):
            self.app.outbox.bury(row_id, f"the worker cannot read the message: {exc}")
        super().on_decode_error(message, exc)


class Settlement:
    """Listens to Celery's signals in a worker.

    A run that has succeeded, and a task that was revoked or has expired, let go of their row. A run
    that has failed for good, a rejected message and one that no task is registered for leave a dead
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
        self._timer: Any = None

    def on_worker_ready(self, sender: Any = None, **_: Any) -> None:
        """Keep the timer of the worker's main process."""
        if self._is_ours(sender):
            self._timer = sender.timer

    def on_postrun(
        self, task: Any = None, state: str | None = None, retval: Any = None, **_: Any
    ) -> None:
        """Settle the row of a run that is over, unless its own transaction has."""
        context = task.request
        row_id = self._outbox.row_id_of(context) if task.app is self._outbox.app else None
        if row_id is None or getattr(context, "ws_celery_settled", False):
            return
        if state in (states.SUCCESS, states.IGNORED):
            if not self._outbox.delete(row_id) and (owner := self._outbox.owner_of(context)):
                log.error(
                    "%s[%s] has run here, and its row is in another outbox (%s), which sends it "
                    "again. Give each application queues of its own.",
                    *(task.name, context.id, owner),
                )
        elif state == states.REJECTED and not getattr(retval, "requeue", False):
            self._outbox.bury(row_id, f"rejected: {getattr(retval, 'reason', None)}")

    def on_failure(
        self, sender: Any = None, exception: Any = None, einfo: Any = None, **_: Any
    ) -> None:
        """Keep what has failed for good as a dead letter, with its traceback."""
        row_id = self._outbox.row_id_of(sender.request) if self._is_ours(sender) else None
        if row_id is None or isinstance(exception, WorkerLostError):
            return  # of a run that was cut off the row stays
        if isinstance(exception, TimeLimitExceeded):
            reason = f"the hard time limit is exceeded: {exception!r}"
            self._when_free(row_id, partial(self._outbox.bury, row_id, reason))
        elif not getattr(sender.request, "ws_celery_settled", False):
            self._outbox.bury(row_id, str(einfo and einfo.traceback))

    def _when_free(self, row_id: UUID, settle: Callable[[], bool], times: int = 60) -> None:
        # The process that is to end is killed after this, and holds the row until then.
        if not settle() and self._timer and times and self._outbox.is_there(row_id):
            self._timer.call_after(0.5, self._when_free, (row_id, settle, times - 1))

    def on_revoked(
        self, sender: Any = None, request: Any = None, expired: bool = False, **_: Any
    ) -> None:
        """Let go of what is not to run, or to go on running: revoked, or expired."""
        row_id = self._outbox.row_id_of(request) if self._is_ours(sender) else None
        if row_id is None:
            return
        if expired:
            self._outbox.delete_expired(row_id)
        else:
            self._when_free(row_id, partial(self._outbox.delete, row_id))

    def on_unknown(
        self, sender: Any = None, message: Any = None, name: Any = None, **_: Any
    ) -> None:
        """Keep the message of a task that is not registered as a dead letter."""
        if self._is_ours(sender) and (row_id := row_id_in(message.headers)):
            self._outbox.bury(row_id, f"the task {name} is not registered in the worker")

    def on_rejected(
        self, sender: Any = None, message: Any = None, exc: Any = None, **_: Any
    ) -> None:
        """Keep a message that is no call of a task as a dead letter."""
        if self._is_ours(sender) and (row_id := row_id_in(message.headers)):
            self._outbox.bury(row_id, f"the worker cannot read the message: {exc}")

    def _is_ours(self, sender: Any) -> bool:
        return bool(sender.app is self._outbox.app)
