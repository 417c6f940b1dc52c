"""The test kit in an application with an outbox: it touches neither the table nor its rows."""

from __future__ import annotations

import pytest
import transaction
import zope.sqlalchemy
from sqlalchemy import create_engine, inspect
from sqlalchemy.orm import sessionmaker

from ws_celery import task
from ws_celery.testing import capture


@task(name="first", bind=True)
def first(self, request):
    if not self.request.retries:
        raise self.retry(countdown=0)
    second.delay()
    return "first"


@task(name="second")
def second(request):
    return "second"


@pytest.fixture
def app(make_app, tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path}/test.sqlite")

    def session(request):
        made = sessionmaker(engine)()
        zope.sqlalchemy.register(made)
        return made

    def setup(config):
        config.add_request_method(session, "dbsession", reify=True)

    yield make_app(first, second, setup=setup, ws_celery__outbox="true")
    assert inspect(engine).get_table_names() == []  # nobody has needed the table
    engine.dispose()


def test_capture_and_drain_write_no_rows(app):
    outbox = app.celery.outbox
    with capture(app.registry) as sent:
        with transaction.manager:
            first.delay(app.request())
        assert sent.names == ["first"]
        assert sent.drain() == ["first", "second"]

    assert app.celery.outbox is outbox


def test_what_was_dispatched_before_the_capture_is_taken_out_of_its_transaction(app):
    request = app.request()
    transaction.begin()
    second.delay(request)
    with capture(app.registry) as sent:
        sent.look_at(request)
        assert sent.drain() == ["second"]
    transaction.commit()
