"""Keys of locks that somebody else has made, in any way: they are held, by nobody known."""

from __future__ import annotations

import json
import uuid

import pytest
from redis import Redis
from sqlalchemy import text

from ws_celery import inspection, task
from ws_celery.exceptions import Skipped
from ws_celery.locks import Held, Holder
from ws_celery.locks.postgresql import number_of

TEXTS = {
    "without a holder": "held",
    "with a list": "[1, 2]",
    "with no JSON": b"\xff{",
    "without an end": "[" * 100_000,
    "with other fields": json.dumps({"whose": "mine", "pid": "many", "id": 3}),
    "with words for numbers": json.dumps({"token": "a token", "since": "yesterday"}),
    "with a great number": json.dumps({"token": 10**400, "since": 10**400}),
    "with too great a number": '{"token": %s}' % ("9" * 5000),
}


@pytest.fixture
def client(redis_url):
    with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture(params=[*TEXTS, "as a hash", "as a list"])
def key(request, client):
    """A key that is held."""
    key = uuid.uuid4().hex
    name = f"ws_celery:lock:{key}"
    if request.param in TEXTS:
        client.set(name, TEXTS[request.param])
    elif request.param == "as a hash":
        client.hset(name, mapping={"owner": "somebody", "token": "1", "holder": "null"})
    else:
        client.rpush(name, "held")
    yield key
    client.delete(name)


@pytest.fixture
def app(make_app, redis_url):
    @task(name="locked", one_instance="{key}")
    def locked(request, key):
        return "has run"

    return make_app(locked, broker=redis_url, celery=f"result_backend = {redis_url}\n")


def held_by_us(app, key):
    store = app.celery.locks.store
    return Held(key, 60, task="ours", id="an-id", store=store, on_loss=lambda *_: None)


def test_a_run_that_meets_it_is_skipped(app, key):
    result = app.celery.tasks["locked"].apply((key,))

    assert result.state == "IGNORED"
    assert isinstance(result.result, Skipped)
    assert str(result.result).endswith(f"the lock {key!r} is held by an unknown holder")


def test_it_is_listed_and_hides_no_other(app, key):
    ours = held_by_us(app, uuid.uuid4().hex)
    assert app.celery.locks.store.acquire(ours) is None
    shown = {holder.key: holder for holder in inspection.lock_holders(app.celery)}
    ours.end()

    assert shown[ours.key].task == "ours"
    assert shown[key] == inspection.lock_holder(app.celery, key) == Holder(key)


def test_it_can_be_freed_and_is_ours_then(app, key):
    inspection.free_lock(app.celery, inspection.lock_holder(app.celery, key))

    assert app.celery.tasks["locked"].apply((key,)).get() == "has run"


@pytest.mark.parametrize("kind", ["text", "list"])
def test_a_run_whose_key_was_overwritten_has_lost_its_lock(app, client, kind):
    ours = held_by_us(app, uuid.uuid4().hex)
    store = app.celery.locks.store
    assert store.acquire(ours) is None
    name = f"ws_celery:lock:{ours.key}"
    if kind == "text":
        client.set(name, "held")
    else:
        client.delete(name)
        client.rpush(name, "held")
    client.expire(name, 60)

    assert not store.renew(ours)
    assert not store.release(ours)


def test_tokens_go_on_though_somebody_has_overwritten_the_last_one(app, client):
    client.set("ws_celery:lock-token", "a token")
    ours = held_by_us(app, uuid.uuid4().hex)
    assert app.celery.locks.store.acquire(ours) is None
    ours.end()

    assert ours.token > 10**15


@pytest.mark.parametrize("told", ["W10=", "eyJhIjogMX0=", "eyJzaW5jZSI6ICJ4In0=", "eA=="])
def test_a_comment_like_ours_in_a_statement_of_another_program_is_an_unknown_holder(
    make_app, postgres, told
):
    app = make_app(setup=postgres.includeme, ws_celery__locks="database")
    key = uuid.uuid4().hex
    store = app.celery.locks.store
    with postgres.engine.connect() as connection:
        lock = text(f"SELECT pg_advisory_lock({number_of(key)}) /* ws_celery:{told} */")
        connection.execute(lock)

        assert store.holder_of(key) == Holder(key)
        assert key not in [holder.key for holder in store.holders()]
        connection.invalidate()
