"""Sections of an INI file to typed Celery settings: pure functions of a mapping.

Every option is typed from Celery's own table. An unknown key or a value of the wrong type is a
:class:`~ws_celery.exceptions.ConfigurationError` that names file, section and key.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from celery.app.defaults import NAMESPACES, flatten
from pyramid.settings import falsey, truthy

from ws_celery.exceptions import ConfigurationError
from ws_celery.schedules import SCHEDULE_TYPES, parse_schedule

__all__ = ("Sections", "celery_settings")

#: Section name to key to text, as plaster returns them.
Sections = Mapping[str, Mapping[str, str]]

#: Celery's own description of every option, by its full lower-case name.
OPTIONS: dict[str, Any] = dict(flatten(NAMESPACES))

#: Options whose declared type is not what Celery does with the value.
CORRECTED_TYPES = {
    "beat_cron_starting_deadline": "int",  # declared as the class int
    "broker_heartbeat_checkrate": "float",
    "cassandra_auth_kwargs": "dict",
    "cassandra_port": "int",
    "redis_backend_use_ssl": "json",
    "result_compression": "string",  # declared as the string "str"
    "security_key_password": "bytes",
    "task_annotations": "json",
    "task_default_delivery_mode": "json",  # 1, 2, "transient" or "persistent"
    "task_default_priority": "int",
    "task_routes": "json",
    "worker_concurrency": "int",
}


def _bool(text: str) -> bool:
    word = text.lower()
    if word in truthy:
        return True
    if word in falsey and word:
        return False
    raise ValueError("expected true or false")


def _number(kind: Callable[[str], Any], expected: str) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"expected {expected}") from None

    return convert


def _list(text: str) -> list[str]:
    return [item for line in text.splitlines() for item in line.replace(",", " ").split()]


def _dict(text: str) -> dict[str, Any]:
    value = _json(text)
    if not isinstance(value, dict):
        raise ValueError('expected a JSON object such as {"key": "value"}')
    return value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"expected JSON ({error})") from None


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


#: Converter for each type that Celery declares, and for those of :data:`CORRECTED_TYPES`.
CONVERTERS: dict[str, Callable[[str], Any]] = {
    "any": _json_or_text,
    "bool": _bool,
    "bytes": str.encode,
    "dict": _dict,
    "float": _number(float, "a number"),
    "int": _number(int, "a whole number"),
    "json": _json_or_text,
    "list": _list,
    "string": str,
    "tuple": _list,
}

_SCHEDULE_KEYS = ("task", "type", "schedule", "args", "kwargs", "options")


def celery_settings(sections: Sections, source: str) -> dict[str, Any]:
    """Return Celery's settings from the ``[celery...]`` sections of one INI file.

    ``[celery]`` holds options; ``[celery:OPTION]`` the keys of an option that is a mapping;
    ``[celeryroute:TASK]`` how a task is routed; ``[celerybeat:NAME]`` a schedule entry.

    :param sections: all sections; those that are not ours are left alone.
    :param source: name of the file, for messages.
    :raises ConfigurationError: at the first key that is unknown or has a value of the wrong type.
    """
    reader = _Reader(source)
    settings = reader.options("celery", sections.get("celery", {}))
    for section, values in sections.items():
        kind, _, name = section.partition(":")
        if not name or kind not in ("celery", "celeryroute", "celerybeat"):
            if kind.startswith("celery") and section != "celery":
                reader.fail_section(section)
            continue
        if kind == "celery":
            reader.known(section, name, OPTIONS)
            settings.setdefault(name, {}).update(
                {key: _json_or_text(text.strip()) for key, text in values.items()}
            )
        elif kind == "celeryroute":
            settings.setdefault("task_routes", {})[name] = {
                key: _json_or_text(text.strip()) for key, text in values.items()
            }
        else:
            settings.setdefault("beat_schedule", {})[name] = reader.entry(section, values)
    return settings


class _Reader:
    """Reads sections of one file; knows how to say where something is wrong."""

    def __init__(self, source: str) -> None:
        self._source = source

    def options(self, section: str, values: Mapping[str, str]) -> dict[str, Any]:
        settings = {}
        for key, text in values.items():
            option = self.known(section, key, OPTIONS)
            settings[key] = self._option(section, key, text.strip(), option)
        return settings

    def _option(self, section: str, key: str, text: str, option: Any) -> Any:
        if option.default is None and text.lower() == "none":
            return None
        converter = CONVERTERS[CORRECTED_TYPES.get(key, option.type)]
        return self.convert(section, key, text, converter)

    def entry(self, section: str, values: Mapping[str, str]) -> dict[str, Any]:
        for key in values:
            self.known(section, key, _SCHEDULE_KEYS)
        for key in ("task", "type", "schedule"):
            if not values.get(key, "").strip():
                self.fail(
                    section, key, "is missing; a schedule entry needs task, type and schedule"
                )
        kind = self.known(section, values["type"].strip(), SCHEDULE_TYPES, "type")
        return {
            "task": values["task"].strip(),
            "schedule": self.convert(
                section, "schedule", values["schedule"], lambda text: parse_schedule(kind, text)
            ),
            "args": self.convert(section, "args", values.get("args", "[]"), _json_array),
            "kwargs": self.convert(section, "kwargs", values.get("kwargs", "{}"), _dict),
            "options": self.convert(section, "options", values.get("options", "{}"), _dict),
        }

    def convert(self, section: str, key: str, text: str, converter: Callable[[str], Any]) -> Any:
        try:
            return converter(text)
        except ValueError as error:
            self.fail(section, key, f"= {text!r}: {error}")

    def known(self, section: str, name: str, names: Any, key: str = "") -> Any:
        """Return ``names[name]``, or ``name`` where names have no values; fail if it is unknown."""
        if name not in names:
            hint = _nearest(name, names)
            self.fail(section, key or name, f"{f'= {name!r} ' if key else ''}is not known.{hint}")
        return names[name] if not key and isinstance(names, Mapping) else name

    def fail_section(self, section: str) -> NoReturn:
        known = ("celery", "celery:OPTION", "celeryroute:TASK", "celerybeat:NAME")
        raise ConfigurationError(
            f"{self._source}: the section [{section}] is not known; "
            f"ws_celery reads [{'], ['.join(known)}]."
        )

    def fail(self, section: str, key: str, problem: str) -> NoReturn:
        raise ConfigurationError(f"{self._source}: [{section}] {key} {problem}")


def _json_array(text: str) -> list[Any]:
    value = _json(text)
    if not isinstance(value, list):
        raise ValueError("expected a JSON array such as [1, 2]")
    return value


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.lower(), list(names), n=1)
    return f" Did you mean {near[0]}?" if near else ""
