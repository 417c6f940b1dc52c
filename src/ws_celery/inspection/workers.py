"""Workers, what they have in hand, and taking it from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

from ws_celery.app import get_celery_app
from ws_celery.exceptions import Unavailable
from ws_celery.inspection.brokers import connected
from ws_celery.inspection.queues import time_of
from ws_celery.shown_arguments import shown_arguments

__all__ = (
    "STATES",
    "HeldTask",
    "WorkerState",
    "held_tasks",
    "revoke_tasks",
    "revoked_ids",
    "worker_states",
)

#: What a worker may do with a task in its hands, in the order in which it comes to it.
STATES = ("active", "reserved", "scheduled")


@dataclass(frozen=True)
class WorkerState:
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

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


@dataclass(frozen=True)
class HeldTask:
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

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        times = {"since": self.since, "eta": self.eta}
        return {**asdict(self), **{key: time and time.isoformat() for key, time in times.items()}}


def worker_states(source: Any, timeout: float = 1.0) -> list[WorkerState]:
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


def held_tasks(source: Any, states: Sequence[str] = STATES, timeout: float = 1.0) -> list[HeldTask]:
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
        for task in _held(app, state, worker, found)
    ]


def revoked_ids(source: Any, timeout: float = 1.0) -> set[str]:
    """Return the ids of the tasks that workers are told not to run; they forget when they stop."""
    return {each for ids in _asked(source, timeout, "revoked").values() for each in ids or ()}


def revoke_tasks(
    source: Any,
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
    :raises Unavailable: before workers are told, if the database does not answer.
    :raises BrokerUnavailable: if the broker does not answer.
    """
    app, ids = get_celery_app(source), list(ids)
    settled = _settled(app, ids)
    arguments = {"task_id": ids, "terminate": terminate, "signal": signal}
    with connected(app) as broker:
        # Not `control.revoke()`, which settles rows as well, and does not tell how many.
        answers = app.control.broadcast(
            "revoke",
            arguments=arguments,
            connection=broker.connection,
            reply=True,
            timeout=timeout,
        )
    if not answers and settled < len(set(ids)):
        raise Unavailable("workers", f"{timeout:g} seconds")


def _settled(app: Any, ids: Iterable[str]) -> int:
    if app.outbox is None:
        return 0
    # Not `outbox.revoke()`, which only logs what the database raises.
    with app.outbox.begin() as connection:
        deleted: int = app.outbox.rows.delete_tasks(connection, ids)
    return deleted


def _asked(source: Any, timeout: float, question: str) -> dict[str, Any]:
    app = get_celery_app(source)
    with connected(app) as broker:
        inspect = app.control.inspect(timeout=timeout, connection=broker.connection)
        answers: dict[str, Any] | None = getattr(inspect, question)()
    if not answers:
        raise Unavailable("workers", f"{timeout:g} seconds")
    return answers


def _held(app: Any, state: str, worker: str, found: Any) -> Iterator[HeldTask]:
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
