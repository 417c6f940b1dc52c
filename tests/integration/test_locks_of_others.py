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

HASHES = {
    "without a holder": {"who": "knows"},
    "with a list": {"holder": "[1, 2]"},
    "with no JSON": {"holder": b"\xff{"},
    "with other fields": {"holder": json.dumps({"whose": "mine", "pid": "many", "id": 3})},
    "with words for numbers": {"token": "a token", "since": "yesterday", "holder": "null"},
    "with too great a number": {"token": "9" * 5000},
}


@pytest.fixture
def client(redis_url):
    with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture(params=[*HASHES, "as a text", "as a list"])
def key(request, client):
    """A key that is held, and in the index of those that are."""
    key = uuid.uuid4().hex
    name = f"ws_celery:lock:{key}"
    if request.param in HASHES:
        client.hset(name, mapping=HASHES[request.param])
    elif request.param == "as a text":
        client.set(name, "held")
    else:
        client.rpush(name, "held")
    client.zadd("ws_celery:locks", {name: 2**53})
    yield key
    client.delete(name)
    client.zrem("ws_celery:locks", name)


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


def test_a_run_whose_key_was_overwritten_has_lost_its_lock(app, client):
    ours = held_by_us(app, uuid.uuid4().hex)
    store = app.celery.locks.store
    assert store.acquire(ours) is None
    client.set(f"ws_celery:lock:{ours.key}", "held", ex=60)

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
