"""When an entry runs: across changes of the clock, downtimes, and clocks that jump."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from itertools import pairwise

import pytest
from celery import Celery
from celery.schedules import BaseSchedule, crontab, schedule
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.chaos.beats import Line
from tests.walks import walk

from ws_celery.beat.entries import Entry
from ws_celery.beat.ticks import LATE, due_tick, next_tick, ticks_between
from ws_celery.schedules import Clocked, parse_schedule

BERLIN = "Europe/Berlin"
SECOND, HOUR, DAY = timedelta(seconds=1), timedelta(hours=1), timedelta(days=1)


def entry_of(schedule, **fields):
    return Entry("mine", "myapp.tasks.mine", schedule, **fields)


def at(text):
    return datetime.fromisoformat(text).replace(tzinfo=timezone.utc)


def cron(line, zone="UTC", **fields):
    return entry_of(parse_schedule("crontab", line, zone), **fields)


def every(period, **fields):
    return entry_of(schedule(period), **fields)


def ticks(entry, first, last):
    """Return the ticks after ``first`` up to ``last``, each found from the one before."""
    found = []
    while (tick := next_tick(entry, found[-1] if found else first)) and tick <= last:
        found.append(tick)
    return found


# The next tick


@pytest.mark.parametrize(
    ("line", "first", "expected"),
    [
        # 02:00 to 03:00 is left out: it runs at 03:00, once.
        ("30 2 * * *", "2026-03-28 12:00", ["2026-03-29 01:00", "2026-03-30 00:30"]),
        # 02:00 to 03:00 comes twice: it runs in the first pass.
        ("30 2 * * *", "2026-10-24 12:00", ["2026-10-25 00:30", "2026-10-26 01:30"]),
        ("30 * * * *", "2026-10-24 23:45", ["2026-10-25 00:30", "2026-10-25 01:30"]),
        ("0 12 29 2 *", "2026-01-01 00:00", ["2028-02-29 11:00", "2032-02-29 11:00"]),
        ("59 23 28-29 2 *", "2028-02-01 00:00", ["2028-02-28 22:59", "2028-02-29 22:59"]),
        ("0 0 1 1 *", "2026-12-31 22:59", ["2026-12-31 23:00", "2027-12-31 23:00"]),
    ],
)
def test_a_crontab_ticks_by_the_clock_of_its_zone(line, first, expected):
    expected = [at(text) for text in expected]

    assert ticks(cron(line, BERLIN), at(first), expected[-1]) == expected


def test_a_crontab_of_celery_is_as_good_as_one_of_ours_in_the_zone_of_its_app():
    app = Celery(set_as_current=False)
    app.conf.timezone = BERLIN
    entry = entry_of(crontab(minute=30, hour=2, app=app))

    found = ticks(entry, at("2026-10-24 12:00"), at("2026-10-26 12:00"))

    assert found == [at("2026-10-25 00:30"), at("2026-10-26 01:30")]


CHANGES = (
    (BERLIN, "2026-03-29 01:00"),
    (BERLIN, "2026-10-25 01:00"),
    ("America/New_York", "2026-03-08 07:00"),
    ("America/Santiago", "2026-04-05 03:00"),
    ("America/Santiago", "2026-09-06 04:00"),
    ("Africa/Cairo", "2026-04-23 22:00"),
    ("Africa/Cairo", "2026-10-29 21:00"),
    ("Australia/Lord_Howe", "2026-04-04 15:00"),
    ("Australia/Lord_Howe", "2026-10-03 15:30"),
    # A whole day was left out.
    ("Pacific/Apia", "2011-12-30 10:00"),
    ("Asia/Kathmandu", "2028-02-29 12:00"),
    ("UTC", "2026-12-31 23:59"),
)
MINUTES = st.sampled_from(("0", "30", "10,35", "59", "*/20", "*/7", "*"))
HOURS = st.sampled_from(("*", "0", "2", "3", "23", "0-5", "2,3", "22-1", "*/2", "1-23"))
DAYS = st.sampled_from(("* * *", "* * sun", "* * thu-sat", "1-15 * *", "29 2 *", "* 4,10 sun"))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CHANGES), MINUTES, HOURS, DAYS, st.integers(0, 36 * 60))
def test_all_ticks_around_a_change_are_those_of_a_walk_over_every_minute(
    change, minute, hour, days, before
):
    zone, moment = change
    entry = cron(f"{minute} {hour} {days}", zone)
    first, last = at(moment) - timedelta(minutes=before), at(moment) + 36 * HOUR

    found = ticks(entry, first, last)

    assert found == list(walk(entry.schedule, zone, first + SECOND, last))


@given(st.integers(1, 10**7), st.integers(1, 10**9))
def test_a_period_ticks_on_a_grid_however_late_each_tick_was_run(milliseconds, late):
    entry, start = every(timedelta(milliseconds=milliseconds)), at("2026-01-01 00:00")
    now = start + timedelta(milliseconds=late)

    due, kept = due_tick(entry, start, now)

    assert (kept - start) % entry.schedule.run_every == timedelta(0)
    assert (due is None) == (now - kept > LATE or kept == start)
    assert next_tick(entry, kept) == kept + entry.schedule.run_every


def test_a_period_that_starts_at_a_time_has_its_first_tick_then():
    entry = every(6 * HOUR, starts_at=at("2026-01-01 03:00"))

    assert ticks(entry, at("2025-12-24 18:11"), at("2026-01-01 16:00")) == [
        *(at("2026-01-01 03:00"), at("2026-01-01 09:00"), at("2026-01-01 15:00"))
    ]


def test_a_period_longer_than_the_calendar_has_no_tick():
    assert next_tick(every(timedelta(days=10**7)), at("2026-01-01 00:00")) is None


def test_ticks_begin_with_the_start_and_end_before_the_end():
    entry = cron("0 * * * *", starts_at=at("2026-01-02 07:00"), expires=at("2026-01-02 09:00"))

    found = ticks(entry, at("2026-01-01 00:00"), at("2026-02-01 00:00"))

    assert found == [at("2026-01-02 07:00"), at("2026-01-02 08:00")]


def test_the_sun_has_one_tick_a_day():
    pytest.importorskip("ephem")
    entry = entry_of(parse_schedule("solar", "sunset 52.5 13.4"))
    first = at("2026-01-01 00:00")

    found = ticks(entry, first, first + 60 * DAY)

    assert len(found) == 60
    assert all(DAY < later - earlier < DAY + 200 * SECOND for earlier, later in pairwise(found))
    assert abs(found[0] - at("2026-01-01 15:03")) < 120 * SECOND


def test_a_period_that_is_rounded_ticks_at_full_hours():
    entry = entry_of(schedule(2 * HOUR, relative=True, app=Celery(set_as_current=False)))

    found = ticks(entry, at("2026-01-01 00:20"), at("2026-01-01 06:00"))

    assert found == [at("2026-01-01 02:00"), at("2026-01-01 04:00"), at("2026-01-01 06:00")]


# What is due


def test_a_new_entry_waits_for_its_next_tick():
    now = at("2026-01-01 12:00:07")

    assert due_tick(cron("0 * * * *"), None, now) == (None, now)
    assert due_tick(every(HOUR), None, now) == (None, now)


def test_a_tick_is_due_once():
    entry, tick = cron("0 * * * *"), at("2026-01-01 12:00")

    due, kept = due_tick(entry, at("2026-01-01 11:00"), tick + SECOND)

    assert (due, kept) == (tick, tick)
    assert due_tick(entry, kept, tick + 2 * SECOND) == (None, tick)


def test_what_was_missed_is_forgotten():
    entry = cron("0 * * * *")

    assert due_tick(entry, at("2026-01-01 02:00"), at("2026-01-01 12:30")) == (
        *(None, at("2026-01-01 12:00")),
    )


def test_what_was_missed_runs_as_one_if_the_entry_says_so():
    entry = cron("0 * * * *", catch_up="once")

    due, kept = due_tick(entry, at("2016-01-01 02:00"), at("2026-01-01 12:30"))

    assert due == kept == at("2026-01-01 12:00")
    assert due_tick(entry, kept, at("2026-01-01 12:31")) == (None, kept)


def test_an_entry_that_has_ended_catches_up_with_nothing():
    entry = cron("0 * * * *", catch_up="once", expires=at("2026-01-01 11:30"))

    due, kept = due_tick(entry, at("2026-01-01 02:00"), at("2026-01-01 12:30"))

    assert (due, kept) == (None, at("2026-01-01 11:00"))
    assert due_tick(entry, kept, at("2026-01-01 12:31")) == (None, kept)


def test_an_entry_that_has_not_ended_catches_up():
    entry = every(HOUR, catch_up="once", expires=at("2026-01-01 13:00"))

    due, _ = due_tick(entry, at("2026-01-01 02:00"), at("2026-01-01 12:30"))

    assert due == at("2026-01-01 12:00")


def test_the_last_tick_before_the_end_may_be_late():
    entry = every(SECOND, expires=at("2026-01-01 12:00:03"))

    due, _ = due_tick(entry, at("2026-01-01 12:00:01"), at("2026-01-01 12:00:04"))

    assert due == at("2026-01-01 12:00:02")


def one_off(text, **fields):
    return entry_of(Clocked(datetime.fromisoformat(text)), **fields)


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ("2026-03-28 12:00", ["2026-03-28 23:00", "2026-03-29 22:00", "2026-03-30 22:00"]),
        ("2026-10-24 12:00", ["2026-10-24 22:00", "2026-10-25 23:00", "2026-10-26 23:00"]),
    ],
)
def test_a_relative_period_of_a_day_ticks_at_midnight_of_the_applications_zone(first, expected):
    app = Celery(set_as_current=False)
    app.conf.timezone = BERLIN
    entry = entry_of(schedule(DAY, relative=True, app=app))

    assert ticks(entry, at(first), at(expected[-1])) == [at(each) for each in expected]


def test_a_schedule_of_the_applications_own_is_told_the_time_of_its_zone():
    class Noon(BaseSchedule):
        def remaining_estimate(self, last_run_at):
            noon = last_run_at.replace(hour=12, minute=0)
            return noon + (DAY if noon <= last_run_at else 0 * DAY) - self.now()

    app = Celery(set_as_current=False)
    app.conf.timezone = "Asia/Tokyo"

    assert next_tick(entry_of(Noon(app=app)), at("2026-01-01 00:00")) == at("2026-01-01 03:00")


@pytest.mark.parametrize("catch_up", ["skip", "once"])
def test_a_tick_that_a_beat_was_ready_for_is_not_missed_however_late_it_gets_round_to_it(catch_up):
    entry, tick = every(HOUR, catch_up=catch_up), at("2026-01-01 12:00")
    last, now = tick - HOUR, tick + 60 * SECOND

    assert due_tick(entry, last, now, ready=tick - SECOND) == (tick, tick)
    assert due_tick(entry, last, now, ready=tick + 5 * SECOND) == (tick, tick)
    missed = due_tick(entry, last, now, ready=tick + 6 * SECOND)
    assert missed == (tick if catch_up == "once" else None, tick)


def test_a_beat_that_falls_behind_sends_the_latest_tick_for_those_before():
    entry, last = every(SECOND), at("2026-01-01 12:00")

    due = due_tick(entry, last, last + 60 * SECOND, ready=last)

    assert due == (last + 60 * SECOND, last + 60 * SECOND)


def test_a_one_off_runs_once():
    entry, tick = one_off("2026-01-01T12:00+01:00"), at("2026-01-01 11:00")

    none, kept = due_tick(entry, None, tick - HOUR)
    due, ran = due_tick(entry, kept, tick)

    assert (none, due) == (None, tick)
    assert due_tick(entry, ran, tick + SECOND) == (None, tick)
    assert next_tick(entry, tick) is None


def test_a_one_off_that_is_moved_to_an_earlier_time_still_runs():
    now, tick = at("2026-01-01 10:00"), at("2026-01-01 11:00")
    none, kept = due_tick(one_off("2030-01-01T00:00+00:00"), None, now)
    moved = one_off("2026-01-01T11:00+00:00")

    assert none is None
    assert due_tick(moved, kept, now) == (None, kept)
    assert due_tick(moved, kept, tick) == (tick, tick)


def test_a_one_off_that_nobody_was_there_for_runs_late_only_if_it_says_so():
    tick = at("2026-01-01 11:00")

    skipped = due_tick(one_off("2026-01-01T11:00+00:00"), None, tick + DAY)
    caught_up = due_tick(one_off("2026-01-01T11:00+00:00", catch_up="once"), None, tick + DAY)

    assert skipped == (None, tick)
    assert caught_up == (tick, tick)


def test_a_one_off_does_not_run_again_when_the_clock_goes_back_by_days():
    entry, tick = one_off("2026-01-01T11:00+00:00"), at("2026-01-01 11:00")

    assert due_tick(entry, tick, tick - 30 * DAY) == (None, tick)


def test_a_clock_that_was_ahead_by_days_does_not_silence_an_entry():
    entry, now = every(HOUR), at("2026-01-01 12:00")

    none, kept = due_tick(entry, at("2036-01-01 12:00"), now)

    assert none is None
    assert due_tick(entry, kept, now + HOUR) == (now + HOUR, now + HOUR)


def test_coming_ticks_begin_with_the_one_that_is_caught_up_with():
    entry = cron("0 * * * *", catch_up="once")
    now = at("2026-01-01 12:30")

    found = list(ticks_between(entry, at("2026-01-01 02:00"), now, now + 2 * HOUR))

    assert found == [at(f"2026-01-01 {hour}:00") for hour in (12, 13, 14)]


@pytest.mark.parametrize(
    "entry", [cron("0 * * * *"), every(HOUR, starts_at=at("2020-01-01 00:00"))]
)
def test_coming_ticks_of_a_new_entry_are_those_that_it_will_have(entry):
    now = at("2026-01-01 12:30")

    found = list(ticks_between(entry, None, now, now + 2 * HOUR))

    assert found == [at("2026-01-01 13:00"), at("2026-01-01 14:00")]


# Beats that look again and again


def looked(entry, last, looks):
    """Return what beats run that look at an entry at these times."""
    ran = []
    for now in looks:
        while (found := due_tick(entry, last, now))[0] is not None:
            ran.append(found[0])
            last = found[1]
        last = found[1]
    return ran


def told(nominal, start, looks, *, once):
    """Return the same by the words of the documentation, from all ticks there are."""
    ran, previous = [], start
    for now in looks:
        pending = [tick for tick in nominal if previous < tick <= now]
        if pending and now - pending[0] > LATE:
            pending = [pending[-1]] if once or now - pending[-1] <= LATE else []
        ran += pending
        previous = now
    return ran


WAITS = st.lists(
    st.floats(0.05, 3) | st.floats(3, 3000) | st.integers(0, 90_000), min_size=1, max_size=40
)
ENTRIES = st.sampled_from(
    [
        cron("* * * * *"),
        cron("*/20 2,3 * * *", BERLIN),
        cron("30 2 * * *", BERLIN),
        every(SECOND),
        every(7 * SECOND),
        every(HOUR),
        every(10 * SECOND, starts_at=at("2026-03-28 12:30:05")),
    ]
)


@settings(max_examples=150, deadline=None)
@given(ENTRIES, WAITS, st.booleans())
def test_beats_run_what_the_documentation_says_whenever_they_look(entry, waits, once):
    start = at("2026-03-28 12:00:00")
    looks, now = [], start
    for wait in waits:
        now += timedelta(seconds=wait)
        looks.append(min(now, start + 2 * DAY))
    entry = replace(entry, catch_up="once" if once else "skip")

    ran = looked(entry, start, looks)

    nominal = ticks(entry, start, looks[-1])
    assert ran == told(nominal, start, looks, once=once)


@settings(max_examples=150, deadline=None)
@given(ENTRIES, st.lists(st.integers(-3600, 7200), min_size=1, max_size=40), st.booleans())
def test_nothing_runs_twice_when_the_clock_jumps(entry, jumps, once):
    entry = replace(entry, catch_up="once" if once else "skip")
    now = start = at("2026-03-28 12:00:00")
    looks = [now := max(now + timedelta(seconds=jump), start - HOUR) for jump in jumps]

    ran = looked(entry, start, looks)

    assert all(earlier < later for earlier, later in pairwise(ran))


@pytest.mark.parametrize(
    ("skipped", "gap", "outage", "broken"),
    [
        (0, 1.1, 0, False),
        (1, 1.1, 0, True),
        (0, 2.1, 0, True),
        (50, 11.0, 10, False),
        (61, 11.0, 10, True),
        (50, 12.1, 10, True),
    ],
)
def test_beats_of_the_crash_matrix_may_skip_only_what_nobody_could_claim(
    skipped, gap, outage, broken
):
    line = Line("a fault", 300, twice=0, never=0, skipped=skipped, gap=gap, outage=outage)

    assert line.is_broken is broken
