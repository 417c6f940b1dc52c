"""From a text to a value, for all that is configured as text.

What is not understood is refused: a wrong guess would be a setting that lies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import datetime, timezone
from difflib import get_close_matches
from typing import Any

__all__ = ("Refused", "aware", "json_value", "moment", "nearest", "period", "untyped", "utc")

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


class Refused(ValueError):
    """A value that is not of the kind; the message may be empty where the kind's words say it all.

    :param problem: what is wrong with this value.
    :param close: the legal value that is most like it.
    """

    def __init__(self, problem: str = "", close: str | None = None) -> None:
        super().__init__(problem)
        self.close = close


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


def period(text: str) -> float | None:
    """Return the seconds of ``1h30m``, ``24h`` or ``1.5d``; ``None`` if it is none of the sort."""
    match = _PERIOD.fullmatch(text.strip())
    if not match or not any(match.groups()):
        return None
    return sum(float(match[unit] or 0) * seconds for unit, seconds in _UNITS.items())


def moment(text: str) -> datetime:
    """Return the time that an ISO 8601 text says, with its offset if it has one.

    :raises Refused: if it is none.
    """
    try:
        # Python 3.10 does not know the Z.
        found = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", text.strip()))
    except ValueError:
        raise Refused("is no time such as 2027-01-31T09:00+01:00") from None
    if found.utcoffset() is not None:
        utc(found)
    return found


def utc(time: datetime) -> datetime:
    """Return a time that has an offset in UTC.

    :raises Refused: if the calendar ends between here and there.
    """
    try:
        return time.astimezone(timezone.utc)
    except OverflowError:
        raise Refused("is not within the years 1 to 9999 in UTC") from None


def aware(time: datetime) -> datetime:
    """Return a time with its zone: UTC where none is kept, as by some databases and by Celery."""
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)
