"""Applications that share a queue and have an outbox each: a message is run where its row is."""

from __future__ import annotations

import logging

import pytest
import transaction
from celery import Task
from pyramid.threadlocal import RequestContext
from sqlalchemy import create_engine, event
from sqlalchemy.engine import make_url
from tests.notes import dispatch, follow, insert, write
from tests.waiting import SOON

from ws_celery import RequestAwareTask, task
from ws_celery.events import TaskFinished
from ws_celery.exceptions import Abandoned, Unavailable
from ws_celery.outbox import outbox_table
from ws_celery.outbox.tables import place_of
from ws_celery.recording import OUTBOX_HEADER
from ws_celery.testing.captured import run_as_worker


@task(name="late", acknowledge="late")
def late(request, number):
    insert(request, number)


@task(name="aware", base=RequestAwareTask)
def aware(request, number):
    return number


class Plain(Task):
    name = "plain"

    def run(self, number):
        return number


TASKS = (write, follow, late, aware)


@pytest.fixture
def owner(make_outbox, postgres):
    """The application that dispatches."""
    app = make_outbox(postgres, *TASKS, ws_celery__outbox__table="theirs")
    app.celery.register_task(Plain())
    return app


@pytest.fixture
def finished():
    return []


@pytest.fixture(params=["another table", "another database"])
def other(request, make_outbox, finished):
    """The application whose worker takes the message."""
    name = "postgres" if request.param == "another table" else "sqlite"
    database = request.getfixturevalue(name)
    app = make_outbox(
        database, *TASKS, setup=lambda config: config.add_subscriber(finished.append, TaskFinished)
    )
    app.celery.register_task(Plain())
    app.database = database
    return app


@pytest.mark.parametrize("name", ["write", "late", "aware"])
def test_a_message_of_another_outbox_is_refused_and_its_row_stays(
    owner, other, start_worker, rows_of, finished, caplog, name
):
    queue = other.celery.conf.task_default_queue
    result = dispatch(owner, owner.celery.tasks[name], 1, queue=queue)
    start_worker(other)
    own = dispatch(other, other.celery.tasks["write"], 2)
    assert own.get(SOON) == 2

    assert other.database.notes() == ["note 2"]
    assert result.state == "PENDING"
    (row,) = rows_of(owner)
    assert (row.task_id, row.died_at, row.error) == (result.id, None, None)
    assert row.due_at is not None
    assert [event.id for event in finished] == [own.id]
    (said,) = [each.getMessage() for each in caplog.records if each.name == "ws_celery.outbox.runs"]
    assert said.startswith(f"{name}[{result.id}] is not run: its row is in another outbox")
    assert "Give each application queues of its own" in said
    assert repr(queue) in said


def test_what_follows_a_task_that_cannot_see_its_row_is_refused(owner, other, rows_of):
    """The database does not answer as it begins, and does at its end."""
    with RequestContext(owner.request()), transaction.manager:
        aware.apply_async((1,), link=follow.s(2))
    (message,) = owner.sent()
    begin, calls = other.celery.outbox.begin, []

    def at_first_not():
        calls.append(1)
        if len(calls) == 1:
            raise Unavailable("outbox", "it starts")
        return begin()

    other.celery.outbox.begin = at_first_not
    (row,) = rows_of(owner)
    publication = owner.celery.outbox.publication_of(row)
    publication.options["headers"].update(message.headers)
    with pytest.raises(Abandoned, match="in another outbox"):
        run_as_worker(other.celery, publication, {})

    assert len(rows_of(owner)) == 1
    assert rows_of(other) == other.sent() == []


def test_a_plain_task_of_another_outbox_is_told_when_it_has_run(
    owner, other, start_worker, rows_of, caplog
):
    result = dispatch_by_name(owner, "plain", queue=other.celery.conf.task_default_queue)
    start_worker(other)

    assert result.get(SOON) == 1
    dispatch(other, other.celery.tasks["write"], 2).get(SOON)
    assert f"plain[{result.id}] has run here, and its row is in another outbox" in caplog.text
    assert len(rows_of(owner)) == 1


def dispatch_by_name(app, name, **options):
    with RequestContext(app.request()), transaction.manager:
        return app.celery.send_task(name, (1,), **options)


def test_a_message_that_does_not_tell_its_outbox_is_as_it_was(owner, other, rows_of, caplog):
    """The version before has sent it."""
    dispatch(owner, write, 1)
    (message,) = owner.sent()
    (row,) = rows_of(owner)
    publication = owner.celery.outbox.publication_of(row)
    publication.options["headers"].update(message.headers)
    assert publication.options["headers"].pop(OUTBOX_HEADER)

    with pytest.raises(Abandoned, match="has run"):
        run_as_worker(other.celery, publication, {})
    assert run_as_worker(owner.celery, publication, {}) == 1
    assert rows_of(owner) == []
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]


def test_a_message_that_names_an_old_place_runs_where_its_row_is(owner, postgres, rows_of):
    """The database was moved, with messages in the queues."""
    dispatch(owner, write, 1)
    (message,) = owner.sent()
    (row,) = rows_of(owner)
    publication = owner.celery.outbox.publication_of(row)
    publication.options["headers"].update(message.headers, **{OUTBOX_HEADER: "1/old/2"})

    assert run_as_worker(owner.celery, publication, {}) == 1
    assert postgres.notes() == ["note 1"]


def test_a_run_that_finds_its_row_asks_for_nothing_more(owner, postgres, start_worker):
    owner.celery.outbox.place = None
    first = dispatch(owner, write, 1)
    owner.celery.outbox.place = None  # as in a worker that has dispatched nothing
    statements = []
    event.listen(
        postgres.engine,
        "before_cursor_execute",
        lambda _, __, statement, *___: statements.append(statement),
    )
    start_worker(owner)
    first.get(SOON)

    assert [each.split()[0] for each in statements] == ["DELETE", "INSERT"]


# Places


def place(url, name="ws_celery_outbox"):
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            return place_of(connection, outbox_table(name))
    finally:
        engine.dispose()


def test_tables_of_one_database_are_different_places_by_whatever_url(owner, postgres, make_outbox):
    make_outbox(postgres)
    url = postgres.engine.url.render_as_string(hide_password=False)
    elsewhere = make_url(url).set(host="localhost", query={"application_name": "x"})
    places = {name: place(url, name) for name in ("theirs", "ws_celery_outbox", "public.theirs")}

    assert place(elsewhere, "theirs") == places["theirs"] == places["public.theirs"]
    assert places["theirs"] == owner.celery.outbox.place or owner.celery.outbox.place is None
    assert places["theirs"] != places["ws_celery_outbox"]
    assert place(url, "missing") is None


def test_a_role_that_may_ask_for_little_knows_its_place_still(owner, postgres):
    function = "FUNCTION pg_control_system()"
    url = postgres.engine.url
    try:
        postgres.execute("CREATE ROLE ws_celery_test LOGIN")
        postgres.execute(f"REVOKE EXECUTE ON {function} FROM PUBLIC")
        told = place(url.set(username="ws_celery_test"), "theirs")
    finally:
        postgres.execute(f"GRANT EXECUTE ON {function} TO PUBLIC")
        postgres.execute("DROP ROLE ws_celery_test")

    assert place(url, "theirs").endswith(told)
    assert told.startswith(url.database)


def test_a_file_of_sqlite_is_one_place_by_whatever_path(tmp_path, sqlite):
    alias = tmp_path / "alias.sqlite"
    alias.symlink_to(sqlite.engine.url.database)

    assert place(f"sqlite:///{alias}") == place(sqlite.engine.url) is not None
    assert place(f"sqlite:///{tmp_path}/other.sqlite") != place(sqlite.engine.url)
    assert place("sqlite://") is None


def test_databases_of_mariadb_are_different_places(mariadb):
    url = mariadb.engine.url

    assert place(url) == place(url.set(host="localhost"))
    assert place(url) != place(url.set(database="test"))
    assert place(url) != place(url, "another")


@task(name="fails")
def fails(request):
    raise LookupError("no such thing")


def test_of_two_applications_in_a_process_each_has_its_dead_letters(
    make_outbox, postgres, sqlite, rows_of
):
    # To Celery 5.5 what listens for the second application was what listened for the first.
    for app in [make_outbox(database, fails) for database in (postgres, sqlite)]:
        dispatch(app, fails)
        (row,) = rows_of(app)
        publication = app.celery.outbox.publication_of(row)
        publication.options["headers"].update(app.sent()[0].headers)
        with pytest.raises(LookupError):
            run_as_worker(app.celery, publication, {})

        (row,) = rows_of(app)
        assert "LookupError: no such thing" in row.error
