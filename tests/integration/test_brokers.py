"""What reaches a real broker, and what a broker that is down does to its callers."""

from __future__ import annotations

import logging
import socket
import time
from contextlib import suppress

import pytest
import transaction
from celery import chord, group
from kombu import Producer

from ws_celery import task
from ws_celery.dispatch import CONNECT_TIMEOUT
from ws_celery.embedded import EmbeddedBroker

#: Transport options with which kombu sends a message at a time, where it would send a batch.
NO_BATCH = 'broker_transport_options = {"retry_on_timeout": true}'


#: Seconds until an event must have come.
SOON = 20


@task(name="add")
def add(request, x):
    """Do nothing."""


@pytest.fixture
def batches(monkeypatch):
    """How often a batch has been begun."""
    begun = []
    batch = Producer.batch

    def spy(self, *args, **kwargs):
        begun.append(self)
        return batch(self, *args, **kwargs)

    monkeypatch.setattr(Producer, "batch", spy)
    return begun


def arguments(app):
    return [message.args[0] for message in app.sent()]


def test_a_task_is_sent_when_the_transaction_commits(make_app, broker_url):
    app = make_app(add, broker=broker_url)
    transaction.begin()
    add.delay(1)
    assert app.names() == []
    transaction.commit()

    assert arguments(app) == [1]


def test_a_task_of_an_aborted_transaction_is_never_sent(make_app, broker_url):
    app = make_app(add, broker=broker_url)
    transaction.begin()
    add.delay(1)
    transaction.abort()

    assert app.names() == []


def test_the_tasks_of_a_transaction_are_sent_in_one_batch(make_app, broker_url, batches):
    app = make_app(add, broker=broker_url)
    with transaction.manager:
        for number in range(100):
            add.delay(number)

    assert arguments(app) == list(range(100))
    assert len(batches) == 1


def test_tasks_are_sent_one_by_one_where_the_broker_takes_no_batches(make_app, broker_url, batches):
    app = make_app(add, broker=broker_url, celery=NO_BATCH)
    with transaction.manager:
        for number in range(100):
            add.delay(number)

    assert arguments(app) == list(range(100))
    assert batches == []


@pytest.mark.parametrize("celery", ["", NO_BATCH], ids=["batch", "no batch"])
def test_a_queue_is_declared_once_for_all_tasks_of_a_transaction(
    make_app, redis_url, monkeypatch, celery
):
    declared = []
    maybe_declare = Producer.maybe_declare

    def spy(self, entity, *args, **kwargs):
        declared.append(entity.name)
        return maybe_declare(self, entity, *args, **kwargs)

    app = make_app(add, broker=redis_url, celery=celery)
    with transaction.manager:
        for number in range(10):
            add.delay(number)
        monkeypatch.setattr(Producer, "maybe_declare", spy)

    assert declared == [app.celery.conf.task_default_queue]


def test_a_task_sent_event_leaves_with_its_task(make_app, redis_url):
    app = make_app(add, broker=redis_url, celery="task_send_sent_event = true")
    events = []
    with app.celery.connection_for_read() as connection:
        receiver = app.celery.events.Receiver(connection, handlers={"task-sent": events.append})
        with receiver.consumer_context() as (listening, *_):
            with suppress(TimeoutError):
                listening.drain_events(timeout=0.1)  # subscribes
            with transaction.manager:
                result = add.delay(1)
            while not events:
                listening.drain_events(timeout=SOON)

    assert [event["uuid"] for event in events] == [result.id]


def test_rabbitmq_gets_what_a_transaction_has_called(make_app, rabbitmq_url):
    app = make_app(add, broker=rabbitmq_url)
    transaction.begin()
    for number in range(10):
        add.delay(number)
    assert app.names() == []
    transaction.commit()

    assert arguments(app) == list(range(10))


def test_a_group_and_a_chord_are_deferred(make_app, redis_url):
    app = make_app(add, broker=redis_url, celery=f"result_backend = {redis_url}")
    transaction.begin()
    group(add.s(number) for number in range(3)).delay()
    chord(add.s(number) for number in range(3))(add.s())
    assert app.names() == []
    transaction.commit()

    assert app.names() == ["add"] * 6


# A broker that is down


@pytest.fixture
def down(tmp_path):
    """A broker that is not running."""
    return EmbeddedBroker(tmp_path / "broker")


def test_a_broker_that_is_down_does_not_fail_the_commit(make_app, down, caplog):
    make_app(add, broker=down.url(0))
    with transaction.manager:
        first, second = add.delay(1), add.delay(2)

    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert f"add[{first.id}], add[{second.id}]" in record.getMessage()


def test_a_broker_that_is_down_costs_the_caller_little_time(make_app, down, caplog):
    make_app(add, broker=down.url(0))
    began = time.monotonic()
    with transaction.manager:
        add.delay(1)

    assert time.monotonic() - began < 2 * CONNECT_TIMEOUT
    caplog.clear()


@pytest.fixture
def silent_port():
    """A port where something takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_broker_that_never_answers_costs_the_caller_little_time(make_app, silent_port, scheme):
    app = make_app(add, broker=f"{scheme}://127.0.0.1:{silent_port}/0")
    began = time.monotonic()
    with transaction.manager:
        add.delay(app.request(), 1)

    assert time.monotonic() - began < 2 * CONNECT_TIMEOUT + 1


def test_a_result_backend_that_is_down_does_not_delay_the_call(make_app, down):
    make_app(add, celery=f"result_backend = {down.url(1)}")
    transaction.begin()
    began = time.monotonic()
    add.delay(1)

    assert time.monotonic() - began < 1


def test_tasks_are_sent_again_when_the_broker_is_back(make_app, down, start_broker):
    app = make_app(add, broker=down.url(0))
    with transaction.manager:
        add.delay(1)
    start_broker(down)
    with transaction.manager:
        add.delay(2)

    assert arguments(app) == [2]


def test_tasks_are_sent_to_a_broker_that_was_restarted(make_app, down, start_broker):
    app = make_app(add, broker=down.url(0))
    process = start_broker(down)
    with transaction.manager:
        add.delay(1)
    process.kill()
    process.wait()
    down.socket.unlink()
    start_broker(down)
    with transaction.manager:
        add.delay(2)

    assert arguments(app) == [1, 2]
