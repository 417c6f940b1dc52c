"""With the outbox, what follows a task is dispatched in its transaction: who may stop that."""

from __future__ import annotations

import pytest
import transaction
import zope.sqlalchemy
from celery import chain
from pyramid.threadlocal import RequestContext
from sqlalchemy import text
from tests.waiting import SOON

from ws_celery import task
from ws_celery.events import BeforeDispatch


@task(name="write")
def write(request, number):
    request.dbsession.execute(
        text("INSERT INTO notes (id, text) VALUES (:id, :text)"),
        {"id": number, "text": f"note {number}"},
    )
    zope.sqlalchemy.mark_changed(request.dbsession, request.tm)


def refuse(event):
    if event.app.current_worker_task:
        raise LookupError("not after another task")


@pytest.fixture
def app(make_outbox, database):
    """An application in which nothing may follow a task."""
    return make_outbox(database, write, setup=_subscribe)


def _subscribe(config):
    config.add_subscriber(refuse, BeforeDispatch)


def call(app, how):
    """Dispatch two tasks, the second of which follows the first."""
    with RequestContext(app.request()), transaction.manager:
        if how == "chain":
            chain(write.si(1), write.si(2)).apply_async()
        else:
            write.apply_async((1,), link=write.si(2))


def finish(app):
    """Wait until the only worker has done what it had to do."""
    with RequestContext(app.request()), transaction.manager:
        result = write.delay(3)
    result.get(SOON)


@pytest.mark.parametrize("how", ["chain", "callback"])
def test_a_subscriber_that_raises_undoes_the_task_whose_successor_it_stops(
    app, start_worker, database, rows_of, how
):
    call(app, how)
    start_worker(app)

    finish(app)
    assert database.notes() == ["note 3"]
    (row,) = rows_of(app)
    assert row.died_at is not None
    assert "LookupError: not after another task" in row.error


@pytest.mark.filterwarnings("ignore:Exception raised outside body")
@pytest.mark.parametrize("how", ["chain", "callback"])
def test_without_an_outbox_the_task_has_committed_before(
    make_app, redis_url, postgres, start_worker, how
):
    def setup(config):
        postgres.includeme(config)
        _subscribe(config)

    app = make_app(write, setup=setup, broker=redis_url, celery=f"result_backend = {redis_url}")
    call(app, how)
    start_worker(app)

    finish(app)
    assert postgres.notes() == ["note 1", "note 3"]
