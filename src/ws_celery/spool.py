"""What the broker has not taken: left to the relay, kept in the memory of the process, or lost."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

from ws_celery.events import PublishFailed, TasksSpooled, notify
from ws_celery.exceptions import BrokerUnavailable
from ws_celery.masking import logger_of, masked_text
from ws_celery.outages import Service
from ws_celery.settings import our_setting
from ws_celery.shown_arguments import logged_arguments

if TYPE_CHECKING:
    from ws_celery.app import PyramidCelery
    from ws_celery.publishing import Attempt, Publisher
    from ws_celery.recording import Publication

__all__ = ("Spool",)

#: Users know it by this name.
log = logger_of("ws_celery.publishing")

#: Bytes that the messages of a spool may have together.
LARGEST = 64 * 2**20

#: Bytes that a message is taken to need beside its body: headers, properties, objects.
_BESIDE_BODY = 4096

#: How many messages one attempt sends at most. After a failure it is one, then twice as many with
#: each success: if a broker falls silent again, only those on their way are in doubt.
_MOST = 128

#: How many are tried, each alone, when the broker refuses a batch.
_ALONE = 16

#: Seconds between two attempts while somebody waits for the end.
_HURRY = 0.1

_TOO_EARLY = (
    "The process ends before the broker has taken them. Raise ws_celery.publish_timeout, for which "
    "an orderly end waits, or keep them in an outbox."
)


class Spool:
    """Keeps messages in their order, and sends them from a thread when the broker takes them.

    The thread lives as long as there is something to send. A forked child begins with nothing: what
    its parent keeps, its parent sends.

    :param app: the Celery app.
    :param publisher: tries to send.
    """

    def __init__(self, app: PyramidCelery, publisher: Publisher) -> None:
        settings = app.registry.settings
        self._app = app
        self._publisher = publisher
        self._limit = our_setting(settings, "ws_celery.publish_spool", 10_000)
        self._log_arguments = our_setting(settings, "ws_celery.log_arguments", default=False)
        self._watches_process = False
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._condition = threading.Condition()
        #: What is kept, and what is being sent; nothing overtakes it.
        self.waiting: deque[Publication] = deque()
        self.in_hand: Sequence[Publication] = ()
        self._bytes = 0
        self._size = _MOST
        self._refused = False
        self._thread: threading.Thread | None = None
        self._in_a_hurry = False
        self._broker = Service("The spool", "broker")

    def __len__(self) -> int:
        return len(self.waiting) + len(self.in_hand)

    def conclude_failure(
        self,
        publications: Sequence[Publication],
        attempt: Attempt,
        error: BaseException,
        *,
        late: bool,
    ) -> None:
        """See to it that what was not sent will be, and report what may be lost.

        :param error: what ended the attempt.
        :param late: whether the messages come from here, and go back.
        """
        if kept := [each for each in publications[attempt.sent :] if each.row_id]:
            log.warning("The outbox keeps %d tasks for the relay: %s", len(kept), error)
            self._app.outbox.not_published(kept)
        others = [each for each in publications[attempt.begun :] if not each.row_id]
        if others and not late:
            self._keep_and_notify(others, error)
        doubtful = publications[attempt.sent : attempt.begun]
        self.report([each for each in doubtful if not each.row_id], error)

    def _keep_and_notify(self, publications: Sequence[Publication], error: BaseException) -> None:
        lost = self.keep(publications)
        without = set(lost)
        if kept := [each for each in publications if each not in without]:
            self._log(logging.WARNING, "this process sends these tasks later", kept, error)
            notify(TasksSpooled(self._app, kept, error=error))
        self.report(lost, error, ambiguous=False)

    def report(
        self, publications: Sequence[Publication], error: BaseException, *, ambiguous: bool = True
    ) -> None:
        """Log that messages are lost, and notify the application.

        :param ambiguous: whether they may have been sent all the same.
        """
        if any(publication.task_id for publication in publications):
            said = "these tasks may not have been sent" if ambiguous else "these tasks are lost"
            self._log(logging.ERROR, said, publications, error)
            notify(PublishFailed(self._app, publications, error=error, ambiguous=ambiguous))

    def _log(
        self, level: int, said: str, publications: Sequence[Publication], error: BaseException
    ) -> None:
        tasks = [self._described(each) for each in publications if each.task_id]
        is_known = isinstance(error, BrokerUnavailable)
        log.log(
            level,
            "The transaction has committed, but %s: %s (%s)",
            said,
            ", ".join(tasks),
            masked_text(str(error)) or type(error).__name__,
            exc_info=None if level < logging.ERROR or is_known else error,
        )

    def _described(self, publication: Publication) -> str:
        text = f"{publication.task_name}[{publication.task_id}]"
        if not self._log_arguments:
            return text
        headers = publication.options["headers"]
        reprs = headers.get("argsrepr"), headers.get("kwargsrepr")
        call: tuple[Any, Any] | None = None
        with suppress(Exception):  # serialisers raise anything
            call = publication.call()
        args, kwargs = logged_arguments(self._app, publication.task_name, call, reprs)
        return f"{text} args={args} kwargs={kwargs}"

    def keep(self, publications: Sequence[Publication]) -> list[Publication]:
        """Keep messages; return the oldest ones, which are too many now and so are lost."""
        self._watch_process()
        lost = []
        with self._condition:
            self.waiting.extend(publications)
            self._bytes += sum(map(_bytes_of, publications))
            while self.waiting and (len(self) > self._limit or self._bytes > LARGEST):
                lost.append(self.waiting.popleft())
                self._bytes -= _bytes_of(lost[-1])
            if self.waiting and self._thread is None:
                thread = threading.Thread(target=self._run, name="spool", daemon=True)
                with suppress(RuntimeError):  # no thread can be had: the next message tries again
                    thread.start()
                    self._thread = thread
        return lost

    def end(self, patience: float) -> None:
        """Wait until all has been sent, for so many seconds; what is left then is lost."""
        with self._condition:
            self._in_a_hurry = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: not len(self), patience)
            self._in_a_hurry = False
            in_hand, left = self.in_hand, list(self.waiting)
            self.in_hand, self._bytes = (), 0
            self.waiting.clear()
            self._condition.notify_all()
        error = self._broker.error or BrokerUnavailable(_TOO_EARLY)
        self.report(in_hand, error, ambiguous=True)
        self.report(left, error, ambiguous=False)

    def _watch_process(self) -> None:
        if not self._watches_process:
            self._watches_process = True
            anew, end = WeakMethod(self._begin_anew), WeakMethod(self._publisher.end)
            os.register_at_fork(after_in_child=lambda: (method := anew()) and method())
            atexit.register(lambda: (method := end()) and method())

    # The thread

    def _run(self) -> None:
        wait = 0.0
        while batch := self._take(wait):
            wait = self._send(batch)

    def _take(self, wait: float) -> Sequence[Publication]:
        """Return what is to be sent next, after so many seconds; nothing ends the thread."""
        deadline = monotonic() + wait
        with self._condition:
            while len(self) and (left := deadline - monotonic()) > 0:
                self._condition.wait(min(left, _HURRY) if self._in_a_hurry else left)
                if self._in_a_hurry:
                    break
            self.in_hand = [
                self.waiting.popleft() for _ in range(min(self._size, len(self.waiting)))
            ]
            if not self.in_hand:
                self._thread = None
            return self.in_hand

    def _send(self, batch: Sequence[Publication]) -> float:
        """Send messages; return how many seconds to wait until the next ones."""
        if self._refused and len(batch) > 1:
            return self._send_each(batch)  # RabbitMQ would not say which of them it refuses
        attempt = self._publisher.attempt(batch)
        self._refused = attempt.refused
        if self._refused and len(batch) > 1:
            return self._send_each(batch)
        self._publisher.conclude(batch, attempt, late=True)
        self._put_back(batch, batch[attempt.begun :])
        if attempt.error is None:
            self._broker.works()
            self._size = min(self._size * 2, _MOST)
            return 0
        self._size = _ALONE if attempt.refused else 1
        return self._broker.failed(attempt.error)

    def _send_each(self, batch: Sequence[Publication]) -> float:
        """Send each alone: if none passes it is the broker, else what is refused is to blame.

        :return: how many seconds to wait until the next ones.
        """
        attempts = []
        for publication in batch[:_ALONE]:
            attempt = self._publisher.attempt([publication])
            attempts.append((publication, attempt))
            if attempt.error is not None and not attempt.refused:
                break
        passes = any(attempt.sent for _, attempt in attempts)
        self._refused = not passes
        errors = [attempt.error for _, attempt in attempts if attempt.error is not None]
        left: list[Publication] = []
        for publication, attempt in attempts:
            if passes and attempt.refused and attempt.error is not None:
                self.report([publication], attempt.error, ambiguous=False)
            else:
                self._publisher.conclude([publication], attempt, late=True)
                left += [publication][attempt.begun :]
        self._put_back(batch, [*left, *batch[len(attempts) :]])
        return 0 if passes or not errors else self._broker.failed(errors[-1])

    def _put_back(self, batch: Sequence[Publication], left: Sequence[Publication]) -> None:
        with self._condition:
            if self.in_hand is batch:  # nobody has ended the waiting meanwhile
                self.waiting.extendleft(reversed(left))
                self._bytes += sum(map(_bytes_of, left)) - sum(map(_bytes_of, batch))
                self.in_hand = ()
                self._condition.notify_all()


def _bytes_of(publication: Publication) -> int:
    return len(publication.payload) + _BESIDE_BODY
