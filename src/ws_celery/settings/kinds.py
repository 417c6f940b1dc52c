"""Kinds of values: what is accepted, in code and in words.

A :class:`Kind` refuses everything that it does not understand. None of these knows Celery.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from difflib import get_close_matches
from functools import cache, partial
from typing import Any
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, available_timezones

from pyramid.settings import falsey, truthy

from ws_celery.converters import Refused, json_value, moment, nearest, period, untyped, utc


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    :param name: its name.
    :param expected: what is accepted, in words.
    :param example: a text that is accepted.
    :param convert: from a text, or a value of one of ``types``, to the typed value.
    :param types: what is accepted from Python or JSON besides text.
    :param quotes: those that cannot stand around a text in a file.
    :param prose: whether all quotes, and ` ;` and ` #` inside of a text, belong to it.
    :param inside: of a mapping: from a key to its kind; ``None`` for what has no keys.
    """

    name: str
    expected: str
    example: str
    convert: Callable[[Any], Any]
    types: tuple[type, ...] = ()
    quotes: str = "\"'"
    prose: bool = False
    inside: Callable[[str], Kind] | None = None

    def accept(self, value: object) -> Any:
        """Return the typed value.

        :raises Refused: if ``value`` is of another kind.
        """
        if isinstance(value, str):
            return self.convert(value.strip())
        if not isinstance(value, self.types) or (
            isinstance(value, bool) and bool not in self.types
        ):
            raise Refused(f"is of the type {type(value).__name__}")
        return self.convert(value)

    def described(self, example: str, expected: str | None = None) -> Kind:
        """Return the same kind in words of its own."""
        return replace(self, example=example, expected=expected or self.expected)


def accepts(
    expected: str, example: str, *types: type, name: str | None = None, prose: bool = False
) -> Callable[[Callable[[Any], Any]], Kind]:
    """Return the decorator that makes a kind of the function that converts its values."""

    def made(convert: Callable[[Any], Any]) -> Kind:
        own = name or convert.__name__.replace("_", " ")
        return Kind(own, expected, example, convert, types, prose=prose)

    return made


def nullable(kind: Kind) -> Kind:
    """Return the same kind with ``none`` for a value as well."""

    def convert(value: object) -> Any:
        empty = value is None or (isinstance(value, str) and value.lower() == "none")
        return None if empty else kind.convert(value)

    types = (*kind.types, type(None))
    return replace(kind, expected=f"{kind.expected}, or none", convert=convert, types=types)


# --- What stands around a value --------------------------------------------------------------


class Miswritten(Refused):
    """A text with something around the value that does not belong to it.

    :param problem: what that is.
    :param bare: the value without it.
    """


#: Python 2 took ` ;` for a comment. A ``#`` alone is a routing key.
_COMMENT = re.compile(r"\s+[;#].*|^;.*|^#\s.*", re.DOTALL)
_QUOTED = re.compile(r"([\"'])(.*)\1", re.DOTALL)


def miswritten(text: str, quotes: str = "\"'") -> Miswritten | None:
    """Return what is wrong with a text that has a comment behind the value, or quotes around it.

    :param quotes: those that cannot be a part of the value.
    """
    text = text.strip()
    end = _end_of_json(text)
    for line in [text] if end else text.splitlines():
        comment = _COMMENT.search(line, end)
        value = line[: comment.start()] if comment else line
        quoted = _QUOTED.fullmatch(value)
        enclosed = quoted and quoted[1] in quotes and quoted[1] not in quoted[2]
        bare = quoted[2] if quoted and enclosed else value
        if comment:
            return Miswritten("has a comment behind it, which needs a line of its own", bare)
        if enclosed:
            return Miswritten("has quotes around it, which would be a part of it", bare)
    return None


def _end_of_json(text: str) -> int:
    """Return where the JSON ends that a text begins with, 0 if it begins with none."""
    if not text.startswith(("{", "[", '"')):
        return 0
    try:
        return json.JSONDecoder().raw_decode(text)[1]
    except (ValueError, RecursionError):
        return 0 if text.startswith('"') else len(text)


# --- Numbers and times ---------------------------------------------------------------------


@accepts("true or false", "true", bool, name="bool")
def boolean(value: str | bool) -> bool:
    word = str(value).lower()
    if word in truthy or word in falsey:
        return word in truthy
    raise Refused


#: More than any number that is meant; a period of so many seconds can still be added to a date.
_HUGE = 10**9


def _within(value: Any, least: float, most: float) -> Any:
    if math.isnan(value) or not least <= value <= most:
        raise Refused
    return value


def whole(least: int = 0, most: float = math.inf, example: str = "4") -> Kind:
    """Return the kind of whole numbers in a range."""
    limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"

    def convert(value: str | int) -> int:
        if isinstance(value, str) and not re.fullmatch(r"[+-]?[0-9]{1,18}", value):
            raise Refused
        return int(_within(int(value), least, most))

    return Kind("int", f"a whole number {limits}", example, convert, (int,))


def _number(value: str | float, least: float = 0, most: float = _HUGE) -> Any:
    try:
        return _within(float(value) if isinstance(value, str) else value, least, most)
    except ValueError:
        raise Refused from None


number = Kind("float", "a number of at least 0", "1.5", _number, (int, float))
unbounded = replace(number, convert=partial(_number, most=math.inf))


def _seconds(value: str | float, least: float = 0, most: float = _HUGE) -> Any:
    found = period(value) if isinstance(value, str) else None
    found = _number(value if found is None else found, least, most)
    # Some brokers take whole numbers only.
    return int(found) if isinstance(value, str) and found.is_integer() else found


seconds = Kind(
    "seconds", "seconds, or a period such as 24h or 1h30m", "24h", _seconds, (int, float)
)
seconds_or_minus_one = replace(seconds, convert=partial(_seconds, least=-1))
#: A time to wait: never none at all.
patience = replace(
    seconds,
    expected="more than 0 seconds",
    example="2",
    convert=partial(_seconds, least=1e-9, most=86400),
)


@accepts("whole seconds, or a period such as 24h or 1h30m", "24h", int, name="seconds")
def whole_seconds(value: str | int) -> int:
    found = _seconds(value)
    if not float(found).is_integer():
        raise Refused
    return int(found)


@accepts("the name of a time zone, such as Europe/Berlin", "Europe/Berlin", name="timezone")
def zone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (OSError, ValueError, KeyError):
        raise Refused(close=nearest(value, _zones())) from None
    return value


@cache
def _zones() -> set[str]:
    return available_timezones()


@accepts(
    "a time with its offset from UTC, such as 2027-01-31T09:00+01:00",
    "2027-01-31T09:00+01:00",
    datetime,
)
def instant(value: str | datetime) -> datetime:
    time = moment(value) if isinstance(value, str) else value
    if time.utcoffset() is None:
        raise Refused("has no offset from UTC", f"{time.isoformat()}+00:00")
    return utc(time)


# --- Texts and lists -----------------------------------------------------------------------

#: What nothing tells the kind of.
anything: Kind = Kind(
    "any",
    "JSON or text",
    "4",
    lambda value: untyped(value) if isinstance(value, str) else value,
    (object, bool),
    quotes="'",
    inside=lambda _: anything,
)


@accepts("one line of text", "a-name")
def text(value: str) -> str:
    if not value:
        raise Refused("is empty")
    if "\n" in value:
        raise Refused("has more than one line")
    return value


prose = replace(text, prose=True)
blank = replace(
    text,
    expected="one line of text, which may be empty",
    convert=lambda value: value and text.convert(value),
)


@accepts("one line of text", "a-phrase", bytes, name="bytes", prose=True)
def passphrase(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else text.convert(value).encode()


def choice(name: str, *words: str, more: Callable[[str], bool] = lambda _: False) -> Kind:
    """Return the kind of certain words, and of others that ``more`` agrees to."""

    def convert(value: str) -> str:
        for each in words:
            if value.lower() == each.lower():
                return each
        if more(value):
            return value
        raise Refused(close=nearest(value, words))

    *first, last = words
    return Kind(name, f"{', '.join(first)} or {last}" if first else last, words[0], convert)


def _items(value: str | Iterable[Any]) -> list[Any]:
    if not isinstance(value, str):
        return list(value)
    if value.startswith("["):
        return list(json_value(value))
    items = [item for line in value.splitlines() for item in line.replace(",", " ").split()]
    if quoted := next((item for item in items if re.fullmatch(r"([\"']).*\1", item)), None):
        raise Refused(f"has {quoted} with its quotes", quoted[1:-1])
    return items


def _names(value: str | Iterable[Any], *, may_be_empty: bool = False) -> list[str]:
    found = _items(value)
    if not found and not may_be_empty:
        raise Refused("is empty")
    if not all(isinstance(each, str) and each for each in found):
        raise Refused("has an item that is not text")
    if twice := {each for each in found if found.count(each) > 1}:
        raise Refused(f"has {min(twice)!r} twice")
    return found


COLLECTIONS = (list, tuple, set, frozenset)
listed = Kind("list", "names, by line or comma", "first, second", _names, COLLECTIONS)
names = replace(
    listed,
    expected="names, by line or comma; or none at all",
    convert=partial(_names, may_be_empty=True),
)


@accepts("module names, by line or comma", "myapp.tasks", *COLLECTIONS, name="tuple")
def modules(value: str | Iterable[Any]) -> tuple[str, ...]:
    found = tuple(_names(value))
    for name in found:
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
            raise Refused(f"has {name!r}, which is no module name")
    return found


@accepts(
    "a logging format with %(message)s and the like",
    "%(levelname)s %(message)s",
    name="format",
    prose=True,
)
def log_format(value: str) -> str:
    try:
        logging.Formatter(value)
    except ValueError as error:
        raise Refused(f"is no format ({error})") from None
    return value


@accepts("a URL that begins with http:// or https:// and has no query", "https://shop.example.com")
def base_url(value: str) -> str:
    try:
        parts = urlsplit(text.convert(value))
        usable = parts.hostname and parts.port != 0 and not re.search(r"[\s?#@]", value)
    except ValueError as error:
        raise Refused(str(error)) from None
    if parts.scheme not in ("http", "https") or not usable:
        raise Refused
    return value.rstrip("/")


# --- JSON ----------------------------------------------------------------------------------


def json_of(value: object, wanted: type) -> Any:
    """Return what a JSON text holds, or a value that is not text, if it is of a type."""
    found = json_value(value) if isinstance(value, str) else value
    if not isinstance(found, wanted):
        raise Refused
    return found


@accepts("a JSON array", "[1, 2]", list, tuple)
def array(value: str | list[Any] | tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
    return json_of(value, list) if isinstance(value, str) else value


#: How much alike a key is to a known one that is a slip of it.
_ALIKE = 0.85


def _inside(kinds: Mapping[str, Kind], others: str, key: str) -> Kind:
    if key in kinds:
        return kinds[key]
    if others == "no":
        raise Refused("this key is not known", nearest(key, kinds))
    if others == "unlike" and (close := get_close_matches(key.lower(), kinds, 1, _ALIKE)):
        raise Refused("this key is not known", close[0])
    return anything


def mapping(example: str, kinds: Mapping[str, Kind] | None = None, others: str = "any") -> Kind:
    """Return the kind of JSON objects.

    :param kinds: those of its keys.
    :param others: which other keys it may have: ``any``, those that are ``unlike``, or ``no``.
    """
    inside = partial(_inside, kinds or {}, others)

    def convert(value: str | Mapping[Any, Any]) -> dict[str, Any]:
        found = json_of(value, Mapping)
        if not all(isinstance(key, str) for key in found):
            raise Refused("has a key that is not text")
        return {key: _accept_key(inside, key, each) for key, each in found.items()}

    return Kind("dict", "a JSON object", example, convert, (Mapping,), inside=inside)


def _accept_key(inside: Callable[[str], Kind], key: str, value: object) -> Any:
    try:
        kind = inside(key)
    except Refused as error:
        raise Refused(f"has the unknown key {key}", error.close) from None
    if kind is anything:
        return value  # JSON and Python say the type themselves
    try:
        return kind.accept(value)
    except Refused as error:
        problem = f"{error}; expected " if str(error) else "expected "
        raise Refused(f"has {key}: {problem}{kind.expected}", error.close) from None


def each(kind: Kind, *keys: str) -> dict[str, Kind]:
    """Return the same kind for several keys, which are given as words of texts."""
    return dict.fromkeys(" ".join(keys).split(), kind)
