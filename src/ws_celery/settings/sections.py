"""Layers of sections to typed settings: everything is read, everything wrong is collected.

Nothing is decided by the order of reading: the nearer file beats the one that it includes, and the
same thing twice in one file is a fault that names both places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kombu import Queue

from ws_celery.converters import Refused, untyped
from ws_celery.settings.entries import read_entry
from ws_celery.settings.faults import Faults, Place, Value
from ws_celery.settings.gathering import Block, Found, Gathering
from ws_celery.settings.keys import (
    ANNOTATION_KEYS,
    CALL_KEYS,
    QUEUE_KEYS,
    ROUTE_KEYS,
    TRANSPORT_KEYS,
)
from ws_celery.settings.layers import Layer
from ws_celery.settings.options import OPTIONS, Option
from ws_celery.settings.queues import given_queues, make_queue

__all__ = ("Sections", "Setting")


@dataclass(frozen=True)
class Setting:
    """One thing that was read.

    :param category: ``option``, ``route``, ``queue``, ``annotation`` or ``entry``.
    :param name: the option, with a dot and the key where it is a part of one; or the task, queue or
        entry.
    :param value: the typed value.
    :param place: where it is written.
    """

    category: str
    name: str
    value: Any
    place: Place

    @property
    def type(self) -> str:
        """Name of the value's type, for people."""
        value = self.value["schedule"] if self.category == "entry" else self.value
        return "none" if value is None else type(value).__name__

    def belongs_to(self, option: str) -> bool:
        """Tell whether this is an option, or a key of its mapping."""
        return self.category == "option" and self.name.partition(".")[0] == option


class Sections:
    """Reads layers, the nearest first; its attributes are the result.

    ``settings`` are Celery's, typed; ``rows`` tell what was read and where; ``renamed`` are old
    spellings; ``call_options`` are options of calls, by task or glob, that Celery does not take
    from a route.

    :param layers: what to read.
    :param faults: where to add what is wrong.
    """

    def __init__(self, layers: list[Layer], faults: Faults) -> None:
        self.settings: dict[str, Any] = {}
        self.rows: list[Setting] = []
        self.call_options: dict[str, dict[str, Any]] = {}
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
            self._key(found, mapping)
        with self._faults.catching(keys[0].value):
            return option.kind.finish(mapping)
        return None

    def _key(self, found: Found, mapping: dict[str, Any]) -> None:
        *path, last = str(found.key).split(".")
        text, kind = found.value.text, TRANSPORT_KEYS.get(last)
        with self._faults.catching(found.value, kind.expected if kind else None):
            for name in path:
                mapping = mapping.setdefault(name, {})
                if not isinstance(mapping, dict):
                    raise Refused(f"{name} has a value, and cannot have keys as well")
            if not all((*path, last)) or isinstance(mapping.get(last), dict):
                raise Refused(f"{last} has keys, and cannot have a value as well")
            if kind:
                mapping[last] = kind.accept(text)
            else:
                mapping[last] = untyped(text) if isinstance(text, str) else text

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
        annotations: dict[str, Any] = {}
        for task, block in blocks.items():
            if "*" in task and task != "*":
                self._faults.at(
                    block.place,
                    "a glob does not work here",
                    expected="a task's name, or * for all tasks",
                )
            annotations[task] = self._keys_of(block, ANNOTATION_KEYS)
            self.rows.append(Setting("annotation", task, annotations[task], block.place))
        self._combine("task_annotations", annotations, blocks)

    # --- [celeryroute:TASK] ----------------------------------------------------------------

    def _routes(self, blocks: Mapping[str, Block]) -> None:
        routes: dict[str, Any] = {}
        for task, block in blocks.items():
            if "*" not in task and set("?[]") & set(task):
                self._faults.at(
                    block.place,
                    "a glob without * is a task's name to Celery",
                    expected="a glob with *, or a task's name",
                )
            keys = self._keys_of(block, ROUTE_KEYS)
            call = {key: value for key, value in keys.items() if key in CALL_KEYS}
            if call:
                self.call_options[task] = call
            if len(call) < len(keys):
                routes[task] = {key: value for key, value in keys.items() if key not in call}
            self.rows.append(Setting("route", task, keys, block.place))
        self._combine("task_routes", routes, blocks)

    def _combine(self, name: str, mine: dict[str, Any], blocks: Mapping[str, Block]) -> None:
        given = self.settings.get(name)
        if not mine:
            return
        if isinstance(given, dict):
            for task in mine.keys() & given.keys():
                self._double(blocks[task], task, name)
            self.settings[name] = {**mine, **given}
        elif given is None:
            self.settings[name] = mine
        else:
            self.settings[name] = [mine, *(given if isinstance(given, list) else [given])]

    # --- [celerybeat:NAME] -----------------------------------------------------------------

    def _entries(self, blocks: Mapping[str, Block]) -> None:
        given = self.settings.pop("beat_schedule", None)
        entries = self._given_entries(given, blocks) if given else {}
        for name, block in blocks.items():
            entry = read_entry(block.values, block.place, self._faults)
            if entry is not None:
                entries[name] = entry
                self.rows.append(Setting("entry", name, entry, block.place))
        if entries or given is not None:
            self.settings["beat_schedule"] = entries

    def _given_entries(
        self, given: Mapping[str, Any], blocks: Mapping[str, Block]
    ) -> dict[str, Any]:
        place, entries = self._place("beat_schedule"), {}
        for name, keys in given.items():
            where = place.key_beside(name)
            if name in blocks:
                self._double(blocks[name], name, "beat_schedule")
            elif not isinstance(keys, Mapping):
                self._faults.at(where, "is no object", expected='{"task": ..., "schedule": ...}')
            else:
                values = {str(key): Value(value, where) for key, value in keys.items()}
                entry = read_entry(values, where, self._faults)
                if entry is not None:
                    entries[name] = entry
        self._replace("beat_schedule", dict(entries))
        return entries

    # --- What they share -------------------------------------------------------------------

    def _keys_of(self, block: Block, kinds: Mapping[str, Any]) -> dict[str, Any]:
        if not block.values:
            self._faults.at(
                block.place, "the section is empty", expected=f"one of {', '.join(kinds)}"
            )
        return self._faults.typed(block.values, kinds)

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
