"""What the consumer of a worker does otherwise than Celery's: with errors, and with Redis."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from celery.bootsteps import StartStopStep
from celery.concurrency import prefork
from celery.worker.request import Request as CeleryRequest

from ws_celery.redis_channel import lighten
from ws_celery.shown_arguments import shown_text

__all__ = ("OnRedis", "Request")

#: Seconds between two looks for what others have not acknowledged, as in kombu, whose transport
#: option has a say.
_INTERVAL = 10


class Request(CeleryRequest):
    """What a worker knows of a message; its events hide in an error what is hidden of arguments."""

    def send_event(self, type: str, **fields: Any) -> None:  # noqa: A002 - as Celery calls it
        """Tell of a step of the run."""
        call = self.args, self.kwargs
        for name in ("exception", "traceback"):
            if isinstance(fields.get(name), str):
                fields[name] = shown_text(self.app, self.name, call, fields[name])
        super().send_event(type, **fields)


class OnRedis(StartStopStep):
    """Lets a consumer take and acknowledge messages at less cost, and restore those of the dead."""

    requires = ("celery.worker.consumer.connection:Connection",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._ends: list[Callable[[], None]] = []

    def start(self, consumer: Any) -> None:
        """Begin with a connection; after each reconnection, too."""
        if consumer.connection.transport.driver_type != "redis":
            return
        lighten(consumer.connection.default_channel)
        if not consumer.hub:
            self._ends.append(_restore_repeatedly(consumer).cancel)
        elif isinstance(consumer.pool, prefork.TaskPool) and hasattr(consumer, "call_soon_ack"):
            consumer.call_soon_ack = after = _AfterNextPoll(consumer.hub)
            self._ends.append(after.close)

    def stop(self, _consumer: Any) -> None:
        """End with the connection."""
        while self._ends:
            self._ends.pop()()


class _AfterNextPoll:
    """Calls functions when the event loop has polled once more, or at once when it has ended.

    With ``acks_late`` the acknowledgement of a message stands between the end of its run and the
    beginning of the next one: the loop calls what is to be called soon before it polls, and hands
    the next job to the child only after that. Celery 5.7 and later let it be postponed.

    :param hub: kombu's event loop.
    """

    def __init__(self, hub: Any) -> None:
        self._hub = hub
        self._waiting: deque[Callable[[], Any]] = deque()
        # What can always be written to makes the next poll return at once.
        self._pipe = os.pipe()
        self._ended = False

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._waiting.append(partial(function, *args, **kwargs))
        if self._ended:
            self._call()
        elif len(self._waiting) == 1:
            self._hub.add_writer(self._pipe[1], self._polled)

    def _polled(self) -> None:
        self._hub.remove_writer(self._pipe[1])
        self._hub.call_soon(self._call)  # after what else has been polled

    def _call(self) -> None:
        while self._waiting:
            self._waiting.popleft()()

    def close(self) -> None:
        """Wait for the event loop no more: it has ended, or is about to."""
        self._ended = True
        try:
            self._call()
        finally:  # the connection may be gone
            self._hub.remove_writer(self._pipe[1])
            for end in self._pipe:
                os.close(end)


def _restore_repeatedly(consumer: Any) -> Any:
    """Restore what others have not acknowledged in time; return the entry of the consumer's timer.

    Redis does not know which messages a dead worker had; kombu keeps them, and puts them back after
    the ``visibility_timeout``. It looks for them from its event loop, or when a poll meets nothing
    at all. With the pools gevent and eventlet there is no event loop, and polls always meet the
    time-out of BRPOP, so that messages would wait until the next worker starts
    (https://github.com/celery/celery/issues/4976).
    """
    connection = consumer.connection

    def look() -> None:
        with suppress(*connection.connection_errors):  # the consumer meets them, too
            connection.transport.cycle.maybe_restore_messages()

    interval = connection.transport_options.get("unacked_restore_interval", _INTERVAL)
    return consumer.timer.call_repeatedly(max(interval, 0) or _INTERVAL, look)
