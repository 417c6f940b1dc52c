"""What code and INI of an application say of its schedule, and the entries that come of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

from celery.backends.base import DisabledBackend
from celery.schedules import BaseSchedule, crontab, maybe_schedule

from ws_celery.beat.entries import FIELDS, TIMING, Entry, Known, fitted, problem_of_name
from ws_celery.converters import Refused, nearest
from ws_celery.exceptions import ConfigurationError, Fault
from ws_celery.masking import MASK, masked
from ws_celery.schedules import KEYS_OF_TYPES, SCHEDULE_TYPES, parse_schedule, text_of_schedule
from ws_celery.settings.options import ENTRY_KEYS, accept_options

__all__ = (
    "check_fields",
    "check_sources",
    "declare",
    "entries_of",
    "entry_of",
    "fields_by_source",
    "install",
    "merge",
    "problems_of_sources",
)


def merge(
    code: Mapping[str, Mapping[str, Any]],
    ini: Mapping[str, Mapping[str, Any]],
    database: Mapping[str, Known],
) -> dict[str, Entry]:
    """Return all entries by name, those that are set aside and the orphaned ones included.

    :param code: name to fields; the schedule may be an object.
    :param ini: likewise.
    :param database: what is known there; see :class:`Known`.
    """
    entries = {}
    for name in dict.fromkeys((*code, *ini, *database)):
        known = database.get(name)
        edited = known.fields if known else {}
        sources = {"code": code.get(name), "ini": ini.get(name), "database": edited}
        made = sources["code"] or (sources["ini"] or {}).get("task")
        orphaned = not made and (known is None or known.origin != "database")
        broken = known.problem if known else None
        if orphaned and not edited and not broken:
            continue  # a section that switches off what is not there, or what left nothing behind
        fields, origins = _overlaid(sources)
        entry = _entry(name, fields, origins, orphaned=orphaned)
        entries[name] = replace(entry, problem=broken) if broken else entry
    return entries


def _overlaid(
    sources: Mapping[str, Mapping[str, Any] | None],
) -> tuple[dict[str, Any], dict[str, str]]:
    fields: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source, given in sources.items():
        if not given:
            continue
        if "type" in given or not isinstance(given.get("schedule", ""), (str, Mapping)):
            for name in TIMING:
                fields.pop(name, None)
                origins.pop(name, None)
        fields.update(given)
        origins.update(dict.fromkeys(given, source))
    return fields, origins


def _entry(
    name: str, fields: Mapping[str, Any], origins: Mapping[str, str], *, orphaned: bool
) -> Entry:
    typed: dict[str, Any] = {}
    in_python = origins.get("options") == "code"
    problem = "; ".join(_problems(fields, typed, in_python=in_python)) or None
    return Entry(
        name=name,
        origins=origins,
        orphaned=orphaned,
        problem=problem,
        **{"task": "", "schedule": None, **typed},
    )


def check_fields(fields: Mapping[str, Any]) -> None:
    """Make sure that an entry could have these fields, whatever else it has.

    :raises Refused: at the first one that is wrong.
    """
    for problem in _problems(fields, {}, whole=False):
        raise Refused(problem)


def _problems(
    fields: Mapping[str, Any],
    typed: dict[str, Any],
    *,
    whole: bool = True,
    in_python: bool = False,
) -> Iterator[str]:
    """Put what is right into ``typed``, and tell what is not.

    :param whole: whether it is an entry, and not a part of one.
    :param in_python: whether its options are written in code.
    """
    for key in fields:
        if key not in FIELDS:
            yield f"has the unknown field {key}{_meant(nearest(key, FIELDS))}"
    for key, kind in ENTRY_KEYS.items():
        if key not in fields:
            continue
        try:
            value = kind.accept(fields[key])
            if key == "options":
                value = accept_options(value, in_python=in_python)
            typed[key] = value
        except Exception as error:  # noqa: BLE001 - of this entry alone, whatever it is
            yield _told(key, fields[key], error, kind.expected)
    if "args" in typed:
        typed["args"] = tuple(typed["args"])
    if whole and "task" not in fields:
        yield "has no task"
    if whole or {"type", "schedule"} <= fields.keys():
        yield from _timing_of(fields, typed)


def _timing_of(fields: Mapping[str, Any], typed: dict[str, Any]) -> Iterator[str]:
    schedule, kind = fields.get("schedule"), fields.get("type")
    if schedule is None:
        yield "has no schedule"
        return
    try:
        typed.update(_timed(kind, schedule, typed))
    except Exception as error:  # noqa: BLE001 - likewise
        typed.update(type=str(kind or ""), text=_as_text(schedule))
        yield _told("schedule", schedule, error, "a schedule")


def _timed(kind: Any, schedule: Any, typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an entry that come of its schedule."""
    parsed = _checked(schedule) if _is_python(schedule, kind) else _parsed(kind, schedule, typed)
    made = maybe_schedule(parsed, typed.get("relative", False))
    if kind is not None:
        return {"schedule": made, "text": _as_text(schedule), "type": kind}
    said = text_of_schedule(made)
    return {**said, "schedule": made, "text": said["schedule"]}


def _is_python(schedule: Any, kind: Any) -> bool:
    """Tell whether it is a schedule that was made in Python, or a number of seconds."""
    made = isinstance(schedule, (BaseSchedule, timedelta, int, float))
    return kind is None and made and not isinstance(schedule, bool)


def _checked(schedule: Any) -> Any:
    """Return a schedule that was made in Python, if its period is one.

    :raises Refused: if it is none: it would have no next tick, or go backwards.
    """
    if isinstance(schedule, (int, float)):
        return parse_schedule("number", schedule)
    every = getattr(schedule, "run_every", schedule)
    if isinstance(every, timedelta) and every <= timedelta(0):
        raise Refused("is no period: it must be longer than zero")
    return schedule


def _parsed(kind: Any, schedule: Any, typed: Mapping[str, Any]) -> Any:
    if kind not in SCHEDULE_TYPES:
        types = ", ".join(SCHEDULE_TYPES)
        raise Refused(
            f"has the type {kind!r}, which is none of {types}", nearest(str(kind), SCHEDULE_TYPES)
        )
    for key, allowed in KEYS_OF_TYPES.items():
        if typed.get(key) and kind not in allowed:
            raise Refused(f"has the type {kind}, for which {key} has no meaning")
    return parse_schedule(kind, schedule, typed.get("timezone"))


def _as_text(schedule: Any) -> str:
    return schedule if isinstance(schedule, str) else json.dumps(schedule, default=str)


def _told(key: str, value: Any, error: Exception, expected: str) -> str:
    """Return what is wrong with a field in words, whatever its conversion has raised."""
    # The names of a task's parameters, by which its arguments are masked, are not known here.
    value = MASK if key in ("args", "kwargs") else masked(key, value)
    if not isinstance(error, Refused):
        return f"{key} = {value!r} is not {expected} ({type(error).__name__}: {error})"
    said = str(error) or f"is not {expected}"
    return f"{key} = {value!r} {said}{_meant(error.close)}"


def _meant(close: str | None) -> str:
    return f"; did you mean {close}?" if close else ""


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
