"""Beat with the schedule in a real database: what it sends, once, and which edits it sees."""

from __future__ import annotations

import json
import logging
import os
import resource
import threading
import time
from datetime import datetime, timedelta, timezone
from itertools import pairwise

import pytest
from redis import Redis
from sqlalchemy import text
from tests.waiting import SOON, wait_for

from ws_celery import RequestAwareTask, inspection, task
from ws_celery.beat import Scheduler, ticks
from ws_celery.beat.scheduler import DatabaseScheduler
from ws_celery.beat.store import Listener
from ws_celery.embedded import EmbeddedBroker
from ws_celery.events import BeforeDispatch
from ws_celery.exceptions import EntryRefused

NOWHERE = "redis://127.0.0.1:1"
EVERY_SECOND = {"task": "work", "type": "integer", "schedule": 1}
NEVER = {"task": "work", "type": "integer", "schedule": 10**8}


@task(name="work")
def work(request, number=0):
    pass


@task(name="plain", base=RequestAwareTask, outbox=False)
def plain(request):
    pass


@pytest.fixture(params=["postgres", "sqlite", "mariadb"])
def database(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def make(make_schedule, database):
    def make(**settings):
        return make_schedule(database, work, plain, ws_celery__outbox="true", **settings).celery

    return make


@pytest.fixture
def beat_of():
    """Start a beat in a thread; it turns until the test ends."""
    beats = []

    def start(app):
        scheduler = Scheduler(app=app)
        ended = threading.Event()

        def turn():
            while not ended.is_set():
                scheduler.tick()

        thread = threading.Thread(target=turn)
        thread.start()
        beats.append((scheduler, ended, thread))
        return scheduler

    yield start
    for scheduler, ended, thread in beats:
        ended.set()
        thread.join(SOON)
        scheduler.close()


def sent(app):
    """Return the ticks of the rows in the outbox, by their headers."""
    with app.outbox.begin() as connection:
        rows = connection.execute(app.outbox.rows.select()).all()
    headers = [json.loads(row.options)["headers"] for row in rows]
    return [(each["ws_celery_entry"], each["ws_celery_tick"]) for each in headers]


def ticks_of(app, name):
    return sorted(tick for entry, tick in sent(app) if entry == name)


def set_last(app, name, last, task_id=None):
    with app.schedule.begin() as connection:
        row = {"entry": name, "last_run_at": last, "task_id": task_id}
        app.schedule.advance(connection, [row])


def test_three_beats_send_each_tick_once(make, beat_of):
    app = make()
    app.schedule.save("e", **EVERY_SECOND)

    for _ in range(3):
        assert isinstance(beat_of(app), DatabaseScheduler)
    wait_for(lambda: len(ticks_of(app, "e")) >= 5)

    times = [datetime.fromisoformat(tick) for tick in ticks_of(app, "e")]
    assert len(set(times)) == len(times)
    assert {b - a for a, b in pairwise(times)} == {timedelta(seconds=1)}


def test_a_tick_and_its_row_are_written_together_or_not_at_all(make, beat_of, monkeypatch):
    app = make()
    app.schedule.save("e", **EVERY_SECOND)
    beat_of(app)
    wait_for(lambda: ticks_of(app, "e"))
    keep = app.outbox.keep
    failed = threading.Event()

    def fail(connection, publications):
        keep(connection, publications)
        failed.set()
        raise RuntimeError("just before the commit")

    monkeypatch.setattr(app.outbox, "keep", fail)
    assert failed.wait(60)
    last, ticks = app.schedule.load()["e"].last_run_at, ticks_of(app, "e")
    monkeypatch.undo()

    assert last.isoformat() == ticks[-1]


@pytest.mark.parametrize("broker", [NOWHERE, None])
def test_a_broker_that_is_down_loses_no_tick(make, beat_of, broker, redis_url):
    app = make(broker=broker or redis_url)
    app.schedule.save("e", **EVERY_SECOND)

    beat_of(app)

    wait_for(lambda: len(ticks_of(app, "e")) >= 3)


def test_what_became_of_an_entry_is_told_by_its_name(make, beat_of, caplog):
    caplog.set_level(logging.INFO, "ws_celery.beat")
    app = make(celery="[celerybeat:e]\ntask = work\ntype = integer\nschedule = 100000000\n")
    beat_of(app)
    wait_for(app.schedule.load)

    def told(words):
        wait_for(lambda: words in caplog.messages)

    inspection.add_schedule_entry(app, "new", {**EVERY_SECOND, "schedule": "1000"})
    told("The entry new was added: every 0:16:40, ticks")
    inspection.edit_schedule_entry(app, "new", {"schedule": "2000"})
    told("The entry new was edited: every 0:33:20, ticks")
    inspection.run_schedule_entry(app, "new")
    told("The entry new is to be sent now, whatever its schedule says")
    wait_for(lambda: ticks_of(app, "new"))
    inspection.remove_schedule_entry(app, "new")
    told("The entry new was removed")
    assert sum("new was" in each for each in caplog.messages) == 3


def test_edits_are_seen_while_beat_runs(make, beat_of):
    app = make(celery="[celerybeat:e]\ntask = work\ntype = integer\nschedule = 100000000\n")
    scheduler = beat_of(app)
    wait_for(app.schedule.load)

    app.schedule.save("e", schedule="1", origin="ini")
    wait_for(lambda: ticks_of(app, "e"))
    app.schedule.save("added", **EVERY_SECOND)
    wait_for(lambda: ticks_of(app, "added"))
    app.schedule.save("e", enabled=False)
    app.schedule.remove("added")
    wait_for(lambda: not len(scheduler._agenda))


def test_the_entry_that_celery_adds_is_switched_off_like_any_other(
    make_schedule, sqlite, sqlite_url, beat_of
):
    app = make_schedule(sqlite, work, celery=f"result_backend = db+{sqlite_url}\n").celery
    assert [each.name for each in inspection.schedule_entries(app)] == ["celery.backend_cleanup"]
    scheduler = beat_of(app)
    wait_for(lambda: len(scheduler._agenda) == 1)

    inspection.disable_schedule_entry(app, "celery.backend_cleanup")

    wait_for(lambda: not len(scheduler._agenda))
    assert inspection.schedule_health(app).entries == 0


def test_an_edit_is_seen_at_once_where_the_database_tells_of_it(make_schedule, postgres, beat_of):
    app = make_schedule(
        postgres, work, ws_celery__outbox="true", ws_celery__beat__poll="600"
    ).celery
    app.schedule.save("e", **NEVER)
    scheduler = beat_of(app)
    wait_for(lambda: scheduler._entries)
    assert scheduler._listener._connection is not None

    app.schedule.request_run("e")

    wait_for(lambda: ticks_of(app, "e"))
    assert app.schedule.load()["e"].run_requested_at is None


@pytest.fixture
def _many_descriptors():
    """Let the next descriptor be one that ``select()`` does not take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    taken = [os.dup(0) for _ in range(1024)]
    yield
    for descriptor in taken:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("_many_descriptors")
def test_a_listener_with_a_high_descriptor_waits_until_an_edit(make_schedule, postgres):
    store = make_schedule(postgres, work).celery.schedule
    store.engine.dispose()
    listener = Listener(store)
    listener.open()

    assert listener._driver.fileno() > 1023
    assert not listener.wait(0.1)
    store.save("e", **NEVER)
    assert listener.wait(SOON)
    assert listener._connection is not None
    listener.close()


def test_a_round_that_fails_is_made_up_for_without_waiting_for_the_next_look(
    make_schedule, postgres, beat_of, monkeypatch, caplog
):
    app = make_schedule(
        postgres, work, ws_celery__outbox="true", ws_celery__beat__poll="600"
    ).celery
    app.schedule.save("e", **EVERY_SECOND)
    beat_of(app)
    wait_for(lambda: ticks_of(app, "e"))

    def fail(*_):
        raise RuntimeError("for a moment")

    monkeypatch.setattr(app.outbox, "keep", fail)
    wait_for(lambda: "has failed, and is tried again: for a moment" in caplog.text)
    monkeypatch.undo()
    before = len(ticks_of(app, "e"))

    wait_for(lambda: len(ticks_of(app, "e")) > before)


def test_a_round_that_takes_long_is_no_jump_of_the_clock(
    make_schedule, postgres, beat_of, monkeypatch
):
    app = make_schedule(postgres, work, ws_celery__outbox="true").celery
    app.schedule.save("e", **EVERY_SECOND)
    keep, load, loads, kept = app.outbox.keep, app.schedule.load, [], []

    def keep_slowly(connection, publications):
        keep(connection, publications)
        time.sleep(2.5)  # longer than a jump
        kept.append(len(loads))

    def count(connection=None):
        loads.append(connection)
        return load(connection)

    monkeypatch.setattr(app.outbox, "keep", keep_slowly)
    monkeypatch.setattr(app.schedule, "load", count)
    beat_of(app)
    wait_for(lambda: len(kept) >= 3)

    assert kept[2] == kept[1]


def test_an_entry_that_is_off_runs_if_somebody_wants_it_to(make, beat_of):
    app = make()
    app.schedule.save("e", **NEVER, enabled=False)
    beat_of(app)

    app.schedule.request_run("e")

    wait_for(lambda: ticks_of(app, "e"))


def test_what_was_missed_is_skipped_or_made_up_for_once(make, beat_of):
    app = make()
    for name, policy in (("skips", "skip"), ("once", "once")):
        app.schedule.save(name, task="work", type="timedelta", schedule="1h", catch_up=policy)
        set_last(app, name, app.schedule.now() - timedelta(hours=5, minutes=30))

    beat_of(app)
    wait_for(lambda: ticks_of(app, "once"))

    last = {name: each.last_run_at for name, each in app.schedule.load().items()}
    wait_for(
        lambda: app.schedule.load()["skips"].last_run_at > app.schedule.now() - timedelta(hours=1)
    )
    assert len(ticks_of(app, "once")) == 1
    assert last["once"].isoformat() == ticks_of(app, "once")[0]
    assert not ticks_of(app, "skips")


def test_an_entry_that_is_not_to_overlap_waits_for_the_row_of_its_last_run(make, beat_of):
    app = make()
    app.schedule.save("e", **EVERY_SECOND, overlap="skip")
    app.schedule.save("other", **EVERY_SECOND)
    beat_of(app)

    wait_for(lambda: len(ticks_of(app, "other")) >= 4)
    assert len(ticks_of(app, "e")) == 1
    with app.outbox.begin() as connection:
        connection.execute(app.outbox.table.delete())  # the run has ended

    wait_for(lambda: ticks_of(app, "e"))


def test_entries_that_share_one_moment_are_all_sent_even_if_late(
    make_schedule, sqlite, beat_of, monkeypatch
):
    monkeypatch.setattr("ws_celery.beat.scheduler.BATCH", 3)
    monkeypatch.setattr("ws_celery.beat.ticks.LATE", timedelta(0))
    app = make_schedule(sqlite, work, ws_celery__outbox="true").celery
    moment = app.schedule.now() + timedelta(seconds=8)
    names = {f"e{number}" for number in range(20)}
    for name in names:
        app.schedule.save(name, task="work", type="clocked", schedule=moment.isoformat())

    scheduler = beat_of(app)
    wait_for(lambda: len(scheduler._agenda) >= len(names))

    wait_for(lambda: {name for name, _ in sent(app)} == names)


def test_there_is_no_pause_while_more_is_due_than_one_transaction_claims(
    make_schedule, sqlite, beat_of, monkeypatch
):
    monkeypatch.setattr("ws_celery.beat.scheduler.BATCH", 3)
    monkeypatch.setattr("ws_celery.beat.scheduler.ROUND", 3600)
    app = make_schedule(sqlite, work, ws_celery__outbox="true").celery
    names = {f"e{number}" for number in range(11)}
    for name in names:
        app.schedule.save(name, **NEVER)
        app.schedule.request_run(name)

    beat_of(app)

    wait_for(lambda: {name for name, _ in sent(app)} == names)


def test_a_beat_that_stood_still_was_not_ready_for_what_was_due_meanwhile(
    make_schedule, sqlite, beat_of, monkeypatch
):
    app = make_schedule(sqlite, work, ws_celery__outbox="true").celery
    app.schedule.save("e", **NEVER)
    scheduler = beat_of(app)
    ready = wait_for(lambda: scheduler._ready.get("e"))

    monkeypatch.setattr("ws_celery.beat.scheduler.STOOD_STILL", -60)  # each wait was too long

    wait_for(lambda: scheduler._ready["e"] > ready)


@pytest.mark.parametrize("schedule", [NEVER, EVERY_SECOND], ids=["never", "every second"])
def test_a_wanted_run_waits_until_the_last_one_is_finished(make, beat_of, caplog, schedule):
    caplog.set_level("DEBUG", "ws_celery.beat.claims")
    app = make()
    app.schedule.save("e", **schedule, overlap="skip")
    beat_of(app)
    app.schedule.request_run("e")
    wait_for(lambda: ticks_of(app, "e"))

    app.schedule.request_run("e")
    wait_for(lambda: caplog.text.count("e is not sent: its last run is not finished") >= 2)
    assert app.schedule.load()["e"].run_requested_at is not None
    with app.outbox.begin() as connection:
        connection.execute(app.outbox.table.delete())  # the run has ended

    wait_for(lambda: ticks_of(app, "e"))
    wait_for(lambda: app.schedule.load()["e"].run_requested_at is None)
    assert len(ticks_of(app, "e")) == 1


def test_a_run_that_waits_is_not_written_each_time_it_is_asked_for(
    make_schedule, sqlite, beat_of, caplog, monkeypatch
):
    caplog.set_level("DEBUG", "ws_celery.beat.claims")
    app = make_schedule(sqlite, work, ws_celery__outbox="true").celery
    app.schedule.save("e", **NEVER, overlap="skip")
    beat_of(app)
    app.schedule.request_run("e")
    wait_for(lambda: app.schedule.load()["e"].task_id)
    advance, written = app.schedule.advance, []
    monkeypatch.setattr(
        app.schedule, "advance", lambda *args: written.append(args[1]) or advance(*args)
    )

    app.schedule.request_run("e")

    wait_for(lambda: caplog.text.count("e is not sent: its last run is not finished") >= 3)
    assert not any(written)


def test_a_tick_that_is_due_and_wanted_is_sent_as_that_tick(make, beat_of):
    app = make()
    app.schedule.save("e", task="work", type="timedelta", schedule="1h", catch_up="once")
    set_last(app, "e", app.schedule.now() - timedelta(hours=5, minutes=30))
    app.schedule.request_run("e")

    beat_of(app)

    wait_for(lambda: ticks_of(app, "e"))
    known = app.schedule.load()["e"]
    assert ticks_of(app, "e") == [known.last_run_at.isoformat()]
    assert known.run_requested_at is None


def test_an_entry_that_is_broken_by_hand_is_set_aside_and_others_tick_on(make, beat_of, caplog):
    app = make()
    for name in ("good", "bad", "worse", "unknown", "unfit"):
        app.schedule.save(name, **EVERY_SECOND)
    beat_of(app)
    wait_for(lambda: {name for name, _ in sent(app)} >= {"good", "bad", "worse"})

    fields = {
        "bad": '{"task": "work", "type": "integer", "schedule": "often"}',
        "worse": "{",
        "unknown": '{"task": "wrok", "type": "integer", "schedule": 1}',
        "unfit": '{"task": "work", "type": "integer", "schedule": 1, "kwargs": {"numbr": 1}}',
    }
    with app.schedule.begin() as connection:
        for name, value in fields.items():
            statement = "UPDATE ws_celery_schedule SET fields = :f, version = 99 WHERE name = :n"
            connection.execute(text(statement), {"f": value, "n": name})

    wait_for(lambda: all(f"The entry {name} is set aside" in caplog.text for name in fields))
    before = len(ticks_of(app, "good"))
    wait_for(lambda: len(ticks_of(app, "good")) > before + 1)
    assert "did you mean work?" in caplog.text
    assert "numbr" in caplog.text


@pytest.mark.parametrize(
    "fields",
    [
        '{"task": "work", "schedule": 1e300}',
        '{"task": "work", "schedule": -5}',
        '{"task": "work", "type": "solar", "schedule": {"event": ["x"], "lat": 1, "lon": 1}}',
        '{"task": "work", "type": "integer", "schedule": 1, "expires": "9999-12-31T23:59-05:00"}',
        '{"task": "work", "type": "clocked", "schedule": "0001-01-01T00:00+00:00"}',
    ],
)
def test_a_row_that_was_broken_before_beat_started_stops_no_other(
    make_schedule, sqlite, beat_of, caplog, fields
):
    app = make_schedule(sqlite, work, ws_celery__outbox="true").celery
    for name in ("bad", "good"):
        app.schedule.save(name, **EVERY_SECOND)
    with app.schedule.begin() as connection:
        statement = "UPDATE ws_celery_schedule SET fields = :f WHERE name = 'bad'"
        connection.execute(text(statement), {"f": fields})

    beat_of(app)
    wait_for(lambda: ticks_of(app, "good"))

    assert "The entry bad is set aside: " in caplog.text
    assert not ticks_of(app, "bad")
    states = {each.name: each.state for each in inspection.schedule_entries(app)}
    assert (states["bad"], states["good"]) == ("set aside", "on")
    inspection.disable_schedule_entry(app, "bad")
    inspection.remove_schedule_entry(app, "bad")


@pytest.mark.parametrize("place", ["scheduler.due_tick", "scheduler.next_tick", "claims.due_tick"])
def test_an_entry_that_cannot_tell_its_tick_while_beat_runs_stops_no_other(
    make_schedule, sqlite, beat_of, monkeypatch, caplog, place
):
    module, function = place.split(".")
    told = getattr(ticks, function)

    def fail(entry, *arguments):
        if entry.name == "bad":
            raise LookupError("no moon")
        return told(entry, *arguments)

    monkeypatch.setattr(f"ws_celery.beat.{module}.{function}", fail)
    app = make_schedule(sqlite, work, ws_celery__outbox="true").celery
    for name in ("bad", "good"):
        app.schedule.save(name, **EVERY_SECOND)

    beat_of(app)
    wait_for(lambda: len(ticks_of(app, "good")) >= 2)

    wait_for(lambda: "The entry bad cannot tell its next tick" in caplog.text)
    assert "has failed, and is tried again" not in caplog.text


def test_a_schedule_that_cannot_tell_its_tick_hides_no_other(make_schedule, sqlite, monkeypatch):
    def fail(entry, *_):
        if entry.name == "bad":
            raise LookupError("no moon")
        return iter(())

    monkeypatch.setattr("ws_celery.inspection.schedule.ticks_between", fail)
    app = make_schedule(sqlite, work, ws_celery__outbox="true").celery
    for name in ("bad", "good"):
        app.schedule.save(name, **EVERY_SECOND)

    problems = {each.name: each.problem for each in inspection.schedule_entries(app)}

    assert (problems["good"], "no moon" in problems["bad"]) == (None, True)


def test_a_section_that_is_renamed_to_other_case_ticks_with_all_others(make, beat_of):
    app = make(celery="[celerybeat:backup]\ntask = work\ntype = integer\nschedule = 1\n")
    app.schedule.save("other", **EVERY_SECOND)
    with app.schedule.begin() as connection:
        app.schedule.register(connection, {"Backup": "ini"})

    beat_of(app)

    wait_for(lambda: {name for name, _ in sent(app)} == {"backup", "other"})


@pytest.mark.parametrize("database", ["mariadb"], indirect=True)
def test_a_table_that_ignores_case_stops_no_other_entry(make, beat_of, database):
    app = make(celery="[celerybeat:backup]\ntask = work\ntype = integer\nschedule = 1\n")
    database.execute(
        "ALTER TABLE ws_celery_schedule MODIFY name VARCHAR(255) COLLATE utf8mb4_general_ci"
    )
    app.schedule.save("other", **EVERY_SECOND)
    with app.schedule.begin() as connection:
        app.schedule.register(connection, {"Backup": "ini"})

    beat_of(app)

    wait_for(lambda: ticks_of(app, "other"))


def test_a_task_that_cannot_be_sent_stops_no_other(make, beat_of, caplog):
    def refuse(event):
        if event.kwargs == {"number": 13}:
            raise RuntimeError("not today")

    app = make(setup=lambda config: config.add_subscriber(refuse, BeforeDispatch))
    app.schedule.save("e", **EVERY_SECOND, kwargs={"number": 13})
    app.schedule.save("other", **EVERY_SECOND)

    beat_of(app)
    wait_for(lambda: len(ticks_of(app, "other")) >= 2)

    wait_for(lambda: "The entry e cannot be sent; others can" in caplog.text)


def test_a_database_that_is_gone_for_a_while_is_waited_for(make, beat_of, caplog, database):
    app = make()
    app.schedule.save("e", **EVERY_SECOND)
    beat_of(app)
    wait_for(lambda: ticks_of(app, "e"))

    app.schedule.table.drop(database.engine)
    wait_for(lambda: "has failed, and is tried again" in caplog.text)
    app.schedule.create_table()
    app.schedule.save("e", **EVERY_SECOND)
    before = len(ticks_of(app, "e"))

    wait_for(lambda: len(ticks_of(app, "e")) > before)
    wait_for(lambda: "is back after" in caplog.text)


def test_the_health_file_tells_what_beat_does(make, beat_of, tmp_path):
    app = make()
    folder = tmp_path / "run"
    folder.mkdir()
    app.beat_health_file = folder / "health"
    app.schedule.save("e", **EVERY_SECOND)

    beat_of(app)

    def healthy():
        told = app.beat_health_file.exists() and json.loads(app.beat_health_file.read_text())
        return told and told["last_tick_age"] is not None and told

    told = wait_for(healthy)
    assert (told["entries"], told["overdue"]) == (1, 0)
    wait_for(lambda: [each.name for each in folder.iterdir()] == ["health"])  # between two writes


# Without the outbox


@pytest.fixture
def received(redis_url):
    """Count what waits in the queue of an application."""
    with Redis.from_url(redis_url) as client:
        yield lambda app: client.llen(app.conf.task_default_queue)


def test_without_an_outbox_a_tick_is_sent_after_its_claim(
    make_schedule, postgres, beat_of, received, redis_url
):
    app = make_schedule(postgres, work).celery
    app.schedule.save("e", **EVERY_SECOND)

    beat_of(app)

    wait_for(lambda: received(app) >= 2)
    last = app.schedule.load()["e"]
    assert last.task_id


@pytest.fixture
def demoted(start_broker, tmp_path):
    """URL of a Redis that answers what is read, and refuses what is written."""
    broker = EmbeddedBroker(tmp_path / "broker")
    start_broker(broker)
    with Redis(unix_socket_path=str(broker.socket)) as client:
        client.replicaof("127.0.0.1", 1)
    return broker.url(0)


@pytest.mark.parametrize("broker", ["nowhere", "demoted"])
def test_without_an_outbox_no_tick_is_claimed_while_the_broker_is_known_to_be_down(
    make_schedule, postgres, beat_of, caplog, monkeypatch, request, broker
):
    url = NOWHERE if broker == "nowhere" else request.getfixturevalue(broker)
    app = make_schedule(postgres, work, broker=url).celery
    app.schedule.save("e", **EVERY_SECOND)
    declare_all, looks = app.publisher.declare_all, []
    monkeypatch.setattr(
        app.publisher, "declare_all", lambda: looks.append(app.schedule.now()) or declare_all()
    )

    beat_of(app)
    wait_for(lambda: "has failed, and is tried again" in caplog.text)
    claimed = app.schedule.load()["e"].last_run_at
    # It looks whether the broker is back when two more ticks are due, and claims neither.
    wait_for(lambda: any(look > claimed + timedelta(seconds=2) for look in looks))

    assert app.schedule.load()["e"].last_run_at == claimed


@pytest.mark.parametrize("state", ["SUCCESS", "SKIPPED"])
def test_without_an_outbox_the_result_tells_whether_the_last_run_has_ended(
    make_schedule, postgres, beat_of, received, redis_url, state
):
    app = make_schedule(postgres, work, celery=f"result_backend = {redis_url}\n").celery
    app.schedule.save("e", **EVERY_SECOND, overlap="skip")
    app.schedule.save("other", **EVERY_SECOND)
    beat_of(app)
    wait_for(lambda: received(app) >= 4)
    first = app.schedule.load()["e"].task_id

    app.backend.store_result(first, None, state)

    wait_for(lambda: app.schedule.load()["e"].task_id != first)


def test_a_result_backend_that_is_down_stops_no_other_entry(
    make_schedule, postgres, beat_of, received, caplog
):
    app = make_schedule(postgres, work, celery=f"result_backend = {NOWHERE}\n").celery
    app.schedule.save("e", **EVERY_SECOND, overlap="skip")
    app.schedule.save("other", **EVERY_SECOND)

    beat_of(app)
    wait_for(lambda: "the result backend has failed" in caplog.text)
    before = received(app)
    wait_for(lambda: received(app) >= before + 3)

    assert "the database or broker has failed" not in caplog.text
    assert caplog.text.count("the result backend has failed") == 1


def test_an_entry_that_is_not_to_overlap_is_set_aside_where_nothing_tells_its_end(
    make_schedule, sqlite, beat_of, received, caplog
):
    app = make_schedule(sqlite, work).celery
    app.schedule.save("e", **EVERY_SECOND, overlap="skip")
    app.schedule.save("other", **EVERY_SECOND)

    beat_of(app)
    wait_for(lambda: received(app) >= 3)

    assert "The entry e is set aside: overlap = skip needs to know" in caplog.text
    with pytest.raises(EntryRefused, match="has no result_backend"):
        inspection.edit_schedule_entry(app, "other", {"overlap": "skip"})


def test_a_result_that_was_lost_is_waited_for_from_when_its_task_was_sent(
    make_schedule, postgres, beat_of, redis_url
):
    celery = f"result_backend = {redis_url}\nresult_expires = 3\n"
    app = make_schedule(postgres, work, celery=celery).celery
    app.schedule.save("e", **EVERY_SECOND, overlap="skip")
    beat_of(app)
    first = wait_for(lambda: app.schedule.load()["e"].task_id)

    wait_for(lambda: app.schedule.load()["e"].task_id != first)


def test_a_beat_notes_that_it_has_looked_at_an_entry_long_before_its_first_tick(make, beat_of):
    app = make()
    inspection.add_schedule_entry(app, "e", NEVER)
    assert not inspection.schedule_health(app).is_healthy

    beat_of(app)

    wait_for(lambda: inspection.schedule_health(app).is_healthy)
    assert inspection.schedule_entry(app, "e").last_tick is None


def test_a_result_that_never_comes_is_not_waited_for_for_ever():
    from ws_celery.beat.claims import is_unfinished

    now = datetime(2027, 1, 31, tzinfo=timezone.utc)

    class App:
        class conf:  # noqa: N801
            result_expires = 60

    assert not is_unfinished(App, "1", now - timedelta(minutes=2), now)
