"""Text to schedule: ``type`` and ``schedule`` of a ``[celerybeat:NAME]`` section."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from celery.schedules import ParseException, crontab

__all__ = ("SCHEDULE_TYPES", "parse_schedule")


def _crontab(text: str) -> crontab:
    fields = _json_object(text, '{"minute": "*/15"}')
    try:
        return crontab(**{name: str(value) for name, value in fields.items()})
    except TypeError:
        names = ("minute", "hour", "day_of_week", "day_of_month", "month_of_year")
        unknown = ", ".join(sorted(set(fields) - set(names)))
        raise ValueError(f"unknown field {unknown}; the fields are {', '.join(names)}") from None
    except (ParseException, ValueError) as error:
        raise ValueError(str(error)) from None


def _timedelta(text: str) -> timedelta:
    fields = _json_object(text, '{"hours": 24}')
    try:
        period = timedelta(**fields)
    except TypeError as error:
        raise ValueError(f"{error}; expected numbers of days, hours, minutes, seconds") from None
    return _positive(period)


def _integer(text: str) -> timedelta:
    try:
        period = timedelta(seconds=int(text))
    except ValueError:
        raise ValueError("expected a whole number of seconds") from None
    return _positive(period)


def _positive(period: timedelta) -> timedelta:
    if period <= timedelta(0):
        raise ValueError("the period must be longer than zero")
    return period


def _json_object(text: str, example: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error}); expected an object such as {example}") from None
    if not isinstance(fields, dict) or not fields:
        raise ValueError(f"expected a JSON object such as {example}")
    return fields


#: Parser of ``schedule`` for each ``type``.
SCHEDULE_TYPES: dict[str, Callable[[str], crontab | timedelta]] = {
    "crontab": _crontab,
    "timedelta": _timedelta,
    "integer": _integer,
}


def parse_schedule(kind: str, text: str) -> crontab | timedelta:
    """Return the Celery schedule that ``text`` describes.

    :param kind: a key of :data:`SCHEDULE_TYPES`.
    :param text: a JSON object for crontab and timedelta, a number of seconds for integer.
    :raises ValueError: with what is wrong and what was expected.
    :raises KeyError: if ``kind`` is unknown.
    """
    return SCHEDULE_TYPES[kind](text.strip())
