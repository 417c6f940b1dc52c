"""What an application can subscribe to with ``config.add_subscriber``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from celery.exceptions import SoftTimeLimitExceeded
from zope.interface import implementedBy, implementer

from ws_celery.interfaces import (
    IBeforeDispatch,
    ICeleryEvent,
    ILockLost,
    IPublishFailed,
    ITaskFinished,
    ITaskSkipped,
    ITasksPublished,
    ITasksSpooled,
    IWorkerProcessInit,
)
from ws_celery.masking import logger_of

if TYPE_CHECKING:
    from celery import Task
    from celery.utils.dispatch import Signal
    from pyramid.registry import Registry
    from pyramid.request import Request

    from ws_celery.app import PyramidCelery
    from ws_celery.locks import Holder
    from ws_celery.recording import Publication

__all__ = (
    "SKIPPED",
    "BeforeDispatch",
    "LockLost",
    "PublishFailed",
    "TaskFinished",
    "TaskMessage",
    "TaskSkipped",
    "TasksPublished",
    "TasksSpooled",
    "WorkerProcessInit",
    "has_subscriber",
    "listen",
    "notify",
)

log = logger_of(__name__)

#: The state of a task that another one with its key has kept from running.
SKIPPED = "SKIPPED"


@implementer(ICeleryEvent)
@dataclass
class _Event:
    app: PyramidCelery

    @property
    def registry(self) -> Registry:
        """The Pyramid registry that owns the Celery app."""
        return self.app.registry


@implementer(IBeforeDispatch)
@dataclass
class BeforeDispatch(_Event):
    """A task is being dispatched, and its message is not built yet.

    Sent at the call, in the thread of the caller; for the next task of a chain, a callback and a
    retry in the worker, for an entry of the schedule in beat. What a subscriber raises stops the
    call: the caller gets it, and nothing is sent.

    :param request: the request on whose behalf the task is dispatched; ``None`` if there is none.
    :param name: the name of the task.
    :param args: the positional arguments, without a request. Changing them changes nothing.
    :param kwargs: the keyword arguments, likewise.
    :param options: the options of the call (``queue``, ``countdown``, ``priority``, ``headers`` and
        so on), a dictionary that a subscriber may change. ``headers`` is a dictionary in it.
    """

    request: Request | None
    name: str
    args: tuple[Any, ...] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)
    options: dict[str, Any] = field(repr=False)


class TaskMessage(NamedTuple):
    """A task that has been dispatched."""

    name: str
    id: str


@dataclass
class _OfMessages(_Event):
    publications: Sequence[Publication] = field(repr=False)

    @property
    def tasks(self) -> list[TaskMessage]:
        """Names and ids, in the order of the calls."""
        return [TaskMessage(str(p.task_name), p.task_id) for p in self.publications if p.task_id]


@implementer(ITasksPublished)
@dataclass
class TasksPublished(_OfMessages):
    """Deferred messages have been handed to the broker: those of one transaction, as a rule.

    Sent after each flush, in the thread that has committed; what was spooled, in the spool's. What
    a subscriber raises is logged.

    :param publications: what was published.
    :param late: whether they were spooled before.
    """

    late: bool = field(default=False, kw_only=True)


@implementer(ITasksSpooled)
@dataclass
class TasksSpooled(_OfMessages):
    """The transaction has committed, and its messages wait in this process for the broker.

    :class:`TasksPublished` or :class:`PublishFailed` says what becomes of them, unless the process
    is killed before.

    :param publications: what was not sent.
    :param error: the reason.
    """

    error: BaseException = field(repr=False)


@implementer(IPublishFailed)
@dataclass
class PublishFailed(TasksPublished):
    """The transaction has committed, and these of its messages are lost, or may be.

    :param error: the reason.
    :param ambiguous: whether they may have reached the broker all the same.
    """

    error: BaseException
    ambiguous: bool = field(default=True, kw_only=True)


@dataclass
class _OfRun(_Event):
    task: Task
    id: str

    @property
    def name(self) -> str:
        """The name of the task."""
        return str(self.task.name)


@implementer(ITaskFinished)
@dataclass
class TaskFinished(_OfRun):
    """A run of a task is over, and so are its request and its transaction.

    Sent in the process and thread that ran the task, for every task of the app, Celery's own too.
    What a subscriber raises is logged; it cannot change the outcome. A run that a hard time limit
    or the end of its process has cut off sends nothing.

    :param task: Celery's task; ``task.request`` is still Celery's context of the run.
    :param id: the id of the task.
    :param args: the positional arguments, without the request.
    :param kwargs: the keyword arguments.
    :param state: ``SUCCESS``, ``FAILURE``, ``RETRY``, ``IGNORED`` or ``REJECTED``.
    :param result: what the task has returned; ``None`` if it has not.
    :param error: what it has raised, or ``None``; of a retry that is Celery's ``Retry``.
    :param runtime: how long it has run, storing its result included, in seconds.
    """

    args: Sequence[Any] = field(repr=False)
    kwargs: Mapping[str, Any] = field(repr=False)
    state: str
    result: object = field(repr=False)
    error: BaseException | None = field(repr=False)
    runtime: float


@implementer(ITaskSkipped)
@dataclass
class TaskSkipped(_OfRun):
    """A run did not begin: another task holds the lock of its ``@one_instance``.

    Sent in the process and thread that would have run it, instead of :class:`TaskFinished`. What a
    subscriber raises is logged.

    :param task: Celery's task; ``task.request`` is Celery's context of the run.
    :param id: the id of the task.
    :param key: the key of the lock.
    :param holder: who has it: ``task``, ``id``, ``host`` and ``pid``.
    """

    key: str
    holder: Holder


@implementer(ILockLost)
@dataclass
class LockLost(_OfRun):
    """A run has lost the lock of its ``@one_instance``, so that another one may have begun.

    Sent once, in the process of the run, by the thread that notices: the one that renews locks, or
    that of the run. What a subscriber raises is logged.

    :param task: Celery's task.
    :param id: the id of the task; ``None`` for an item of ``map()``.
    :param key: the key of the lock.
    :param token: the fencing token that the run has.
    :param reason: how it was lost, a part of a sentence.
    """

    id: str | None  # type: ignore[assignment] # of a run that has none
    key: str
    token: int
    reason: str


@implementer(IWorkerProcessInit)
@dataclass
class WorkerProcessInit(_Event):
    """A process that runs tasks has started: each child of a prefork pool, else the worker itself.

    Sent once in each process, before its first task: the place to open what must not be shared with
    a parent. What a subscriber raises is logged, and the process goes on.
    """


def has_subscriber(registry: Registry, event: type) -> bool:
    """Return whether anybody would get an event of this class; it costs no object to ask."""
    # Zope keeps the answer until a subscriber comes or goes.
    return bool(
        registry.has_listeners and registry.adapters.subscriptions((implementedBy(event),), None)
    )


def listen(signal: Signal, method: Callable[..., object]) -> None:
    """Connect a method to a signal of Celery's, for as long as its object lives.

    To Celery 5.5 the methods of two objects of one class are the same, and it keeps the first: of
    two applications in a process only one would be notified.
    """
    name, owner = method.__name__, method.__self__  # type: ignore[attr-defined]
    signal.connect(method, dispatch_uid=f"{type(owner).__qualname__}.{name}:{id(owner)}")


def notify(event: _Event) -> None:
    """Notify the subscribers of what has happened already; what one raises can only be logged."""
    try:
        event.registry.notify(event)
    except SoftTimeLimitExceeded:
        raise
    except Exception:
        log.exception("A subscriber to %s has failed", type(event).__name__)
