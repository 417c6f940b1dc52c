"""Options of calls that stand in a route: added to a call, never instead of what it says."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from ws_celery import RequestAwareTask, task

LATER = datetime(2030, 1, 1, tzinfo=timezone.utc)


@task(name="add", base=RequestAwareTask)
def add(request, x):
    return x


@pytest.fixture
def app(make_app):
    return make_app(add, celery="[celeryroute:add]\ncountdown = 60")


def test_a_countdown_of_the_route_is_added(app):
    app.celery.send_task("add", (1,))

    (message,) = app.sent()
    assert message.headers["eta"] is not None


@pytest.mark.parametrize("how", ["keyword", "positional", "apply_async"])
def test_an_eta_of_the_call_beats_a_countdown_of_the_route(app, how):
    if how == "keyword":
        app.celery.send_task("add", (1,), eta=LATER)
    elif how == "positional":
        app.celery.send_task("add", (1,), {}, None, LATER)
    else:
        add.apply_async((app.request(), 1), eta=LATER)

    (message,) = app.sent()
    assert message.headers["eta"].startswith("2030-01-01")


def test_a_positional_countdown_beats_that_of_the_route(app):
    app.celery.send_task("add", (1,), {}, 0)

    assert len(app.sent()) == 1
