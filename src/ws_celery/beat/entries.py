"""Entries of the schedule: merged from code, INI and database, each field checked.

An entry in which something is wrong is set aside with its problem, and stops no other one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from celery.schedules import BaseSchedule, maybe_schedule

from ws_celery.converters import Refused, nearest
from ws_celery.masking import MASK, masked
from ws_celery.schedules import (
    KEYS_OF_TYPES,
    SCHEDULE_TYPES,
    describe,
    parse_schedule,
    text_of_schedule,
)
from ws_celery.settings.options import ENTRY_KEYS, accept_options

__all__ = (
    "FIELDS",
    "LONGEST_NAME",
    "SOURCES",
    "TIMING",
    "Entry",
    "Known",
    "check_fields",
    "merge",
    "problem_of_name",
    "unknown_field",
)

#: How many characters the name of an entry has at most that the database is to know.
LONGEST_NAME = 255

#: Fields that make the schedule. A source that has ``type`` has all of them: the time zone of a
#: crontab means nothing to the period that takes its place.
TIMING = ("type", "schedule", "timezone", "relative")

#: All fields, in the order in which people read them.
FIELDS = (
    "task",
    *TIMING,
    "args",
    "kwargs",
    "options",
    "enabled",
    "catch_up",
    "overlap",
    "starts_at",
    "expires",
    "description",
)

#: Where fields come from; the later ones count more.
SOURCES = ("code", "ini", "database")


def problem_of_name(name: str) -> str | None:
    """Return why the database cannot know an entry of this name, ``None`` if it can."""
    # MariaDB takes no notice of blanks at the end of a name.
    if name and name == name.strip() and name.isprintable() and len(name) <= LONGEST_NAME:
        return None
    return (
        f"a name is from 1 to {LONGEST_NAME} characters that can be printed, with no blank at its "
        "ends"
    )


@dataclass(frozen=True)
class Known:
    """What the database knows of one entry.

    :param name: of the entry.
    :param origin: the source that has made it: one that is not ``database`` has to go on having it.
    :param fields: what was edited.
    :param last_run_at: the nominal tick that the next one is counted from, in UTC: the last that
        was sent, or is over. ``None`` until a beat has looked at the entry, or it was edited.
    :param task_id: the id of the task that was sent last.
    :param sent_at: when that was; ``None`` before the first.
    :param seen_at: when a beat first looked at the entry.
    :param run_requested_at: since when somebody wants it to be run now.
    :param version: counts the edits.
    :param problem: why what was edited cannot be read.
    """

    name: str
    origin: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    last_run_at: datetime | None = None
    task_id: str | None = None
    sent_at: datetime | None = None
    seen_at: datetime | None = None
    run_requested_at: datetime | None = None
    version: int = 0
    problem: str | None = None

    @property
    def last_tick(self) -> datetime | None:
        """The tick that was sent last; ``None`` before the first.

        Later ones are over for another reason: they were missed, or edited away.
        """
        if self.sent_at is None:
            return None
        return min(self.sent_at, self.last_run_at or self.sent_at)


@dataclass(frozen=True)
class Entry:
    """One entry, merged from its sources.

    :param name: its name.
    :param task: the name of the task.
    :param schedule: Celery's schedule; ``None`` if it is broken.
    :param args: positional arguments of the task.
    :param kwargs: keyword arguments.
    :param options: of the call, as ``apply_async`` takes them.
    :param enabled: whether it is switched on.
    :param catch_up: what becomes of ticks that nobody was there for: ``skip`` or ``once``.
    :param overlap: ``skip`` does not send while the task of the last tick is unfinished.
    :param starts_at: there are no ticks before this time.
    :param expires: there are no ticks from this time on.
    :param description: for people.
    :param type: of the schedule, as the INI has it; ``python`` if no text can say it.
    :param text: the schedule as the INI has it.
    :param timezone: of a crontab or a time.
    :param relative: whether times are rounded to the period's unit.
    :param origins: field to ``code``, ``ini`` or ``database``.
    :param problem: why it is set aside, and does not tick.
    :param orphaned: whether it was edited in the database, and its source has it no more.
    """

    name: str
    task: str
    schedule: BaseSchedule | None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    enabled: bool = True
    catch_up: str = "skip"
    overlap: str = "allow"
    starts_at: datetime | None = None
    expires: datetime | None = None
    description: str | None = None
    type: str = ""
    text: str = ""
    timezone: str | None = None
    relative: bool = False
    origins: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None
    orphaned: bool = False

    @property
    def ticks(self) -> bool:
        """Whether it is sent at its times."""
        return self.enabled and not self.orphaned and self.problem is None

    @property
    def origin(self) -> str:
        """The source that has made it."""
        return min(self.origins.values(), key=SOURCES.index, default="database")

    @property
    def words(self) -> str:
        """The schedule in words that fit on one line."""
        return self.text if self.schedule is None else describe(self.schedule)

    def as_fields(self) -> dict[str, Any]:
        """Return the fields as JSON has them, without those that have their default."""
        needed, default = ("task", "type", "schedule"), Entry("", "", None).values
        return {
            name: value
            for name, value in self.values.items()
            if name in needed or value != default[name]
        }

    @property
    def values(self) -> dict[str, Any]:
        """All fields, as JSON has them."""
        return {
            "task": self.task,
            "type": self.type,
            "schedule": self.text,
            "timezone": self.timezone,
            "relative": self.relative,
            "args": list(self.args),
            "kwargs": dict(self.kwargs),
            "options": dict(self.options),
            "enabled": self.enabled,
            "catch_up": self.catch_up,
            "overlap": self.overlap,
            "starts_at": self.starts_at and self.starts_at.isoformat(),
            "expires": self.expires and self.expires.isoformat(),
            "description": self.description,
        }

    def for_celery(self) -> dict[str, Any]:
        """Return the entry as Celery's ``beat_schedule`` has it."""
        entry = {name: self.values[name] for name in ("task", "args", "kwargs", "options")}
        entry["schedule"] = self.schedule
        return {**entry, "relative": True} if self.relative else entry


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
        entry = _entry(name, sources, orphaned=orphaned)
        entries[name] = replace(entry, problem=broken) if broken else entry
    return entries


def _entry(name: str, sources: Mapping[str, Mapping[str, Any] | None], *, orphaned: bool) -> Entry:
    fields, origins = _overlaid(sources)
    typed: dict[str, Any] = {"task": "", "schedule": None}
    problems = _problems(fields, typed, in_python=origins.get("options") == "code")
    problem = "; ".join(problems) or None  # read to its end, it has typed all fields
    return Entry(name=name, origins=origins, orphaned=orphaned, problem=problem, **typed)


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
    """Yield what is wrong with fields, and put what is right into ``typed``.

    :param whole: whether it is an entry, and not a part of one.
    :param in_python: whether its options are written in code.
    """
    yield from (unknown_field(key) for key in fields if key not in FIELDS)
    for key, kind in ENTRY_KEYS.items():
        if key not in fields:
            continue
        try:
            value = kind.accept(fields[key])
            if key == "options":
                value = accept_options(value, in_python=in_python)
            typed[key] = tuple(value) if key == "args" else value
        except Exception as error:  # noqa: BLE001 - of this entry alone, whatever it is
            yield _refusal(key, fields[key], error, kind.expected)
    if whole and "task" not in fields:
        yield "has no task"
    if not whole and not {"type", "schedule"} <= fields.keys():
        return
    schedule, kind_of_schedule = fields.get("schedule"), fields.get("type")
    if schedule is None:
        yield "has no schedule"
        return
    try:
        typed.update(_timing(kind_of_schedule, schedule, typed))
    except Exception as error:  # noqa: BLE001 - likewise
        typed.update(type=str(kind_of_schedule or ""), text=_as_text(schedule))
        yield _refusal("schedule", schedule, error, "a schedule")


def unknown_field(name: str) -> str:
    """Return what is wrong with a field of this name, which is none of :data:`FIELDS`."""
    return f"has the unknown field {name}{_suggestion(nearest(name, FIELDS))}"


def _timing(kind: object, schedule: object, typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an entry that come of its schedule."""
    if kind is None and _is_of_python(schedule):
        parsed = _checked(schedule)
    else:
        parsed = _parsed(kind, schedule, typed)
    made = maybe_schedule(parsed, typed.get("relative", False))
    if kind is not None:
        return {"schedule": made, "text": _as_text(schedule), "type": kind}
    text = text_of_schedule(made)
    return {**text, "schedule": made, "text": text["schedule"]}


def _is_of_python(schedule: object) -> bool:
    """Tell whether it is a schedule that was made in Python, or a number of seconds."""
    made = isinstance(schedule, (BaseSchedule, timedelta, int, float))
    return made and not isinstance(schedule, bool)


def _checked(schedule: object) -> object:
    """Return a schedule that was made in Python, if its period is one.

    :raises Refused: if it is none: it would have no next tick, or go backwards.
    """
    if isinstance(schedule, (int, float)):
        return parse_schedule("number", schedule)
    every = getattr(schedule, "run_every", schedule)
    if isinstance(every, timedelta) and every <= timedelta(0):
        raise Refused("is no period: it must be longer than zero")
    return schedule


def _parsed(kind: object, schedule: object, typed: Mapping[str, Any]) -> object:
    if not isinstance(kind, str) or kind not in SCHEDULE_TYPES:
        types = ", ".join(SCHEDULE_TYPES)
        raise Refused(
            f"has the type {kind!r}, which is none of {types}", nearest(str(kind), SCHEDULE_TYPES)
        )
    for key, allowed in KEYS_OF_TYPES.items():
        if typed.get(key) and kind not in allowed:
            raise Refused(f"has the type {kind}, for which {key} has no meaning")
    return parse_schedule(kind, schedule, typed.get("timezone"))


def _as_text(schedule: object) -> str:
    return schedule if isinstance(schedule, str) else json.dumps(schedule, default=str)


def _refusal(key: str, value: object, error: Exception, expected: str) -> str:
    """Return what is wrong with a field in words, whatever its conversion has raised."""
    # The names of a task's parameters, by which its arguments are masked, are not known here.
    value = MASK if key in ("args", "kwargs") else masked(key, value)
    if not isinstance(error, Refused):
        return f"{key} = {value!r} is not {expected} ({type(error).__name__}: {error})"
    reason = str(error) or f"is not {expected}"
    return f"{key} = {value!r} {reason}{_suggestion(error.close)}"


def _suggestion(close: str | None) -> str:
    return f"; did you mean {close}?" if close else ""
