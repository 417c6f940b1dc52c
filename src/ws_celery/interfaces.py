"""Contracts, as zope interfaces; imports nothing of ours."""

from __future__ import annotations

from typing import Any

from zope.interface import Attribute, Interface

__all__ = (
    "IBeforeDispatch",
    "ICeleryApp",
    "ICeleryEvent",
    "ICelerySource",
    "ILockLost",
    "IPublishFailed",
    "IRequestPropagator",
    "ITaskDeriver",
    "ITaskDeriverInfo",
    "ITaskDerivers",
    "ITaskFinished",
    "ITaskRequest",
    "ITaskSkipped",
    "ITasksPublished",
    "ITasksSpooled",
    "IWorkerProcessInit",
)


class ICeleryApp(Interface):
    """The Celery app of one Pyramid registry, registered there as an unnamed utility."""

    registry = Attribute("The Pyramid registry that owns this Celery app.")


class ICelerySource(Interface):
    """Where the configuration is, as ``config.configure_celery`` was told."""

    config_uri = Attribute("The file, or None.")
    overrides = Attribute("Options set in code, by name.")


class IRequestPropagator(Interface):
    """Takes one thing from a request to the requests of the tasks that it dispatches.

    A utility by its name; ``config.add_request_propagator`` registers it.
    """

    capture = Attribute(
        """``capture(request)`` returns what travels, a JSON value; ``None`` for nothing.

        Called at each dispatch, with a request of the web, of a script, or of a task."""
    )
    restore = Attribute(
        """``restore(request, value)`` gives ``value`` to the request of a task before it runs.

        ``capture(request)`` has to return it again, for tasks that this task dispatches."""
    )


class ITaskRequest(Interface):
    """Marks the request that a task run is given, to tell it from a request of the web."""


class ITaskDeriver(Interface):
    """Wraps the functions of tasks: what ``config.add_task_deriver`` takes.

    It may have an attribute ``options``: names of options of ``@task`` that it understands.
    """

    def __call__(run: Any, info: Any) -> Any:  # noqa: N805 - an interface has no self
        """Return ``run``, or a callable with its signature, ``run(request, *args, **kwargs)``.

        ``info`` is an :class:`ITaskDeriverInfo`. Called once for each task, when it is registered.
        """


class ITaskDeriverInfo(Interface):
    """What a deriver is told of a task."""

    task = Attribute("Celery's task, bound to its app; what ``bind=True`` hands to the function.")
    name = Attribute("The name of the task.")
    options = Attribute("The options of the task by name: those of @task, and those of derivers.")
    original_task = Attribute("The function or class that ``@task`` was put on.")
    registry = Attribute("The Pyramid registry of the application.")
    settings = Attribute("The settings of the application.")


class ITaskDerivers(Interface):
    """The derivers of one application in their order; an unnamed utility."""


class ICeleryEvent(Interface):
    """What all events of ws_celery have."""

    app = Attribute("The Celery app.")
    registry = Attribute("The Pyramid registry that owns it.")


class IBeforeDispatch(ICeleryEvent):
    """A task is being dispatched; its message is not built yet."""

    request = Attribute("The request on whose behalf it is dispatched, or None.")
    name = Attribute("The name of the task.")
    args = Attribute("The positional arguments, a tuple.")
    kwargs = Attribute("The keyword arguments, a copy.")
    options = Attribute("The options of the call, a dictionary to change; headers is one in it.")


class ITasksPublished(ICeleryEvent):
    """Deferred messages have been handed to the broker."""

    tasks = Attribute("Names and ids, in the order of the calls.")
    late = Attribute("Whether they were spooled before.")


class ITasksSpooled(ICeleryEvent):
    """The transaction has committed, and its messages wait in this process for the broker."""

    tasks = Attribute("Names and ids, in the order of the calls.")
    error = Attribute("The reason.")


class IPublishFailed(ITasksPublished):
    """The transaction has committed, and its messages are lost, or may be."""

    error = Attribute("The reason.")
    ambiguous = Attribute("Whether they may have reached the broker all the same.")


class ITaskFinished(ICeleryEvent):
    """A run of a task is over."""

    task = Attribute("Celery's task; ``task.request`` is Celery's context of the run.")
    name = Attribute("The name of the task.")
    id = Attribute("The id of the task.")
    args = Attribute("The positional arguments, without the request.")
    kwargs = Attribute("The keyword arguments.")
    state = Attribute("SUCCESS, FAILURE, RETRY, IGNORED or REJECTED.")
    result = Attribute("What the task has returned; None if it has not.")
    error = Attribute("What it has raised, or None.")
    runtime = Attribute("How long it has run, in seconds.")


class IWorkerProcessInit(ICeleryEvent):
    """A process that runs tasks has started."""


class ITaskSkipped(ICeleryEvent):
    """A run did not begin, because another task holds its one-instance lock."""

    task = Attribute("Celery's task; ``task.request`` is Celery's context of the run.")
    name = Attribute("The name of the task.")
    id = Attribute("The id of the task.")
    key = Attribute("The key of the lock.")
    holder = Attribute("Who holds it.")


class ILockLost(ICeleryEvent):
    """A run has lost its one-instance lock, and goes on."""

    task = Attribute("Celery's task.")
    name = Attribute("The name of the task.")
    id = Attribute("The id of the task, or None.")
    key = Attribute("The key of the lock.")
    token = Attribute("The fencing token that the run has.")
    reason = Attribute("How it was lost, a part of a sentence.")
