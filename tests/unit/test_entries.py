"""Entries of the schedule, merged from code, INI and database."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone

import pytest
from celery import signature
from celery.schedules import crontab, schedule
from kombu import Queue
from tests.sections import celery_settings

from ws_celery.beat.entries import Known, check_fields, merge
from ws_celery.converters import Refused
from ws_celery.schedules import Clocked, ZonedCrontab, describe, parse_schedule, text_of_schedule
from ws_celery.settings import read_configuration

HOURLY = {"task": "t", "type": "timedelta", "schedule": "1h"}


def merged(code=None, ini=None, **fields):
    """Return the entry ``e`` that code, INI and database make."""
    known = Known("e", origin=fields.pop("origin", "ini"), fields=fields)
    sources = ({"e": source} if source else {} for source in (code, ini))
    return merge(*sources, {"e": known}).get("e")


def test_the_database_counts_more_than_the_ini_and_the_ini_more_than_code():
    entry = merged(
        {"task": "t", "schedule": 60, "args": (1,), "kwargs": {"a": 1}},
        {"schedule": "2h", "type": "timedelta", "kwargs": {"a": 2}},
        kwargs={"a": 3},
    )

    assert (entry.task, entry.args, entry.kwargs) == ("t", (1,), {"a": 3})
    assert entry.schedule == schedule(timedelta(hours=2))
    assert entry.origins == {
        "task": "code",
        "args": "code",
        "type": "ini",
        "schedule": "ini",
        "kwargs": "database",
    }
    assert entry.origin == "code"
    assert entry.ticks


def test_a_schedule_alone_keeps_the_type_of_the_source_below():
    assert merged(ini=HOURLY, schedule="2h").schedule == schedule(timedelta(hours=2))


def test_a_type_takes_nothing_of_the_schedule_below():
    ini = {"task": "t", "type": "crontab", "schedule": "0 3 * * *", "timezone": "Europe/Berlin"}

    entry = merged(ini=ini, type="integer", schedule="5")

    assert (entry.schedule, entry.timezone) == (schedule(timedelta(seconds=5)), None)
    assert "timezone" not in entry.origins


def test_an_edited_entry_whose_source_is_gone_is_orphaned_and_does_not_tick():
    entry = merged(**HOURLY)

    assert entry.orphaned
    assert not entry.ticks


def test_an_entry_that_is_gone_and_was_not_edited_is_no_entry():
    assert merged() is None
    assert merged(ini={"enabled": False}) is None


def test_an_entry_of_the_database_needs_no_other_source():
    entry = merged(**HOURLY, origin="database")

    assert (entry.ticks, entry.origin) == (True, "database")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"schedule": None}, "has no schedule"),
        ({"schedule": "often"}, "schedule = 'often' is neither a period such as 24h"),
        (
            {"type": "cron", "schedule": "1h"},
            "has the type 'cron', which is none of .*; did you mean crontab?",
        ),
        ({"type": 3, "schedule": "1h"}, "has the type 3"),
        ({"type": None, "schedule": True}, "has the type None"),
        ({"type": None, "schedule": []}, "has the type None"),
        ({"type": "integer", "schedule": 5, "timezone": "UTC"}, "for which timezone has no"),
        ({"overlap": "skp"}, "overlap = 'skp' is not allow or skip; did you mean skip?"),
        ({"args": {"a": 1}}, r"^args = '\*{8}' is of the type dict"),
        ({"options": {"que": "a"}}, "has the unknown key que; did you mean queue?"),
        ({"options": {"link": {"task": "t"}}}, "has the unknown key link"),
        (
            {"options": {"task_id": "a"}},
            "has task_id, which cannot be set: each call and each tick has an id of its own; leave "
            "it out$",
        ),
        ({"options": {"eta": "2027-01-31T09:00Z"}}, "has eta, which .*; write countdown, in sec"),
        ({"enabledd": False}, "has the unknown field enabledd; did you mean enabled?"),
        ({"starts_at": "2027-01-31T09:00"}, "has no offset from UTC; did you mean 2027-01-31T09"),
        ({"expires": "tomorrow"}, "is no time such as"),
        ({"type": "clocked", "schedule": "2027-01-31 09:00"}, "needs a timezone, or an offset"),
        ({"type": "clocked", "schedule": 5}, "is no time such as"),
        ({"type": "clocked", "schedule": "0001-01-01T00:00+14:00"}, "is not within the years 1"),
        (
            {"type": "clocked", "schedule": "0001-01-01T00:00", "timezone": "Asia/Tokyo"},
            "is not within the years 1",
        ),
        ({"starts_at": "9999-12-31T23:59:59-05:00"}, "is not within the years 1 to 9999"),
        ({"expires": "9999-12-31T23:59:59-05:00"}, "is not within the years 1 to 9999"),
        ({"type": {"a": 1}, "schedule": "1h"}, "has the type {'a': 1}, which is none of"),
        ({"type": "number", "schedule": 10**400}, "is longer than a calendar"),
        (
            {"type": "solar", "schedule": {"event": ["x"], "lat": 1, "lon": 1}},
            r"has the unknown event \['x'\]",
        ),
        (
            {"type": "solar", "schedule": {"event": "sunset", "lat": 10**400, "lon": 1}},
            "lat is from -90 to 90",
        ),
    ],
)
def test_what_is_wrong_sets_the_entry_aside_and_is_told(fields, problem):
    entry = merged(ini=HOURLY, **fields)

    assert re.search(problem, entry.problem)
    assert not entry.ticks


@pytest.mark.parametrize(
    ("number", "problem"),
    [
        (1e300, "is longer than a calendar"),
        (10**31, "is longer than a calendar"),
        (float("inf"), "is longer than a calendar"),
        (float("nan"), "is no number of seconds"),
        (0, "must be longer than zero"),
        (-5, "must be longer than zero"),
        (timedelta(seconds=-5), "must be longer than zero"),
        (schedule(timedelta(0)), "must be longer than zero"),
    ],
)
def test_a_number_or_a_period_that_is_no_period_sets_the_entry_aside(number, problem):
    entry = merged({"task": "t", "schedule": number})

    assert problem in entry.problem
    assert not entry.ticks


def test_code_may_give_whatever_option_a_call_takes():
    options = {
        "link": [signature("after")],
        "argsrepr": "(...)",
        "expires": datetime(2030, 1, 1, tzinfo=timezone.utc),
        "queue": Queue("slow"),
        "priority": None,
        "stamped_headers": ["tenant"],
        "tenant": "a",
    }

    entry = merged({**HOURLY, "options": options})
    assert (entry.problem, entry.options) == (None, options)
    schedule = {"e": {"task": "t", "schedule": 60, "options": options}}
    read = read_configuration(None, {}, {"beat_schedule": schedule}, need_broker=False)
    assert read.settings["beat_schedule"]["e"]["options"] == options


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"que": Queue("a")}, "has the unknown key que; did you mean queue?"),
        ({"priority": "high"}, "has priority: expected"),
        (
            {"task_id": "1"},
            "has task_id, which cannot be set: each call and each tick has an id of its own",
        ),
        ({"producer": object()}, "has the unknown key producer"),
    ],
)
def test_code_may_not_give_what_no_call_takes(options, problem):
    assert problem in merged({**HOURLY, "options": options}).problem


def test_whatever_a_conversion_raises_is_the_problem_of_its_entry(monkeypatch):
    def fail(*_, **__):
        raise LookupError("unheard of")

    monkeypatch.setattr("ws_celery.beat.entries.parse_schedule", fail)
    monkeypatch.setattr("ws_celery.beat.entries.accept_options", fail)
    entry = merged(ini=HOURLY, options={"queue": "q"})

    assert entry.problem == (
        "options = {'queue': 'q'} is not a JSON object (LookupError: unheard of); "
        "schedule = '1h' is not a schedule (LookupError: unheard of)"
    )


def test_an_entry_without_a_task_or_a_schedule_is_set_aside():
    entry = merged(origin="database", description="to be")

    assert entry.problem == "has no task; has no schedule"
    assert entry.words == ""


def test_fields_are_checked_before_they_are_stored():
    check_fields({"description": "a part is enough"})
    check_fields({"schedule": "1h"})
    with pytest.raises(Refused, match="is neither a period"):
        check_fields({"type": "timedelta", "schedule": "x"})


def test_the_fields_of_an_entry_make_the_same_entry_again():
    ini = {
        "task": "t",
        "type": "crontab",
        "schedule": {"minute": 0},
        "timezone": "Asia/Tokyo",
        "args": [1],
        "options": {"queue": "q"},
        "catch_up": "once",
        "overlap": "skip",
        "starts_at": "2027-01-31T09:00+01:00",
        "expires": "2028-01-31T09:00Z",
        "enabled": False,
        "description": "what for",
    }
    entry = merged(ini=ini)

    again = merged(origin="database", **entry.as_fields())

    assert entry.problem is None
    assert again.as_fields() == entry.as_fields()
    assert again.schedule == entry.schedule
    assert again.starts_at == datetime(2027, 1, 31, 8, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    "made",
    [
        crontab(minute=0, hour="3,4"),
        crontab(minute={0, 30}),
        ZonedCrontab(minute="*/5", zone="Europe/Berlin"),
        schedule(timedelta(minutes=90)),
        Clocked(datetime(2027, 1, 31, 9, tzinfo=timezone.utc)),
    ],
)
def test_a_schedule_and_its_text_are_one(made):
    text = text_of_schedule(made)
    again = parse_schedule(text["type"], text["schedule"], text.get("timezone"))

    assert describe(again) == describe(made).replace("{", "").replace("}", "").replace(", ", ",")


def test_a_schedule_that_no_text_can_say_is_shown_all_the_same():
    class Odd(schedule):
        run_every = "now and then"

        def __init__(self):
            pass

        def __repr__(self):
            return "odd"

    entry = merged({"task": "t", "schedule": Odd()})

    assert (entry.type, entry.text, entry.ticks) == ("python", "odd", True)


def test_a_relative_period_stays_one():
    entry = merged(ini={**HOURLY, "relative": True})

    assert entry.schedule.relative
    assert entry.for_celery()["relative"]
    assert text_of_schedule(entry.schedule)["relative"]


def test_a_schedule_of_one_run_is_told_by_its_time():
    now = datetime(2027, 1, 31, 9, tzinfo=timezone.utc)
    once = Clocked(now)

    assert {once: 1}[Clocked(now)] == 1
    assert once != now
    assert "2027-01-31T09:00:00+00:00" in repr(once)
    assert describe(once) == "once at 2027-01-31 09:00:00+00:00"


def test_the_ini_has_entries_of_one_run_in_a_zone():
    section = {
        "task": "t",
        "type": "clocked",
        "schedule": "2027-01-31 09:00",
        "timezone": "Europe/Berlin",
    }
    settings = celery_settings({"celerybeat:e": section}, "app.ini")

    (entry,) = settings["beat_schedule"].values()
    assert entry["schedule"].at == datetime(2027, 1, 31, 8, tzinfo=timezone.utc)


def test_a_section_without_a_task_is_no_entry_of_celery():
    settings = celery_settings({"celerybeat:e": {"schedule": "2h"}}, "app.ini")

    assert not settings.get("beat_schedule")
