"""What is dispatched inside a savepoint of SQLAlchemy shares its fate."""

from __future__ import annotations

from contextlib import suppress

import pytest
import transaction
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import scoped_session

from ws_celery import task

EXPLICIT = {"tm__manager_hook": "pyramid_tm.explicit_manager"}


@task(name="add")
def add(request, x):
    """Do nothing."""


@pytest.fixture
def app(make_app, database):
    return make_app(add, setup=database.includeme, **EXPLICIT)


@pytest.fixture
def request_(app):
    """A request whose transaction is open."""
    request = app.request()
    with request.tm:
        yield request


@pytest.fixture
def sent(app, request_):
    """Commit; return the argument of each task that is sent."""

    def sent():
        request_.tm.commit()
        numbers = [message.args[0] for message in app.sent()]
        request_.tm.begin()  # the fixture's to finish
        return numbers

    return sent


def test_a_task_of_a_rolled_back_savepoint_is_never_sent(request_, sent):
    session = request_.dbsession
    add.delay(request_, 1)
    with session.begin_nested() as savepoint:
        add.delay(request_, 2)
        savepoint.rollback()
    add.delay(request_, 3)

    assert sent() == [1, 3]


def test_a_task_of_a_savepoint_that_an_exception_ends_is_never_sent(request_, sent):
    with suppress(LookupError), request_.dbsession.begin_nested():
        add.delay(request_, 1)
        raise LookupError("no such thing")

    assert sent() == []


def test_a_task_of_a_savepoint_whose_flush_fails_is_never_sent(request_, sent):
    session = request_.dbsession
    add.delay(request_, 1)
    with suppress(DBAPIError), session.begin_nested():
        add.delay(request_, 2)
        session.execute(text("INSERT INTO notes VALUES (1, NULL)"))

    assert sent() == [1]


def test_a_task_of_a_released_savepoint_is_sent(request_, sent):
    with request_.dbsession.begin_nested():
        add.delay(request_, 1)

    assert sent() == [1]


def test_a_task_of_a_released_savepoint_is_not_sent_if_the_outer_one_is_rolled_back(request_, sent):
    session = request_.dbsession
    with session.begin_nested() as outer:
        add.delay(request_, 1)
        with session.begin_nested():
            add.delay(request_, 2)
        add.delay(request_, 3)
        outer.rollback()

    assert sent() == []


def test_a_task_of_an_inner_savepoint_is_not_sent_if_the_outer_one_is_rolled_back(request_, sent):
    session = request_.dbsession
    outer = session.begin_nested()
    add.delay(request_, 1)
    session.begin_nested()
    add.delay(request_, 2)
    outer.rollback()
    add.delay(request_, 3)

    assert sent() == [3]


def test_a_savepoint_that_is_rolled_back_between_calls_in_bulk_drops_its_own(request_, sent):
    def calls():
        yield (request_, 1)
        savepoint = request_.dbsession.begin_nested()
        yield (request_, 2)
        savepoint.rollback()
        yield (request_, 3)
        with request_.dbsession.begin_nested():
            yield (request_, 4)

    add.delay_many(calls())

    assert sent() == [1, 3, 4]


def test_an_inner_savepoint_is_rolled_back_alone(request_, sent):
    session = request_.dbsession
    with session.begin_nested():
        add.delay(request_, 1)
        with session.begin_nested() as inner:
            add.delay(request_, 2)
            inner.rollback()
        add.delay(request_, 3)

    assert sent() == [1, 3]


def test_a_task_older_than_the_session_is_sent_although_its_savepoint_is_rolled_back(
    request_, sent
):
    add.delay(request_, 1)
    with request_.dbsession.begin_nested() as savepoint:
        savepoint.rollback()
    with request_.dbsession.begin_nested() as savepoint:
        add.delay(request_, 2)
        savepoint.rollback()

    assert sent() == [1]


def test_a_task_is_not_sent_if_the_session_itself_is_rolled_back(request_, sent):
    session = request_.dbsession
    session.execute(text("SELECT 1"))
    add.delay(request_, 1)
    session.rollback()
    add.delay(request_, 2)

    assert sent() == [2]


def test_a_savepoint_rolled_back_after_the_commit_changes_nothing(request_, sent):
    session = request_.dbsession
    add.delay(request_, 1)
    assert sent() == [1]

    with session.begin_nested() as savepoint:
        add.delay(request_, 2)
        savepoint.rollback()
    assert sent() == []


def test_a_savepoint_of_the_transaction_package_takes_those_of_sqlalchemy_along(make_app, postgres):
    app = make_app(add, setup=postgres.includeme, **EXPLICIT)
    request = app.request()
    with request.tm as txn:
        request.dbsession.execute(text("SELECT 1"))
        savepoint = txn.savepoint()
        add.delay(request, 1)
        with request.dbsession.begin_nested():
            add.delay(request, 2)
        savepoint.rollback()
        add.delay(request, 3)

    assert [message.args for message in app.sent()] == [[3]]


def test_a_savepoint_drops_what_came_after_it_although_an_earlier_task_is_dropped_already(
    make_app, postgres
):
    app = make_app(add, setup=postgres.includeme, **EXPLICIT)
    request = app.request()
    with request.tm as txn:
        nested = request.dbsession.begin_nested()
        add.delay(request, 1)
        savepoint = txn.savepoint()
        nested.rollback()
        add.delay(request, 2)
        savepoint.rollback()

    assert app.sent() == []


def test_the_session_of_a_task_run_is_listened_to(make_app, database):
    @task(name="outer")
    def outer(request):
        add.delay(1)
        with request.dbsession.begin_nested() as savepoint:
            add.delay(2)
            savepoint.rollback()

    app = make_app(add, outer, setup=database.includeme, **EXPLICIT)
    app.celery.tasks["outer"].apply().get()

    assert [message.args for message in app.sent()] == [[1]]


# Which session


def test_a_request_that_has_made_no_session_is_not_given_one(request_, sent):
    add.delay(request_, 1)

    assert "dbsession" not in request_.__dict__
    assert sent() == [1]


def test_the_session_may_have_another_name(make_app, database):
    def setup(config):
        config.add_request_method(database.session, "db", reify=True)

    app = make_app(add, setup=setup, ws_celery__dbsession="db", **EXPLICIT)
    request = app.request()
    with request.tm, request.db.begin_nested() as savepoint:
        add.delay(request, 1)
        savepoint.rollback()

    assert app.names() == []


def test_a_session_that_was_put_on_the_request_is_listened_to(make_app, database):
    app = make_app(add, **EXPLICIT)
    request = app.request()
    request.dbsession = database.session(request)
    with request.tm, request.dbsession.begin_nested() as savepoint:
        add.delay(request, 1)
        savepoint.rollback()

    assert app.names() == []


def test_a_scoped_session_is_listened_to_once_it_has_a_session(make_app, database):
    app = make_app(add, **EXPLICIT)
    request = app.request()
    sessions = request.dbsession = scoped_session(lambda: database.session(request))
    with request.tm:
        add.delay(request, 1)
        assert not sessions.registry.has()
        with sessions.begin_nested() as savepoint:
            add.delay(request, 2)
            savepoint.rollback()
    sessions.remove()

    assert [message.args for message in app.sent()] == [[1]]


def test_something_else_of_that_name_is_left_alone(make_app):
    app = make_app(add)
    request = app.request()
    request.dbsession = object()
    with transaction.manager:
        add.delay(request, 1)

    assert app.names() == ["add"]
