"""What a real worker tells of its runs."""

from __future__ import annotations

import queue

import pytest
from tests.waiting import SOON

from ws_celery import task
from ws_celery.events import BeforeDispatch, TaskFinished

# Celery's result backend calls what redis-py has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")


@task(name="add")
def add(request, x):
    return x + 1


@task(name="again", bind=True, max_retries=1)
def again(self, request):
    raise self.retry(countdown=0, exc=LookupError("no such thing"))


@pytest.fixture
def told():
    """Events in the order in which they are sent, from any thread."""
    return queue.Queue()


@pytest.fixture
def app(make_app, redis_url):
    return make_app(
        add, again, broker=redis_url, celery=f"result_backend = {redis_url}\nresult_expires = 600"
    )


@pytest.fixture
def subscribe(app, told):
    def subscribe(event):
        app.config.add_subscriber(told.put, event)
        app.config.commit()

    return subscribe


def test_the_end_of_a_run_is_told_when_its_result_is_there(app, subscribe, start_worker, told):
    subscribe(TaskFinished)
    start_worker(app)
    result = add.delay(1)
    event = told.get(timeout=SOON)

    assert (event.name, event.id, event.args, event.state) == ("add", result.id, [1], "SUCCESS")
    assert event.result == result.result == 2
    assert event.runtime > 0


def test_a_retry_and_the_failure_that_follows_are_told(app, subscribe, start_worker, told):
    subscribe(TaskFinished)
    start_worker(app)
    again.delay()

    assert [told.get(timeout=SOON).state for _ in range(2)] == ["RETRY", "FAILURE"]


def test_who_subscribes_while_the_worker_runs_is_told(app, subscribe, start_worker, told):
    start_worker(app)
    assert add.delay(1).get(timeout=SOON) == 2
    subscribe(TaskFinished)
    add.delay(2)

    assert told.get(timeout=SOON).result == 3


def test_a_retry_and_the_next_of_a_chain_are_dispatched_by_the_worker(
    app, subscribe, start_worker, told
):
    subscribe(BeforeDispatch)
    start_worker(app)
    result = (add.s(1) | add.s()).delay()

    assert result.get(timeout=SOON) == 3
    assert [told.get(timeout=SOON).args for _ in range(2)] == [(1,), (2,)]
