"""Beat without a database: Celery's file, RedBeat, and what code and INI say together."""

from __future__ import annotations

import dbm
import time
import uuid
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
from celery.beat import BeatLazyFunc
from celery.beat import Scheduler as CeleryScheduler
from celery.schedules import crontab, schedule

from ws_celery import ConfigurationError, task
from ws_celery.beat import Scheduler, health
from ws_celery.beat.filed import FileScheduler
from ws_celery.beat.sources import check_sources, entries_of, install
from ws_celery.cli.application import check_schedule


@task(name="work")
def work(request, number=0):
    pass


@task(name="declared", schedule="30 3 * * *")
def declared(request):
    pass


@task(name="period", schedule={"type": "timedelta", "schedule": "1h", "overlap": "skip"})
def period(request):
    pass


@task(name="seconds", schedule=timedelta(minutes=5))
def seconds(request):
    pass


def ini(text):
    """Return sections for the INI file, after [celery]."""
    return "\n" + text.replace("; ", "\n")


@pytest.fixture
def beat(tmp_path):
    """Make a beat with a file of its own."""
    made = []

    def make(app, **options):
        scheduler = Scheduler(app=app, schedule_filename=str(tmp_path / "schedule"), **options)
        made.append(scheduler)
        return scheduler

    yield make
    for scheduler in made:
        scheduler.close()


def waiting(app):
    with app.connection_for_read() as connection:
        queue = app.amqp.queues[app.conf.task_default_queue](connection.default_channel)
        messages = []
        while message := queue.get(no_ack=True):
            messages.append(message.headers)
        return messages


def test_code_declares_entries_beside_the_task(make_app):
    app = make_app(work, declared, period, seconds).celery

    entries = entries_of(app, {})

    assert {name: each.words for name, each in entries.items()} == {
        "declared": "30 3 * * *",
        "period": "every 1:00:00",
        "seconds": "every 0:05:00",
    }
    assert entries["period"].overlap == "skip"
    assert {each.origin for each in entries.values()} == {"code"}


def test_a_directive_declares_entries_for_any_task(make_app):
    def include(config):
        config.add_periodic_task("work", 60)
        config.add_periodic_task(work, crontab(minute=0), name="hourly", kwargs={"number": 1})

    app = make_app(work, setup=include)

    entries = entries_of(app.celery, {})
    assert {name: each.words for name, each in entries.items()} == {
        "work": "every 0:01:00",
        "hourly": "0 * * * *",
    }
    assert entries["hourly"].kwargs == {"number": 1}
    found = app.config.introspector.get("celery periodic tasks", "hourly")
    assert found["task"] == "work"


def test_celerys_own_ways_declare_entries_too(make_app):
    app = make_app(
        work,
        setup=lambda config: config.configure_celery(
            beat_schedule={"given": {"task": "work", "schedule": 60}}
        ),
    ).celery
    app.add_periodic_task(5.0, app.tasks["work"].s(3), name="added")
    app.conf.beat_schedule["assigned"] = {"task": "work", "schedule": crontab(), "args": None}

    entries = install(app)

    assert set(entries) == {"given", "added", "assigned"}
    assert entries["added"].args == (3,)
    assert {each.origin for each in entries.values()} == {"code"}
    assert install(app) == entries  # and again


def test_cleaning_up_results_is_an_entry_as_celery_has_it(make_app, sqlite_url, beat):
    app = make_app(celery=f"result_backend = db+{sqlite_url}").celery
    celerys = CeleryScheduler(app=app, lazy=True)
    celerys.install_default_entries({})
    (theirs,) = celerys.schedule.values()

    (entry,) = entries_of(app, {}).values()

    assert (entry.name, entry.origin, entry.problem) == (theirs.name, "code", None)
    assert (entry.task, entry.schedule, entry.options) == (
        theirs.task,
        theirs.schedule,
        theirs.options,
    )
    assert list(beat(app).schedule) == [entry.name]


def test_the_ini_switches_off_that_results_are_cleaned_up(make_app, sqlite_url, beat):
    off = ini("[celerybeat:celery.backend_cleanup]; enabled = false")
    app = make_app(celery=f"result_backend = db+{sqlite_url}{off}").celery

    check_schedule(app)

    assert not beat(app).schedule


@pytest.mark.parametrize(
    "celery",
    ["", "result_backend = cache+memory://", "result_backend = db+sqlite://\nresult_expires = 0"],
)
def test_there_is_nothing_to_clean_up_where_results_go_or_stay(make_app, beat, celery):
    app = make_app(celery=celery).celery

    assert entries_of(app, {}) == {}
    assert not beat(app).schedule


def test_the_ini_changes_what_code_declares(make_app):
    sections = ini(
        "[celerybeat:declared]; schedule = 0 4 * * *; [celerybeat:period]; enabled = false"
    )
    app = make_app(declared, period, celery=sections).celery

    check_schedule(app)

    entries = entries_of(app, {})
    assert (entries["declared"].words, entries["declared"].origin) == ("0 4 * * *", "code")
    assert list(app.conf.beat_schedule) == ["declared"]


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ("[celerybeat:e]; schedule = 1h", "has no task, and code declares no entry of this name"),
        ("[celerybeat:e]; task = wrok; type = integer; schedule = 1", "did you mean work"),
        (
            '[celerybeat:e]; task = work; type = integer; schedule = 1; kwargs = {"numbr": 1}',
            "do not fit",
        ),
    ],
)
def test_a_beat_does_not_start_with_what_cannot_be_run(make_app, sections, problem):
    app = make_app(work, celery=ini(sections)).celery

    with pytest.raises(
        ConfigurationError, match=rf"\[celerybeat:e\].*{problem}".replace("?", "\\?")
    ):
        check_sources(app)


def test_two_applications_do_not_share_what_they_add(make_app):
    one, other = make_app(work).celery, make_app(work).celery

    one.add_periodic_task(5.0, one.tasks["work"].s(), name="added")

    assert entries_of(one, {})
    assert not entries_of(other, {})


EVERY_SECOND = "[celerybeat:e]; task = work; type = integer; schedule = 1"


def turn(scheduler):
    time.sleep(max(0, min(scheduler.tick(), 0.05)))


def turn_until(scheduler, condition, timeout=60):
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        turn(scheduler)
    return found


def test_the_file_remembers_the_last_tick(make_app, redis_url, beat, tmp_path):
    app = make_app(work, broker=redis_url, celery=ini(EVERY_SECOND)).celery
    app.beat_health_file = tmp_path / "health"
    scheduler = beat(app)
    assert isinstance(scheduler, FileScheduler)

    headers = turn_until(scheduler, lambda: waiting(app))
    tick = datetime.fromisoformat(headers[0]["ws_celery_tick"])
    last = scheduler.schedule["e"].last_run_at
    scheduler.close()

    assert headers[0]["ws_celery_entry"] == "e"
    assert tick <= last <= datetime.now(timezone.utc)
    assert beat(app).schedule["e"].last_run_at == last
    assert app.beat_health_file.exists()


def test_a_health_file_that_cannot_be_written_is_told_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(health, "_EVERY", 0)
    file = health.HealthFile(tmp_path / "run" / "health")
    for _ in range(2):
        file.write(1, 0)
    (tmp_path / "run").mkdir()
    file.write(1, 0)

    failed, back = (record.getMessage() for record in caplog.records)
    assert "health file has failed" in failed
    assert "health file is back" in back


def test_a_file_that_cannot_be_read_is_set_aside(make_app, redis_url, beat, tmp_path, caplog):
    app = make_app(work, broker=redis_url, celery=ini(EVERY_SECOND)).celery
    (tmp_path / "schedule").write_bytes(b"no database" * 1000)

    scheduler = beat(app)

    assert turn_until(scheduler, lambda: waiting(app))
    (aside,) = tmp_path.glob("schedule*.corrupt-*")
    assert aside.read_bytes().startswith(b"no database")
    assert "is set aside as *.corrupt-" in caplog.text


@pytest.mark.parametrize(
    "value",
    [b"", b"\x80\x04", b"hello world", b"\x80\x04\x95\xff\xff", b"cmyapp.gone\nC\n.", b"(lp0\n."],
    ids=["empty", "truncated", "garbage", "cut", "class that is gone", "list"],
)
def test_a_file_whose_entries_cannot_be_read_is_set_aside(
    make_app, redis_url, beat, tmp_path, caplog, value
):
    app = make_app(work, broker=redis_url, celery=ini(EVERY_SECOND)).celery
    beat(app).close()
    with dbm.open(str(tmp_path / "schedule"), "w") as file:
        file["entries"] = value

    scheduler = beat(app)

    assert "e" in scheduler.schedule
    assert list(tmp_path.glob("schedule*.corrupt-*"))
    assert caplog.text.count("is set aside as *.corrupt-") == 1


def test_a_file_that_can_be_read_is_not_set_aside(make_app, redis_url, beat, tmp_path):
    app = make_app(work, broker=redis_url, celery=ini(EVERY_SECOND)).celery
    beat(app).close()
    beat(app).close()

    assert not list(tmp_path.glob("*.corrupt-*"))


def test_the_file_is_written_as_often_as_beat_sync_every_says(
    make_app, redis_url, beat, monkeypatch
):
    sections = "beat_sync_every = 1" + ini(EVERY_SECOND)
    scheduler = beat(make_app(work, broker=redis_url, celery=sections).celery)
    written = []
    monkeypatch.setattr(scheduler, "sync", lambda: written.append(1))

    turn_until(scheduler, lambda: len(written) == 3)


def test_an_entry_that_has_missed_its_tick_does_not_hold_up_others(make_app, redis_url, beat):
    nightly = "[celerybeat:nightly]; task = work; type = timedelta; schedule = 1h; "
    app = make_app(work, broker=redis_url, celery=ini(nightly + EVERY_SECOND)).celery
    first = beat(app)
    first.schedule["nightly"].last_run_at = datetime.now(timezone.utc) - timedelta(hours=5.5)
    first.close()

    scheduler = beat(app)
    assert turn_until(scheduler, lambda: waiting(app))

    # Later as well, such as after the machine has slept.
    scheduler.schedule["nightly"].last_run_at -= timedelta(hours=5.5)
    event = next(each for each in scheduler._heap if each.entry.name == "nightly")
    scheduler._heap.remove(event)
    scheduler._heap.insert(0, event._replace(time=0))
    assert {each["ws_celery_entry"] for each in turn_until(scheduler, lambda: waiting(app))} == {
        "e"
    }


def test_an_entry_whose_schedule_fails_does_not_hold_up_others(
    make_app, redis_url, beat, caplog, monkeypatch
):
    class Moody(schedule):
        def remaining_estimate(self, last_run_at):
            raise RuntimeError("not today")

    app = make_app(work, broker=redis_url, celery=ini(EVERY_SECOND)).celery
    app.conf.beat_schedule["moody"] = {"task": "work", "schedule": Moody(60)}

    scheduler = beat(app)
    merged = scheduler._entries["moody"]
    scheduler._entries["moody"] = replace(merged, schedule=Moody(60), problem=None)
    scheduler.schedule["moody"] = scheduler._maybe_entry(
        "moody", {"task": "work", "schedule": schedule(60)}
    )

    assert turn_until(scheduler, lambda: waiting(app))
    assert "The next tick of moody cannot be told; others tick on" in caplog.text


def test_the_file_obeys_policies_and_limits(make_app, redis_url, beat):
    sections = (
        "[celerybeat:skips]; task = work; type = timedelta; schedule = 1h; "
        "[celerybeat:once]; task = work; type = timedelta; schedule = 1h; catch_up = once; "
        "[celerybeat:over]; task = work; type = integer; schedule = 1; "
        "expires = 2020-01-01T00:00Z; "
        "[celerybeat:coming]; task = work; type = clocked; schedule = 2999-01-01T00:00Z; "
        + EVERY_SECOND
    )
    app = make_app(work, broker=redis_url, celery=ini(sections)).celery
    first = beat(app)
    for name in ("skips", "once"):
        first.schedule[name].last_run_at = datetime.now(timezone.utc) - timedelta(hours=5.5)
    first.close()

    scheduler, seen = beat(app), []

    def twice():
        seen.extend(each["ws_celery_entry"] for each in waiting(app))
        return seen.count("e") >= 2 and "once" in seen

    turn_until(scheduler, twice)
    assert set(seen) == {"e", "once"}


def test_an_entry_of_the_file_that_is_not_to_overlap_waits_for_its_result(
    make_app, redis_url, beat
):
    sections = f"result_backend = {redis_url}" + ini(EVERY_SECOND + "; overlap = skip")
    app = make_app(work, broker=redis_url, celery=sections).celery
    scheduler = beat(app)
    (headers,) = turn_until(scheduler, lambda: waiting(app))

    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        turn(scheduler)
    assert not waiting(app)

    app.backend.store_result(headers["id"], None, "SUCCESS")
    assert turn_until(scheduler, lambda: waiting(app))


def seven():
    return 7


def test_arguments_are_made_at_each_tick(make_app, redis_url, beat):
    app = make_app(work, broker=redis_url).celery
    app.conf.beat_schedule["e"] = {
        "task": "work",
        "schedule": 1,
        "kwargs": {"number": BeatLazyFunc(seven)},
    }

    (headers,) = turn_until(beat(app), lambda: waiting(app))

    assert "7" in headers["kwargsrepr"]


def test_redbeat_sends_the_merged_entries(make_app, redis_url):
    prefix = f"redbeat-{uuid.uuid4()}:"
    sections = "beat_scheduler = redbeat.RedBeatScheduler" + ini(
        "[celerybeat:declared]; type = integer; schedule = 1; " + EVERY_SECOND
    )
    app = make_app(work, declared, broker=redis_url, celery=sections).celery
    app.conf.redbeat_redis_url, app.conf.redbeat_key_prefix = redis_url, prefix
    app.conf.redbeat_lock_key = None
    check_schedule(app)
    from redbeat import RedBeatScheduler
    from redbeat.schedulers import get_redis

    scheduler = RedBeatScheduler(app=app, max_interval=1)
    try:
        seen = set()

        def both():
            seen.update(each["task"] for each in waiting(app))
            return seen == {"work", "declared"}

        turn_until(scheduler, both)
    finally:
        client = get_redis(app)
        for key in client.keys(f"{prefix}*"):
            client.delete(key)
