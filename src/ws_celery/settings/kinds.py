"""Kinds of values: what is accepted, in code and in words; none of them knows Celery.

A :class:`Kind` refuses everything that it does not understand.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cache
from typing import Any
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, available_timezones

from pyramid.settings import falsey, truthy

from ws_celery.converters import Refused, json_value, moment, nearest, period

__all__ = (
    "BASE_URL",
    "BLANK",
    "BOOL",
    "BYTES",
    "FORMAT",
    "LIST",
    "MODULES",
    "MOMENT",
    "NAMES",
    "SECONDS",
    "TEXT",
    "WHOLE_SECONDS",
    "ZONE",
    "Kind",
    "choice",
    "json_value_of",
    "mapping",
    "number",
    "whole",
)


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


#: More than any number that is meant; a period of so many seconds can still be added to a date.
_HUGE = 10**9


def _within(least: float, most: float) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if math.isnan(value) or not least <= value <= most:
            raise Refused
        return value

    return check


def _range(least: float, most: float) -> str:
    return f"of at least {least}" if most >= _HUGE else f"from {least} to {most}"


def whole(least: int = 0, most: float = math.inf, example: str = "4") -> Kind:
    """Return the kind of whole numbers in a range."""
    words = f"a whole number {_range(least, most)}"
    return Kind("int", words, example, _int, (int,), _within(least, most))


def number(least: float = 0, most: float = _HUGE, example: str = "1.5") -> Kind:
    """Return the kind of numbers in a range."""
    words = f"a number {_range(least, most)}"
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


def _whole_seconds(seconds: float) -> int:
    if not float(SECONDS.finish(seconds)).is_integer():
        raise Refused
    return int(seconds)


WHOLE_SECONDS = replace(
    SECONDS,
    expected="whole seconds, or a period such as 24h or 1h30m",
    types=(int,),
    finish=_whole_seconds,
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

NAMES = replace(
    LIST,
    expected="names, by line or comma; or none at all",
    finish=lambda values: _texts(values) if values else [],
)

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


def _base_url(text: str) -> str:
    try:
        parts = urlsplit(_line(text))
        whole = parts.hostname and parts.port != 0 and not re.search(r"[\s?#@]", text)
    except ValueError as error:
        raise Refused(str(error)) from None
    if parts.scheme not in ("http", "https") or not whole:
        raise Refused
    return text.rstrip("/")


BASE_URL = Kind(
    "URL",
    "a URL that begins with http:// or https:// and has no query",
    "https://shop.example.com",
    _base_url,
)


def mapping(example: str, finish: Callable[[Any], Any] = dict) -> Kind:
    """Return the kind of JSON objects, checked or completed by ``finish``."""

    def check(value: Any) -> Any:
        if not all(isinstance(key, str) for key in value):
            raise Refused("has a key that is not text")
        return finish(value)

    return Kind("dict", "a JSON object", example, json_value_of(dict), (Mapping,), check)


def json_value_of(wanted: type) -> Callable[[str], Any]:
    """Return the converter of JSON texts that hold a value of the type ``wanted``."""

    def convert(text: str) -> Any:
        value = json_value(text)
        if not isinstance(value, wanted):
            raise Refused
        return value

    return convert


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


def _aware(time: datetime) -> datetime:
    if time.utcoffset() is None:
        raise Refused("has no offset from UTC", f"{time.isoformat()}+00:00")
    return time.astimezone(timezone.utc)


MOMENT = Kind(
    "time",
    "a time with its offset from UTC, such as 2027-01-31T09:00+01:00",
    "2027-01-31T09:00+01:00",
    moment,
    (datetime,),
    _aware,
)


def _format(text: str) -> str:
    try:
        logging.Formatter(text)
    except ValueError as error:
        raise Refused(f"is no format ({error})") from None
    return text


FORMAT = Kind(
    "format", "a logging format with %(message)s and the like", "%(levelname)s %(message)s", _format
)
