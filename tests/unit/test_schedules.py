"""Schedules: text to schedule, what is refused, and what happens when the clock is changed."""

from __future__ import annotations

import pickle
from datetime import datetime, timedelta, timezone
from functools import cache
from zoneinfo import ZoneInfo

import pytest
from celery import Celery
from celery.schedules import crontab, solar
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.walks import walk

from ws_celery.converters import Refused
from ws_celery.schedules import SCHEDULE_TYPES, ZonedCrontab, describe, parse_schedule

BERLIN = "Europe/Berlin"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"minute": 0}', crontab(minute=0)),
        ('{"minute": "*/15"}', crontab(minute="*/15")),
        ('{"hour": 0, "minute": 0}', crontab(minute=0, hour=0)),
        ('{"minute": [0, 30], "hour": "8-17"}', crontab(minute="0,30", hour="8-17")),
        ('{"day_of_week": "mon-fri", "minute": 5}', crontab(minute=5, day_of_week="1-5")),
        ("*/15 * * * *", crontab(minute="*/15")),
        ("0 9 1,15 jan-jun *", crontab(0, 9, day_of_month="1,15", month_of_year="1-6")),
        ("0  22-2   * *  sunday", crontab(0, "22-2", day_of_week=0)),
        ("0 0 29 2 *", crontab(0, 0, day_of_month=29, month_of_year=2)),
    ],
)
def test_a_crontab_is_json_or_five_fields(text, expected):
    assert parse_schedule("crontab", text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"hours": 24}', timedelta(days=1)),
        ('{"minutes": 1, "seconds": 0.5}', timedelta(seconds=60.5)),
        ("24h", timedelta(days=1)),
        ("1h30m", timedelta(minutes=90)),
        ("1d 12h", timedelta(hours=36)),
        ("0.5s", timedelta(seconds=0.5)),
        ("2w", timedelta(weeks=2)),
    ],
)
def test_a_period_is_json_or_a_number_of_units(text, expected):
    assert parse_schedule("timedelta", text) == expected


def test_a_number_of_seconds_may_be_whole_or_not():
    assert parse_schedule("integer", "30") == timedelta(seconds=30)
    assert parse_schedule("number", "0.25") == timedelta(seconds=0.25)
    assert parse_schedule("number", " 30 ") == timedelta(seconds=30)


@pytest.mark.parametrize(
    "text", ["sunset 52.5 13.4", '{"event": "sunset", "lat": 52.5, "lon": 13.4}']
)
def test_the_sun_has_an_event_and_a_place(text):
    schedule = parse_schedule("solar", text)

    assert isinstance(schedule, solar)
    assert (schedule.event, schedule.lat, schedule.lon) == ("sunset", 52.5, 13.4)
    assert describe(schedule) == "sunset at 52.5 13.4"


@pytest.mark.parametrize(
    ("kind", "text", "words", "close"),
    [
        ("crontab", "0 24 * * *", "hour is from 0 to 23", "0"),
        ("crontab", "60 * * * *", "minute is from 0 to 59", "0"),
        ("crontab", "0 0 * * 7", "day_of_week is from 0 to 6", "0"),
        ("crontab", "0 0 0 * *", "day_of_month is from 1 to 31", None),
        ("crontab", "0 0 1 13 *", "month_of_year is from 1 to 12", None),
        ("crontab", "0 0 31 2 *", "never comes: day_of_month begins with 31", "29"),
        ("crontab", "0 0 31 4,6 *", "longest of these months has 30 days", "30"),
        ("crontab", '{"day_of_month": 30, "month_of_year": "feb"}', "never comes", "29"),
        ("crontab", "0 0 * * mondy", "or sun, mon", "mon"),
        ("crontab", "mar * * * *", "minute is from 0 to 59", None),
        ("crontab", "5/15 * * * *", "a step without a range", "5-59/15"),
        ("crontab", "*/0 * * * *", "a step is from 1 to 60", "*/59"),
        ("crontab", "*/70 * * * *", "a step is from 1 to 60", "*/59"),
        ("crontab", "1-5/2-3 * * * *", "is none of", None),
        ("crontab", "1,,2 * * * *", "is none of", None),
        ("crontab", "-1 * * * *", "is none of", None),
        ("crontab", "* * * *", "has 4 fields; a crontab has 5", None),
        ("crontab", "@daily", "has 1 fields", None),
        ("crontab", '{"minut": 0}', "the fields are minute, hour", "minute"),
        ("crontab", '{"second": 1}', "the fields are minute, hour", None),
        ("crontab", '{"minute": true}', "neither a number nor text", None),
        ("crontab", '{"minute": 0, "minute": 1}', "has the key 'minute' twice", None),
        ("crontab", "{}", "is no JSON object such as", None),
        ("crontab", "[]", "is no JSON object such as", None),
        ("crontab", '{"minute":', "is not JSON", None),
        ("timedelta", '{"hours": 0}', "longer than zero", None),
        ("timedelta", '{"hours": -1}', "longer than zero", None),
        ("timedelta", '{"hour": 1}', "the units are weeks", "hours"),
        ("timedelta", '{"hours": "1"}', "is no number", None),
        ("timedelta", '{"days": 1e12}', "longer than a calendar", None),
        ("timedelta", "soon", "neither a period such as", None),
        ("timedelta", "-1h", "neither a period such as", None),
        ("integer", "2.5", "no whole number of seconds", "type = number"),
        ("integer", "0", "longer than zero", None),
        ("number", "-0.5", "longer than zero", None),
        ("number", "nan", "is no number of seconds", None),
        ("number", "inf", "longer than a calendar", None),
        ("number", "1e-9", "longer than zero", None),
        ("solar", "sunsett 1 2", "the events are dawn_astronomical", "sunset"),
        ("solar", "sunset 91 0", "lat is from -90 to 90", None),
        ("solar", "sunset 0 181", "lon is from -180 to 180", None),
        ("solar", "sunset", "needs event, lat and lon", None),
    ],
)
def test_what_cannot_be_is_refused_with_the_range_and_a_suggestion(kind, text, words, close):
    with pytest.raises(Refused) as caught:
        parse_schedule(kind, text)

    assert words in str(caught.value)
    assert caught.value.close == close


@given(st.sampled_from(SCHEDULE_TYPES[:-1]), st.one_of(st.text(), st.text("0123456789*/-, ")))
def test_any_text_is_a_schedule_or_is_refused(kind, text):
    try:
        assert describe(parse_schedule(kind, text))
    except Refused as error:
        assert str(error)  # noqa: PT017 - both ends are right


# Time zones


def runs(line, first, last, zone=BERLIN):
    """Return when beat would run a crontab that it looks at every 20 seconds."""
    moment = first
    schedule = ZonedCrontab(
        **{
            name: getattr(parse_schedule("crontab", line), f"_orig_{name}")
            for name in ("minute", "hour", "day_of_week", "day_of_month", "month_of_year")
        },
        zone=zone,
        nowfun=lambda: moment,
        app=Celery(set_as_current=False),
    )
    previous, found = first, []
    while moment < last:
        if schedule.is_due(previous).is_due:
            found.append(moment.strftime("%d %H:%M"))
            previous = moment
        moment += timedelta(seconds=20)
    return found


def utc(month, day, hour, minute=0):
    return datetime(2026, month, day, hour, minute, 1, tzinfo=timezone.utc)


def test_a_crontab_with_a_zone_runs_by_the_clock_of_that_zone():
    assert runs("30 9 * * *", utc(1, 10, 0), utc(1, 12, 0)) == ["10 08:30", "11 08:30"]
    assert runs("30 9 * * *", utc(7, 10, 0), utc(7, 12, 0)) == ["10 07:30", "11 07:30"]


def test_an_hour_that_comes_twice_has_all_runs_of_a_crontab_for_every_hour():
    # 02:00 to 03:00 is 00:00 to 01:00 and again 01:00 to 02:00 UTC.
    expected = [f"25 0{hour}:{minute:02}" for hour in (0, 1) for minute in (0, 20, 40)]

    assert runs("*/20 * * * *", utc(10, 24, 23, 50), utc(10, 25, 1, 59)) == expected


def test_beat_that_starts_in_the_second_pass_does_not_run_all_the_time():
    assert runs("*/20 * * * *", utc(10, 25, 1, 5), utc(10, 25, 2, 30)) == [
        *("25 01:20", "25 01:40", "25 02:00", "25 02:20")
    ]


def test_an_hour_that_comes_twice_has_one_run_of_a_crontab_for_that_hour():
    assert runs("30 2 * * *", utc(10, 24, 12), utc(10, 26, 12)) == ["25 00:30", "26 01:30"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("30 2 * * *", ["28 01:30", "29 01:00", "30 00:30"]),
        ("0,30 2 * * *", ["28 01:00", "28 01:30", "29 01:00", "30 00:00", "30 00:30"]),
        ("30 2 29 3 *", ["29 01:00"]),
        ("0 2,3 29 * *", ["29 01:00"]),
    ],
)
def test_what_falls_into_the_hour_that_is_left_out_runs_right_after_it_once(line, expected):
    # 02:00 to 03:00 is left out on the 29th, at 01:00 UTC.
    assert runs(line, utc(3, 28, 0), utc(3, 30, 12)) == expected


def test_a_crontab_for_every_hour_runs_by_the_clock_around_the_hour_that_is_left_out():
    found = runs("30 * * * *", utc(3, 28, 23), utc(3, 29, 3))

    assert found == ["28 23:30", "29 00:30", "29 01:30", "29 02:30"]


@pytest.mark.parametrize(
    ("zone", "line", "last", "expected"),
    [
        (BERLIN, "*/20 0-5 * * *", "2025-10-26T01:05Z", "2025-10-26T02:00Z"),
        (BERLIN, "*/20 0-5 * * *", "2025-10-26T00:45Z", "2025-10-26T02:00Z"),
        (BERLIN, "30 2 * * *", "2025-10-26T01:05Z", "2025-10-27T01:30Z"),
        ("Africa/Cairo", "45 23 * * *", "2025-10-30T21:10Z", "2025-10-31T21:45Z"),
        ("America/Santiago", "45 23 * * *", "2025-04-06T03:10Z", "2025-04-07T03:45Z"),
        # The hour before midnight comes twice, or the one after it is left out.
        ("America/Santiago", "30 * * * sat", "2025-04-06T02:30Z", "2025-04-06T03:30Z"),
        ("Africa/Cairo", "30 * * * *", "2025-04-24T21:30Z", "2025-04-24T22:30Z"),
        # The last hour of Saturday is left out.
        ("America/Nuuk", "30 * * * sat", "2025-03-30T00:30Z", "2025-04-05T01:30Z"),
    ],
)
def test_the_next_run_after_a_last_run_near_a_change(zone, line, last, expected):
    assert following(line, zone, instant(last)) == instant(expected)


def test_a_last_run_that_the_clock_leaves_out_is_followed_by_a_later_one():
    left_out = datetime(2025, 3, 30, 2, 10, tzinfo=ZoneInfo(BERLIN))  # 03:10
    schedule = parse_schedule("crontab", "30 2 * * *", BERLIN)
    schedule.nowfun = lambda: instant("2025-03-30T01:10Z")

    assert schedule.remaining_estimate(left_out) == timedelta(hours=23, minutes=20)


CHANGING = (BERLIN, "America/Santiago", "Africa/Cairo", "Australia/Lord_Howe", "America/New_York")


def instant(text):
    return datetime.strptime(text, "%Y-%m-%dT%H:%MZ").replace(tzinfo=timezone.utc)


def following(line, zone, last):
    schedule = parse_schedule("crontab", line, zone)
    schedule.nowfun = lambda: last
    return last + schedule.remaining_estimate(last)


@cache
def changes(zone):
    """Return the first instants after the changes of the clock in 2025."""
    hours = [instant("2025-01-01T00:00Z") + timedelta(minutes=30 * n) for n in range(365 * 48)]
    offsets = [hour.astimezone(ZoneInfo(zone)).utcoffset() for hour in hours]
    return [
        hour for hour, old, new in zip(hours[1:], offsets, offsets[1:], strict=False) if old != new
    ]


MINUTES = st.sampled_from(("0", "30", "10,35", "45", "59", "*/20", "*/7", "*"))
HOURS = st.one_of(
    st.just("*"),
    st.sampled_from(("0", "1", "2", "3", "23", "0-5", "2,3", "1-3", "22-1", "*/2", "1-23")),
)
DAYS = st.sampled_from(("* * *", "* * sun", "* * sat", "* * thu,fri", "1-15 * *", "* 4,10 sun"))


@settings(max_examples=400, deadline=None)
@given(st.data(), st.sampled_from(CHANGING), MINUTES, HOURS, DAYS)
def test_the_next_run_is_the_one_of_a_walk_over_every_minute(data, zone, minute, hour, days):
    line = f"{minute} {hour} {days}"
    change = data.draw(st.sampled_from(changes(zone)), "change")
    # Around the change, with both passes; or up to a day and a half away.
    away = data.draw(st.integers(-130, 130) | st.integers(-36 * 60, 36 * 60), "minutes away")
    last = change + timedelta(minutes=away, seconds=data.draw(st.integers(0, 59), "seconds"))

    found = following(line, zone, last)

    end = change + timedelta(days=3)
    after = last + timedelta(microseconds=1)
    expected = next(walk(parse_schedule("crontab", line, zone), zone, after, end), None)
    assert found == expected if expected else found > end


def test_a_change_of_half_an_hour_is_a_change():
    found = runs("*/30 * * * *", utc(4, 4, 13, 50), utc(4, 4, 16, 10), "Australia/Lord_Howe")

    assert found == ["04 14:00", "04 14:30", "04 15:00", "04 15:30", "04 16:00"]


def test_a_yearly_crontab_does_not_search_the_whole_year():
    assert runs("0 * 1 1 *", utc(10, 25, 0, 50), utc(10, 25, 3)) == []


def test_without_a_zone_the_zone_is_the_one_of_the_app():
    app = Celery(set_as_current=False)
    app.conf.timezone = BERLIN
    schedule = parse_schedule("crontab", "0 9 * * *")
    schedule.app = app

    assert schedule.tz == app.timezone
    assert schedule.now().utcoffset() == datetime.now(app.timezone).utcoffset()


def test_a_zone_gives_the_current_time_in_that_zone():
    schedule = parse_schedule("crontab", "0 9 * * *", "Asia/Tokyo")

    assert schedule.now().utcoffset() == timedelta(hours=9)


def test_a_crontab_survives_the_file_of_beat():
    schedule = parse_schedule("crontab", "0 9 * * mon-fri", BERLIN)

    again = pickle.loads(pickle.dumps(schedule))  # noqa: S301 - our own

    assert again == schedule
    assert (again.zone, describe(again)) == (BERLIN, f"0 9 * * mon-fri ({BERLIN})")


def test_crontabs_in_different_zones_are_different():
    one, other = (parse_schedule("crontab", "0 9 * * *", zone) for zone in (BERLIN, "UTC"))

    assert one != other
    assert one != "0 9 * * *"


def test_a_period_describes_itself():
    assert describe(parse_schedule("timedelta", "90m")) == "every 1:30:00"
    assert describe(30) == "30"
