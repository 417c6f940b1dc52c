"""What RabbitMQ itself delays, where there are quorum queues: for as long as is left, and once."""

from __future__ import annotations

import inspect
import json
import uuid
from datetime import datetime, timedelta, timezone

import pytest
from kombu import Connection, Exchange, Queue
from kombu.transport import native_delayed_delivery as native
from sqlalchemy import update
from tests.notes import dispatch, write
from tests.waiting import SOON, wait_for

from ws_celery.publishing import bare_key, delay_anew

QUORUM = "task_default_queue_type = quorum\ntask_default_exchange_type = topic\n"


def in_seconds(seconds):
    return (datetime.now(timezone.utc) + timedelta(seconds=seconds)).isoformat()


def delay_of(key):
    return int("".join(key.split(".")[: native.MAX_NUMBER_OF_BITS_TO_USE]), 2)


@pytest.fixture
def app(make_app, postgres, rabbitmq_url):
    """An application with an outbox and a quorum queue."""
    app = make_app(
        write,
        setup=postgres.includeme,
        broker=rabbitmq_url,
        celery=QUORUM,
        ws_celery__outbox="true",
    )
    outbox = app.celery.outbox
    outbox.create_table()
    yield app
    outbox.rows.table.drop(postgres.engine)
    outbox.engine.dispose()
    with Connection(rabbitmq_url) as connection:
        connection.default_channel.queue_delete(outbox.relay.canary.name)
    outbox.relay.close()


@pytest.fixture
def keys(app, rabbitmq_url):
    """Take the routing keys of what was handed to RabbitMQ to be delayed."""
    with Connection(rabbitmq_url) as connection:
        channel = connection.default_channel
        entrance = Exchange("celery_delayed_27", type="topic")
        name = app.celery.conf.task_default_queue
        probe = Queue(f"{name}-probe", entrance, f"#.{name}", exclusive=True)(channel)
        probe.declare()
        yield lambda: [each.delivery_info["routing_key"] for each in iter(probe.get, None)]
        probe.delete()


@pytest.mark.parametrize("exchange", ["celery_delayed_27", Exchange("celery_delayed_27")])
@pytest.mark.parametrize(("eta", "left"), [(100, 100), (-100, 0)])
def test_the_delay_is_what_is_left_until_the_eta(exchange, eta, left):
    key = native.calculate_routing_key(4000, "queue.1.0")
    options = {"exchange": exchange, "routing_key": key, "headers": {"eta": in_seconds(eta)}}

    delay_anew(options)

    assert bare_key(options["routing_key"]) == "queue.1.0"
    assert abs(delay_of(options["routing_key"]) - left) < 5


@pytest.mark.parametrize("headers", [None, {}, {"eta": "2030-01-31T12:00:00"}])
def test_what_has_no_delay_keeps_its_key(headers):
    options = {"exchange": "", "routing_key": "queue", "headers": headers}

    delay_anew(options)

    assert options["routing_key"] == "queue"


def test_the_relay_delays_for_what_is_left(app, keys, rows_of):
    outbox = app.celery.outbox
    outbox.relay.turn()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app.celery, "publish", lambda _: None)
        dispatch(app, write, 1, countdown=200)
    (row,) = rows_of(app)
    options = json.loads(row.options)
    options["headers"]["eta"] = in_seconds(50)
    with outbox.begin() as connection:
        changed = update(outbox.table).values(options=json.dumps(options), due_at=row.created_at)
        connection.execute(changed)

    outbox.relay.turn()

    (key,) = wait_for(keys)
    assert 30 < delay_of(key) <= 50


def test_the_row_of_what_is_delayed_knows_its_queue(app, keys, rows_of):
    dispatch(app, write, 1, countdown=200)

    (row,) = rows_of(app)
    assert row.queue == app.celery.conf.task_default_queue
    assert len(wait_for(keys)) == 1


def test_no_delay_leads_through_all_levels_at_once(rabbitmq_url):
    declare = native.declare_native_delayed_delivery_exchanges_and_queues
    if "prefix" not in inspect.signature(declare).parameters:
        pytest.skip("this kombu cannot give the levels names of their own")
    prefix = f"test-{uuid.uuid4().hex}"
    levels = [native.level_name(level, prefix) for level in range(28)]
    delivery = f"{prefix}_celery_delayed_delivery"
    queue = Queue(prefix, Exchange(prefix, type="topic"), prefix)
    options = {"exchange": "celery_delayed_27", "headers": {"eta": in_seconds(-1)}}
    options["routing_key"] = native.calculate_routing_key(60, prefix)
    with Connection(rabbitmq_url) as connection:
        channel = connection.default_channel
        try:
            declare(connection, "classic", prefix)
            queue(channel).declare()
            native.bind_queue_to_native_delayed_delivery_exchange(connection, queue, prefix)
            delay_anew(options)
            connection.Producer().publish("1", **{**options, "exchange": levels[-1]})

            assert wait_for(lambda: queue(channel).get(), timeout=SOON / 2).body == "1"
        finally:
            for name in (prefix, *levels):
                channel.queue_delete(name)
            for name in (prefix, delivery, *levels):
                channel.exchange_delete(name)
