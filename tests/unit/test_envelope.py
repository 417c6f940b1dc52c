"""What travels around the body of a deferred message is fixed, and checked, at the call."""

from __future__ import annotations

import uuid
from datetime import datetime, timezone
from decimal import Decimal

import pytest
import transaction
from kombu.exceptions import EncodeError

from ws_celery import task
from ws_celery.exceptions import OptionNotSendable
from ws_celery.recording import freeze_envelope

NOON = datetime(2030, 1, 1, 12, tzinfo=timezone.utc)


@task(name="add")
def add(request, x):
    return x


@pytest.fixture
def app(make_app):
    return make_app(add)


@pytest.mark.parametrize("bulk", [False, True])
def test_a_header_changed_afterwards_is_sent_as_it_was(app, bulk):
    tags, place = ["a"], {"city": {"name": "Bonn"}}
    headers = {"tags": tags, "place": place}
    with transaction.manager:
        if bulk:
            add.apply_async_many([((1,), {}), ((2,), {})], headers=headers)
        else:
            add.apply_async((1,), headers=headers)
        tags.append("b")
        place["city"]["name"] = "Berlin"
        headers["more"] = 1

    for message in app.sent():
        assert message.headers["tags"] == ["a"]
        assert message.headers["place"] == {"city": {"name": "Bonn"}}
        assert "more" not in message.headers


def test_a_stamp_changed_afterwards_is_sent_as_it_was(app):
    stamp = ["a"]
    signature = add.s(1)
    signature.stamp(mark=stamp)
    with transaction.manager:
        signature.apply_async()
        stamp.append("b")
        signature.options["mark"].append("c")

    assert [message.headers["stamps"] for message in app.sent()] == [{"mark": ["a"]}]


def endless():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize("value", [object(), [{"deep": object()}], {1, 2}, endless()])
def test_a_header_that_cannot_be_written_fails_at_the_call_and_is_named(app, value):
    transaction.begin()
    add.delay(1)
    with pytest.raises(OptionNotSendable, match=r"^add: the header 'tenant' cannot be sent \("):
        add.apply_async((2,), headers={"tenant": value})
    add.delay(3)
    transaction.commit()

    assert [message.args for message in app.sent()] == [[1], [3]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"priority": "high"}, "'priority' cannot be sent ('high' is no number)"),
        ({"expiration": "soon"}, "'expiration' cannot be sent ('soon' is no number)"),
        ({"compression": "zap"}, "'compression' cannot be sent ('zap' is not known to kombu)"),
        ({"message_id": object()}, "'message_id' cannot be sent (TypeError"),
    ],
)
def test_an_option_that_cannot_be_written_fails_at_the_call_and_is_named(app, options, said):
    transaction.begin()
    with pytest.raises(EncodeError) as info:
        add.apply_async((1,), **options)

    assert str(info.value).startswith(f"add: the option {said}")


def test_options_that_can_be_written_are_sent(app):
    with transaction.manager:
        add.apply_async((1,), priority=3, expiration=60.5, compression="zlib", user_id="me")
        (publication,) = transaction.get().data(app.celery).publications
        assert publication.options["priority"] == 3
        assert publication.options["user_id"] == "me"


@pytest.mark.parametrize("value", [NOON, Decimal("1.5"), 2**63 - 1, b"raw", [NOON, {"a": None}]])
def test_rabbitmq_takes_what_its_library_takes(value):
    options = {"headers": {"task": "add", "value": value}}
    freeze_envelope(options, "amqp")

    assert options["headers"]["value"] == value


@pytest.mark.parametrize("value", [uuid.UUID(int=1), 2**63, [2**70], {1: 2}])
def test_rabbitmq_does_not_take_what_its_library_does_not(value):
    with pytest.raises(OptionNotSendable, match="add: the header 'value'"):
        freeze_envelope({"headers": {"task": "add", "value": value}}, "amqp")


@pytest.mark.parametrize(
    ("value", "arrives"), [(uuid.UUID(int=1), uuid.UUID(int=1)), (2**70, 2**70), ({1: 2}, {"1": 2})]
)
def test_redis_takes_what_json_takes(value, arrives):
    options = {"headers": {"task": "add", "value": value}}
    freeze_envelope(options, "redis")

    assert options["headers"]["value"] == arrives
