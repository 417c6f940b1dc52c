"""The main process of a worker: it reads messages, and sees the end of the processes it runs."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from billiard.exceptions import WorkerLostError
from celery.worker.consumer import Consumer

from ws_celery.consumer import Request
from ws_celery.outbox.message import row_id_in

__all__ = ("Reader", "Reception")


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
