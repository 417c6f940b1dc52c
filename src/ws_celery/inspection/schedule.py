"""The schedule as people see it: its entries, what overrides what, what comes.

Without a schedule in the database, what code and INI say is there, and nothing of what ran.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta, timezone
from itertools import islice
from typing import Any

from ws_celery.app import PyramidCelery, get_celery_app
from ws_celery.beat.entries import FIELDS, Entry, Known
from ws_celery.beat.sources import entries_of, entry_of, fields_by_source
from ws_celery.beat.ticks import ticks_between
from ws_celery.exceptions import NotFound, NotIncluded
from ws_celery.inspection.messages import Record, Source
from ws_celery.masking import masked_text
from ws_celery.shown_arguments import shown_arguments, shown_value

__all__ = (
    "ComingTick",
    "ScheduleEntry",
    "coming_ticks",
    "create_schedule",
    "look",
    "schedule_entries",
    "schedule_entry",
)

_FOREVER = datetime.max.replace(tzinfo=timezone.utc)


@dataclass(frozen=True)
class ScheduleEntry(Record):
    """An entry of the schedule, and where it stands.

    :param name: its name.
    :param task: the name of its task.
    :param schedule: when it runs, in words.
    :param state: ``on``; ``off``; ``ended``, if there is no tick to come; ``set aside``, with a
        problem; ``orphaned``, if it was edited in the database and code and INI have it no more.
    :param problem: why it is set aside.
    :param origin: which source has made it: ``code``, ``ini`` or ``database``.
    :param origins: which source each of its fields is from.
    :param overridden: what other sources say of a field, which does not count: field to source to
        value.
    :param last_tick: the tick that was sent last, as all times here in UTC; ``None`` if there was
        none, or nobody keeps it.
    :param next_tick: the tick that comes next.
    :param run_requested_at: since when somebody wants it to be run now.
    :param task_id: the id of the task that was sent last.
    :param fields: all its fields, as the INI has them, secrets masked.
    """

    name: str
    task: str
    schedule: str
    state: str
    problem: str | None
    origin: str
    origins: Mapping[str, str]
    overridden: Mapping[str, Mapping[str, Any]]
    last_tick: datetime | None
    next_tick: datetime | None
    run_requested_at: datetime | None
    task_id: str | None
    fields: Mapping[str, Any] = field(repr=False)

    @property
    def edited(self) -> list[str]:
        """The fields that the database says of an entry that another source has made."""
        if self.origin == "database":
            return []
        return [name for name in FIELDS if self.origins.get(name) == "database"]

    def as_dict(self) -> dict[str, Any]:
        """Return the entry as JSON has it."""
        return _as_json({**asdict(self), "edited": self.edited})


@dataclass(frozen=True)
class ComingTick(Record):
    """A tick to come.

    :param time: when, in UTC.
    :param name: of the entry.
    :param task: the name of its task.
    """

    time: datetime
    name: str
    task: str


def create_schedule(source: Source) -> bool:
    """Create the table of the schedule if it is missing.

    :param source: a registry, or what has one: a request, a Celery app. So it is for all of these
        functions.
    :return: whether it was missing.
    :raises NotIncluded: if the application keeps no schedule in its database.
    :raises TableError: if there is a table of its name with other columns.
    """
    app = get_celery_app(source)
    if app.schedule is None:
        raise NotIncluded("schedule")
    return bool(app.schedule.create_table())


def schedule_entries(source: Source) -> list[ScheduleEntry]:
    """Return all entries by name: also those that are off, set aside or orphaned."""
    app, known, now = look(source)
    entries, sources = entries_of(app, known), fields_by_source(app)
    return [_shown(app, entries[name], known.get(name), now, sources) for name in sorted(entries)]


def schedule_entry(source: Source, name: str) -> ScheduleEntry:
    """Return one entry.

    :raises NotFound: if there is none of this name.
    """
    app, known, now = look(source)
    entry = entry_of(app, name, known.get(name))
    if entry is None:
        raise NotFound("entry", name)
    return _shown(app, entry, known.get(name), now, fields_by_source(app))


def coming_ticks(
    source: Source, within: timedelta, names: Iterable[str] = (), limit: int | None = 1000
) -> list[ComingTick]:
    """Return the ticks to come, the earliest first.

    Without a schedule in the database, those of a period are counted from now.

    :param within: how far to look ahead.
    :param names: of entries; of all that are on if there are none.
    :param limit: how many at most.
    :raises NotFound: if there is no entry of a name.
    """
    app, known, now = look(source)
    entries = entries_of(app, known)
    wanted = list(names) or list(entries)
    for name in wanted:
        if name not in entries:
            raise NotFound("entry", name)
    ticks = (_coming(entries[name], known.get(name), now, now + within) for name in wanted)
    return list(islice(heapq.merge(*ticks, key=lambda tick: (tick.time, tick.name)), limit))


def _coming(
    entry: Entry, known: Known | None, now: datetime, until: datetime
) -> Iterator[ComingTick]:
    if entry.ticks:
        last = known.last_run_at if known else None
        for time in ticks_between(entry, last, now, until):
            yield ComingTick(time, entry.name, entry.task)


def look(source: Source) -> tuple[PyramidCelery, dict[str, Known], datetime]:
    """Return the app, what the database knows of its schedule, and the time by its clock."""
    app = get_celery_app(source)
    if app.schedule is None:
        return app, {}, datetime.now(timezone.utc)
    with app.schedule.begin() as connection:
        return app, app.schedule.load(connection), app.schedule.now(connection)


def _shown(
    app: PyramidCelery,
    entry: Entry,
    known: Known | None,
    now: datetime,
    sources: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> ScheduleEntry:
    known, coming = known or Known(entry.name, entry.origin), None
    if entry.ticks:
        try:
            coming = next(ticks_between(entry, known.last_run_at, now, _FOREVER), None)
        except Exception as error:  # noqa: BLE001 - one schedule must not hide the others
            entry = replace(entry, problem=f"the schedule cannot tell its next tick: {error}")
    return ScheduleEntry(
        name=entry.name,
        task=entry.task,
        schedule=entry.words,
        state=_state(entry, coming),
        problem=entry.problem and masked_text(entry.problem),
        origin=known.origin if entry.orphaned else entry.origin,
        origins=dict(entry.origins),
        overridden=_overridden(app, entry, sources),
        last_tick=known.last_tick,
        next_tick=coming,
        run_requested_at=known.run_requested_at,
        task_id=known.task_id,
        fields=_masked(app, entry.task, entry.as_fields()),
    )


def _state(entry: Entry, coming: datetime | None) -> str:
    if entry.orphaned:
        return "orphaned"
    if entry.problem is not None:
        return "set aside"
    if not entry.enabled:
        return "off"
    return "ended" if coming is None else "on"


def _overridden(
    app: PyramidCelery, entry: Entry, sources: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for source, entries in sources.items():
        for name, value in _masked(app, entry.task, entries.get(entry.name, {})).items():
            if entry.origins.get(name) != source:
                found.setdefault(name, {})[source] = _as_json(value)
    return found


def _masked(app: PyramidCelery, task: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    shown = dict(fields)
    if call := {"args", "kwargs"} & fields.keys():
        arguments = shown_arguments(app, task, fields.get("args"), fields.get("kwargs"))
        shown.update({name: arguments[name] for name in call})
    if "options" in fields:
        shown["options"] = shown_value(app, "", fields["options"])
    if fields.get("description"):
        shown["description"] = masked_text(str(fields["description"]))
    return shown


def _as_json(value: object) -> Any:
    """Return a value as JSON has it, times in UTC."""
    if isinstance(value, Mapping):
        return {key: _as_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(inner) for inner in value]
    if isinstance(value, datetime):
        return value.astimezone(timezone.utc).isoformat()
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
