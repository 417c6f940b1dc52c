"""What code and INI of an application say of its schedule, and the entries that come of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from celery.backends.base import DisabledBackend
from celery.schedules import crontab

from ws_celery.beat.entry import Entry, Known, problem_of_name
from ws_celery.beat.fitting import fitted
from ws_celery.beat.merging import merge
from ws_celery.exceptions import ConfigurationError, Fault

__all__ = (
    "check_sources",
    "declare",
    "entries_of",
    "entry_of",
    "fields_by_source",
    "install",
    "problems_of_sources",
)

_WORDS_OF_A_CRONTAB = 5


def declare(app: Any, name: str, task: str, schedule: Any, **fields: Any) -> None:
    """Let code declare an entry.

    :param app: the Celery app.
    :param name: of the entry.
    :param task: the name of the task.
    :param schedule: Celery's schedule, a period, seconds, a text (a crontab, or a period such as
        ``1h``), or a mapping of the keys that ``[celerybeat:NAME]`` has.
    :param fields: more of these keys.
    """
    app.periodic[name] = {"task": task, **_timing(schedule), **fields}


def _timing(schedule: Any) -> Mapping[str, Any]:
    if isinstance(schedule, Mapping):
        return schedule
    if isinstance(schedule, str):
        crontab = len(schedule.split()) == _WORDS_OF_A_CRONTAB
        return {"type": "crontab" if crontab else "timedelta", "schedule": schedule}
    return {"schedule": schedule}


def entries_of(app: Any, known: Mapping[str, Known]) -> dict[str, Entry]:
    """Return all entries of an application by name, as it will run them.

    :param app: the Celery app.
    :param known: what the database knows of them, by name.
    """
    return fitted(merge(_code(app), _ini(app), known), app)


def entry_of(app: Any, name: str, known: Known | None) -> Entry | None:
    """Return one entry of an application, ``None`` if there is none of this name.

    :param app: the Celery app.
    :param known: what the database knows of it, or is to know.
    """
    sources = fields_by_source(app).values()
    code, ini = ({name: said[name]} if name in said else {} for said in sources)
    found = merge(code, ini, {name: known} if known else {})
    return fitted(found, app).get(name)


def fields_by_source(app: Any) -> dict[str, Mapping[str, Mapping[str, Any]]]:
    """Return what code and INI say of entries: source to name to fields."""
    return {"code": _code(app), "ini": _ini(app)}


def check_sources(app: Any) -> None:
    """Make sure that what code and INI say can be run; of the database nothing is asked.

    :raises ConfigurationError: with all that is wrong.
    """
    if problems := [problem for _, problem in problems_of_sources(app)]:
        raise ConfigurationError(*problems)


def problems_of_sources(app: Any) -> Iterator[tuple[str, Fault]]:
    """Yield the name of each entry or option that beat would not start with, and why."""
    if app.schedule is not None and app.conf.beat_cron_starting_deadline is not None:
        problem = (
            "[celery] beat_cron_starting_deadline is an option of Celery's own scheduler: with the "
            "schedule in the database, catch_up of an entry says what becomes of a missed tick. "
            "Take it out"
        )
        yield "beat_cron_starting_deadline", Fault(problem)
    entries, code = entries_of(app, {}), _code(app)
    for name, entry in entries.items():
        if entry.problem and entry.enabled:
            yield name, Fault(f"[celerybeat:{name}] {entry.problem}")
    for name, fields in _ini(app).items():
        if "task" not in fields and fields.get("enabled", True) and name not in code:
            problem = "has no task, and code declares no entry of this name"
            yield name, Fault(f"[celerybeat:{name}] {problem}")
    for name in entries if app.schedule is not None else ():
        if reason := problem_of_name(name):
            problem = f"cannot be kept in the database: {reason}. Give it another name"
            yield name, Fault(f"[celerybeat:{name}] {problem}")


def install(app: Any) -> dict[str, Entry]:
    """Let Celery's ``beat_schedule`` hold what code and INI say, for schedulers that read it.

    :return: the entries.
    """
    app.periodic = dict(_code(app))
    entries = entries_of(app, {})
    app.installed = {name: each.for_celery() for name, each in entries.items() if each.ticks}
    app.conf.beat_schedule = dict(app.installed)
    return entries


def _of_celery(app: Any) -> Mapping[str, Mapping[str, Any]]:
    """Return the entry that Celery's own beat adds: cleaning up results that stay otherwise."""
    backend = app.backend_class()[0]
    goes = backend is DisabledBackend or backend.supports_autoexpire
    if goes or not app.conf.result_expires:
        return {}
    name = "celery.backend_cleanup"
    schedule = crontab(minute="0", hour="4")
    return {name: {"task": name, "schedule": schedule, "options": {"expires": 12 * 3600}}}


def _code(app: Any) -> Mapping[str, Mapping[str, Any]]:
    configured = app.configuration.entries_of_code if app.configuration else {}
    # What Celery's own ways have added since: add_periodic_task() in a handler, or an assignment.
    added = {
        name: {key: value for key, value in entry.items() if value is not None}
        for name, entry in app.conf.beat_schedule.items()
        if entry is not app.installed.get(name)
    }
    return {**_of_celery(app), **configured, **added, **app.periodic}


def _ini(app: Any) -> Mapping[str, Mapping[str, Any]]:
    entries: Mapping[str, Mapping[str, Any]] = (
        app.configuration.entries if app.configuration else {}
    )
    return entries
