"""Rows and messages commit together, on real databases."""

from __future__ import annotations

from contextlib import suppress

import pytest
import transaction
import zope.sqlalchemy
from celery import Task
from kombu.exceptions import EncodeError
from pyramid.response import Response
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, scoped_session

from ws_celery import RequestAwareTask, task

EXPLICIT = {"tm__manager_hook": "pyramid_tm.explicit_manager"}


class Base(DeclarativeBase):
    """Base of the mapped classes."""


class Note(Base):
    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


@task(name="write")
def write(request, number):
    request.dbsession.add(Note(id=number, text=f"note {number}"))


@task(name="write_and_fail")
def write_and_fail(request, number):
    request.dbsession.add(Note(id=number, text=f"note {number}"))
    request.dbsession.flush()
    raise LookupError("no such thing")


@pytest.fixture(params=["explicit manager", "manager of the thread"])
def make(request, make_app, database):
    """Make an application with this database, for each kind of transaction manager."""
    settings = EXPLICIT if request.param == "explicit manager" else {}

    def make(*tasks, view=None, celery=""):
        def setup(config):
            database.includeme(config)
            if view:
                config.add_route("home", "/")
                config.add_view(view, route_name="home")

        return make_app(write, write_and_fail, *tasks, setup=setup, celery=celery, **settings)

    return make


def call_as_worker(registered, args=()):
    """Run a task as a worker does: not eagerly, in no transaction."""
    registered.push_request(id="id", called_directly=False, is_eager=False, args=args, kwargs={})
    try:
        return registered(*args)
    finally:
        registered.request_stack.pop()


# Tasks


def test_a_task_that_returns_commits_its_rows(make, database):
    app = make()
    app.celery.tasks["write"].apply((1,)).get()

    assert database.notes() == ["note 1"]


def test_a_task_that_fails_leaves_no_rows(make, database):
    app = make()
    app.celery.tasks["write_and_fail"].apply((1,))

    assert database.notes() == []


def test_a_task_that_fails_leaves_nothing_for_the_next_one_to_commit(make, database):
    app = make()
    app.celery.tasks["write_and_fail"].apply((1,))
    app.celery.tasks["write"].apply((2,)).get()

    assert database.notes() == ["note 2"]


@task(name="careless", base=RequestAwareTask)
def careless(request, how):
    """Leave a transaction open, in the manager of the thread."""
    request.dbsession.add(Note(id=1, text="note 1"))
    request.dbsession.flush()
    if how == "fail":
        raise LookupError("no such thing")


@task(name="reading", base=RequestAwareTask)
def reading(request):
    sessions.append(request.dbsession)
    return request.dbsession.query(Note).count()


@task(name="committing", base=RequestAwareTask)
def committing(request):
    transaction.commit()


sessions = []


@pytest.mark.parametrize("call", [call_as_worker, Task.apply])
@pytest.mark.parametrize("how", ["return", "fail"])
def test_what_a_run_without_a_transaction_leaves_open_is_not_committed_by_the_next(
    make_app, database, call, how
):
    app = make_app(careless, committing, setup=database.includeme)
    with suppress(LookupError):
        call(app.celery.tasks["careless"], (how,))
    call(app.celery.tasks["committing"])

    assert database.notes() == []


@pytest.mark.parametrize("call", [call_as_worker, Task.apply])
def test_a_run_without_a_transaction_that_reads_gives_its_connection_back(make_app, postgres, call):
    app = make_app(reading, setup=postgres.includeme)
    sessions.clear()
    call(app.celery.tasks["reading"])

    assert postgres.engine.pool.checkedout() == 0
    assert not sessions.pop().in_transaction()


def test_a_commit_that_the_database_refuses_is_a_failure_of_the_task(make, database):
    app = make()
    database.execute("INSERT INTO notes VALUES (1, 'taken')")
    result = app.celery.tasks["write"].apply((1,))

    assert isinstance(result.result, DBAPIError)
    assert database.notes() == ["taken"]


def test_a_task_in_place_commits_with_its_caller(make, database):
    def view(request):
        write(request, 1)
        seen.append(database.notes())
        return Response("done")

    seen = []
    make(view=view).web.get("/")

    assert seen == [[]]
    assert database.notes() == ["note 1"]


@pytest.mark.parametrize("call", [call_as_worker, Task.apply])
def test_a_task_commits_although_the_thread_had_a_transaction_open(make_app, database, call):
    """As when an application with a session of the thread reads its database while it starts."""
    session = scoped_session(database.sessions)
    zope.sqlalchemy.register(session)

    @task(name="write_by_thread")
    def write_by_thread(request):
        session.add(Note(id=1, text="note 1"))

    app = make_app(write_by_thread)
    session.query(Note).all()
    call(app.celery.tasks["write_by_thread"])
    transaction.abort()

    assert database.notes() == ["note 1"]


# Requests


def test_rows_and_tasks_of_a_view_commit_together(make, database):
    def view(request):
        request.dbsession.add(Note(id=1, text="ordered"))
        write.delay(2)
        return Response("done")

    app = make(view=view)
    app.web.get("/")

    assert database.notes() == ["ordered"]
    assert app.names() == ["write"]


def test_neither_rows_nor_tasks_of_a_view_that_fails_are_left(make, database):
    def view(request):
        request.dbsession.add(Note(id=1, text="ordered"))
        request.dbsession.flush()
        write.delay(2)
        raise LookupError("no such thing")

    app = make(view=view)
    with pytest.raises(LookupError):
        app.web.get("/")

    assert (database.notes(), app.names()) == ([], [])


def test_a_task_is_not_sent_if_the_database_refuses_the_commit(make, database):
    def view(request):
        request.dbsession.add(Note(id=1, text="ordered"))
        write.delay(2)
        return Response("done")

    app = make(view=view)
    database.execute("INSERT INTO notes VALUES (1, 'taken')")
    with pytest.raises(DBAPIError):
        app.web.get("/")

    assert app.names() == []


def test_an_eager_task_sees_what_its_view_has_committed_and_commits_itself(make, database):
    @task(name="correct")
    def correct(request):
        request.dbsession.get(Note, 1).text += ", corrected"

    def view(request):
        request.dbsession.add(Note(id=1, text="ordered"))
        correct.delay()
        write_and_fail.delay(2)
        write.delay(3)
        return Response("done")

    make(correct, view=view, celery="task_always_eager = true").web.get("/")

    assert database.notes() == ["ordered, corrected", "note 3"]


def dispatching_view(request):
    """A view whose rows dispatch a task when they are flushed, which the commit does."""
    session = request.dbsession
    event.listen(session, "after_flush", lambda *_: write.delay(request, 2))
    session.add(Note(id=1, text="ordered"))
    return Response("done")


def test_a_task_called_while_the_commit_flushes_is_sent(make, database):
    app = make(view=dispatching_view)
    app.web.get("/")

    assert database.notes() == ["ordered"]
    assert app.names() == ["write"]


def test_a_task_called_while_the_commit_flushes_is_sent_besides_others(make, database):
    def view(request):
        write.delay(1)
        return dispatching_view(request)

    app = make(view=view)
    app.web.get("/")

    assert [message.args for message in app.sent()] == [[1], [2]]


def test_a_task_called_while_the_commit_flushes_is_not_sent_if_it_fails(make, database):
    def view(request):
        response = dispatching_view(request)
        request.dbsession.add(Note(id=9, text=None))
        event.listen(request.dbsession, "before_commit", fail)
        return response

    def fail(session):
        raise LookupError("no such thing")

    app = make(view=view)
    with pytest.raises((DBAPIError, LookupError)):
        app.web.get("/")

    assert app.names() == []


def test_rows_and_tasks_of_a_savepoint_are_rolled_back_together(make_app, postgres):
    def view(request):
        request.dbsession.add(Note(id=1, text="kept"))
        write.delay(1)
        savepoint = request.tm.savepoint()
        request.dbsession.add(Note(id=2, text="rolled back"))
        write.delay(2)
        request.dbsession.flush()
        savepoint.rollback()
        return Response("done")

    def setup(config):
        postgres.includeme(config)
        config.add_route("home", "/")
        config.add_view(view, route_name="home")

    app = make_app(write, setup=setup)
    app.web.get("/")

    assert postgres.notes() == ["kept"]
    assert [message.args for message in app.sent()] == [[1]]


# Conflicts


@pytest.fixture
def counting(make_app, postgres):
    """An application whose transactions must be serialisable, and its counter."""
    postgres.engine = postgres.engine.execution_options(isolation_level="REPEATABLE READ")
    postgres.sessions.configure(bind=postgres.engine)
    postgres.execute("INSERT INTO notes VALUES (1, '0')")
    attempts = []

    @task(name="count")
    def count(request, interrupted):
        (value,) = request.dbsession.execute(text("SELECT text FROM notes")).scalars()
        attempts.append(value)
        if len(attempts) <= interrupted:
            postgres.execute("UPDATE notes SET text = CAST(text AS INTEGER) + 10")
        request.dbsession.execute(text("UPDATE notes SET text = :new"), {"new": int(value) + 1})
        zope.sqlalchemy.mark_changed(request.dbsession)

    app = make_app(count, setup=postgres.includeme, **EXPLICIT)
    return app.celery.tasks["count"], attempts


def test_a_serialization_failure_is_tried_again(counting, postgres):
    count, attempts = counting
    count.apply((1,)).get()

    assert attempts == ["0", "10"]
    assert postgres.notes() == ["11"]


def test_a_serialization_failure_is_a_failure_in_the_end(counting, postgres):
    count, attempts = counting
    count.max_retries = 0
    result = count.apply((9,))

    assert isinstance(result.result, DBAPIError)
    assert attempts == ["0", "10", "20"]
    assert postgres.notes() == ["30"]


@pytest.mark.parametrize("pass_it", [lambda note: note, lambda note: [{"note": note}]])
def test_a_row_as_an_argument_is_told_to_be_passed_by_its_key(make_app, sqlite, pass_it):
    make_app(write, setup=sqlite.includeme)
    advice = r"write: argument 1 cannot be serialized with json: a Note is a row .* key \(id\)"
    with transaction.manager, pytest.raises(EncodeError, match=advice):
        write.delay(pass_it(Note(id=1, text="ordered")))
