"""Publishing to a real Redis by a channel that keeps its client and joins its pushes."""

from __future__ import annotations

import json
import uuid
from contextlib import closing, suppress
from itertools import takewhile
from types import SimpleNamespace

import pytest
from kombu import Connection, Exchange, Producer, Queue
from redis import Redis

from ws_celery.publishing import lighten


@pytest.fixture
def connection(redis_url):
    with Connection(redis_url) as connection:
        yield connection


@pytest.fixture
def producer(connection):
    producer = Producer(connection, auto_declare=False)
    lighten(producer.channel)
    if not hasattr(producer, "batch"):
        pytest.skip("kombu sends batches from 5.7")
    return producer


@pytest.fixture
def client(redis_url):
    with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def unique():
    """Make a name that nobody else uses."""
    return lambda name: f"{name}-{uuid.uuid4().hex}"


def bodies(client, queue):
    """Return the messages of a queue, the first one first."""
    messages = [json.loads(message) for message in client.lrange(queue, 0, -1)]
    decode = Connection("memory://").default_channel.decode_body
    return [decode(each["body"], "base64").decode() for each in reversed(messages)]


def pushed(monitor, until):
    """Return the lists that something was pushed to, by command, before ``until``."""
    words = (command["command"].split() for command in monitor.listen())
    before = takewhile(lambda each: until not in each, words)
    return [each[1] for each in before if each[0] == "LPUSH"]


def test_all_messages_arrive_in_their_order_and_those_of_one_queue_by_one_command(
    producer, client, unique
):
    one, other, end = unique("one"), unique("other"), unique("end")
    with client.monitor() as monitor:
        with producer.batch():
            for number, queue in enumerate((one, one, one, other, one)):
                producer.publish(str(number), routing_key=queue)
        client.get(end)
        keys = [key for key in pushed(monitor, end) if key in (one, other)]

    assert keys == [one, other, one]
    assert bodies(client, one) == ["0", "1", "2", "4"]
    assert bodies(client, other) == ["3"]


def test_the_expiry_of_a_queue_follows_what_is_pushed_to_it(producer, client, unique):
    queue = unique("expiring")
    producer.channel.queue_declare(queue, arguments={"x-expires": 60_000})
    with producer.batch():
        for body in ("first", "second"):
            producer.publish(body, routing_key=queue)

    assert bodies(client, queue) == ["first", "second"]
    assert 0 < client.pttl(queue) <= 60_000


def test_a_batch_that_is_given_up_sends_nothing(producer, client, unique):
    queue = unique("given-up")
    with suppress(KeyError), producer.batch():
        producer.publish("lost", routing_key=queue)
        raise KeyError

    with producer.batch():
        producer.publish("found", routing_key=queue)

    assert bodies(client, queue) == ["found"]


def test_a_channel_makes_one_client(producer):
    channel = producer.channel

    with channel.conn_or_acquire() as one, channel.conn_or_acquire() as other:
        assert one is other
    given = object()
    with channel.conn_or_acquire(given) as taken:
        assert taken is given
    with channel.conn_or_acquire(client=given) as taken:
        assert taken is given


def test_a_channel_does_all_that_a_consumer_asks(producer, client, unique):
    name = unique("consumed")
    queue = Queue(name, Exchange(name), channel=producer.channel)
    queue.declare()
    for body in ("acknowledged", "put back", "rejected"):
        producer.publish(body, exchange=name)
    queue.get().ack()
    queue.get().reject(requeue=True)
    assert client.llen(name) == 2
    queue.get().reject()
    assert queue.purge() == 1
    queue.delete()

    assert not client.exists(name)


def test_an_older_kombu_and_other_brokers_are_left_alone(connection):
    channel = Connection("memory://").default_channel
    before = dict(vars(channel))
    lighten(channel)
    assert vars(channel) == before

    with connection.default_channel.conn_or_acquire() as client:
        old = SimpleNamespace(conn_or_acquire=lambda: closing(client))
    lighten(old)
    assert vars(old).keys() == {"conn_or_acquire"}
