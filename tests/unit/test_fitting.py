"""Entries that an application cannot run are set aside, each with its reason."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest
from celery.schedules import BaseSchedule, schedule

from ws_celery import task
from ws_celery.beat.entries import Entry, merge
from ws_celery.beat.sources import fitted
from ws_celery.beat.ticks import next_tick
from ws_celery.schedules import Clocked


@task(name="myapp.clean_up")
def clean_up(request, what, *, days=30):
    pass


@pytest.fixture
def app(make_app):
    return make_app(clean_up, celery="timezone = Asia/Tokyo", ws_celery__beat="true").celery


def problem(app, **fields):
    entry = Entry("mine", **{"task": "myapp.clean_up", "schedule": schedule(60), **fields})
    return fitted({"mine": entry}, app)["mine"].problem


def test_what_an_application_can_run_has_no_problem(app):
    assert problem(app, args=("old",)) is None
    assert problem(app, kwargs={"what": "old", "days": 7}) is None


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((), {}, "missing 1 required positional argument: 'what'"),
        (("old", "older"), {}, "takes 1 positional argument but 2 were given"),
        (("old",), {"weeks": 1}, "unexpected keyword argument 'weeks'"),
    ],
)
def test_arguments_that_do_not_fit_the_function_set_an_entry_aside(app, args, kwargs, words):
    found = problem(app, args=args, kwargs=kwargs)

    assert found.startswith("the arguments do not fit myapp.clean_up: ")
    assert words in found


def test_arguments_are_not_looked_at_where_the_task_says_so(app):
    app.tasks["myapp.clean_up"].typing = False

    assert problem(app) is None


def test_an_unknown_task_sets_an_entry_aside_with_the_name_that_was_meant(app):
    found = problem(app, task="myapp.cleanup")

    assert "the task 'myapp.cleanup' is not registered; did you mean myapp.clean_up?" in found
    assert "`imports` in the [celery] section" in problem(app, task="elsewhere")


def test_a_schedule_that_cannot_tell_its_next_tick_sets_an_entry_aside(app):
    class Lunar(BaseSchedule):
        def remaining_estimate(self, last_run_at):
            raise LookupError("no moon")

    found = problem(app, args=("old",), schedule=Lunar())

    assert found == "the schedule cannot tell its next tick: no moon"


def test_an_entry_is_not_to_overlap_only_where_something_tells_the_end_of_its_run(app, make_app):
    fields = {"args": ("old",), "overlap": "skip"}
    on = {"ws_celery__beat": "true"}
    with_results = make_app(clean_up, celery="result_backend = cache+memory://", **on).celery
    eager = make_app(clean_up, celery="task_always_eager = true", **on).celery

    assert "the application has no result_backend. Set overlap" in problem(app, **fields)
    assert problem(with_results, **fields) is None
    assert problem(eager, **fields) is None
    ignored = problem(with_results, **fields, options={"ignore_result": True})
    assert "the results of myapp.clean_up are ignored" in ignored
    with_results.tasks["myapp.clean_up"].ignore_result = True
    assert "are ignored" in problem(with_results, **fields)


def test_a_run_at_the_beginning_of_the_calendar_sets_an_entry_aside(app):
    first = Clocked(datetime.min.replace(tzinfo=timezone.utc))

    assert "cannot tell its next tick" in problem(app, args=("old",), schedule=first)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"catch_up": "skip"}, "catch_up"),
        ({"overlap": "allow"}, "overlap"),
        ({"overlap": "skip", "expires": "2030-01-01T00:00Z"}, "overlap and expires"),
        ({"starts_at": "2030-01-01T00:00Z"}, "starts_at"),
        ({"type": "clocked", "schedule": "2030-01-01T00:00Z"}, "type = clocked"),
        ({"type": None, "schedule": Clocked(datetime(2030, 1, 1, tzinfo=timezone.utc))}, "type ="),
    ],
)
def test_what_celerys_scheduler_would_not_obey_is_refused_without_a_database(
    app, make_app, fields, named
):
    without = make_app(clean_up).celery
    made = {"task": "myapp.clean_up", "args": ["old"], "type": "integer", "schedule": 1, **fields}
    entries = merge({"mine": {k: v for k, v in made.items() if v is not None}}, {}, {})

    found = fitted(entries, without)["mine"].problem

    assert found.startswith(f"has {named}")
    assert found.endswith(
        "which needs the schedule in the database: Celery's own scheduler would not obey. Set "
        "ws_celery.beat = true in the section of the application, or take it out"
    )
    assert "schedule in the database" not in (fitted(entries, app)["mine"].problem or "")


def test_an_entry_that_has_a_problem_already_keeps_it(app):
    fields = {"task": "elsewhere", "type": "crontab", "schedule": "broken"}

    entry = fitted(merge({}, {"mine": fields}, {}), app)["mine"]

    assert "broken" in entry.problem
    assert "registered" not in entry.problem


def test_a_crontab_without_a_zone_is_meant_in_that_of_the_application(app):
    fields = {"task": "myapp.clean_up", "type": "crontab", "schedule": "0 9 * * *", "args": ["a"]}

    entry = fitted(merge({}, {"mine": fields}, {}), app)["mine"]

    midnight = datetime(2026, 1, 1, tzinfo=timezone.utc)
    assert (entry.problem, next_tick(entry, midnight).hour) == (None, 0)
    assert next_tick(entry, midnight).day == 2
