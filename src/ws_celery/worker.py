"""What Celery calls in a worker: as its processes start, and as a run begins and ends.

:func:`run_of` returns what is known of a run beside Celery's context of it.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from celery import signals, states
from celery.app.events import Events as CeleryEvents
from celery.bootsteps import StartStopStep
from celery.concurrency import prefork, solo
from celery.events.dispatcher import EventDispatcher as CeleryEventDispatcher
from celery.exceptions import Retry
from celery.loaders.app import AppLoader
from celery.worker.request import Request as CeleryRequest

from ws_celery.compat import get_current_app
from ws_celery.events import TaskFinished, WorkerProcessInit, has_subscriber, listen, notify
from ws_celery.exceptions import Abandoned, ConfigurationError, Skipped
from ws_celery.logs import filter_handlers
from ws_celery.masking import masked_text
from ws_celery.publishing import lighten
from ws_celery.shown_arguments import shown_text

if TYPE_CHECKING:
    from celery import Task
    from celery.app.task import Context
    from celery.concurrency.base import BasePool
    from celery.worker import WorkController
    from celery.worker.consumer import Consumer
    from kombu.asynchronous import Hub
    from kombu.asynchronous.timer import Entry
    from sqlalchemy.pool import ConnectionPoolEntry
    from transaction import TransactionManager

    from ws_celery.app import PyramidCelery
    from ws_celery.locks import Held
    from ws_celery.outbox.runs import Claim, Unclaimed
    from ws_celery.recording import Publication

__all__ = (
    "EventDispatcher",
    "Events",
    "OnRedis",
    "PooledConnections",
    "PyramidFixup",
    "PyramidLoader",
    "Request",
    "Run",
    "run_of",
)

#: Seconds between two looks for what others have not acknowledged, as in kombu, whose transport
#: option has a say.
_INTERVAL = 10


@dataclass
class Run:
    """The state of one run of a task, beside Celery's context of it."""

    #: When it has begun, if somebody subscribes to its end.
    begun_at: float | None = None
    #: Whether the function is at work: who calls the task now calls it like a function.
    is_running: bool = False
    #: The lock of ``@one_instance``.
    lock: Held | None = None
    #: Claims the row that the message names: of a TransactionalTask.
    claim: Claim | None = None
    #: Looks after that row: of a task without a transaction.
    unclaimed: Unclaimed | None = None
    #: Whether nothing is to be done any more for the row: it is gone, or belongs to another run.
    is_settled: bool = False
    #: The manager of the transaction of a TransactionalTask, until that is aborted.
    manager: TransactionManager = None
    #: How often it may be made again in place, after a conflict.
    attempts_left: int = 0
    #: What ``retry()`` has asked for in the transaction: sent when that has ended.
    retries: list[Publication] = field(default_factory=list)
    #: What ``replace()`` has put in its place: dispatched when the function has returned.
    replacement: list[Publication] = field(default_factory=list)


def run_of(context: Context) -> Run:
    """Return the state of a run.

    :param context: Celery's context of it, ``task.request``.
    """
    run: Run | None = getattr(context, "ws_celery_run", None)
    if run is None:
        run = context.ws_celery_run = Run()
    return run


class Request(CeleryRequest):
    """What a worker knows of a message; its events hide in an error what is hidden of arguments."""

    def send_event(self, type: str, **fields: Any) -> None:  # noqa: A002 - as Celery calls it
        """Send an event of a step of the run."""
        call = self.args, self.kwargs
        for name in ("exception", "traceback"):
            if isinstance(fields.get(name), str):
                fields[name] = shown_text(self.app, self.name, call, fields[name])
        super().send_event(type, **fields)


class OnRedis(StartStopStep):
    """Lets a consumer take and acknowledge messages at less cost, and restore those of the dead."""

    requires = ("celery.worker.consumer.connection:Connection",)

    def __init__(self, consumer: Consumer, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._ends: list[Callable[[], None]] = []

    def start(self, consumer: Consumer) -> None:
        """Begin with a connection; after each reconnection, too."""
        if consumer.connection.transport.driver_type != "redis":
            return
        lighten(consumer.connection.default_channel)
        if not consumer.hub:
            self._ends.append(_restore_repeatedly(consumer).cancel)
        elif isinstance(consumer.pool, prefork.TaskPool) and hasattr(consumer, "call_soon_ack"):
            consumer.call_soon_ack = after = _AfterNextPoll(consumer.hub)
            self._ends.append(after.close)

    def stop(self, _consumer: Consumer) -> None:
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

    def __init__(self, hub: Hub) -> None:
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


def _restore_repeatedly(consumer: Consumer) -> Entry:
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
    entry: Entry = consumer.timer.call_repeatedly(max(interval, 0) or _INTERVAL, look)
    return entry


#: Fields of Celery's events that may hold secrets.
_FIELDS = ("args", "kwargs", "result", "exception", "traceback")


class PyramidFixup:
    """Celery's extension point for frameworks; Celery makes one for each app.

    :param app: the Celery app of one Pyramid registry.
    """

    def __init__(self, app: PyramidCelery) -> None:
        self.app = app
        self._pid = os.getpid()
        self._connections = PooledConnections()
        listen(signals.worker_init, self.on_worker_init)
        listen(signals.worker_process_init, self.on_process_init)
        listen(signals.worker_process_shutdown, self.on_process_shutdown)
        listen(signals.worker_ready, self.on_worker_ready)
        listen(signals.beat_init, self.on_beat_init)
        for signal in (signals.after_setup_logger, signals.after_setup_task_logger):
            signal.connect(filter_handlers)

    def on_worker_init(self, **_: Any) -> None:
        """Watch database connections before the pool forks."""
        self._connections.watch()

    def on_process_init(self, **_: Any) -> None:
        """Let a forked child open database connections of its own, and notify the application."""
        # The solo pool sends this signal in the process that loaded the application.
        if os.getpid() != self._pid:
            self._connections.forget()
        if get_current_app() is self.app:  # and not another one of this process
            notify(WorkerProcessInit(self.app))

    def on_process_shutdown(self, **_: Any) -> None:
        """Wait for what is spooled: a child of a pool ends without what Python does at an exit."""
        self.app.publisher.end()

    def on_beat_init(self, **_: Any) -> None:
        """Let the beat of ``worker --beat``, a forked child, open database connections of its own.

        This comes before a thread of the outbox's relay starts there, by the same signal.
        """
        if os.getpid() != self._pid:
            self._connections.forget()

    def on_worker_ready(self, sender: WorkController, **_: Any) -> None:
        """Notify the application, where the pool has no signal for it: threads and greenlets."""
        if sender.app is self.app and _runs_tasks_here(sender.pool):
            notify(WorkerProcessInit(self.app))


class PyramidLoader(AppLoader):
    """Celery's hooks into an app's configuration, and into each run.

    A signal that nobody waits for would cost more than the latter.
    """

    def read_configuration(self, **_: Any) -> Any:
        """Refuse: Celery asks for it if something uses the app before it is configured.

        :raises ConfigurationError: always; Celery's defaults would be another broker.
        """
        raise ConfigurationError(
            "The Celery app is used before the application's configuration is committed, so that "
            "it has no settings and no tasks yet. Connect to on_after_configure or "
            "on_after_finalize, or use it in a function that is called later."
        )

    def on_task_init(self, task_id: str, task: Task) -> None:
        """Remember when a run begins, if anybody wants to know of its end."""
        super().on_task_init(task_id, task)
        if has_subscriber(self.app.registry, TaskFinished):
            run_of(task.request).begun_at = monotonic()
            listen(signals.task_postrun, self.on_task_postrun)  # once, however often it is said

    def on_task_postrun(self, task: Task, **ended: Any) -> None:
        """Notify the application that a run is over."""
        if task.app is self.app and (begun_at := run_of(task.request).begun_at) is not None:
            _notify_of_end(task, ended, monotonic() - begun_at)


class Events(CeleryEvents):
    """``app.events``: what Flower and ``ws-celery events`` show of them has no secrets."""

    dispatcher_cls = "ws_celery.worker:EventDispatcher"


class EventDispatcher(CeleryEventDispatcher):
    """Sends events as Celery does, without passwords in errors, results and words of arguments."""

    def send(self, *args: Any, **fields: Any) -> Any:
        """Send an event of this process."""
        return super().send(*args, **_masked(fields))

    def publish(self, kind: str, fields: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Send an event with another producer."""
        return super().publish(kind, _masked(fields), *args, **options)


def _masked(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: masked_text(value) if name in _FIELDS and isinstance(value, str) else value
        for name, value in fields.items()
    }


def _notify_of_end(task: Task, ended: Mapping[str, Any], runtime: float) -> None:
    state, outcome = ended["state"], ended["retval"]
    is_elsewhere = isinstance(outcome, Abandoned) and outcome.reason != "cut off"
    if is_elsewhere or isinstance(outcome, Skipped):
        return  # it is no run: another one has the effect, or the lock
    if state is None:  # the error is on its way to the caller of an eager task
        outcome = sys.exc_info()[1]
        if not isinstance(outcome, Exception):
            return  # what ends the process ends no run
        state = states.RETRY if isinstance(outcome, Retry) else states.FAILURE
    result, error = (outcome, None) if state == states.SUCCESS else (None, outcome)
    call = ended["task_id"], ended["args"], ended["kwargs"]
    notify(TaskFinished(task.app, task, *call, state, result, error, runtime))


def _runs_tasks_here(pool: BasePool) -> bool:
    """Return whether it is a pool of threads or greenlets."""
    return not isinstance(pool, (prefork.TaskPool, solo.TaskPool))


class PooledConnections:
    """The connections in the pools of SQLAlchemy, which a forked child has from its parent.

    Two processes that talk over one connection corrupt both conversations, and closing it would
    close it for the parent. Engines may be anywhere in the application, and are not asked for.
    """

    def __init__(self) -> None:
        self._entries: WeakSet[Any] = WeakSet()
        self._inherited: list[object] = []
        self._watching = False

    def watch(self) -> None:
        """Remember those that there are, and those to come: in the parent, before it forks.

        A child that walks over all objects copies the memory that it shares with its parent.
        """
        pool = sys.modules.get("sqlalchemy.pool")
        if pool is None or self._watching:
            return
        self._watching = True
        sys.modules["sqlalchemy.event"].listen(pool.Pool, "connect", self._remember)
        self._entries.update(
            # type(), not isinstance(): lazy proxies evaluate themselves when asked for __class__.
            each
            for each in _objects()
            if issubclass(type(each), pool.ConnectionPoolEntry)
        )

    def _remember(self, _connection: object, entry: ConnectionPoolEntry) -> None:
        self._entries.add(entry)

    def forget(self) -> None:
        """Let the pools of a child open connections of their own."""
        self.watch()  # if the parent did not, at its start
        for entry in self._entries:
            # Kept: some drivers close a connection that nobody refers to.
            self._inherited.append(entry.dbapi_connection)
            entry.dbapi_connection = None


def _objects() -> list[Any]:
    """Return all objects, also those that ``gc.freeze()`` hides to share them with children."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    objects = gc.get_objects()
    if frozen:
        gc.freeze()
    return objects
