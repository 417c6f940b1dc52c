"""The tasks of an application and what was decided about each; what workers have in hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from celery.exceptions import QueueNotFound

from ws_celery.app import PyramidCelery, get_celery_app
from ws_celery.beat.sources import entries_of
from ws_celery.exceptions import TaskNotRegistered, Unavailable
from ws_celery.inspection.brokers import connected
from ws_celery.inspection.messages import Record, Source, time_of
from ws_celery.inspection.schedule import look
from ws_celery.shown_arguments import shown_arguments, shown_value

if TYPE_CHECKING:
    from celery import Task

    from ws_celery.beat.entries import Entry, Known

__all__ = (
    "STATES",
    "HeldTask",
    "RegisteredTask",
    "WorkerState",
    "held_tasks",
    "queue_of",
    "registered_task",
    "registered_tasks",
    "revoke_tasks",
    "revoked_ids",
    "worker_states",
)


@dataclass(frozen=True)
class RegisteredTask(Record):
    """A task that the application has registered.

    :param name: of the task.
    :param target: module and name of the function or class.
    :param origin: how it was found: ``config.scan``, ``config.add_celery_task``, ``imports``,
        ``plugin``, ``celery`` for Celery's own, or ``app.task``.
    :param plugin: the distribution that brings it.
    :param base: module and name of its class.
    :param queue: where it is sent; ``None`` if its route leads nowhere.
    :param outbox: whether the outbox keeps what is dispatched; ``False`` where there is none.
    :param acknowledge: when a run takes its row of the outbox, where that was decided.
    :param max_retries: how often it may ask to be tried again; ``None`` without limit.
    :param schedule: the names of its entries in beat's schedule, also of those that are off;
        without those of the database while it does not answer.
    :param options: what its declaration says.
    """

    name: str
    target: str
    origin: str
    plugin: str | None
    base: str
    queue: str | None
    outbox: bool
    acknowledge: str | None
    max_retries: int | None
    schedule: tuple[str, ...]
    options: Mapping[str, Any] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields; the options as text, where JSON has no such value."""
        options = {key: _plain(value) for key, value in self.options.items()}
        return {**super().as_dict(), "options": options}


def registered_tasks(source: Source) -> list[RegisteredTask]:
    """Return the tasks of the application, by name; Celery's own come last.

    :param source: a registry, or what has one: a request, a Celery app.
    """
    app = get_celery_app(source)
    names = sorted(app.tasks, key=lambda name: (name.startswith("celery."), name))
    introspected, entries = _introspected(app), _entries(app)
    return [_registered(app, name, introspected.get(name, {}), entries) for name in names]


def registered_task(source: Source, name: str) -> RegisteredTask:
    """Return one task.

    :raises TaskNotRegistered: if there is none of this name.
    """
    app = get_celery_app(source)
    if name not in app.tasks:
        raise TaskNotRegistered(name)
    return _registered(app, name, _introspected(app).get(name, {}), _entries(app))


def _introspected(app: PyramidCelery) -> dict[str, Any]:
    found = app.registry.introspector.get_category("celery tasks", default=())
    return {each["introspectable"]["name"]: each["introspectable"] for each in found}


def _registered(
    app: PyramidCelery, name: str, known: Mapping[str, Any], entries: Mapping[str, Entry]
) -> RegisteredTask:
    task = app.tasks[name]
    return RegisteredTask(
        name=name,
        target=known.get("target") or f"{task.__module__}.{type(task).__name__}",
        origin=known.get("origin") or ("celery" if name.startswith("celery.") else "app.task"),
        plugin=known.get("plugin"),
        base=_base(task, known),
        queue=queue_of(app, name),
        outbox=app.outbox is not None and bool(getattr(task, "outbox", True)),
        acknowledge=getattr(task, "acknowledge", None),
        max_retries=task.max_retries,
        schedule=tuple(sorted(key for key, entry in entries.items() if entry.task == name)),
        options=_options(app, name, known.get("options") or {}),
    )


def _options(app: PyramidCelery, name: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options of a task, secrets masked; the schedule among them may have arguments."""
    schedule = options.get("schedule")
    if isinstance(schedule, Mapping):
        shown = shown_value(app, "", {**schedule, "task": name})
        options = {**options, "schedule": {key: shown[key] for key in schedule}}
    return dict(shown_value(app, "", options))


def _base(task: Task, known: Mapping[str, Any]) -> str:
    base = known.get("base") or type(task).__mro__[1]
    return f"{base.__module__}.{base.__qualname__}"


def queue_of(app: PyramidCelery, name: str) -> str | None:
    """Return where a task is sent; ``None`` if its route leads nowhere."""
    queue = getattr(app.tasks[name], "queue", None)
    try:
        options = app.amqp.router.route({"queue": queue} if queue else {}, name)
    except QueueNotFound:
        return None
    found = options.get("queue")
    return str(getattr(found, "name", found) or options.get("routing_key"))


def _entries(app: PyramidCelery) -> dict[str, Entry]:
    known: Mapping[str, Known] = {}
    if app.schedule is not None:
        with suppress(*app.schedule.errors):
            known = look(app)[1]
    found = entries_of(app, known)
    return {name: entry for name, entry in found.items() if not entry.orphaned}


def _plain(value: Any) -> Any:
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)


#: What a worker may do with a task in its hands, in the order in which it comes to it.
STATES = ("active", "reserved", "scheduled")


@dataclass(frozen=True)
class WorkerState(Record):
    """A worker that has answered.

    :param name: as ``--hostname`` has it.
    :param pid: of its main process.
    :param pool: the kind of its pool.
    :param concurrency: how many tasks it runs at once.
    :param queues: those that it takes from.
    :param uptime: seconds since it was started.
    :param finished: how many tasks it has finished, by name.
    """

    name: str
    pid: int
    pool: str
    concurrency: int | None
    queues: tuple[str, ...]
    uptime: float
    finished: Mapping[str, int] = field(repr=False)


@dataclass(frozen=True)
class HeldTask(Record):
    """A task that a worker has in hand.

    :param id: of the task.
    :param task: its name.
    :param state: ``active``: it runs; ``reserved``: it is next; ``scheduled``: it waits for its
        eta.
    :param worker: the name of the worker.
    :param since: since when it runs.
    :param eta: before when it is not to run.
    :param pid: of the process that runs it.
    :param arguments: ``args`` and ``kwargs``, their secrets masked.
    """

    id: str
    task: str
    state: str
    worker: str
    since: datetime | None
    eta: datetime | None
    pid: int | None
    arguments: Mapping[str, Any] = field(repr=False)


def worker_states(source: Source, timeout: float = 1.0) -> list[WorkerState]:
    """Return the workers that answer, by name.

    :param source: a registry, or what has one: a request, a Celery app.
    :param timeout: seconds to wait for answers; all of it is always waited.
    :raises Unavailable: if none answers, as all functions here do that ask workers.
    :raises BrokerUnavailable: if the broker does not answer.
    """
    statistics = _asked(source, timeout, "stats")
    queues = _asked(source, timeout, "active_queues")
    return [
        WorkerState(
            name=name,
            pid=found["pid"],
            pool=str(found["pool"].get("implementation", "")).rpartition(":")[0],
            concurrency=found["pool"].get("max-concurrency"),
            queues=tuple(queue["name"] for queue in queues.get(name) or ()),
            uptime=found["uptime"],
            finished=found["total"],
        )
        for name, found in sorted(statistics.items())
    ]


def held_tasks(
    source: Source, states: Sequence[str] = STATES, timeout: float = 1.0
) -> list[HeldTask]:
    """Return the tasks that workers have in hand: running first, then what is next.

    These are not in any queue; a worker takes several at a time, and all that have an eta.

    :param states: which of ``active``, ``reserved`` and ``scheduled``.
    """
    app = get_celery_app(source)
    return [
        task
        for state in STATES
        if state in states
        for worker, found in sorted(_asked(source, timeout, state).items())
        for task in _in_hand(app, state, worker, found)
    ]


def revoked_ids(source: Source, timeout: float = 1.0) -> set[str]:
    """Return the ids of the tasks that workers are told not to run; they forget when they stop."""
    return {each for ids in _asked(source, timeout, "revoked").values() for each in ids or ()}


def revoke_tasks(
    source: Source,
    ids: Iterable[str],
    *,
    terminate: bool = False,
    signal: str = "SIGTERM",
    timeout: float = 1.0,
) -> None:
    """Let tasks not run, if they have not begun.

    With the outbox their rows are deleted, which lasts; workers keep it in mind until they stop.

    :param terminate: kill the process that runs one of them; whatever else it runs is lost.
    :param signal: the name of the signal that does.
    :param timeout: seconds to wait for answers of workers.
    :raises Unavailable: if none answers, and not all of the tasks had rows in the outbox.
    :raises Unavailable: before workers are asked, if the database does not answer.
    :raises BrokerUnavailable: if the broker does not answer.
    """
    app, ids = get_celery_app(source), list(ids)
    settled = _settled(app, ids)
    arguments = {"task_id": ids, "terminate": terminate, "signal": signal}
    with connected(app) as broker:
        # Not `control.revoke()`, which settles rows as well, and does not return how many.
        answers = app.control.broadcast(
            "revoke",
            arguments=arguments,
            connection=broker.connection,
            reply=True,
            timeout=timeout,
        )
    if not answers and settled < len(set(ids)):
        raise Unavailable("workers", f"{timeout:g} seconds")


def _settled(app: PyramidCelery, ids: Iterable[str]) -> int:
    if app.outbox is None:
        return 0
    # Not `outbox.revoke()`, which only logs what the database raises.
    with app.outbox.begin() as connection:
        deleted: int = app.outbox.rows.delete_tasks(connection, ids)
    return deleted


def _asked(source: Source, timeout: float, question: str) -> dict[str, Any]:
    app = get_celery_app(source)
    with connected(app) as broker:
        inspect = app.control.inspect(timeout=timeout, connection=broker.connection)
        answers: dict[str, Any] | None = getattr(inspect, question)()
    if not answers:
        raise Unavailable("workers", f"{timeout:g} seconds")
    return answers


def _in_hand(app: PyramidCelery, state: str, worker: str, found: Any) -> Iterator[HeldTask]:
    for each in found or ():
        # What waits for its eta is inside of what says so.
        request = each.get("request", each)
        began = request.get("time_start")
        yield HeldTask(
            id=request["id"],
            task=request["name"],
            state=state,
            worker=worker,
            since=began and datetime.fromtimestamp(began, timezone.utc),
            eta=time_of(each.get("eta")),
            pid=request.get("worker_pid"),
            arguments=shown_arguments(
                app, request["name"], request.get("args"), request.get("kwargs")
            ),
        )
