"""Many calls as one dispatch, by real brokers and to a real worker."""

from __future__ import annotations

import pytest
import transaction
from kombu import Producer
from tests.waiting import SOON

from ws_celery import immediately, task

# Celery's result backend calls what redis-py has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")


@task(name="add")
def add(request, x, y=1):
    return x + y


@task(name="outer", bind=True)
def outer(self, request):
    result = root.delay_many([(1,), (2,)])
    return [result.id, *result.ids]


@task(name="root", bind=True)
def root(self, request, x):
    return [self.request.root_id, self.request.parent_id]


@pytest.fixture
def make(make_app, redis_url):
    """Make an application with this broker, and results in Redis."""
    return lambda broker: make_app(
        add, outer, root, broker=broker, celery=f"result_backend = {redis_url}"
    )


@pytest.fixture(params=["redis", "rabbitmq"])
def app(request, make):
    return make(request.getfixturevalue(f"{request.param}_url"))


def test_a_worker_runs_what_a_transaction_has_called(app, start_worker):
    start_worker(app)
    with transaction.manager:
        result = add.apply_async_many(((number,), {"y": number}) for number in range(100))

    assert result.get(timeout=SOON) == list(range(0, 200, 2))


def test_a_worker_runs_what_was_sent_at_once(make, redis_url, start_worker):
    start_worker(make(redis_url))
    result = add.delay_many((number,) for number in range(100))

    assert result.get(timeout=SOON) == list(range(1, 101))


def test_an_aborted_transaction_sends_nothing(app):
    transaction.begin()
    add.delay_many([(1,), (2,)])
    transaction.abort()

    assert app.names() == []


def test_thousands_leave_in_the_order_of_the_calls(app):
    with transaction.manager:
        add.delay_many((number,) for number in range(3000))

    assert [message.args for message in app.sent()] == [[number] for number in range(3000)]


def test_the_calls_of_a_task_have_its_root(make, redis_url, start_worker):
    start_worker(make(redis_url))
    with transaction.manager:
        result = outer.delay()
    group_id, *ids = result.get(timeout=SOON)

    assert [child.id for child in result.children] == [group_id]
    assert [one.id for one in result.children[0]] == ids
    assert result.children[0].get(timeout=SOON) == [[result.id, result.id]] * 2


@pytest.mark.skipif(not hasattr(Producer, "batch"), reason="kombu sends batches from 5.7")
def test_what_is_sent_at_once_goes_by_slices_of_one_batch_each(make_app, redis_url, monkeypatch):
    app = make_app(add, broker=redis_url)
    begun = []
    batch = Producer.batch
    monkeypatch.setattr(Producer, "batch", lambda self, **of: begun.append(1) or batch(self, **of))
    monkeypatch.setattr("ws_celery.bulk.SLICE", 10)
    with immediately():
        add.delay_many((number,) for number in range(25))

    assert len(begun) == 3
    assert [message.args for message in app.sent()] == [[number] for number in range(25)]
