"""``[celerybeat:NAME]``: one entry of the schedule."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any, NamedTuple

from celery import Celery, Task

from ws_celery.converters import Refused, nearest
from ws_celery.schedules import KEYS_OF_TYPES, SCHEDULE_TYPES, parse_schedule
from ws_celery.settings.faults import Faults, Place, Value
from ws_celery.settings.keys import ENTRY_KEYS, ROUTE_KEYS, accept_keys
from ws_celery.settings.kinds import OF_ONE_CALL

__all__ = ("ReadEntry", "accept_options", "read_entry")

_TYPES = f"one of {', '.join(SCHEDULE_TYPES)}"

#: What beat itself gives to each call.
_OF_BEAT = {"name", "args", "kwargs", "options", "task_id", "producer", "publisher", "connection"}
#: Options of a call that Celery takes, and names nowhere.
_UNNAMED = {"argsrepr", "kwargsrepr", "stamped_headers"}
#: What an INI file could say; a call also takes other objects, such as a datetime.
_PLAIN = (str, int, float, list, tuple, dict)


class ReadEntry(NamedTuple):
    """One section that was read.

    :param fields: what is written there, typed; ``schedule`` as it is written.
    :param for_celery: the entry as Celery's ``beat_schedule`` has it; ``None`` if it is switched
        off, or changes an entry that code declares.
    """

    fields: dict[str, Any]
    for_celery: dict[str, Any] | None


def accept_options(values: Mapping[str, Any], *, in_python: bool) -> dict[str, Any]:
    """Return the options of an entry's calls, typed.

    :param in_python: whether they are written in code: then they may be whatever ``apply_async``
        takes, such as the signatures of ``link``.
    :raises Refused: at the first key that is unknown or has a value of another kind.
    """
    if "task_id" in values:
        raise Refused(f"has task_id, which {OF_ONE_CALL['task_id']}")
    as_given: dict[str, Any] = {}
    if in_python:
        untyped = {*_options_of_a_call(), *values.get("stamped_headers", ())}
        untyped |= {key for key in ROUTE_KEYS if not isinstance(values.get(key), _PLAIN)}
        as_given = {key: value for key, value in values.items() if key in untyped}
    rest = {key: value for key, value in values.items() if key not in as_given}
    return {**as_given, **accept_keys(rest, ROUTE_KEYS)}


def _options_of_a_call() -> set[str]:
    """Return those that are not typed."""
    calls = (Task.apply_async, Celery.send_task)
    named = {name for call in calls for name in signature(call).parameters}
    return (named | _UNNAMED) - _OF_BEAT - {"self", *ROUTE_KEYS}


def read_entry(
    values: Mapping[str, Value], place: Place, faults: Faults, *, in_python: bool = False
) -> ReadEntry | None:
    """Read an entry.

    Without a task it changes fields of an entry that code declares under its name.

    :param values: the keys of the section.
    :param place: where the entry begins.
    :param faults: where to add what is wrong.
    :param in_python: whether it is written in code.
    :return: ``None`` if something is.
    """
    before = len(faults)
    plain = {key: value for key, value in values.items() if key not in ("schedule", "type")}
    keys = faults.typed(plain, ENTRY_KEYS, also=("schedule", "type"))
    written = {key: values[key].text for key in ("type", "schedule") if key in values}
    if keys.get("enabled") is False:
        return ReadEntry({**keys, **written}, None) if len(faults) == before else None
    for key in ("task", "schedule") if "task" in values or not values else ():
        if key not in values:
            faults.at(place.key_beside(key), "is missing; an entry needs task, type and schedule")
    timing = _timing(values, keys, place, faults) if "schedule" in values else None
    if "options" in keys:
        with faults.catching(values["options"]):
            keys["options"] = accept_options(keys["options"], in_python=in_python)
    if len(faults) > before:
        return None
    if "task" not in keys:
        return ReadEntry({**keys, **written}, None)
    entry = {
        "task": keys["task"],
        "schedule": timing,
        "args": keys.get("args", []),
        "kwargs": keys.get("kwargs", {}),
        "options": keys.get("options", {}),
    }
    if keys.get("relative"):
        entry["relative"] = True
    return ReadEntry({**keys, **written}, entry)


def _timing(
    values: Mapping[str, Value], keys: Mapping[str, Any], place: Place, faults: Faults
) -> Any:
    schedule, kind = values["schedule"], values.get("type")
    text = schedule.text
    if kind is None and not isinstance(text, (str, dict)):
        if not isinstance(text, (int, float)) or isinstance(text, bool):
            return text  # a schedule that was made in Python
        kind = Value("number", schedule.place)
    if kind is None:
        if "task" in values:
            faults.at(place.key_beside("type"), "is missing", expected=_TYPES)
        return None
    name = str(kind.text).strip()
    if name not in SCHEDULE_TYPES:
        faults.at(
            kind.place,
            "is no type of schedule",
            value=name,
            expected=_TYPES,
            close=nearest(name, SCHEDULE_TYPES),
        )
        return None
    for key, types in KEYS_OF_TYPES.items():
        if keys.get(key) and name not in types:
            problem = f"has no meaning for the type {name}, only for {', '.join(types)}"
            faults.at(values[key].place, problem)
    with faults.catching(schedule):
        schedule.check()
        return parse_schedule(name, text, keys.get("timezone"))
    return None
