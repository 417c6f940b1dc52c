"""What one part may ask of another, and an application of us, as zope interfaces.

Imports nothing of ours.
"""

# Methods of an interface are written as they are called, without self, and have no body.
# ruff: noqa: N805
# mypy: disable-error-code="misc, empty-body"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zope.interface import Attribute, Interface

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from datetime import datetime
    from uuid import UUID

    from celery import Task
    from sqlalchemy import Connection, Row
    from transaction import Transaction

    from ws_celery.beat.entries import Known
    from ws_celery.locks import Holder
    from ws_celery.outbox.store import Journal
    from ws_celery.recording import Publication

__all__ = (
    "IBeforeDispatch",
    "ICeleryApp",
    "ICeleryEvent",
    "ICelerySource",
    "IDatabase",
    "ILockLost",
    "ILockStore",
    "IOutbox",
    "IPublishFailed",
    "IRequestPropagator",
    "IScheduleStore",
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
    """Where the configuration is, as ``config.configure_celery`` was given it."""

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

    def __call__(run: Any, info: Any) -> Any:
        """Return ``run``, or a callable with its signature, ``run(request, *args, **kwargs)``.

        ``info`` is an :class:`ITaskDeriverInfo`. Called once for each task, when it is registered.
        """


class ITaskDeriverInfo(Interface):
    """What a deriver gets to know of a task."""

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


class IDatabase(Interface):
    """The database of the application's sessions, for one table of ours.

    Where the database is the reason, methods raise one of ``errors``: an ``Unavailable`` if it does
    not answer, a ``TableError`` if the table cannot be used, else SQLAlchemy's own.
    """

    part = Attribute("What the table is for: ``outbox`` or ``schedule``.")
    table = Attribute("The table, of SQLAlchemy.")
    engine = Attribute("The engine of the sessions; READ COMMITTED where there are levels.")
    errors = Attribute("The classes of what may go wrong, for ``except``.")

    def begin() -> AbstractContextManager[Connection]:
        """Open a transaction of its own: committed at the end of ``with``, or rolled back.

        It never is the transaction of a session, of whose locks and level it knows nothing.
        """

    def check_table() -> None:
        """Compare the table with its definition.

        :raises TableError: if it is missing or another one.
        """

    def create_table() -> bool:
        """Create the table if it is missing; return whether it was.

        :raises TableError: if there is another one of its name, which is left as it is.
        """


class IOutbox(IDatabase):
    """Keeps each dispatch as a row until it has taken effect; ``app.outbox``, or ``None``.

    A row is the token of its effect: it is deleted in the transaction that commits the effect, and
    nothing else lets go of it but what a person, a revoke or an expiry has ended.
    """

    rows = Attribute("The statements about rows, each for a connection of the caller's.")
    lease = Attribute("Seconds until an unfinished message is sent again.")
    relay = Attribute("What publishes what is due, in beat or alone.")

    def set_defaults(task: type[Task]) -> None:
        """Let messages of a class of tasks survive the worker that runs them.

        What the class or the configuration says is left alone.
        """

    def journal(txn: Transaction, publications: Iterable[Publication]) -> Journal:
        """Return what writes the rows of a transaction, before it commits and with it.

        A dispatch whose row would not be committed by ``txn`` is refused at the call, by a
        ``SessionError``; a savepoint that is rolled back takes its rows along.
        """

    def keep(connection: Connection, publications: Iterable[Publication]) -> None:
        """Write the rows of messages in the transaction of ``connection``; commit nothing.

        A message that is not to be kept (an event, a task that has opted out) is passed by.
        """

    def published(publications: Iterable[Publication]) -> None:
        """Note that the broker has these: rows of tasks that are none of ours have done their work.

        Called after a commit: never raises, and waits for no run.
        """

    def not_published(publications: Iterable[Publication]) -> None:
        """Make the rows of these due now, for the relay. Called after a commit: never raises."""

    def publication_of(row: Row[Any]) -> Publication:
        """Return the message of a row, with its headers, id and routing as they were.

        :raises BrokenRow: if it does not hold one.
        """

    def when_due(eta: datetime | None) -> tuple[bool, float]:
        """Return whether a message waits here for its eta, and in how many seconds it is due.

        One that does not wait is due no earlier than a lease after it may run.
        """

    def row_ids(headers: Iterable[Mapping[str, Any]]) -> list[UUID]:
        """Return the ids of the rows that messages with these headers belong to."""

    def discard(headers: Iterable[Mapping[str, Any]]) -> int:
        """Delete the rows of messages that were taken from the broker; return how many.

        Rows that a run has locked are left: their effect is under way.
        """

    def revoke(task_ids: Sequence[str]) -> int:
        """Delete the rows of tasks, unless they are running; return how many.

        Called where an error would reach nobody: never raises.
        """


class IScheduleStore(IDatabase):
    """The schedule in the database; ``app.schedule``, or ``None``.

    Every edit counts up the version of its entry, in the transaction that makes it, so that each
    beat sees it within its poll. A ``connection`` is one of the caller's transaction; without it
    the method has a transaction of its own. Times are aware, by the database's clock.
    """

    def load(connection: Connection | None = None) -> dict[str, Known]:
        """Return what the database knows of each entry, by name."""

    def now(connection: Connection | None = None) -> datetime:
        """Return the time by the database's clock, of which all beats have the same."""

    def save(
        name: str,
        /,
        *,
        origin: str = "database",
        connection: Connection | None = None,
        **fields: Any,
    ) -> None:
        """Edit fields of an entry, and leave its other ones; ``None`` takes an edit back.

        Its row is made if the database does not know it yet, and locked until the commit.
        """

    def request_run(
        name: str, *, origin: str = "database", connection: Connection | None = None
    ) -> None:
        """Let some beat send an entry once, soon, whatever its schedule."""

    def restart(name: str, origin: str, connection: Connection) -> None:
        """Count the ticks of an entry from now on: none before is made up for."""

    def remove(name: str, connection: Connection | None = None) -> None:
        """Delete an entry of the database, or what was edited of one from code or INI.

        :raises NotFound: if the database does not know it.
        """


class ILockStore(Interface):
    """Where one-instance locks are; ``app.locks.store``. All workers see the same.

    Methods raise ``LocksUnavailable`` where nobody can tell, and never guess.
    """

    def holders() -> list[Holder]:
        """Return who holds locks, in the order of their keys."""

    def holder_of(key: str) -> Holder | None:
        """Return who holds the lock of a key, if somebody does."""

    def free(holder: Holder) -> bool:
        """Take the lock away from this holder, and from nobody who has taken it since.

        :return: whether he still had it; his run notices when it renews the lock.
        """
