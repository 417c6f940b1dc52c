"""Runs that claim their row just before the commit: what may happen to it while they work."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from celery import signals
from sqlalchemy import update
from tests.notes import dispatch, insert, write
from tests.waiting import SOON

from ws_celery import task


@task(name="late", acknowledge="late", bind=True)
def late(self, request, number):
    meanwhile(self, request)
    insert(request, number)


def meanwhile(run, request):
    """Do what happens while the task works; replaced by tests."""


def change(app, *conditions, **values):
    table = app.celery.outbox.rows.table
    with app.celery.outbox.begin() as connection:
        connection.execute(update(table).where(*conditions).values(values))


def ago(seconds):
    return datetime.now(timezone.utc) - timedelta(seconds=seconds)


@pytest.fixture
def app(make_outbox, database):
    app = make_outbox(database, late, write)
    app.celery.outbox.relay.turn()
    return app


@pytest.fixture
def while_it_runs(monkeypatch):
    """Let a function happen while the task works."""
    return lambda happens: monkeypatch.setitem(globals(), "meanwhile", happens)


def test_a_late_run_that_has_begun_in_time_is_not_undone_by_the_relay(
    app, while_it_runs, start_worker, database, rows_of
):
    def expire_and_turn(run, request):
        expires = app.celery.outbox.rows.table.c.expires
        change(app, expires.is_not(None), expires=ago(1))
        change(app, due_at=ago(1))
        app.celery.outbox.relay.turn()

    while_it_runs(expire_and_turn)
    dispatch(app, late, 1, expires=3600)
    start_worker(app)
    dispatch(app, write, 2).get(SOON)

    assert database.notes() == ["note 1", "note 2"]


def test_a_late_run_that_has_begun_in_time_is_not_undone_by_a_message_that_comes_too_late(
    app, while_it_runs, start_worker, database
):
    def meet_expired(run, request):
        options = {"request": run.request, "terminated": False, "signum": None, "expired": True}
        signals.task_revoked.send(run, **options)

    while_it_runs(meet_expired)
    dispatch(app, late, 1, expires=3600)
    start_worker(app)
    dispatch(app, write, 2).get(SOON)

    assert database.notes() == ["note 1", "note 2"]


def test_what_has_begun_in_time_and_was_cut_off_is_run_to_its_end(
    app, start_worker, database, rows_of
):
    dispatch(app, late, 1, expires=3600)
    app.sent()
    (row,) = rows_of(app)
    first = app.celery.outbox.publication_of(row)
    in_time, too_late = first.options["headers"]["expires"], ago(1).isoformat()
    first.options["headers"]["expires"] = too_late
    app.celery.outbox.attempt(app.celery.outbox.rows.forget_expiry, row.id)
    change(app, options=row.options.replace(in_time, too_late))
    (row,) = rows_of(app)
    assert too_late in row.options

    app.celery.publisher.publish([first, app.celery.outbox.publication_of(row)])
    start_worker(app)
    dispatch(app, write, 2).get(SOON)

    assert database.notes() == ["note 1", "note 2"]
    assert rows_of(app) == []


def test_what_has_not_begun_in_time_is_not_run(app, start_worker, database, rows_of):
    dispatch(app, late, 1, expires=3600)
    app.sent()
    (row,) = rows_of(app)
    message = app.celery.outbox.publication_of(row)
    message.options["headers"]["expires"] = ago(1).isoformat()
    change(app, expires=ago(1))

    app.celery.publisher.publish([message])
    start_worker(app)
    dispatch(app, write, 2).get(SOON)

    assert database.notes() == ["note 2"]
    assert rows_of(app) == []
