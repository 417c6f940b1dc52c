"""Beat without a database: Celery's scheduler, RedBeat, and what code and INI say together."""

from __future__ import annotations

import json
import time
import uuid
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import pytest
from celery import _state
from celery.beat import BeatLazyFunc, PersistentScheduler
from celery.beat import Scheduler as CeleryScheduler
from celery.schedules import crontab, schedule, solar
from click.testing import CliRunner

from ws_celery import ConfigurationError, task
from ws_celery.beat import Scheduler, scheduler
from ws_celery.beat.sources import check_sources, entries_of, install
from ws_celery.cli.application import check_schedule
from ws_celery.cli.worker import beat as beat_command
from ws_celery.inspection import export_schedule, unexported_entries


@task(name="work")
def work(request, number=0):
    pass


@task(name="declared", schedule="30 3 * * *")
def declared(request):
    pass


@task(name="period", schedule={"type": "timedelta", "schedule": "1h", "description": "hourly"})
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
    """Make a beat with a file of its own, whose app is Celery's current one, as in its process."""
    made, before = [], _state._tls.current_app

    def make(app, **options):
        app.set_current()
        scheduler = Scheduler(app=app, schedule_filename=str(tmp_path / "schedule"), **options)
        made.append(scheduler)
        return scheduler

    yield make
    for each in made:
        each.close()
    _state._set_current_app(before)


def waiting(app, *, bodies=False):
    with app.connection_for_read() as connection:
        queue = app.amqp.queues[app.conf.task_default_queue](connection.default_channel)
        messages = []
        while message := queue.get(no_ack=True):
            messages.append((message.headers, message.payload) if bodies else message.headers)
        return messages


def test_code_declares_entries_beside_the_task(make_app):
    app = make_app(work, declared, period, seconds).celery

    entries = entries_of(app, {})

    assert {name: each.words for name, each in entries.items()} == {
        "declared": "30 3 * * *",
        "period": "every 1:00:00",
        "seconds": "every 0:05:00",
    }
    assert entries["period"].description == "hourly"
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


def test_celerys_scheduler_remembers_the_last_run_and_beat_tells_that_it_is_alive(
    make_app, redis_url, beat, tmp_path
):
    app = make_app(work, broker=redis_url, celery=ini(EVERY_SECOND)).celery
    app.beat_health_file = tmp_path / "health"
    scheduler = beat(app)
    assert isinstance(scheduler, PersistentScheduler)

    (headers,) = turn_until(scheduler, lambda: waiting(app))
    last = scheduler.schedule["e"].last_run_at
    scheduler.close()

    assert headers["celery_beat_task"] is True
    assert abs(datetime.now(timezone.utc) - last) < timedelta(seconds=60)
    assert beat(app).schedule["e"].last_run_at == last
    told = json.loads(app.beat_health_file.read_text())
    assert (told["entries"], told["overdue"]) == (1, 0)


def test_the_health_file_is_written_while_nothing_is_due(make_app, beat, tmp_path):
    app = make_app(work, celery=ini("[celerybeat:e]; task = work; type = timedelta; schedule = 1h"))
    app.celery.beat_health_file = tmp_path / "health"

    wait = beat(app.celery).tick()

    assert 0 < wait <= 1
    told = json.loads(app.celery.beat_health_file.read_text())
    assert (told["entries"], told["last_tick_age"]) == (1, None)


def test_what_changes_between_two_starts_is_taken_over_and_the_rest_remembered(
    make_app, beat, monkeypatch
):
    sections = (
        "[celerybeat:kept]; task = work; type = crontab; schedule = 30 3 * * *; "
        "timezone = Asia/Tokyo; "
        "[celerybeat:changed]; task = work; type = timedelta; schedule = 1h; "
    )
    gone = "[celerybeat:gone]; task = work; type = solar; schedule = sunset 52.5 13.4"
    first = beat(make_app(work, celery=ini(sections + gone)).celery)
    assert first.schedule["gone"].schedule == solar("sunset", 52.5, 13.4)
    runs = {name: entry.last_run_at for name, entry in first.schedule.items()}
    first.close()

    app = make_app(work, celery=ini(sections.replace("1h", "2h"))).celery
    second = beat(app)

    assert set(second.schedule) == {"kept", "changed"}
    assert {name: each.last_run_at for name, each in second.schedule.items()} == {
        name: runs[name] for name in ("kept", "changed")
    }
    assert second.schedule["changed"].schedule == schedule(timedelta(hours=2))
    kept = second.schedule["kept"].schedule
    tokyo = datetime(2026, 7, 1, 18, 0, tzinfo=timezone.utc)  # 3:00 there, the next day
    monkeypatch.setattr(kept, "nowfun", lambda: tokyo)
    assert kept.is_due(tokyo - timedelta(hours=1)) == (False, 30 * 60)


def test_a_health_file_that_cannot_be_written_is_told_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(scheduler, "_EVERY", 0)
    file = scheduler.HealthFile(tmp_path / "run" / "health")
    for _ in range(2):
        file.heartbeat(1, 0)
    (tmp_path / "run").mkdir()
    file.heartbeat(1, 0)

    failed, back = (record.getMessage() for record in caplog.records)
    assert "health file has failed" in failed
    assert "health file is back" in back


def test_a_beat_does_not_start_with_what_celerys_scheduler_would_not_obey(make_app):
    sections = (
        "[celerybeat:long]; task = work; type = timedelta; schedule = 1h; overlap = skip; "
        "[celerybeat:off]; task = work; type = timedelta; schedule = 1h; overlap = skip; "
        "enabled = false; "
        "[celerybeat:coming]; task = work; type = clocked; schedule = 2999-01-01T00:00Z; "
        "catch_up = once"
    )
    app = make_app(work, celery=ini(sections)).celery

    with pytest.raises(ConfigurationError) as raised:
        check_schedule(app)

    sentence = (
        "[celerybeat:{}] has {}, which needs the schedule in the database: Celery's own scheduler "
        "would not obey. Set ws_celery.beat = true in the section of the application, or take it "
        "out."
    )
    assert [str(fault) for fault in raised.value.faults] == [
        sentence.format("long", "overlap"),
        sentence.format("coming", "type = clocked and catch_up"),
    ]


def test_a_crontab_in_a_zone_obeys_the_deadline_of_celery(make_app, redis_url, beat):
    hour_ago = datetime.now(ZoneInfo("Asia/Tokyo")) - timedelta(hours=1)
    sections = "beat_cron_starting_deadline = 600" + ini(
        "[celerybeat:late]; task = work; type = crontab; schedule = * * * * *; "
        "timezone = Asia/Tokyo; "
        "[celerybeat:missed]; task = work; type = crontab; timezone = Asia/Tokyo; "
        f"schedule = {hour_ago.minute} {hour_ago.hour} * * *"
    )
    app = make_app(work, broker=redis_url, celery=sections).celery
    scheduler = beat(app)
    for entry in scheduler.schedule.values():
        entry.last_run_at -= timedelta(days=1)

    turn_until(scheduler, lambda: scheduler.schedule["late"].total_run_count)
    for _ in range(3):
        turn(scheduler)

    assert scheduler.schedule["missed"].total_run_count == 0


@pytest.mark.parametrize("on", [False, True], ids=["without", "database"])
def test_an_entry_from_code_may_have_what_a_call_may_have(
    make_app, make_schedule, sqlite, redis_url, beat, on
):
    app = make_schedule(sqlite, work) if on else make_app(work, broker=redis_url)
    call = app.celery.tasks["work"].s(1).set(link=work.s(2), argsrepr="(hidden)", expires=600)
    app.celery.add_periodic_task(1.0, call, name="added")
    check_schedule(app.celery)

    ((headers, body),) = turn_until(beat(app.celery), lambda: waiting(app.celery, bodies=True))

    args, _, embed = body
    assert (args, headers["argsrepr"]) == ([1], "(hidden)")
    assert [(each["task"], each["args"]) for each in embed["callbacks"]] == [("work", [2])]
    assert headers["expires"] is not None
    assert [*export_schedule(app.celery, everything=True)] == []
    assert unexported_entries(app.celery, everything=True) == ["added"]


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


def test_a_scheduler_that_does_not_read_the_database_is_refused_beside_it(make_app):
    with pytest.raises(ConfigurationError, match="RedBeatScheduler does not read"):
        make_app(celery="beat_scheduler = redbeat.RedBeatScheduler", ws_celery__beat="true")


def test_neither_does_the_command_take_one_that_does_not_read_it(make_app):
    app = make_app(ws_celery__beat="true").celery

    ended = CliRunner().invoke(
        beat_command, ["-S", "redbeat.RedBeatScheduler"], obj=SimpleNamespace(app=app)
    )

    assert ended.exit_code == 2
    assert "redbeat.RedBeatScheduler does not read the schedule in the database" in ended.output
