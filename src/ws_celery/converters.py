"""From a text, or a value of Python or JSON, to a value of the kind that Celery wants.

A :class:`Kind` raises :class:`Refused` for everything that it does not understand: a wrong guess
would be a setting that lies.
"""

from __future__ import annotations

import json
import logging
import math
import re
import ssl
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

from celery.utils.imports import symbol_by_name
from celery.utils.time import rate
from pyramid.settings import falsey, truthy

__all__ = (
    "Kind",
    "Refused",
    "choice",
    "json_value",
    "mapping",
    "nearest",
    "number",
    "period",
    "resolve",
    "untyped",
    "whole",
)


class Refused(ValueError):
    """A value that is not of the kind; the message may be empty where the kind's words say it all.

    :param problem: what is wrong with this value.
    :param close: the legal value that is most like it.
    """

    def __init__(self, problem: str = "", close: str | None = None) -> None:
        super().__init__(problem)
        self.close = close


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    :param name: its name, for tables.
    :param expected: what is accepted, in words.
    :param example: a text that is accepted.
    :param convert: from text to value.
    :param types: what is accepted from Python or JSON besides text.
    :param finish: checks, or completes, a value that has the right type.
    """

    name: str
    expected: str
    example: str
    convert: Callable[[str], Any] = str
    types: tuple[type, ...] = ()
    finish: Callable[[Any], Any] = lambda value: value

    def accept(self, value: object) -> Any:
        """Return the typed value.

        :raises Refused: if ``value`` is of another kind.
        """
        if isinstance(value, str):
            value = self.convert(value.strip())
        elif not isinstance(value, self.types) or (
            isinstance(value, bool) and bool not in self.types
        ):
            raise Refused(f"is of the type {type(value).__name__}")
        return self.finish(value)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of ``names`` that ``name`` was probably meant to be."""
    if len(name) > _LONGEST_NAME:
        return None
    by_lower = {each.lower(): each for each in names}
    close = get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[close[0]] if close else None


def json_value(text: str) -> Any:
    """Return what a JSON text says.

    :raises Refused: if it is not JSON, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except Refused:
        raise
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise Refused(f"is not JSON ({error.msg} at {where})") from None
    except (ValueError, RecursionError):
        raise Refused("is not JSON that can be read") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise Refused(f"has the key {key!r} twice")
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise Refused(f"is not JSON ({name} is no number there)")


def untyped(text: str) -> Any:
    """Return the value of a text that nothing tells the kind of.

    JSON is JSON; ``true``, ``false`` and ``none`` are what they say in any case; numbers are
    numbers; the rest is text.

    :raises Refused: if it is broken JSON, or yes, no, on or off, which might be meant either way.
    """
    text = text.strip()
    word = text.lower()
    if word in _WORDS:
        return _WORDS[word]
    if word in ("yes", "no", "on", "off"):
        raise Refused("may be a word or a truth value", f'"{text}" or true or false')
    if text.startswith(("{", "[", '"')) or _NUMBER.fullmatch(text):
        return json_value(text)
    return text


#: Longer than any name, and short enough to be compared with all of them.
_LONGEST_NAME = 80
_WORDS = {"true": True, "false": False, "none": None, "null": None}
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_PERIOD = re.compile(
    r"(?:(?P<weeks>\d+(?:\.\d+)?)w)?\s*(?:(?P<days>\d+(?:\.\d+)?)d)?\s*"
    r"(?:(?P<hours>\d+(?:\.\d+)?)h)?\s*(?:(?P<minutes>\d+(?:\.\d+)?)m)?\s*"
    r"(?:(?P<seconds>\d+(?:\.\d+)?)s)?"
)
_UNITS = {"weeks": 604800, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}


def period(text: str) -> float | None:
    """Return the seconds of ``1h30m``, ``24h`` or ``1.5d``; ``None`` if it is none of the sort."""
    match = _PERIOD.fullmatch(text.strip())
    if not match or not any(match.groups()):
        return None
    return sum(float(match[unit] or 0) * seconds for unit, seconds in _UNITS.items())


def _bool(text: str) -> bool:
    word = text.lower()
    if word in truthy or word in falsey:
        return word in truthy
    raise Refused


def _int(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise Refused
    return int(text)


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise Refused from None


def _seconds(text: str) -> float:
    seconds = period(text)
    seconds = _float(text) if seconds is None else seconds
    # Some brokers take whole numbers only.
    return int(seconds) if seconds.is_integer() else seconds


def _within(least: float, most: float) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if math.isnan(value) or not least <= value <= most:
            raise Refused
        return value

    return check


def _range(least: float, most: float, unlimited: str) -> str:
    return unlimited if math.isinf(most) else f"from {least} to {most}"


def whole(least: int = 0, most: float = math.inf, example: str = "4") -> Kind:
    """Return the kind of whole numbers in a range."""
    words = f"a whole number {_range(least, most, f'of at least {least}')}"
    return Kind("int", words, example, _int, (int,), _within(least, most))


def number(least: float = 0, most: float = 10**9, example: str = "1.5") -> Kind:
    """Return the kind of numbers in a range."""
    words = f"a number {_range(least, most, f'of at least {least}')}"
    if most == 10**9:
        words = f"a number of at least {least}"
    return Kind("float", words, example, _float, (int, float), _within(least, most))


def choice(name: str, *names: str, more: Callable[[str], bool] = lambda _: False) -> Kind:
    """Return the kind of certain words, and of others that ``more`` agrees to."""

    def convert(text: str) -> str:
        for each in names:
            if text.lower() == each.lower():
                return each
        if more(text):
            return text
        raise Refused(close=nearest(text, names))

    *first, last = names
    return Kind(name, f"{', '.join(first)} or {last}" if first else last, names[0], convert)


BOOL = Kind("bool", "true or false", "true", _bool, (bool,))
SECONDS = replace(
    number(example="24h"),
    name="seconds",
    expected="seconds, or a period such as 24h or 1h30m",
    convert=_seconds,
)


def _line(text: str) -> str:
    if not text:
        raise Refused("is empty")
    if "\n" in text:
        raise Refused("has more than one line")
    return text


def _blank_or_line(text: str) -> str:
    return text and _line(text)


TEXT = Kind("text", "one line of text", "a-name", _line)
BLANK = Kind("text", "one line of text, which may be empty", "a-name", _blank_or_line)
BYTES = Kind("bytes", "one line of text", "a-phrase", lambda text: _line(text).encode(), (bytes,))


def _items(text: str) -> list[Any]:
    if text.startswith("["):
        return list(json_value(text))
    return [item for line in text.splitlines() for item in line.replace(",", " ").split()]


def _texts(values: Iterable[Any]) -> list[str]:
    found = list(values)
    if not found:
        raise Refused("is empty")
    if not all(isinstance(value, str) and value for value in found):
        raise Refused("has an item that is not text")
    if twice := {value for value in found if found.count(value) > 1}:
        raise Refused(f"has {min(twice)!r} twice")
    return found


_COLLECTIONS = (list, tuple, set, frozenset)
LIST = Kind("list", "names, by line or comma", "first, second", _items, _COLLECTIONS, _texts)

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def _modules(values: Iterable[Any]) -> tuple[str, ...]:
    names = tuple(_texts(values))
    for name in names:
        if not _MODULE.fullmatch(name):
            raise Refused(f"has {name!r}, which is no module name")
    return names


MODULES = Kind(
    "tuple", "module names, by line or comma", "myapp.tasks", _items, _COLLECTIONS, _modules
)


def mapping(example: str, finish: Callable[[Any], Any] = dict) -> Kind:
    """Return the kind of JSON objects, checked or completed by ``finish``."""

    def check(value: Any) -> Any:
        if not all(isinstance(key, str) for key in value):
            raise Refused("has a key that is not text")
        return finish(value)

    return Kind("dict", "a JSON object", example, json_value_of(dict), (Mapping,), check)


def json_value_of(*types: type) -> Callable[[str], Any]:
    """Return the converter of JSON texts that hold one of ``types``."""

    def convert(text: str) -> Any:
        value = json_value(text)
        if not isinstance(value, types):
            raise Refused
        return value

    return convert


def resolve(text: str) -> Any:
    """Return what a dotted name, ``package.module:name`` or ``package.module.name``, stands for.

    :raises Refused: if it cannot be imported.
    """
    if not _DOTTED.fullmatch(text):
        raise Refused
    try:
        return symbol_by_name(text)
    except Exception as error:  # noqa: BLE001  whatever the imported module does
        raise Refused(f"cannot be imported ({type(error).__name__}: {error})") from None


_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*[.:][^\W\d]\w*")


def callback(value: Any) -> Any:
    """Return ``value`` if it can be called."""
    if not callable(value):
        raise Refused("cannot be called")
    return value


CALLBACK = Kind(
    "callable", "the dotted name of a function", "logging:getLogger", resolve, (object,), callback
)


def dotted(name: str, example: str, *aliases: str) -> Kind:
    """Return the kind of a class by dotted name or alias, which Celery imports where it is used."""

    def convert(text: str) -> str:
        if text in aliases or _DOTTED.fullmatch(text):
            return text
        raise Refused(close=nearest(text, aliases))

    words = f"{', '.join(aliases)} or " if aliases else ""
    return Kind(name, f"{words}the dotted name of a class", example, convert, (type,))


def _rate(text: str) -> str:
    try:
        valid = math.isfinite(rate(text)) and rate(text) >= 0
    except (KeyError, ValueError):
        valid = False
    if not valid:
        raise Refused
    return text


RATE = Kind("rate", "a rate such as 10/s, 10/m or 10/h", "10/m", _rate, (int, float))


def _zone(text: str) -> str:
    try:
        ZoneInfo(text)
    except (OSError, ValueError, KeyError):
        raise Refused(close=nearest(text, _zones())) from None
    return text


@cache
def _zones() -> set[str]:
    return available_timezones()


ZONE = Kind("timezone", "the name of a time zone, such as Europe/Berlin", "Europe/Berlin", _zone)


def _format(text: str) -> str:
    try:
        logging.Formatter(text)
    except ValueError as error:
        raise Refused(f"is no format ({error})") from None
    return text


FORMAT = Kind(
    "format", "a logging format with %(message)s and the like", "%(levelname)s %(message)s", _format
)


def with_ssl_constants(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return TLS options with the names of constants, such as ``CERT_REQUIRED``, resolved."""
    return {key: _ssl_constant(key, value) for key, value in options.items()}


def _ssl_constant(key: str, value: Any) -> Any:
    prefix = {"cert_reqs": "CERT_", "ssl_version": "PROTOCOL_"}.get(key.removeprefix("ssl_")) or (
        "PROTOCOL_" if key == "ssl_version" else None
    )
    if prefix is None or not isinstance(value, str) or not value.startswith(prefix):
        return value
    names = [name for name in dir(ssl) if name.startswith(prefix)]
    if value not in names:
        raise Refused(f"has {key} = {value!r}, which is no constant of ssl", nearest(value, names))
    return getattr(ssl, value)


def _tls(text: str) -> Any:
    return json_value_of(dict)(text) if text.startswith("{") else _bool(text)


TLS = Kind(
    "bool or dict",
    "true, false or a JSON object",
    '{"cert_reqs": "CERT_REQUIRED"}',
    _tls,
    (bool, Mapping),
    lambda value: value if isinstance(value, bool) else with_ssl_constants(value),
)
