"""Whether an application can run an entry: its task, its arguments, its next tick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from celery.beat import BeatLazyFunc
from celery.exceptions import QueueNotFound
from kombu.exceptions import EncodeError
from kombu.serialization import dumps

from ws_celery.arguments import blame_argument
from ws_celery.beat.entry import Entry
from ws_celery.beat.overlap import nothing_tells
from ws_celery.beat.ticks import due_tick
from ws_celery.clocked import Clocked
from ws_celery.converters import nearest
from ws_celery.exceptions import ArgumentNotSerializable

__all__ = ("fitted", "problem_of_queue")

#: Fields that Celery's own scheduler does not know.
_OURS = ("catch_up", "overlap", "starts_at", "expires")


def fitted(entries: Mapping[str, Entry], app: Any) -> dict[str, Entry]:
    """Return entries as the application will run them, those that it cannot run set aside.

    :param entries: by name, as :func:`ws_celery.beat.merging.merge` returns them.
    :param app: the Celery app; its time zone is that of a crontab without one.
    """
    return {name: _fitted(entry, app) for name, entry in entries.items()}


def _fitted(entry: Entry, app: Any) -> Entry:
    if entry.schedule is not None:
        entry.schedule.app = app
    if entry.problem is not None:
        return entry
    return replace(entry, problem=_problem(entry, app))


def _problem(entry: Entry, app: Any) -> str | None:
    task = app.tasks.get(entry.task)
    if task is None:
        close = nearest(entry.task, app.tasks)
        meant = f"did you mean {close}? Else call" if close else "call"
        return (
            f"the task {entry.task!r} is not registered; {meant} config.scan() on its module, or "
            "list the module under `imports` in the [celery] section"
        )
    try:
        if task.typing:
            task.__header__(*entry.args, **entry.kwargs)
    except TypeError as error:
        return f"the arguments do not fit {entry.task}: {error}"
    if app.schedule is None:
        of_scheduler = _problem_without_database(entry)
    else:
        of_scheduler = _problem_of_overlap(entry, app)
    return _problem_of_message(entry, task) or of_scheduler or _problem_of_timing(entry)


def _problem_of_message(entry: Entry, task: Any) -> str | None:
    serializer = entry.options.get("serializer") or task.serializer
    # What is made at each tick cannot be looked at now.
    args = [None if isinstance(each, BeatLazyFunc) else each for each in entry.args]
    kwargs = {k: v for k, v in entry.kwargs.items() if not isinstance(v, BeatLazyFunc)}
    try:
        dumps((args, kwargs), serializer=serializer)
    except EncodeError as error:
        try:
            blame_argument(error, entry.task, args, kwargs, serializer)
        except ArgumentNotSerializable as blamed:
            return str(blamed).rstrip(".")
    queue = entry.options.get("queue") or getattr(task, "queue", None)
    return problem_of_queue(task.app, entry.task, queue)


def problem_of_queue(app: Any, task: str, queue: Any = None) -> str | None:
    """Return why a call of a task could not be routed, if it could not.

    :param queue: the one that the call or the task names; that of the route if it is ``None``.
    """
    if app.conf.task_create_missing_queues:
        return None  # not asked for: a worker would consume from what is made
    try:
        app.amqp.router.route({"queue": queue} if queue else {}, task)
    except QueueNotFound as error:
        return f"calls of {task} cannot be routed: {error}; add [celeryqueue:NAME] for it"
    return None


def _problem_without_database(entry: Entry) -> str | None:
    fields = [name for name in _OURS if name in entry.origins]
    if isinstance(entry.schedule, Clocked):
        fields.insert(0, "type = clocked")
    return " and ".join(fields) and (
        f"has {' and '.join(fields)}, which needs the schedule in the database: Celery's own "
        "scheduler would not obey. Set ws_celery.beat = true in the section of the application, or "
        "take it out"
    )


def _problem_of_overlap(entry: Entry, app: Any) -> str | None:
    reason = nothing_tells(app, entry) if entry.overlap == "skip" else None
    return reason and (
        "overlap = skip needs to know when the last run has ended, and nothing tells it: the task "
        f"has no row in an outbox, and {reason}. Set overlap = allow, or keep its results"
    )


def _problem_of_timing(entry: Entry) -> str | None:
    try:
        due_tick(entry, None, datetime.now(timezone.utc))
    except Exception as error:  # noqa: BLE001 - schedules are the application's own classes, too
        return f"the schedule cannot tell its next tick: {error}"
    return None
