"""Kinds of values that name code: functions, classes, routers, attributes of tasks."""

from __future__ import annotations

import re
from typing import Any

from celery.utils.imports import symbol_by_name

from ws_celery.converters import Refused, json_value, nearest
from ws_celery.settings.kinds import Kind

__all__ = ("ANNOTATIONS", "CALLBACK", "FAILOVER", "ROUTES", "dotted")

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*[.:][^\W\d]\w*")


def _resolve(text: str) -> Any:
    """Return what a dotted name, ``package.module:name`` or ``package.module.name``, stands for.

    :raises Refused: if it cannot be imported.
    """
    if not _DOTTED.fullmatch(text):
        raise Refused
    try:
        return symbol_by_name(text)
    except Exception as error:  # noqa: BLE001  whatever the imported module does
        raise Refused(f"cannot be imported ({type(error).__name__}: {error})") from None


def _callback(value: Any) -> Any:
    """Return ``value`` if it can be called."""
    if not callable(value):
        raise Refused("cannot be called")
    return value


CALLBACK = Kind(
    "callable", "the dotted name of a function", "logging:getLogger", _resolve, (object,), _callback
)


def dotted(name: str, example: str, *aliases: str) -> Kind:
    """Return the kind of a class by dotted name or alias, which Celery imports where it is used."""

    def convert(text: str) -> str:
        if text in aliases or _DOTTED.fullmatch(text):
            return text
        raise Refused(close=nearest(text, aliases))

    words = f"{', '.join(aliases)} or " if aliases else ""
    return Kind(name, f"{words}the dotted name of a class", example, convert, (type,))


FAILOVER = Kind(
    "failover strategy",
    "round-robin, shuffle or the dotted name of a function",
    "shuffle",
    lambda text: text if text in ("round-robin", "shuffle") else _callback(_resolve(text)),
    (object,),
    lambda value: value if isinstance(value, str) else _callback(value),
)


def _routers(value: Any) -> Any:
    """Resolve the dotted names of routers; check that a mapping has mappings or queue names."""
    if isinstance(value, str):
        return _resolve(value)
    if isinstance(value, (list, tuple)):
        return [_router(each) for each in value]
    if callable(value):
        return value
    if not all(isinstance(route, (str, dict)) and route for route in value.values()):
        raise Refused("has a route that is neither a queue name nor an object")
    return dict(value)


def _router(value: Any) -> Any:
    # A pair of pattern and route, or a router like those that stand alone.
    if isinstance(value, (list, tuple)):
        if len(value) != 2 or not isinstance(value[0], str):
            raise Refused("has a route that is no pair of pattern and queue")
        return tuple(value)
    if not isinstance(value, (str, dict)) and not callable(value):
        raise Refused("has an item that is no router")
    return _routers(value)


def _annotations(value: Any) -> Any:
    if isinstance(value, str):
        return _resolve(value)
    if isinstance(value, (list, tuple)):
        return [_annotations(each) for each in value]
    if not isinstance(value, dict):
        return value
    if not all(isinstance(annotation, dict) for annotation in value.values()):
        raise Refused("has an annotation that is no object")
    return dict(value)


def _json_or_name(text: str) -> Any:
    if not text:
        raise Refused("is empty")
    return json_value(text) if text[0] in "{[" else text


ROUTES = Kind(
    "routes",
    "a JSON object of tasks and queues, or the dotted name of a router",
    '{"myapp.tasks.*": {"queue": "slow"}}',
    _json_or_name,
    (object,),
    _routers,
)
ANNOTATIONS = Kind(
    "annotations",
    "a JSON object of tasks and their attributes, or a dotted name",
    '{"myapp.tasks.slow": {"rate_limit": "10/m"}}',
    _json_or_name,
    (object,),
    _annotations,
)
