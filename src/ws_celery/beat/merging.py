"""How what code, INI and database say of an entry becomes one.

Each source gives the fields that it has something to say of: the database counts more than the INI,
and the INI more than code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

from celery.schedules import BaseSchedule, maybe_schedule

from ws_celery.beat.entry import FIELDS, TIMING, Entry, Known
from ws_celery.converters import Refused, nearest
from ws_celery.masking import MASK, masked
from ws_celery.schedules import KEYS_OF_TYPES, SCHEDULE_TYPES, parse_schedule, text_of_schedule
from ws_celery.settings.entries import accept_options
from ws_celery.settings.keys import ENTRY_KEYS

__all__ = ("check_fields", "merge")


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
        yield from _timing(fields, typed)


def _timing(fields: Mapping[str, Any], typed: dict[str, Any]) -> Iterator[str]:
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
