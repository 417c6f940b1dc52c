"""Layers of sections to typed settings: everything is read, everything wrong is collected.

Nothing is decided by the order of reading: the nearer file beats the one that it includes, and the
same thing twice in one file is a fault that names both places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from typing import Any, NamedTuple

from kombu import Queue

from ws_celery.converters import Refused, nearest
from ws_celery.schedules import KEYS_OF_TYPES, SCHEDULE_TYPES, parse_schedule
from ws_celery.settings import celery_kinds, kinds
from ws_celery.settings.kinds import Kind
from ws_celery.settings.options import (
    ANNOTATION_KEYS,
    CALL_KEYS,
    ENTRY_KEYS,
    OPTIONS,
    QUEUE_KEYS,
    REMOVED,
    ROUTE_KEYS,
    accept_options,
    find_option,
    make_queue,
    nearest_option,
)
from ws_celery.settings.reader import SECTIONS, Faults, Layer, Place, Renamed, Value, right_spelling


@dataclass(frozen=True)
class Setting:
    """One thing that was read.

    :param category: ``option``, ``route``, ``queue``, ``annotation`` or ``entry``.
    :param name: the option, with a dot and the key where it is a part of one; or the task, queue or
        entry.
    :param value: the typed value; of an entry its fields, the schedule as it is written.
    :param place: where it is written.
    """

    category: str
    name: str
    value: Any
    place: Place

    @property
    def type(self) -> str:
        """Name of the value's type, for people; of an entry, of its schedule."""
        if self.category == "entry":
            return str(self.value.get("type") or "none")
        return "none" if self.value is None else type(self.value).__name__

    def belongs_to(self, option: str) -> bool:
        """Tell whether this is an option, or a key of its mapping."""
        return self.category == "option" and self.name.partition(".")[0] == option


@dataclass
class Sections:
    """What the sections say.

    :param settings: Celery's settings by today's names, typed.
    :param rows: each thing that was read, with its place.
    :param renamed: old spellings that were understood.
    :param call_options: options of calls by task or glob, which Celery does not take from a route.
    :param entries: the schedule's entries by name, as written; also those that are switched off.
    :param entries_of_code: those that ``beat_schedule`` has in Python.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[Setting] = field(default_factory=list)
    renamed: list[Renamed] = field(default_factory=list)
    call_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    entries_of_code: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_sections(layers: list[Layer], faults: Faults) -> Sections:
    """Read the sections of layers.

    :param layers: what to read, the nearest first.
    :param faults: where to add what is wrong.
    """
    reader = _Reader(layers, faults)
    reader.read()
    return reader.result


# --- Sections --------------------------------------------------------------------------------


_EXPECTED = "one of [celery], " + ", ".join(f"[{kind}:{name}]" for kind, name in SECTIONS.items())


@dataclass
class _Written:
    """What is written of one option: as a whole, and by keys, with dots between their levels."""

    whole: Value | None = None
    keys: dict[str, Value] = field(default_factory=dict)


class _Block(NamedTuple):
    """The keys of one named section, or of what an option has under the same name."""

    place: Place
    values: dict[str, Value]


class _Reader:
    """Sorts what the layers contain, the nearest last, and then reads it."""

    def __init__(self, layers: list[Layer], faults: Faults) -> None:
        self.result = Sections()
        self._faults = faults
        self._options: dict[str, _Written] = {}
        self._blocks: dict[str, dict[str, _Block]] = {kind: {} for kind in SECTIONS}
        for layer in reversed(layers):
            #: What this layer sets: the option and its key, or the section of a mapping.
            self._set: dict[str, dict[str | None, Place]] = {}
            self._headings: dict[str, Place] = {}
            for section, values in layer.sections.items():
                self._section(layer.heading(section), values)

    def read(self) -> None:
        """Fill in the result."""
        for name, written in self._options.items():
            self._option(name, OPTIONS[name], written)
        self._queues()
        self._of_tasks("task_annotations", "celeryannotate", "annotation")
        self._of_tasks("task_routes", "celeryroute", "route")
        self._entries()

    # --- Sorting ---------------------------------------------------------------------------

    def _section(self, heading: Place, values: dict[str, Value]) -> None:
        kind, _, name = heading.section.partition(":")
        if heading.section == "celery":
            for key, value in values.items():
                self._sort(key, value)
        elif meant := right_spelling(heading.section):
            problem = "this section is not known"
            self._faults.at(heading, problem, expected=_EXPECTED, close=meant)
        elif kind in SECTIONS and not name:
            self._faults.at(
                heading, "the section has no name", expected=f"[{kind}:{SECTIONS[kind]}]"
            )
        elif kind == "celery":
            self._sort_keys(name, heading, values)
        elif kind in SECTIONS:
            below = self._blocks[kind].get(name)
            overlaid = _overlaid(below.values, values) if below else values
            self._blocks[kind][name] = _Block(heading, overlaid)

    def _sort(self, key: str, value: Value) -> None:
        written, dot, inner = key.partition(".")
        name = self._name(written, value)
        if name is None:
            return
        if dot and OPTIONS[name].inside is None:
            problem = f"{name} is no mapping; it has no keys"
            self._faults.at(value.place, problem, value=value.text)
            return
        self._add(name, inner if dot else None, value)

    def _sort_keys(self, written: str, heading: Place, values: dict[str, Value]) -> None:
        name = self._name(written, Value(None, heading))
        if name is None:
            return
        if OPTIONS[name].inside is None:
            self._faults.at(heading, f"{name} is no mapping; set it in [celery]")
            return
        first = self._headings.setdefault(name, heading)
        if first is not heading:
            problem = f"this section is already there, as [{first.section}] at {first}"
            self._faults.at(heading, problem)
            return
        for key, value in values.items():
            self._add(name, key, value)

    def _name(self, written: str, value: Value) -> str | None:
        """Return today's name of an option, if it is one."""
        name = find_option(written)
        if name and name != written:
            self.result.renamed.append(Renamed(written, name, value.place))
        elif instead := REMOVED.get(written.upper()):
            problem = f"Celery has no such option any more: {instead}"
            self._faults.at(value.place, problem, value=value.text)
        elif not name:
            close = nearest_option(written)
            self._faults.at(value.place, "is no option of Celery", value=value.text, close=close)
        return name

    def _add(self, name: str, key: str | None, value: Value) -> None:
        places = self._set.setdefault(name, {})
        for other, first in places.items():
            if other == key or None in (other, key):
                self._faults.at(
                    value.place,
                    f"sets {name}, which [{first.section}] {first.key} at {first} sets as well; "
                    "keep one of them",
                )
                return
        places[key] = value.place
        if key is None:
            self._options[name] = _Written(value)
        else:
            self._options.setdefault(name, _Written()).keys[key] = value

    # --- [celery] and [celery:OPTION] ------------------------------------------------------

    def _option(self, name: str, kind: Kind, written: _Written) -> None:
        before = len(self._faults)
        value: Any = {}
        if written.whole:
            with self._faults.catching(written.whole, kind.expected):
                value = written.whole.typed(kind)
        if written.keys:
            value = dict(value) if isinstance(value, Mapping) else {}
        for key, each in written.keys.items():
            with self._faults.catching(each):
                self._key(kind, key, each, value)
        if len(self._faults) > before:
            return
        self.result.settings[name] = value
        if written.whole:
            self._row("option", name, value, written.whole.place)
        for key, each in written.keys.items():
            self._row("option", f"{name}.{key}", reduce(getitem, key.split("."), value), each.place)

    def _key(self, kind: Kind, path: str, value: Value, mapping: dict[str, Any]) -> None:
        """Put the value of a key into a mapping, or into one inside of it."""
        *outer, last = path.split(".")
        if not all((*outer, last)):
            raise Refused("has an empty key")
        for name in outer:
            kind, inner = _kind_inside(kind, name), mapping.get(name, {})
            if not isinstance(inner, dict):
                raise Refused(f"{name} has a value, and cannot have keys as well")
            mapping[name] = inner = dict(inner)  # may be of a module
            mapping = inner
        if isinstance(mapping.get(last), dict):
            raise Refused(f"{last} has keys, and cannot have a value as well")
        kind = _kind_inside(kind, last)
        with self._faults.catching(value, None if kind is kinds.anything else kind.expected):
            mapping[last] = value.typed(kind)

    # --- [celeryqueue:NAME] ----------------------------------------------------------------

    def _queues(self) -> None:
        queues: list[Queue] = list(self.result.settings.get("task_queues") or [])
        for name, block in self._blocks["celeryqueue"].items():
            keys = self._faults.typed(block.values, QUEUE_KEYS)
            if any(queue.name == name for queue in queues):
                self._double(block, name, "task_queues")
                continue
            queues.append(make_queue(name, keys))
            self._row("queue", name, queues[-1], block.place)
        if queues:
            self.result.settings["task_queues"] = queues

    # --- [celeryannotate:TASK] and [celeryroute:TASK] --------------------------------------

    def _annotation(self, task: str, block: _Block) -> dict[str, Any]:
        if "*" in task and task != "*":
            problem = "a glob does not work here"
            self._faults.at(block.place, problem, expected="a task's name, or * for all tasks")
        # Python can give methods as well.
        methods = {key: each.text for key, each in block.values.items() if callable(each.text)}
        plain = {key: each for key, each in block.values.items() if key not in methods}
        return {**self._faults.typed(plain, ANNOTATION_KEYS), **methods}

    def _route(self, task: str, block: _Block) -> dict[str, Any]:
        """Return what Celery takes from a route; keep the options of calls."""
        if "*" not in task and set("?[]") & set(task):
            problem = "a glob without * is a task's name to Celery"
            self._faults.at(block.place, problem, expected="a glob with *, or a task's name")
        keys = self._faults.typed(block.values, ROUTE_KEYS)
        call = {key: value for key, value in keys.items() if key in CALL_KEYS}
        if call:
            self.result.call_options.setdefault(task, call)
        return {key: value for key, value in keys.items() if key not in call}

    def _of_tasks(self, option: str, kind: str, category: str) -> None:
        """Read the sections of routes or of annotations, and what the option has besides."""
        known, call_options = ANNOTATION_KEYS, {}
        if category == "route":
            known, call_options = ROUTE_KEYS, self.result.call_options
        mine = {}
        for task, block in self._blocks[kind].items():
            if not block.values:
                expected = f"one of {', '.join(known)}"
                self._faults.at(block.place, "the section is empty", expected=expected)
            mine[task] = self._keys(option, task, block)
            keys = {**mine[task], **call_options.get(task, {})}
            self._row(category, task, keys, block.place)
        self._combine(option, kind, mine)

    def _keys(self, option: str, task: str, block: _Block) -> dict[str, Any]:
        read = self._route if option == "task_routes" else self._annotation
        return read(task, block)

    def _combine(self, option: str, kind: str, mine: dict[str, dict[str, Any]]) -> None:
        """Let what stands in sections come before what the option has in one piece."""
        mine = {task: keys for task, keys in mine.items() if keys}
        settings = self.result.settings
        given = settings.get(option)
        if given is None:
            settings.update({option: mine} if mine else {})
            return
        if isinstance(given, Mapping):
            for task in self._blocks[kind].keys() & given.keys():
                self._double(self._blocks[kind][task], task, option)
        found = self._given(option, given)
        if isinstance(found, dict):
            found = {**mine, **found}
        elif mine:
            found = [mine, *(found if isinstance(found, list) else [found])]
        settings[option] = found

    def _given(self, option: str, given: object) -> Any:
        """Read what an option has in one piece as if it stood in sections."""
        if isinstance(given, (list, tuple)):
            return [self._item(option, each) for each in given]
        if isinstance(given, Mapping):
            found = {task: self._given_keys(option, task, keys) for task, keys in given.items()}
            return {task: keys for task, keys in found.items() if keys}
        if given is None or isinstance(given, (str, int, float)):
            self._faults.at(self._place(option), "has an item that is neither an object nor code")
        return given

    def _item(self, option: str, given: object) -> Any:
        if isinstance(given, str):
            value, expected = Value(given, self._place(option)), OPTIONS[option].expected
            with self._faults.catching(value, expected):
                return celery_kinds.resolve(given)
        if not isinstance(given, (list, tuple)):
            return self._given(option, given)
        if option == "task_routes" and len(given) == 2 and isinstance(given[0], str):
            return given[0], self._given_keys(option, *given)
        problem = "has an item that is no pair of a pattern and a queue"
        self._faults.at(self._place(option), problem)
        return None

    def _given_keys(self, option: str, task: str, keys: object) -> object:
        place, is_route = self._place(option).key_beside(str(task)), option == "task_routes"
        if isinstance(keys, Mapping) and (keys or not is_route):
            return self._keys(option, task, _literal(place, keys))
        if is_route and isinstance(keys, str) and keys:
            return keys
        problem = "is neither a queue's name nor an object" if is_route else "is no object"
        self._faults.at(place, problem)
        return None

    # --- [celerybeat:NAME] -----------------------------------------------------------------

    def _entries(self) -> None:
        given = self.result.settings.pop("beat_schedule", None)
        schedule = self._given_entries(given) if given else {}
        for name, block in self._blocks["celerybeat"].items():
            if entry := _read_entry(block, self._faults):
                self.result.entries[name] = entry.fields
                self._row("entry", name, entry.fields, block.place)
                schedule.update({name: entry.for_celery} if entry.for_celery else {})
        if schedule or given is not None:
            self.result.settings["beat_schedule"] = schedule

    def _given_entries(self, given: Mapping[str, object]) -> dict[str, dict[str, Any]]:
        place, blocks, schedule = self._place("beat_schedule"), self._blocks["celerybeat"], {}
        in_python = place.section in ("code", "celeryconfig")
        entries = self.result.entries_of_code if in_python else self.result.entries
        for name, keys in given.items():
            where = place.key_beside(name)
            if name in blocks and not in_python:
                self._double(blocks[name], name, "beat_schedule")
            elif not isinstance(keys, Mapping):
                self._faults.at(where, "is no object", expected='{"task": ..., "schedule": ...}')
            elif entry := _read_entry(_literal(where, keys), self._faults, in_python=in_python):
                entries[name] = entry.fields
                schedule.update({name: entry.for_celery} if entry.for_celery else {})
        return schedule

    # --- What they share -------------------------------------------------------------------

    def _row(self, category: str, name: str, value: object, place: Place) -> None:
        self.result.rows.append(Setting(category, name, value, place))

    def _place(self, option: str) -> Place:
        return next(row.place for row in self.result.rows if row.belongs_to(option))

    def _double(self, block: _Block, name: str, option: str) -> None:
        place = self._place(option)
        self._faults.at(
            block.place,
            f"[{place.section}] {place.key} at {place} has {name!r} as well; keep one of them",
        )


def _overlaid(below: dict[str, Value], values: dict[str, Value]) -> dict[str, Value]:
    """Return the keys of a section as they count, over those of a file that is included."""
    types = {each["type"].text for each in (below, values) if "type" in each}
    # What belongs to another type of schedule means nothing to this one.
    gone = ("schedule", *KEYS_OF_TYPES) if len(types) > 1 else ()
    return {**{key: each for key, each in below.items() if key not in gone}, **values}


def _literal(place: Place, keys: Mapping[Any, object]) -> _Block:
    """Return what Python or JSON has as if it were a section."""
    names = {str(key): each for key, each in keys.items()}
    return _Block(
        place, {key: Value(each, place.key_beside(key), True) for key, each in names.items()}
    )


def _kind_inside(kind: Kind, key: str) -> Kind:
    if kind.inside is None:
        raise Refused(f"has no keys inside; expected {kind.expected}")
    return kind.inside(key)


# --- Entries of the schedule -----------------------------------------------------------------


#: Keys that are read together.
_TIMING = ("type", "schedule")


class _Entry(NamedTuple):
    """An entry as it was read.

    :param fields: what is written there, typed; ``schedule`` as it is written.
    :param for_celery: the entry as Celery's ``beat_schedule`` has it; ``None`` if it is switched
        off, or changes an entry that code declares under its name.
    """

    fields: dict[str, Any]
    for_celery: dict[str, Any] | None


def _read_entry(block: _Block, faults: Faults, *, in_python: bool = False) -> _Entry | None:
    """Read an entry; ``None`` if something is wrong.

    :param in_python: whether it is written in code.
    """
    before, (place, values) = len(faults), block
    plain = {key: value for key, value in values.items() if key not in _TIMING}
    fields = faults.typed(plain, ENTRY_KEYS, also=_TIMING)
    written = fields | {key: values[key].text for key in _TIMING if key in values}
    schedule = None
    if fields.get("enabled", True):
        for key in ("task", "schedule") if "task" in values or not values else ():
            if key not in values:
                problem = "is missing; an entry needs task, type and schedule"
                faults.at(place.key_beside(key), problem)
        schedule = _schedule(block, fields, faults) if "schedule" in values else None
        if "options" in fields:
            with faults.catching(values["options"]):
                written["options"] = accept_options(fields["options"], in_python=in_python)
    if len(faults) > before:
        return None
    if "task" not in fields or not fields.get("enabled", True):
        return _Entry(written, None)
    entry: dict[str, Any] = {"task": fields["task"], "schedule": schedule}
    entry |= {"args": [], "kwargs": {}, "options": {}}
    entry |= {key: written[key] for key in (*entry, "relative") if fields.get(key)}
    return _Entry(written, entry)


def _schedule(block: _Block, fields: Mapping[str, Any], faults: Faults) -> Any:
    place, values = block
    schedule, kind = values["schedule"], values.get("type")
    text, types = schedule.text, f"one of {', '.join(SCHEDULE_TYPES)}"
    if kind is None and not isinstance(text, (str, dict)):
        if not isinstance(text, (int, float)) or isinstance(text, bool):
            return text  # a schedule that was made in Python
        kind = Value("number", schedule.place)
    if kind is None:
        if "task" in values:
            faults.at(place.key_beside("type"), "is missing", expected=types)
        return None
    name = str(kind.text).strip()
    if name not in SCHEDULE_TYPES:
        close, problem = nearest(name, SCHEDULE_TYPES), "is no type of schedule"
        faults.at(kind.place, problem, value=name, expected=types, close=close)
        return None
    for key, meant in KEYS_OF_TYPES.items():
        if fields.get(key) and name not in meant:
            problem = f"has no meaning for the type {name}, only for {', '.join(meant)}"
            faults.at(values[key].place, problem)
    with faults.catching(schedule):
        schedule.check()
        return parse_schedule(name, text, fields.get("timezone"))
    return None
