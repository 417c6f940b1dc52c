"""The schedule's table and its rows, in real databases."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import MetaData, Table, inspect, text

from ws_celery import ConfigurationError, task
from ws_celery.beat.sources import check_sources
from ws_celery.beat.store import schedule_table
from ws_celery.exceptions import (
    NotFound,
    SessionError,
    TableError,
    Unavailable,
)

TICK = datetime(2027, 1, 31, 9, 0, 0, 250000, tzinfo=timezone.utc)


@task(name="work")
def work(request):
    pass


@pytest.fixture(params=["postgres", "sqlite", "mariadb"])
def database(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def store(make_schedule, database):
    return make_schedule(database, work).celery.schedule


def edit(store, statement, **parameters):
    with store.begin() as connection:
        connection.execute(text(statement), parameters)


def test_an_entry_is_edited_field_by_field_and_taken_back(store):
    store.save("e", task="work", type="integer", schedule="1")
    store.save("e", schedule="2", args=[1])
    store.save("e", args=None)

    (known,) = store.load().values()
    assert known.fields == {"task": "work", "type": "integer", "schedule": "2"}
    assert (known.name, known.origin, known.version) == ("e", "database", 3)


def test_an_entry_may_have_arguments_of_any_length(store):
    store.save("e", task="work", args=["é" * 100_000])

    assert store.load()["e"].fields["args"] == ["é" * 100_000]


def test_each_edit_makes_another_revision(store):
    revisions = []

    def look():
        with store.begin() as connection:
            revisions.append(store.revision(connection)[0])

    look()
    for change in (
        lambda: store.save("e", task="work"),
        lambda: store.save("e", enabled=False),
        lambda: store.save("e", enabled=True),
        lambda: store.request_run("e"),
        lambda: store.remove("e"),
        lambda: store.save("f", origin="ini", enabled=False),
    ):
        change()
        look()

    assert len(set(revisions[:5])) == 5
    assert revisions[5] == revisions[0]  # as it was: nothing is known
    assert revisions[6] != revisions[1]


def test_what_was_edited_of_an_entry_of_the_ini_is_taken_back_and_its_last_tick_stays(store):
    store.save("e", origin="ini", schedule="2")
    with store.begin() as connection:
        store.advance(connection, [{"entry": "e", "last_run_at": TICK, "task_id": "1"}])

    store.remove("e")

    (known,) = store.load().values()
    assert (known.fields, known.last_run_at, known.task_id) == ({}, TICK, "1")


def test_what_is_not_there_cannot_be_removed(store):
    with pytest.raises(NotFound, match="no schedule entry 'e'"):
        store.remove("e")


def test_a_run_that_was_asked_for_is_kept_until_the_next_tick_is_stored(store):
    store.request_run("e", origin="code")

    requested = store.load()["e"].run_requested_at
    assert abs(requested - store.now()) < timedelta(minutes=1)
    with store.begin() as connection:
        store.advance(connection, [{"entry": "e", "last_run_at": TICK, "task_id": "1"}])
    assert store.load()["e"].run_requested_at is None


def test_entries_that_are_known_are_not_made_again(store):
    store.save("b", origin="ini", schedule="2")
    with store.begin() as connection:
        store.register(connection, {"c": "ini", "b": "code", "a": "code"})
        store.register(connection, {})

    assert [(each.name, each.origin) for each in store.load().values()] == [
        ("a", "code"),
        ("b", "ini"),
        ("c", "ini"),
    ]


@pytest.mark.parametrize(
    ("fields", "problem"), [("{", "are no JSON"), ("[1]", "are no JSON object"), ("", None)]
)
def test_a_hand_that_slips_harms_one_entry_only(store, fields, problem):
    store.save("e", task="work")
    edit(store, "UPDATE ws_celery_schedule SET fields = :fields", fields=fields)

    known = store.load()["e"]
    assert known.fields == {}
    assert (known.problem is None) is (problem is None)
    assert problem is None or problem in known.problem


@pytest.mark.parametrize("database", ["postgres", "mariadb"], indirect=True)  # SQLite waits
def test_an_entry_that_another_beat_holds_is_left_out(make_schedule, database):
    store = make_schedule(database, work).celery.schedule
    store.save("e", task="work")

    with store.begin() as first, store.begin() as second:
        assert list(store.lock(first, ["e", "f"]).known) == ["e"]
        assert not store.lock(second, ["e"]).known


def test_an_edit_on_the_way_is_undone_with_its_transaction(store):
    with store.begin() as connection:
        store.save("e", task="work", connection=connection)
        connection.rollback()

    assert store.load() == {}


def test_names_that_differ_in_case_or_an_accent_are_entries_of_their_own(store):
    names = ["Nightly", "Rate", "nightly", "rate", "rat\u00e9"]
    for number, name in enumerate(names):
        store.save(name, args=[number])
    with store.begin() as connection:
        store.register(connection, {"NIGHTLY": "ini"})

    assert {name: known.fields for name, known in store.load().items()} == {
        **{name: {"args": [number]} for number, name in enumerate(names)},
        "NIGHTLY": {},
    }
    with store.begin() as connection:
        assert list(store.lock(connection, ["nightly"]).known) == ["nightly"]


# The table


def test_alembic_finds_no_difference(store, database):
    metadata = schedule_table().metadata
    with database.engine.begin() as connection:
        options = {"compare_type": True, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)
        differences = compare_metadata(context, metadata)

    ours = [each for each in differences if "ws_celery_schedule" in repr(each)]
    assert not ours


def test_another_table_of_the_name_is_told(store, database):
    store.table.drop(database.engine)
    store.table.metadata.remove(store.table)
    with pytest.raises(TableError, match=r"does not exist.*ws-celery schedule create"):
        store.load()

    edit(store, "CREATE TABLE ws_celery_schedule (name INTEGER)")
    with pytest.raises(TableError, match=r"ws_celery\.beat\.table"):
        store.create_table()


def test_its_name_is_a_setting(make_schedule, database):
    store = make_schedule(database, work, ws_celery__beat__table="my_schedule").celery.schedule

    assert inspect(database.engine).has_table("my_schedule")
    assert store.create_table() is False


def test_alembic_gets_it_with_a_metadata_of_its_own():
    metadata = MetaData()

    assert isinstance(schedule_table("tasks.schedule", metadata), Table)
    assert list(metadata.tables) == ["tasks.schedule"]


def test_an_application_without_a_session_is_told(make_app):
    app = make_app(work, ws_celery__beat="true").celery

    with pytest.raises(SessionError, match=r"ws_celery\.dbsession"):
        app.schedule.load()


@pytest.mark.parametrize("name", ["n" * 256, "blank at the end "])
def test_a_name_that_the_database_cannot_hold_stops_the_start_of_beat(make_app, name):
    schedule = {name: {"task": "work", "schedule": 60}}
    app = make_app(
        work,
        ws_celery__beat="true",
        setup=lambda config: config.configure_celery(beat_schedule=schedule),
    ).celery

    with pytest.raises(ConfigurationError, match=r"cannot be kept.*from 1 to 255 characters"):
        check_sources(app)
    app.schedule = None
    check_sources(app)  # a file can


def test_a_database_that_does_not_answer_is_told(make_app):
    from sqlalchemy import create_engine
    from sqlalchemy.orm import Session

    engine = create_engine("postgresql+psycopg://postgres@127.0.0.1:1/test")

    def include(config):
        config.add_request_method(lambda _: Session(engine), "dbsession", reify=True)

    app = make_app(work, setup=include, ws_celery__beat="true").celery

    with pytest.raises(Unavailable, match="The database of the schedule does not answer"):
        app.schedule.load()
