"""Layers of sections to typed settings: everything is read, everything wrong is collected.

Nothing is decided by the order of reading: the nearer file beats the one that it includes, and the
same thing twice in one file is a fault that names both places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

from celery import Celery, Task
from kombu import Exchange, Queue

from ws_celery.converters import Refused, nearest
from ws_celery.schedules import KEYS_OF_TYPES, SCHEDULE_TYPES, parse_schedule
from ws_celery.settings.gathering import Block, Found, Gathering
from ws_celery.settings.keys import (
    ANNOTATION_KEYS,
    CALL_KEYS,
    ENTRY_KEYS,
    QUEUE_KEYS,
    ROUTE_KEYS,
    accept_keys,
)
from ws_celery.settings.kinds import ANYTHING, OF_ONE_CALL, Faults, Kind, Place, Value
from ws_celery.settings.options import OPTIONS, Option

if TYPE_CHECKING:
    from ws_celery.settings.reader import Layer

__all__ = (
    "ReadEntry",
    "Sections",
    "Setting",
    "accept_options",
    "given_queues",
    "make_queue",
    "read_entry",
)

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


def given_queues(given: Any) -> list[Queue]:
    """Return the queues of ``task_queues``.

    :raises Refused: if something there is no queue, or is there twice.
    """
    if isinstance(given, Mapping):
        given = [{"name": name, **_mapping(options)} for name, options in given.items()]
    queues = [_given_queue(each) for each in given]
    names = [queue.name for queue in queues]
    if len(set(names)) < len(names):
        raise Refused("has a queue twice")
    return queues


def _mapping(options: Any) -> Mapping[str, Any]:
    if not isinstance(options, Mapping):
        raise Refused("has a queue whose options are no object")
    return options


def _given_queue(given: Any) -> Queue:
    if isinstance(given, Queue):
        return given
    if isinstance(given, str) and given:
        return make_queue(given, {})
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise Refused("has an item that is neither a queue's name nor an object with one")
    options = {key: value for key, value in given.items() if key != "name"}
    return make_queue(given["name"], accept_keys(options, QUEUE_KEYS))


def make_queue(name: str, keys: Mapping[str, Any]) -> Queue:
    """Return a queue; where exchange and routing key are not given, they are the queue's own.

    Celery's own default would bind it to the default exchange with the default routing key: it
    would take part of what is meant for the default queue.
    """
    options = dict(keys)
    exchange = Exchange(
        options.pop("exchange", name),
        type=options.pop("type", "direct"),
        durable=options.get("durable", True),
    )
    if "priority" in options:
        options["max_priority"] = options.pop("priority")
    return Queue(name, exchange, options.pop("routing_key", name), **options)


#: Reads the keys of one task's route or annotation.
_Read = Callable[[str, Block], dict[str, Any]]


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


class Sections:
    """Reads layers, the nearest first; its attributes are the result.

    ``settings`` are Celery's, typed; ``rows`` tell what was read and where; ``renamed`` are old
    spellings; ``call_options`` are options of calls, by task or glob, that Celery does not take
    from a route; ``entries`` are the schedule's, those that are switched off included, and
    ``entries_of_code`` those of them that stand in Python.

    :param layers: what to read.
    :param faults: where to add what is wrong.
    """

    def __init__(self, layers: list[Layer], faults: Faults) -> None:
        self.settings: dict[str, Any] = {}
        self.rows: list[Setting] = []
        self.call_options: dict[str, dict[str, Any]] = {}
        self.entries: dict[str, dict[str, Any]] = {}
        self.entries_of_code: dict[str, dict[str, Any]] = {}
        self._faults = faults
        gathering = Gathering(faults)
        gathering.gather(layers)
        self.renamed = gathering.renamed
        for name, found in gathering.options.items():
            self._option(OPTIONS[name], found)
        self._queues(gathering.blocks["celeryqueue"])
        self._annotations(gathering.blocks["celeryannotate"])
        self._routes(gathering.blocks["celeryroute"])
        self._entries(gathering.blocks["celerybeat"])

    # --- [celery] and [celery:OPTION] ------------------------------------------------------

    def _option(self, option: Option, all_found: list[Found]) -> None:
        whole = next((found for found in all_found if found.key is None), None)
        # The keys of a file beat those of a mapping that stands in a file which it includes.
        keys = [
            found
            for found in all_found
            if found.key is not None and (whole is None or found.layer < whole.layer)
        ]
        before = len(self._faults)
        value: Any = {}
        if whole:
            with self._faults.catching(whole.value, option.expected):
                whole.value.check(option.kind)
                value = option.accept(whole.value.text)
        if keys:
            value = self._with_keys(option, value, keys)
        if len(self._faults) > before:
            return
        self.settings[option.name] = value
        if whole:
            self.rows.append(Setting("option", option.name, value, whole.value.place))
        for found in keys:
            name = f"{option.name}.{found.key}"
            self.rows.append(Setting("option", name, _at(value, found.key), found.value.place))

    def _with_keys(self, option: Option, value: Any, keys: list[Found]) -> Any:
        mapping = dict(value) if isinstance(value, Mapping) else {}
        # The nearest last, so that it has the last word.
        for found in sorted(keys, key=lambda each: -each.layer):
            with self._faults.catching(found.value):
                self._key(option.kind, found, mapping)
        return mapping

    def _key(self, kind: Kind, found: Found, mapping: dict[str, Any]) -> None:
        *path, last = str(found.key).split(".")
        if not all((*path, last)):
            raise Refused("has an empty key")
        for name in path:
            kind, inner = kind.inside(name), mapping.get(name, {})
            if not isinstance(inner, dict):
                raise Refused(f"{name} has a value, and cannot have keys as well")
            mapping[name] = inner = dict(inner)  # may be of a module
            mapping = inner
        if isinstance(mapping.get(last), dict):
            raise Refused(f"{last} has keys, and cannot have a value as well")
        kind = kind.inside(last)
        with self._faults.catching(found.value, None if kind is ANYTHING else kind.expected):
            mapping[last] = found.value.typed(kind)

    # --- [celeryqueue:NAME] ----------------------------------------------------------------

    def _queues(self, blocks: Mapping[str, Block]) -> None:
        queues: list[Queue] = []
        given = self.settings.get("task_queues")
        if given is not None:
            place = self._place("task_queues")
            with self._faults.catching(Value(None, place)):
                queues += given_queues(given)
                self._replace("task_queues", queues[:])
        for name, block in blocks.items():
            keys = self._faults.typed(block.values, QUEUE_KEYS)
            if any(queue.name == name for queue in queues):
                self._double(block, name, "task_queues")
                continue
            queues.append(make_queue(name, keys))
            self.rows.append(Setting("queue", name, queues[-1], block.place))
        if queues:
            self.settings["task_queues"] = queues

    # --- [celeryannotate:TASK] -------------------------------------------------------------

    def _annotations(self, blocks: Mapping[str, Block]) -> None:
        mine = {}
        for task, block in blocks.items():
            self._not_empty(block, ANNOTATION_KEYS)
            mine[task] = self._annotation(task, block)
            self.rows.append(Setting("annotation", task, mine[task], block.place))
        self._combine("task_annotations", mine, blocks, self._annotation)

    def _annotation(self, task: str, block: Block) -> dict[str, Any]:
        if "*" in task and task != "*":
            problem = "a glob does not work here"
            self._faults.at(block.place, problem, expected="a task's name, or * for all tasks")
        # Python can give methods as well.
        methods = {key: each.text for key, each in block.values.items() if callable(each.text)}
        plain = {key: each for key, each in block.values.items() if key not in methods}
        return {**self._faults.typed(plain, ANNOTATION_KEYS), **methods}

    # --- [celeryroute:TASK] ----------------------------------------------------------------

    def _routes(self, blocks: Mapping[str, Block]) -> None:
        mine = {}
        for task, block in blocks.items():
            self._not_empty(block, ROUTE_KEYS)
            mine[task] = self._route(task, block)
            keys = {**mine[task], **self.call_options.get(task, {})}
            self.rows.append(Setting("route", task, keys, block.place))
        mine = {task: route for task, route in mine.items() if route}
        self._combine("task_routes", mine, blocks, self._route)

    def _route(self, task: str, block: Block) -> dict[str, Any]:
        if "*" not in task and set("?[]") & set(task):
            self._faults.at(
                block.place,
                "a glob without * is a task's name to Celery",
                expected="a glob with *, or a task's name",
            )
        keys = self._faults.typed(block.values, ROUTE_KEYS)
        call = {key: value for key, value in keys.items() if key in CALL_KEYS}
        if call:
            self.call_options.setdefault(task, call)
        return {key: value for key, value in keys.items() if key not in call}

    # --- Both ------------------------------------------------------------------------------

    def _combine(
        self, name: str, mine: dict[str, Any], blocks: Mapping[str, Block], read: _Read
    ) -> None:
        given = self.settings.get(name)
        if isinstance(given, dict):
            for task in blocks.keys() & given.keys():
                self._double(blocks[task], task, name)
        if given is not None:
            self.settings[name] = given = self._given(given, self._place(name), read)
        if not mine:
            return
        if isinstance(given, dict):
            self.settings[name] = {**mine, **given}
        elif given is None:
            self.settings[name] = mine
        else:
            self.settings[name] = [mine, *(given if isinstance(given, list) else [given])]

    def _given(self, given: Any, place: Place, read: _Read) -> Any:
        """Read what an option in one piece has as if it stood in sections."""
        if isinstance(given, list):
            return [self._given(each, place, read) for each in given]
        if isinstance(given, tuple):  # a pattern and a route
            task, keys = given
            return task, self._given({task: keys}, place, read).get(task, {})
        if not isinstance(given, dict):
            return given
        found = {}
        for task, keys in given.items():
            where = place.key_beside(str(task))
            if isinstance(keys, dict):
                values = {
                    str(key): Value(value, where.key_beside(str(key)), literal=True)
                    for key, value in keys.items()
                }
                found[task] = read(task, Block(where, [values]))
            else:
                found[task] = keys
        return {task: keys for task, keys in found.items() if keys}

    # --- [celerybeat:NAME] -----------------------------------------------------------------

    def _entries(self, blocks: Mapping[str, Block]) -> None:
        given = self.settings.pop("beat_schedule", None)
        entries = self._given_entries(given, blocks) if given else {}
        for name, block in blocks.items():
            read = read_entry(block.values, block.place, self._faults)
            if read is None:
                continue
            self.entries[name] = read.fields
            self.rows.append(Setting("entry", name, read.fields, block.place))
            if read.for_celery is not None:
                entries[name] = read.for_celery
        if entries or given is not None:
            self.settings["beat_schedule"] = entries

    def _given_entries(
        self, given: Mapping[str, Any], blocks: Mapping[str, Block]
    ) -> dict[str, Any]:
        place, entries = self._place("beat_schedule"), {}
        in_python = place.section in ("code", "celeryconfig")
        found = self.entries_of_code if in_python else self.entries
        for name, keys in given.items():
            where = place.key_beside(name)
            if name in blocks and not in_python:
                self._double(blocks[name], name, "beat_schedule")
            elif not isinstance(keys, Mapping):
                self._faults.at(where, "is no object", expected='{"task": ..., "schedule": ...}')
            else:
                values = {str(key): Value(value, where, True) for key, value in keys.items()}
                read = read_entry(values, where, self._faults, in_python=in_python)
                if read is not None:
                    found[name] = read.fields
                    if read.for_celery is not None:
                        entries[name] = read.for_celery
        self._replace("beat_schedule", dict(entries))
        return entries

    # --- What they share -------------------------------------------------------------------

    def _not_empty(self, block: Block, kinds: Mapping[str, Any]) -> None:
        if not block.values:
            self._faults.at(
                block.place, "the section is empty", expected=f"one of {', '.join(kinds)}"
            )

    def _place(self, option: str) -> Place:
        return next(row.place for row in self.rows if row.belongs_to(option))

    def _replace(self, option: str, value: Any) -> None:
        self.rows = [replace(row, value=value) if row.name == option else row for row in self.rows]

    def _double(self, block: Block, name: str, option: str) -> None:
        place = self._place(option)
        self._faults.at(
            block.place,
            f"[{place.section}] {place.key} at {place} has {name!r} as well; keep one of them",
        )


def _at(value: Any, path: str | None) -> Any:
    for name in (path or "").split("."):
        value = value[name]
    return value
