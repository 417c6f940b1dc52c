"""What reaches a real broker, and what a broker that is down does to its callers."""

from __future__ import annotations

import logging
import socket
import threading
import time
from contextlib import ExitStack, closing, nullcontext, suppress
from unittest.mock import Mock
from urllib.parse import urlsplit

import pytest
import redis
import transaction
from celery import chord, group
from kombu import Producer
from tests.proxy import Proxy
from tests.waiting import SOON, wait_for

from ws_celery import task
from ws_celery.embedded import EmbeddedBroker
from ws_celery.publishing import connect

#: Seconds that a busy machine may add to a time limit.
MARGIN = 3


@task(name="add")
def add(request, x):
    """Do nothing."""


@pytest.fixture
def batches(monkeypatch):
    """How often a batch has been begun."""
    if not hasattr(Producer, "batch"):
        pytest.skip("kombu sends batches from 5.7")
    begun = []
    batch = Producer.batch

    def spy(self, *args, **kwargs):
        begun.append(self)
        return batch(self, *args, **kwargs)

    monkeypatch.setattr(Producer, "batch", spy)
    return begun


def published(caplog):
    return [record for record in caplog.records if record.name == "ws_celery.publishing"]


def arguments(app):
    return [message.args[0] for message in app.sent()]


class PoolAsOfCelery55(redis.ConnectionPool):
    """Asks for the name of a command, as in redis-py before 5.3."""

    def get_connection(self, command_name, *_keys, **_options):
        assert command_name
        return super().get_connection()


def test_a_channel_connects_with_the_redis_py_that_celery_5_5_wants(redis_url):
    pool = PoolAsOfCelery55.from_url(redis_url, max_connections=1)
    channel = Mock(conn_or_acquire=lambda: nullcontext(redis.Redis(connection_pool=pool)))
    connect(channel)
    connection = pool.get_connection("PING")  # the only one has been given back

    assert connection.is_connected
    pool.disconnect()


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


def test_options_that_would_forbid_a_batch_are_not_for_the_flush(make_app, redis_url, batches):
    app = make_app(
        add, broker=redis_url, celery='broker_transport_options = {"retry_on_timeout": true}'
    )
    with transaction.manager:
        add.delay(1)
        add.delay(2)

    assert batches[0].supports_batch_publish
    assert arguments(app) == [1, 2]


def test_tasks_are_sent_one_by_one_by_a_kombu_that_has_no_batches(make_app, redis_url, monkeypatch):
    monkeypatch.delattr(Producer, "batch", raising=False)
    app = make_app(add, broker=redis_url)
    with transaction.manager:
        for number in range(100):
            add.delay(number)

    assert arguments(app) == list(range(100))


def test_a_queue_is_declared_once_for_all_tasks_of_a_transaction(make_app, redis_url, monkeypatch):
    declared = []
    maybe_declare = Producer.maybe_declare

    def spy(self, entity, *args, **kwargs):
        declared.append(entity.name)
        return maybe_declare(self, entity, *args, **kwargs)

    app = make_app(add, broker=redis_url)
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

    (record,) = published(caplog)
    assert record.levelno == logging.WARNING
    assert f"add[{first.id}], add[{second.id}]" in record.getMessage()


def test_a_broker_that_is_down_costs_the_caller_little_time(make_app, down, caplog):
    make_app(add, broker=down.url(0))
    began = time.monotonic()
    with transaction.manager:
        add.delay(1)

    assert time.monotonic() - began < 2 + MARGIN
    caplog.clear()


@pytest.fixture
def silent():
    """Something that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(SOON)
        yield server


def url(scheme, server):
    return f"{scheme}://127.0.0.1:{server.getsockname()[1]}/0"


def seconds_of_a_commit(app, tasks=1):
    began = time.monotonic()
    with transaction.manager:
        for number in range(tasks):
            add.delay(app.request(), number)
    return time.monotonic() - began


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_broker_that_never_answers_delays_the_commit_by_the_timeout(make_app, silent, scheme):
    app = make_app(add, broker=url(scheme, silent), ws_celery__publish_timeout="0.5")

    assert seconds_of_a_commit(app) < 0.5 + MARGIN


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_broker_that_takes_no_connection_delays_the_commit_by_the_timeout(make_app, scheme):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, ExitStack() as waiting:
        for _ in range(4):  # its queue is full then
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        app = make_app(add, broker=url(scheme, server), ws_celery__publish_timeout="0.5")

        assert seconds_of_a_commit(app) < 0.5 + MARGIN


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_nothing_waits_for_a_broker_that_is_known_to_be_down(make_app, silent, scheme, caplog):
    app = make_app(add, broker=url(scheme, silent), ws_celery__publish_timeout="0.2")
    seconds_of_a_commit(app)
    caplog.clear()
    publisher, tried_by = app.celery.publisher, []
    attempt = publisher.attempt
    publisher.attempt = lambda them: tried_by.append(threading.current_thread()) or attempt(them)
    with transaction.manager:
        result = add.delay(app.request(), 1)

    (record,) = published(caplog)
    assert f"this process sends these tasks later: add[{result.id}]" in record.getMessage()
    assert threading.current_thread() not in tried_by


def test_what_a_broker_has_not_taken_is_sent_in_its_order_when_it_is_back(
    make_app, down, start_broker
):
    app = make_app(add, broker=down.url(0))
    for number in range(3):
        with transaction.manager:
            add.delay(number)
    start_broker(down)
    wait_for(lambda: not len(app.celery.publisher.spool))
    with transaction.manager:
        add.delay(3)

    assert arguments(app) == [0, 1, 2, 3]


def test_a_second_broker_takes_over(make_app, redis_url, silent):
    app = make_app(
        add, broker=f"{url('redis', silent)};{redis_url}", ws_celery__publish_timeout="12"
    )
    with transaction.manager:
        add.delay(1)

    with app.celery.connection_for_read(redis_url) as connection:
        queue = connection.SimpleQueue(app.celery.conf.task_default_queue)
        assert queue.get(timeout=SOON).headers["task"] == "add"


def test_a_result_backend_that_is_down_does_not_delay_the_call(make_app, down):
    make_app(add, celery=f"result_backend = {down.url(1)}")
    transaction.begin()
    began = time.monotonic()
    add.delay(1)

    assert time.monotonic() - began < 1 + MARGIN


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


# A broker that goes away between two commits


@pytest.fixture(params=["redis", "rabbitmq"])
def through_proxy(request, make_app):
    """An application that has sent to its broker through a proxy; and the proxy."""
    broker = urlsplit(request.getfixturevalue(f"{request.param}_url"))
    if not broker.hostname or not broker.port:
        pytest.skip("the embedded broker has no port")
    target = broker.hostname, broker.port
    with closing(Proxy(lambda: socket.create_connection(target))) as proxy:
        address = broker.netloc.replace(
            f"{broker.hostname}:{broker.port}", f"127.0.0.1:{proxy.port}"
        )
        app = make_app(
            add, broker=broker._replace(netloc=address).geturl(), ws_celery__publish_timeout="4"
        )
        with transaction.manager:
            add.delay(1)
        yield app, proxy
        with app.celery.connection_for_write(broker.geturl()) as connection:
            connection.default_channel.queue_delete(app.celery.conf.task_default_queue)
            connection.default_channel.exchange_delete(app.celery.conf.task_default_exchange)
        app.celery.publisher.close()


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_broker_that_falls_silent_is_noticed_in_time_and_known_to_be_down(
    through_proxy, caplog, tasks
):
    app, proxy = through_proxy
    proxy.freeze()

    assert seconds_of_a_commit(app, tasks) < 4 + MARGIN
    assert "these tasks may not have been sent: add[" in caplog.text
    with transaction.manager:
        later = add.delay(app.request(), "later")
    assert "ws_celery.publish_cooldown = 5.0" in published(caplog)[-1].getMessage()
    assert f"sends these tasks later: add[{later.id}]" in published(caplog)[-1].getMessage()
    proxy.thaw()
    wait_for(lambda: not len(app.celery.publisher.spool))
    assert arguments(app)[-1] == "later"


def test_a_connection_that_the_broker_has_closed_is_made_anew(through_proxy):
    app, proxy = through_proxy
    proxy.reset()
    with transaction.manager:
        add.delay(2)

    assert arguments(app) == [1, 2]
