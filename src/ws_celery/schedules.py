"""Text to schedule, and back: ``type``, ``schedule``, ``timezone`` of ``[celerybeat:NAME]``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone, tzinfo
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard
from zoneinfo import ZoneInfo

from celery.exceptions import ImproperlyConfigured
from celery.schedules import (
    BaseSchedule,
    ParseException,
    crontab,
    crontab_parser,
    solar,
)
from celery.utils.time import ffwd

from ws_celery.compat import crontab_fields, solar_events
from ws_celery.converters import Refused, json_value, moment, nearest, period, utc

if TYPE_CHECKING:
    from celery import Celery

__all__ = (
    "KEYS_OF_TYPES",
    "SCHEDULE_TYPES",
    "Clocked",
    "ZonedCrontab",
    "describe",
    "parse_schedule",
    "text_of_schedule",
)

_MINUTE = timedelta(minutes=1)


class ZonedCrontab(crontab):
    """A crontab in a time zone of its own, which need not be the application's.

    A crontab for every hour runs whenever the clock shows its minutes: in both passes of an hour
    that comes twice, and not in one that is left out. One for certain hours runs in the first pass
    only; if it has any runs in an hour that is left out, it runs once instead, at the first moment
    after it.

    :param zone: name of the time zone; the application's by default.
    :param nowfun: returns the current time, for tests.
    :param app: the Celery app.

    The other parameters are those of :class:`celery.schedules.crontab`.
    """

    def __init__(
        self,
        *fields: Any,
        zone: str | None = None,
        nowfun: Callable[[], datetime] | None = None,
        app: Celery | None = None,
        **named: Any,
    ) -> None:
        self.zone = zone
        super().__init__(*fields, nowfun=nowfun, app=app, **named)

    @property
    def tz(self) -> tzinfo:
        """The time zone that the fields are meant in."""
        return ZoneInfo(self.zone) if self.zone else self.app.timezone

    def now(self) -> datetime:
        """Return the current time, in the zone where it has one."""
        if self.nowfun or not self.zone:
            return super().now()
        return datetime.now(self.tz)

    def remaining_estimate(self, last_run_at: datetime, ffwd: type = ffwd) -> timedelta:
        """Return the time from now to the run that follows ``last_run_at``; negative if past."""
        start, now = (self.maybe_make_aware(moment) for moment in (last_run_at, self.now()))
        return self._following(start, ffwd) - now.astimezone(timezone.utc)

    def maybe_make_aware(self, dt: datetime, *args: Any, **options: Any) -> datetime:
        """Return ``dt`` in the zone of the fields."""
        # Before 5.7 Celery leaves an aware time in the zone that it came in, or takes the wrong
        # offset near a change.
        aware = super().maybe_make_aware(dt, *args, **options) if dt.tzinfo is None else dt
        # By way of UTC, as a time in this very zone may be one that the clock leaves out.
        return aware.astimezone(timezone.utc).astimezone(self.tz)

    def _following(self, start: datetime, ffwd: type) -> datetime:
        """Return the instant, in UTC, of the run that follows ``start``."""
        every_hour = len(self.hour) == 24
        if start.fold or (every_hour and _offset(start, 0) != _offset(start, 1)):
            # Celery reads the clock, which does not tell the passes of a repeated hour apart.
            moment = _next_minute(start)
            while _offset(local := moment.astimezone(self.tz), 0) != _offset(local, 1):
                if every_hour and self._matches(local):
                    return moment
                moment += _MINUTE
            start = local - _MINUTE
        _, delta, _ = self.remaining_delta(start, ffwd=ffwd)
        wall = (start + delta).replace(fold=0)
        due: datetime = wall.astimezone(timezone.utc)
        if _is_shown(wall):
            return due
        # The clock leaves it out: ``due`` is after the gap, and this is before it.
        moment = wall.replace(fold=1).astimezone(timezone.utc)
        while moment.astimezone(self.tz).utcoffset() == wall.utcoffset():
            moment += _MINUTE
        if not every_hour:
            return moment
        # Walked because Celery before 5.7 reads the day of ``now``, too, which may be another one.
        for _ in range(60):
            if self._matches(moment.astimezone(self.tz)):
                return moment
            moment += _MINUTE
        return self._following((moment - _MINUTE).astimezone(self.tz), ffwd)

    def _matches(self, local: datetime) -> bool:
        return (
            local.minute in self.minute
            and local.month in self.month_of_year
            and local.day in self.day_of_month
            and local.isoweekday() % 7 in self.day_of_week
        )

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(type(self), zone=self.zone, nowfun=self.nowfun)
        return make, tuple(crontab_fields(self).values())

    def __eq__(self, other: object) -> bool:
        same = super().__eq__(other)
        if same is not True:
            return same
        return bool(getattr(other, "zone", None) == self.zone)

    __hash__ = None  # type: ignore[assignment]


def _offset(local: datetime, fold: int) -> timedelta | None:
    return local.replace(fold=fold).utcoffset()


def _next_minute(moment: datetime) -> datetime:
    return moment.astimezone(timezone.utc).replace(second=0, microsecond=0) + _MINUTE


def _is_shown(wall: datetime) -> bool:
    """Return whether the clock ever shows ``wall``, or leaves it out."""
    there = wall.astimezone(timezone.utc).astimezone(wall.tzinfo)
    return there.replace(tzinfo=None) == wall.replace(tzinfo=None)


class Clocked(BaseSchedule):
    """One run at a certain time, and no other; for the schedule in the database only.

    :param at: the time, with its zone.

    The other parameters are those of :class:`celery.schedules.BaseSchedule`.
    """

    def __init__(self, at: datetime, **options: Any) -> None:
        self.at = at.astimezone(timezone.utc)
        super().__init__(**options)

    def __repr__(self) -> str:
        return f"<clocked: {self.at.isoformat()}>"

    def __eq__(self, other: object) -> bool:
        return self.at == other.at if isinstance(other, Clocked) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.at)


# --- Crontabs ---------------------------------------------------------------------------------

#: Field to least and most value, in the order of a crontab line.
_FIELDS = {
    "minute": (0, 59),
    "hour": (0, 23),
    "day_of_month": (1, 31),
    "month_of_year": (1, 12),
    "day_of_week": (0, 6),
}
_MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_DAYS = ["sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday"]
_NAMES = {"month_of_year": _MONTHS, "day_of_week": _DAYS}
#: The longest that each month, from January, can be.
_MONTH_LENGTHS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
#: Other programs' words for midnight, Sunday and the full hour.
_OTHER_ZEROS = {("hour", "24"), ("day_of_week", "7"), ("minute", "60")}
_PART = re.compile(r"(?:\*|(?P<first>\w+)(?:-(?P<last>\w+))?)(?:/(?P<step>\w+))?", re.ASCII)


def _crontab(value: object, zone: str | None) -> crontab:
    fields = _crontab_fields(value)
    specs = {name: _spec(name, field) for name, field in fields.items()}
    try:
        _check_days(specs)
        return ZonedCrontab(zone=zone, **dict[str, Any](specs))
    except (ParseException, IndexError) as error:
        raise Refused(f"is no crontab ({error})") from None


def _check_days(specs: Mapping[str, str]) -> None:
    first = min(crontab_parser(31, 1).parse(specs.get("day_of_month", "*")))
    months = crontab_parser(12, 1).parse(specs.get("month_of_year", "*"))
    longest = max(_MONTH_LENGTHS[month - 1] for month in months)
    if first > longest:
        raise Refused(
            f"never comes: day_of_month begins with {first}, and the longest of these months has "
            f"{longest} days",
            str(longest),
        )


def _crontab_fields(value: object) -> Mapping[str, Any]:
    if _is_line(value):
        words = value.split()
        if len(words) != len(_FIELDS):
            raise Refused(
                f"has {len(words)} fields; a crontab has 5 (minute, hour, day of month, month, "
                'day of week), such as */15 * * * *, or is a JSON object such as {"minute": "*/15"}'
            )
        return dict(zip(_FIELDS, words, strict=True))
    fields = _json_object(value, '{"minute": "*/15"}')
    for name in fields:
        if name not in _FIELDS:
            names = ", ".join(_FIELDS)
            raise Refused(
                f"has the unknown field {name}; the fields are {names}", nearest(name, _FIELDS)
            )
    return fields


def _spec(name: str, field: object) -> str:
    if isinstance(field, list) and field:
        return ",".join(_spec(name, each) for each in field)
    if isinstance(field, bool) or not isinstance(field, (str, int)):
        raise Refused(f"has {name} = {field!r}, which is neither a number nor text")
    text = str(field).replace(" ", "").lower()
    for part in text.split(","):
        _check_part(name, part)
    return text


def _check_part(name: str, part: str) -> None:
    least, most = _FIELDS[name]
    match = _PART.fullmatch(part)
    if not match:
        raise Refused(f"has {name} = {part!r}, which is none of *, 5, 1-5, */2, 1-5/2 and a list")
    for text in (match["first"], match["last"]):
        if text is not None:
            _check_number(name, text)
    step = match["step"]
    if step is None:
        return
    if match["first"] and not match["last"]:
        raise Refused(
            f"has {name} = {part!r}, a step without a range", f"{match['first']}-{most}/{step}"
        )
    if not step.isdigit() or not 1 <= int(step[:9]) <= most - least + 1:
        raise Refused(
            f"has {name} = {part!r}; a step is from 1 to {most - least + 1}", f"*/{most - least}"
        )


def _check_number(name: str, text: str) -> None:
    least, most = _FIELDS[name]
    names = _NAMES.get(name, [])
    if text.isdigit() and least <= int(text[:9]) <= most:
        return
    if len(text) >= 3 and any(each.startswith(text) for each in names):
        return
    short = [each[:3] for each in names]
    words = f" or {', '.join(short)}" if short else ""
    close = "0" if (name, text) in _OTHER_ZEROS else nearest(text, short)
    raise Refused(f"has {name} = {text!r}; {name} is from {least} to {most}{words}", close)


# --- Periods and the sun ----------------------------------------------------------------------

_PERIOD_UNITS = ["weeks", "days", "hours", "minutes", "seconds", "milliseconds", "microseconds"]


def _timedelta(value: object) -> timedelta:
    if _is_line(value):
        seconds = period(value)
        if seconds is None:
            raise Refused('is neither a period such as 24h or 1h30m nor JSON such as {"hours": 24}')
        return _positive(seconds=seconds)
    fields = _json_object(value, '{"hours": 24}')
    for name, amount in fields.items():
        if name not in _PERIOD_UNITS:
            units = ", ".join(_PERIOD_UNITS)
            raise Refused(
                f"has the unknown unit {name}; the units are {units}", nearest(name, _PERIOD_UNITS)
            )
        if isinstance(amount, bool) or not isinstance(amount, (int, float)):
            raise Refused(f"has {name} = {amount!r}, which is no number")
    return _positive(**fields)


def _integer(value: object) -> timedelta:
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value):
        return _positive(seconds=int(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return _positive(seconds=value)
    raise Refused("is no whole number of seconds", "type = number")


def _number(value: object) -> timedelta:
    seconds = _float(value)
    if math.isnan(seconds):
        raise Refused("is no number of seconds")
    return _positive(seconds=seconds)


def _float(value: object) -> float:
    """Return a number as such; one that is none is not a number, one that is too big infinite."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        return math.nan


def _positive(**amounts: float) -> timedelta:
    try:
        duration = timedelta(**amounts)
    except (OverflowError, ValueError):
        raise Refused("is longer than a calendar") from None
    if duration <= timedelta(0):
        raise Refused("is no period: it must be longer than zero")
    return duration


def _solar(value: object) -> solar:
    if _is_line(value):
        value = dict(zip(("event", "lat", "lon"), value.split(), strict=False))
    fields = _json_object(value, '{"event": "sunset", "lat": 52.5, "lon": 13.4}')
    if set(fields) != {"event", "lat", "lon"}:
        raise Refused("needs event, lat and lon, such as sunset 52.5 13.4")
    event = fields["event"]
    if not isinstance(event, str) or event not in solar_events():
        events = ", ".join(sorted(solar_events()))
        raise Refused(
            f"has the unknown event {event!r}; the events are {events}",
            nearest(str(event), solar_events()),
        )
    lat, lon = _degrees(fields, "lat", 90), _degrees(fields, "lon", 180)
    try:
        return solar(event, lat, lon)
    except ImproperlyConfigured:
        raise Refused("needs the package ephem; pip install 'celery[solar]'") from None


def _degrees(fields: Mapping[str, Any], name: str, most: int) -> float:
    degrees = _float(fields[name])
    if not -most <= degrees <= most:
        raise Refused(f"has {name} = {fields[name]!r}; {name} is from -{most} to {most}")
    return degrees


def _is_line(value: object) -> TypeGuard[str]:
    """Return whether a schedule is written in words, and not as JSON."""
    return isinstance(value, str) and not value.startswith(("{", "["))


def _json_object(value: object, example: str) -> dict[str, Any]:
    fields = json_value(value) if isinstance(value, str) else value
    if not isinstance(fields, dict) or not fields:
        raise Refused(f"is no JSON object such as {example}")
    return fields


def _clocked(value: object, zone: str | None) -> Clocked:
    if not isinstance(value, str):
        raise Refused("is no time such as 2027-01-31T09:00+01:00")
    time = moment(value)
    if time.utcoffset() is None:
        if not zone:
            raise Refused("needs a timezone, or an offset from UTC", f"{time.isoformat()}+00:00")
        time = time.replace(tzinfo=ZoneInfo(zone))
    return Clocked(utc(time))


#: Parser of ``schedule`` for each ``type`` that has nothing to do with a time zone.
_PARSERS: dict[str, Callable[[object], BaseSchedule | timedelta]] = {
    "timedelta": _timedelta,
    "integer": _integer,
    "number": _number,
    "solar": _solar,
}
#: Parsers that take a zone as well.
_ZONED_PARSERS: dict[str, Callable[[object, str | None], BaseSchedule]] = {
    "crontab": _crontab,
    "clocked": _clocked,
}
SCHEDULE_TYPES = ("crontab", *_PARSERS, "clocked")
#: For which types other keys of an entry have a meaning.
KEYS_OF_TYPES = {"timezone": tuple(_ZONED_PARSERS), "relative": SCHEDULE_TYPES[1:4]}


def parse_schedule(kind: str, value: object, zone: str | None = None) -> BaseSchedule | timedelta:
    """Return the Celery schedule, or the period, that ``value`` describes.

    :param kind: one of :data:`SCHEDULE_TYPES`.
    :param value: text, or what a JSON text would hold.
    :param zone: name of the time zone that a crontab, or a time without an offset, is meant in.
    :raises Refused: with the field, its range, and perhaps a suggestion.
    :raises KeyError: if ``kind`` is unknown.
    """
    if isinstance(value, str):
        value = value.strip()
    if kind in _ZONED_PARSERS:
        return _ZONED_PARSERS[kind](value, zone)
    return _PARSERS[kind](value)


def text_of_schedule(schedule: BaseSchedule | timedelta | float) -> dict[str, Any]:
    """Return the keys of an entry that say what ``schedule`` is: ``type``, ``schedule`` and so on.

    It is the way back from :func:`parse_schedule`. A schedule that no text can say has the type
    ``python``.
    """
    if isinstance(schedule, crontab):
        fields = crontab_fields(schedule)
        line = " ".join(_field_text(fields[name]) for name in _FIELDS)
        zone = getattr(schedule, "zone", None)
        return {"type": "crontab", "schedule": line, **({"timezone": zone} if zone else {})}
    if isinstance(schedule, solar):
        place = f"{schedule.event} {schedule.lat} {schedule.lon}"
        return {"type": "solar", "schedule": place}
    if isinstance(schedule, Clocked):
        return {"type": "clocked", "schedule": schedule.at.isoformat()}
    every = getattr(schedule, "run_every", schedule)
    seconds = every.total_seconds() if isinstance(every, timedelta) else every
    if isinstance(seconds, (int, float)):
        relative = {"relative": True} if getattr(schedule, "relative", False) else {}
        return {"type": "number", "schedule": f"{seconds:.15g}", **relative}
    return {"type": "python", "schedule": str(schedule)}


def _field_text(field: object) -> str:
    items = field if isinstance(field, (list, tuple, set, frozenset)) else [field]
    return ",".join(str(item).replace(" ", "") for item in items)


def describe(schedule: BaseSchedule | timedelta | float) -> str:
    """Return a schedule in words that fit on one line."""
    if isinstance(schedule, crontab):
        text = text_of_schedule(schedule)
        zone = f" ({text['timezone']})" if "timezone" in text else ""
        return f"{text['schedule']}{zone}"
    if isinstance(schedule, Clocked):
        return f"once at {schedule.at.isoformat(sep=' ', timespec='seconds')}"
    if isinstance(schedule, solar):
        return f"{schedule.event} at {schedule.lat} {schedule.lon}"
    every = getattr(schedule, "run_every", schedule)
    return f"every {every}" if isinstance(every, timedelta) else str(every)
