"""What code and INI say of the schedule, and the entries of an application as it will run them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from celery import Task
from celery.backends.base import DisabledBackend
from celery.beat import BeatLazyFunc
from celery.exceptions import QueueNotFound
from celery.schedules import BaseSchedule, crontab
from kombu.exceptions import EncodeError
from kombu.serialization import dumps

from ws_celery.beat.claims import why_end_is_unknown
from ws_celery.beat.entries import Entry, Known, merge, problem_of_name
from ws_celery.beat.ticks import due_tick
from ws_celery.converters import nearest
from ws_celery.exceptions import ArgumentNotSerializable, ConfigurationError, Fault
from ws_celery.recording import blame_argument
from ws_celery.schedules import Clocked

if TYPE_CHECKING:
    from datetime import timedelta

    from ws_celery.app import PyramidCelery

__all__ = (
    "check_sources",
    "declare",
    "entries_of",
    "entry_of",
    "fields_by_source",
    "fitted",
    "install",
    "problem_of_queue",
    "problems_of_sources",
)

#: Fields of an entry, or of many by their names.
_Fields = Mapping[str, Any]
_Entries = Mapping[str, _Fields]

_WORDS_OF_A_CRONTAB = 5


def declare(
    app: PyramidCelery,
    name: str,
    task: str,
    schedule: BaseSchedule | timedelta | float | str | _Fields,
    **fields: Any,
) -> None:
    """Let code declare an entry.

    :param app: the Celery app.
    :param name: of the entry.
    :param task: the name of the task.
    :param schedule: Celery's schedule, a period, seconds, a text (a crontab, or a period such as
        ``1h``), or a mapping of the keys that ``[celerybeat:NAME]`` has.
    :param fields: more of these keys.
    """
    if isinstance(schedule, str):
        is_crontab = len(schedule.split()) == _WORDS_OF_A_CRONTAB
        timing: _Fields = {"type": "crontab" if is_crontab else "timedelta", "schedule": schedule}
    else:
        timing = schedule if isinstance(schedule, Mapping) else {"schedule": schedule}
    app.periodic[name] = {"task": task, **timing, **fields}


def fields_by_source(app: PyramidCelery) -> dict[str, _Entries]:
    """Return what code and INI say of entries: source to name to fields."""
    configuration = app.configuration
    # What Celery's own ways have added since: add_periodic_task() in a handler, or an assignment.
    added = {
        name: {key: value for key, value in entry.items() if value is not None}
        for name, entry in app.conf.beat_schedule.items()
        if entry is not app.installed.get(name)
    }
    configured = configuration.entries_of_code if configuration else {}
    return {
        "code": {**_entry_of_celery(app), **configured, **added, **app.periodic},
        "ini": configuration.entries if configuration else {},
    }


def _entry_of_celery(app: PyramidCelery) -> _Entries:
    """Return the entry that Celery's own beat adds: cleaning up results that stay otherwise."""
    backend = app.backend_class()[0]
    goes = backend is DisabledBackend or backend.supports_autoexpire
    if goes or not app.conf.result_expires:
        return {}
    name = "celery.backend_cleanup"
    schedule = crontab(minute="0", hour="4")
    return {name: {"task": name, "schedule": schedule, "options": {"expires": 12 * 3600}}}


def entries_of(app: PyramidCelery, known: Mapping[str, Known]) -> dict[str, Entry]:
    """Return all entries of an application by name, as it will run them.

    :param app: the Celery app.
    :param known: what the database knows of them, by name.
    """
    return fitted(merge(**fields_by_source(app), database=known), app)


def entry_of(app: PyramidCelery, name: str, known: Known | None) -> Entry | None:
    """Return one entry of an application, ``None`` if there is none of this name.

    :param app: the Celery app.
    :param known: what the database knows of it, or is to know.
    """
    sources = {
        source: {name: entries[name]} if name in entries else {}
        for source, entries in fields_by_source(app).items()
    }
    return fitted(merge(**sources, database={name: known} if known else {}), app).get(name)


def install(app: PyramidCelery) -> dict[str, Entry]:
    """Let Celery's ``beat_schedule`` hold what code and INI say, for schedulers that read it.

    :return: the entries.
    """
    app.periodic = dict(fields_by_source(app)["code"])
    entries = entries_of(app, {})
    app.installed = {name: each.for_celery() for name, each in entries.items() if each.ticks}
    app.conf.beat_schedule = dict(app.installed)
    return entries


def check_sources(app: PyramidCelery) -> None:
    """Make sure that what code and INI say can be run; of the database nothing is asked.

    :raises ConfigurationError: with all that is wrong.
    """
    if problems := [problem for _, problem in problems_of_sources(app)]:
        raise ConfigurationError(*problems)


def problems_of_sources(app: PyramidCelery) -> Iterator[tuple[str, Fault]]:
    """Yield the name of each entry or option that beat would not start with, and why."""
    if app.schedule is not None and app.conf.beat_cron_starting_deadline is not None:
        problem = (
            "[celery] beat_cron_starting_deadline is an option of Celery's own scheduler: with the "
            "schedule in the database, catch_up of an entry says what becomes of a missed tick. "
            "Take it out"
        )
        yield "beat_cron_starting_deadline", Fault(problem)
    entries, sources = entries_of(app, {}), fields_by_source(app)
    for name, entry in entries.items():
        if entry.problem and entry.enabled:
            yield name, Fault(f"[celerybeat:{name}] {entry.problem}")
    for name, fields in sources["ini"].items():
        if "task" not in fields and fields.get("enabled", True) and name not in sources["code"]:
            problem = "has no task, and code declares no entry of this name"
            yield name, Fault(f"[celerybeat:{name}] {problem}")
    for name in entries if app.schedule is not None else ():
        if reason := problem_of_name(name):
            problem = f"cannot be kept in the database: {reason}. Give it another name"
            yield name, Fault(f"[celerybeat:{name}] {problem}")


# --- What an application cannot run ------------------------------------------------------------

#: Fields that Celery's own scheduler does not know.
_OURS = ("catch_up", "overlap", "starts_at", "expires")


def fitted(entries: Mapping[str, Entry], app: PyramidCelery) -> dict[str, Entry]:
    """Return entries as the application will run them, those that it cannot run set aside.

    :param entries: by name, as :func:`ws_celery.beat.entries.merge` returns them.
    :param app: the Celery app; its time zone is that of a crontab without one.
    """
    return {name: _fitted(entry, app) for name, entry in entries.items()}


def _fitted(entry: Entry, app: PyramidCelery) -> Entry:
    if entry.schedule is not None:
        entry.schedule.app = app
    return entry if entry.problem is not None else replace(entry, problem=_problem(entry, app))


def _problem(entry: Entry, app: PyramidCelery) -> str | None:
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
    return (
        _problem_of_message(entry, task)
        or _problem_of_scheduler(entry, app)
        or _problem_of_timing(entry)
    )


def _problem_of_message(entry: Entry, task: Task) -> str | None:
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


def problem_of_queue(app: PyramidCelery, task: str, queue: object = None) -> str | None:
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


def _problem_of_scheduler(entry: Entry, app: PyramidCelery) -> str | None:
    """Return what the scheduler would not obey: Celery's own one, without the database."""
    if app.schedule is None:
        fields = ["type = clocked"] if isinstance(entry.schedule, Clocked) else []
        fields += [name for name in _OURS if name in entry.origins]
        if not fields:
            return None
        return (
            f"has {' and '.join(fields)}, which needs the schedule in the database: Celery's own "
            "scheduler would not obey. Set ws_celery.beat = true in the section of the "
            "application, or take it out"
        )
    reason = why_end_is_unknown(app, entry) if entry.overlap == "skip" else None
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
