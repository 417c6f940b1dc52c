"""Ten thousand runs leave nothing behind."""

from __future__ import annotations

import gc
import logging
import sys
from collections import Counter

import pytest
from celery.exceptions import Ignore, Reject
from sqlalchemy import text
from transaction.interfaces import TransientError as Conflict

from ws_celery import task

EXPLICIT = {"tm__manager_hook": "pyramid_tm.explicit_manager"}
#: How some of twenty runs end; the others return.
ENDS = {1: LookupError, 2: Ignore, 3: Reject, 4: Conflict}
RUNS = 5000


@task(name="later")
def later(request, x):
    """Do nothing."""


@pytest.fixture
def runs(make_app, sqlite):
    """Run a task thousands of times, in all the ways in which it can end."""
    met = []

    @task(name="work", max_retries=0)
    def work(request, number):
        request.dbsession.execute(text("SELECT 1"))
        later.delay(number)
        error = ENDS.get(number % 20)
        if error is Conflict and met.count(number) == 0:
            met[:] = [number]
            raise Conflict
        if error and error is not Conflict:
            raise error

    app = make_app(work, later, setup=sqlite.includeme, **EXPLICIT)
    registered = app.celery.tasks["work"]

    def runs():
        for number in range(RUNS):
            registered.apply((number,))
        app.sent()
        assert sqlite.engine.pool.checkedout() == 0

    return runs


def left_over():
    gc.collect()
    kinds = Counter(map(type, gc.get_objects()))
    ours = ("pyramid.request", "sqlalchemy.orm", "transaction", "ws_celery", "zope.sqlalchemy")
    objects = {kind: kinds[kind] for kind in kinds if str(kind.__module__).startswith(ours)}
    return objects, sys.getallocatedblocks()


def test_ten_thousand_runs_leave_memory_flat(runs, caplog):
    caplog.set_level(logging.CRITICAL)
    runs()
    objects, blocks = left_over()
    runs()
    objects_afterwards, blocks_afterwards = left_over()

    assert objects_afterwards == objects
    assert blocks_afterwards - blocks < RUNS / 10
