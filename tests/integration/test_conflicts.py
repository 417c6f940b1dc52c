"""Conflicts of real transactions: the task is run again in place, with a fresh request."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import zope.sqlalchemy
from pyramid.request import Request
from sqlalchemy import create_engine, text
from tests.waiting import SOON
from ZODB import DB
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError

from ws_celery import task

EXPLICIT = {"tm__manager_hook": "pyramid_tm.explicit_manager"}


@pytest.fixture
def requests():
    """The requests of the runs of one test's task."""
    return []


def execute(request, statement, **parameters):
    result = request.dbsession.execute(text(statement), parameters)
    zope.sqlalchemy.mark_changed(request.dbsession)
    return result


def fresh(requests):
    """Tell whether each run had a request and a transaction manager of its own."""
    assert all(isinstance(request, Request) for request in requests)
    return len({id(each) for each in requests}) == len({id(each.tm) for each in requests})


# Deadlocks

UPDATE = "UPDATE notes SET text = :text WHERE id = :id"


@pytest.fixture(params=["postgres", "mariadb"])
def rows(request):
    """A database with two rows."""
    database = request.getfixturevalue(request.param)
    database.execute("INSERT INTO notes VALUES (1, ''), (2, '')")
    return database


def test_a_deadlock_is_tried_again(make_app, rows, requests):
    rival_has_second, task_has_first, rival_has_ended = (threading.Event() for _ in range(3))

    def rival():
        try:
            change_both()
        finally:
            rival_has_ended.set()

    def change_both():
        with rows.engine.begin() as connection:
            # The task is to be given up: PostgreSQL gives up who finds out first, MariaDB who has
            # changed less.
            if rows.engine.dialect.name == "postgresql":
                connection.execute(text("SET LOCAL deadlock_timeout = '1min'"))
            connection.execute(text("INSERT INTO notes VALUES (3, ''), (4, ''), (5, '')"))
            connection.execute(text(UPDATE), {"text": "rival", "id": 2})
            rival_has_second.set()
            assert task_has_first.wait(SOON)
            connection.execute(text(UPDATE), {"text": "rival", "id": 1})

    @task(name="update")
    def update(request):
        requests.append(request)
        if len(requests) > 1:
            assert rival_has_ended.wait(SOON), "it would overtake the rival, for the next deadlock"
        execute(request, UPDATE, text="task", id=1)
        task_has_first.set()
        execute(request, UPDATE, text="task", id=2)

    app = make_app(update, setup=rows.includeme, **EXPLICIT)
    with ThreadPoolExecutor(1) as thread:
        rivalry = thread.submit(rival)
        assert rival_has_second.wait(SOON)
        app.celery.tasks["update"].apply().get()
        rivalry.result(SOON)

    assert len(requests) == 2
    assert fresh(requests)
    assert rows.notes() == ["task", "task", "", "", ""]


def test_a_wait_for_a_lock_of_mariadb_that_takes_too_long_is_tried_again(
    make_app, mariadb, requests
):
    mariadb.execute("INSERT INTO notes VALUES (1, '')")
    rival = mariadb.engine.connect()

    @task(name="update")
    def update(request):
        requests.append(request)
        if len(requests) == 2:
            rival.commit()
        request.dbsession.execute(text("SET innodb_lock_wait_timeout = 1"))
        execute(request, UPDATE, text="task", id=1)

    app = make_app(update, setup=mariadb.includeme, **EXPLICIT)
    with closing(rival):
        rival.execute(text(UPDATE), {"text": "rival", "id": 1})
        app.celery.tasks["update"].apply().get()

    assert len(requests) == 2
    assert fresh(requests)
    assert mariadb.notes() == ["task"]


# Serialisation


def test_two_transactions_that_cannot_be_in_a_row_are_tried_again(make_app, postgres, requests):
    """No row is changed by both: only SERIALIZABLE finds this."""
    postgres.execute("INSERT INTO notes VALUES (1, '0')")
    serializable = postgres.engine.execution_options(isolation_level="SERIALIZABLE")
    postgres.sessions.configure(bind=serializable)

    def interfere():
        with serializable.begin() as connection:
            values = connection.execute(text("SELECT text FROM notes")).scalars().all()
            row = {"id": 9, "text": f"rival saw {len(values)}"}
            connection.execute(text("INSERT INTO notes VALUES (:id, :text)"), row)

    @task(name="count")
    def count(request):
        requests.append(request)
        seen = len(execute(request, "SELECT text FROM notes").all())
        if len(requests) == 1:
            interfere()
        execute(request, UPDATE, text=f"task saw {seen}", id=1)

    app = make_app(count, setup=postgres.includeme, **EXPLICIT)
    app.celery.tasks["count"].apply().get()

    assert len(requests) == 2
    assert fresh(requests)
    assert postgres.notes() == ["task saw 2", "rival saw 1"]


def test_an_sqlite_that_is_busy_is_tried_again(make_app, sqlite, requests):
    sqlite.execute("INSERT INTO notes VALUES (1, '')")
    impatient = create_engine(sqlite.engine.url, connect_args={"timeout": 0})
    sqlite.sessions.configure(bind=impatient)
    rival = sqlite.engine.connect()

    @task(name="update")
    def update(request):
        requests.append(request)
        if len(requests) == 2:
            rival.commit()
        execute(request, UPDATE, text="task", id=1)

    app = make_app(update, setup=sqlite.includeme, **EXPLICIT)
    with closing(rival):
        rival.execute(text(UPDATE), {"text": "rival", "id": 1})
        app.celery.tasks["update"].apply().get()
    impatient.dispose()

    assert len(requests) == 2
    assert fresh(requests)
    assert sqlite.notes() == ["task"]


# ZODB


@pytest.fixture
def objects():
    """An object database that applications can include: ``request.root`` obeys ``request.tm``."""
    database = DB(MappingStorage())

    def includeme(config):
        config.add_request_method(root, "root", reify=True)

    def root(request):
        connection = database.open(transaction_manager=request.tm)
        request.add_finished_callback(lambda _request: connection.close())
        return connection.root()

    database.includeme = includeme
    yield database
    database.close()


def test_a_conflict_of_zodb_is_tried_again(make_app, objects, requests):
    @task(name="increase")
    def increase(request):
        requests.append(request)
        value = request.root.get("value", 0)
        if len(requests) == 1:
            with objects.transaction() as connection:
                connection.root()["value"] = 10
        request.root["value"] = value + 1

    app = make_app(increase, setup=objects.includeme, **EXPLICIT)
    app.celery.tasks["increase"].apply().get()

    assert len(requests) == 2
    assert fresh(requests)
    with objects.transaction() as connection:
        assert connection.root()["value"] == 11


def test_a_conflict_of_zodb_that_stays_is_the_result(make_app, objects, requests):
    @task(name="increase", max_retries=0)
    def increase(request):
        requests.append(request)
        request.root["value"] = 1
        with objects.transaction() as connection:
            connection.root()["value"] = 10

    app = make_app(increase, setup=objects.includeme, **EXPLICIT)
    result = app.celery.tasks["increase"].apply()

    assert isinstance(result.result, ConflictError)
    assert len(requests) == 3
