"""What the broker has not taken: kept in the memory of the process until it does."""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING
from weakref import WeakMethod

from ws_celery.exceptions import BrokerUnavailable
from ws_celery.outages import Service

if TYPE_CHECKING:
    from ws_celery.publishing import Publisher
    from ws_celery.recording import Publication

__all__ = ("Spool",)

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

    :param publisher: tries to send, and reports what becomes of the messages.
    :param limit: how many messages are kept.
    """

    def __init__(self, publisher: Publisher, limit: int) -> None:
        self._publisher = publisher
        self._limit = limit
        self._watches_process = False
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._condition = threading.Condition()
        self._waiting: deque[Publication] = deque()
        self._in_hand: Sequence[Publication] = ()
        self._bytes = 0
        self._size = _MOST
        self._refused = False
        self._thread: threading.Thread | None = None
        self._in_a_hurry = False
        self._broker = Service("The spool", "broker")

    def __len__(self) -> int:
        return len(self._waiting) + len(self._in_hand)

    def keep(self, publications: Sequence[Publication]) -> list[Publication]:
        """Keep messages; return the oldest ones, which are too many now and so are lost."""
        self._watch_process()
        lost = []
        with self._condition:
            self._waiting.extend(publications)
            self._bytes += sum(map(_bytes_of, publications))
            while self._waiting and (len(self) > self._limit or self._bytes > LARGEST):
                lost.append(self._waiting.popleft())
                self._bytes -= _bytes_of(lost[-1])
            if self._waiting and self._thread is None:
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
            in_hand, left = self._in_hand, list(self._waiting)
            self._in_hand, self._bytes = (), 0
            self._waiting.clear()
            self._condition.notify_all()
        error = self._broker.error or BrokerUnavailable(_TOO_EARLY)
        self._publisher.report(in_hand, error, ambiguous=True)
        self._publisher.report(left, error, ambiguous=False)

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
            self._in_hand = [
                self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))
            ]
            if not self._in_hand:
                self._thread = None
            return self._in_hand

    def _send(self, batch: Sequence[Publication]) -> float:
        """Send messages; return how many seconds to wait until the next ones."""
        if self._refused and len(batch) > 1:
            return self._send_each(batch)  # RabbitMQ would not tell which of them it refuses
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
        """Tell a message that no broker takes from a broker that takes none: then no other passes.

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
                self._publisher.report([publication], attempt.error, ambiguous=False)
            else:
                self._publisher.conclude([publication], attempt, late=True)
                left += [publication][attempt.begun :]
        self._put_back(batch, [*left, *batch[len(attempts) :]])
        return 0 if passes or not errors else self._broker.failed(errors[-1])

    def _put_back(self, batch: Sequence[Publication], left: Sequence[Publication]) -> None:
        with self._condition:
            if self._in_hand is batch:  # nobody has ended the waiting meanwhile
                self._waiting.extendleft(reversed(left))
                self._bytes += sum(map(_bytes_of, left)) - sum(map(_bytes_of, batch))
                self._in_hand = ()
                self._condition.notify_all()


def _bytes_of(publication: Publication) -> int:
    return len(publication.payload) + _BESIDE_BODY
