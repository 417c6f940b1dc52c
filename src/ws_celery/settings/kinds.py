"""Kinds of values: what is accepted, in code and in words; none of them knows Celery.

A :class:`Kind` refuses everything that it does not understand.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from difflib import get_close_matches
from functools import cache, partial
from typing import Any
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, available_timezones

from pyramid.settings import falsey, truthy

from ws_celery.converters import Refused, json_value, moment, nearest, period, untyped
from ws_celery.exceptions import Fault
from ws_celery.masking import MASK, masked, masked_text

__all__ = (
    "ANYTHING",
    "BASE_URL",
    "BLANK",
    "BOOL",
    "BYTES",
    "FORMAT",
    "LIST",
    "MODULES",
    "MOMENT",
    "NAMES",
    "OF_ONE_CALL",
    "PROSE",
    "SECONDS",
    "TEXT",
    "WHOLE_SECONDS",
    "ZONE",
    "Faults",
    "Kind",
    "Miswritten",
    "Place",
    "Value",
    "accept_keys",
    "choice",
    "json_value_of",
    "mapping",
    "miswritten",
    "nullable",
    "number",
    "whole",
    "without_blanks",
)

#: Options of one call, refused in what is configured for all calls; with the reason.
OF_ONE_CALL = {
    "task_id": "cannot be set: each call and each tick has an id of its own; leave it out",
    "eta": "cannot be set: all calls would have the same; write countdown, in seconds",
}


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


def without_blanks(url: str) -> str:
    """Return a URL, if it is one without blanks.

    :raises Refused: if it has one.
    """
    if re.search(r"\s", url):
        raise Refused("has a blank, which a URL writes as %20")
    return url


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    :param name: its name, for tables.
    :param expected: what is accepted, in words.
    :param example: a text that is accepted.
    :param convert: from text to value.
    :param types: what is accepted from Python or JSON besides text.
    :param finish: checks, or completes, a value that has the right type.
    :param quotes: those that cannot stand around a text in a file.
    :param prose: whether all quotes, and ` ;` and ` #` inside of a text, belong to it.
    :param inside: of a mapping: from a key to its kind.
    """

    name: str
    expected: str
    example: str
    convert: Callable[[str], Any] = str
    types: tuple[type, ...] = ()
    finish: Callable[[Any], Any] = lambda value: value
    quotes: str = "\"'"
    prose: bool = False
    inside: Callable[[str], Kind] = lambda _: ANYTHING

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


#: What nothing tells the kind of.
ANYTHING: Kind = Kind("any", "JSON or text", "4", untyped, (object,), quotes="'")


def nullable(kind: Kind) -> Kind:
    """Return the same kind with ``none`` for a value as well."""

    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind.convert(text)

    return replace(
        kind,
        expected=f"{kind.expected}, or none",
        convert=convert,
        types=(*kind.types, type(None)),
        finish=lambda value: None if value is None else kind.finish(value),
    )


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


def _line_as_meant(text: str) -> str:
    if not text:
        raise Refused("is empty")
    if "\n" in text:
        raise Refused("has more than one line")
    return text


def _blank_or_line(text: str) -> str:
    return text and _line_as_meant(text)


TEXT = Kind("text", "one line of text", "a-name", _line_as_meant)
PROSE = replace(TEXT, prose=True)
BLANK = Kind("text", "one line of text, which may be empty", "a-name", _blank_or_line)
BYTES = Kind(
    "bytes",
    "one line of text",
    "a-phrase",
    lambda text: _line_as_meant(text).encode(),
    (bytes,),
    prose=True,
)


def _items(text: str) -> list[Any]:
    if text.startswith("["):
        return list(json_value(text))
    items = [item for line in text.splitlines() for item in line.replace(",", " ").split()]
    if quoted := next(filter(_QUOTED.fullmatch, items), None):
        raise Refused(f"has {quoted} with its quotes", quoted[1:-1])
    return items


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
        parts = urlsplit(_line_as_meant(text))
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


#: How much alike a key is to a known one that is a slip of it.
_ALIKE = 0.85


def _inside(kinds: Mapping[str, Kind], others: str, key: str) -> Kind:
    if key in kinds:
        return kinds[key]
    if others == "no":
        raise Refused("this key is not known", nearest(key, kinds))
    if others == "unlike" and (close := get_close_matches(key.lower(), kinds, 1, _ALIKE)):
        raise Refused("this key is not known", close[0])
    return ANYTHING


def mapping(example: str, kinds: Mapping[str, Kind] | None = None, others: str = "any") -> Kind:
    """Return the kind of JSON objects.

    :param kinds: those of its keys.
    :param others: which other keys it may have: ``any``, those that are ``unlike``, or ``no``.
    """
    inside = partial(_inside, kinds or {}, others)

    def check(value: Any) -> dict[str, Any]:
        if not all(isinstance(key, str) for key in value):
            raise Refused("has a key that is not text")
        return {key: _accept_key(inside, key, inner) for key, inner in value.items()}

    return Kind(
        "dict", "a JSON object", example, json_value_of(dict), (Mapping,), check, inside=inside
    )


def accept_keys(values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Return the values of a JSON object, typed.

    :raises Refused: at the first key that is unknown or has a value of another kind.
    """
    for key in OF_ONE_CALL.keys() & values.keys() if "countdown" in kinds else ():
        raise Refused(f"has {key}, which {OF_ONE_CALL[key]}")
    inside = partial(_inside, kinds, "no")
    return {key: _accept_key(inside, key, value) for key, value in values.items()}


def _accept_key(inside: Callable[[str], Kind], key: str, value: Any) -> Any:
    try:
        kind = inside(key)
    except Refused as error:
        raise Refused(f"has the unknown key {key}", error.close) from None
    if kind is ANYTHING:
        return value  # JSON and Python say the type themselves
    try:
        return kind.accept(value)
    except Refused as error:
        problem = f"{error}; expected " if str(error) else "expected "
        raise Refused(f"has {key}: {problem}{kind.expected}", error.close) from None


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
    "format",
    "a logging format with %(message)s and the like",
    "%(levelname)s %(message)s",
    _format,
    prose=True,
)


@dataclass(frozen=True)
class Place:
    """Where a value is written.

    :param file: name of the file, or what else it is.
    :param section: name of the section, without brackets.
    :param key: the key as it is written.
    :param line: line of the key, counted from 1, where it is known.
    """

    file: str
    section: str
    key: str = ""
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"

    def fault(
        self,
        problem: str,
        *,
        value: object = None,
        expected: str | None = None,
        close: str | None = None,
    ) -> Fault:
        """Return what is wrong with the key here.

        :param value: what stands there; masked if the key, or what it was meant to be, is a secret.
        :param close: what was probably meant: a legal name, or the line as it should be.
        """
        name = f"{self.section} {self.key} {close or ''}"
        shown = None if value is None else str(masked(name, value))
        close = close and masked_text(close)
        if value is not None and self.key in ("args", "kwargs"):
            shown = MASK  # nobody knows the names of a task's parameters here
        return Fault(problem, self.file, self.line, self.section, self.key, shown, expected, close)

    def key_beside(self, key: str) -> Place:
        """Return the place of a key that is missing here."""
        return Place(self.file, self.section, f"{self.key} {key}".lstrip(), self.line)


@dataclass(frozen=True)
class Value:
    """The text of one key, interpolated, and its place; from Python it may be any value.

    :param literal: whether it stands in Python or JSON, which say themselves where a text ends.
    """

    text: object
    place: Place
    literal: bool = False

    def typed(self, kind: Kind) -> Any:
        """Return the value of a kind.

        :raises Refused: if it is of another one, or something stands around it.
        """
        self.check(kind)
        return kind.accept(self.text)

    def check(self, kind: Kind = TEXT) -> None:
        """Refuse a text of a file that has a comment behind the value, or quotes around it."""
        if isinstance(self.text, str) and not (self.literal or kind.prose):
            error = miswritten(self.text, kind.quotes)
            if error:
                raise error


class Faults(list[Fault]):
    """What is wrong, as it is found."""

    def at(self, place: Place, problem: str, **about: Any) -> None:
        """Add what is wrong with the key at ``place``; see :meth:`Place.fault`."""
        self.append(place.fault(problem, **about))

    @contextmanager
    def catching(self, value: Value, expected: str | None = None) -> Iterator[None]:
        """Add the fault of a value that is refused inside, and go on."""
        try:
            yield
        except Refused as error:
            close = error.close
            if isinstance(error, Miswritten):
                close, expected = _line(value, error.close), None
            self.at(value.place, str(error), value=value.text, expected=expected, close=close)

    def typed(
        self, values: Mapping[str, Value], kinds: Mapping[str, Kind], also: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Return the values that are right, typed.

        :param also: other legal keys, for suggestions.
        """
        found = {}
        for key, value in values.items():
            kind = kinds.get(key)
            if kind is None:
                reason = OF_ONE_CALL.get(key) if "countdown" in kinds else None
                close = None if reason else nearest(key, (*kinds, *also))
                problem = reason or "this key is not known"
                self.at(value.place, problem, value=value.text, close=close)
                continue
            with self.catching(value, kind.expected):
                found[key] = value.typed(kind)
        return found


def _line(value: Value, bare: str | None) -> str | None:
    """Return the line as it should be."""
    if not bare or "\n" in str(value.text):
        return bare or None
    key = value.place.key
    return f"{key} = {masked(f'{value.place.section} {key}', bare)}"
