"""Locks whose Redis or PostgreSQL falls silent, and more of them than connections in a pool."""

from __future__ import annotations

import logging
import socket
import threading
import uuid
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest
import zope.sqlalchemy
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from tests.proxy import Proxy
from tests.waiting import SOON

from ws_celery import RequestAwareTask, one_instance, task
from ws_celery.events import LockLost
from ws_celery.exceptions import LockGone, LocksUnavailable
from ws_celery.locks import Held


@pytest.fixture
def through():
    """Put a network that can fail before a server; returns it, and the URL that goes through it."""
    with ExitStack() as stack:

        def put(url):
            parts = urlsplit(url)
            if not parts.port:
                pytest.skip("the embedded server has no port")
            target = parts.hostname, parts.port
            proxy = Proxy(lambda: socket.create_connection(target))
            stack.callback(proxy.close)
            host = f"{parts.hostname}:{parts.port}"
            return proxy, url.replace(host, f"127.0.0.1:{proxy.port}")

        yield put


@pytest.fixture
def database():
    """Give requests a session of a database."""
    with ExitStack() as stack:

        def include(url, **options):
            engine = create_engine(url, **options)
            stack.callback(engine.dispose)

            def session(request):
                session = Session(engine)
                zope.sqlalchemy.register(session, transaction_manager=request.tm)
                return session

            return lambda config: config.add_request_method(session, "dbsession", reify=True)

        yield include


@pytest.fixture(params=["redis", "database"])
def cut_off(request, make_app, redis_url, postgres_url, through, database):
    """Make an application whose locks are behind a network that can fail."""
    if request.param == "redis":
        proxy, locks = through(redis_url)
        include = None
    else:
        proxy, url = through(postgres_url)
        locks, include = "database", database(url)

    def make(*tasks):
        settings = {"ws_celery__locks": locks, "celery": f"result_backend = {redis_url}\n"}
        settings["ws_celery__publish_timeout"] = "2"  # also of a lock's Redis
        return make_app(*tasks, setup=include, broker=redis_url, **settings), proxy

    return make


@pytest.fixture
def key():
    return uuid.uuid4().hex


def locked_task(gate, key, **options):
    @task(name="locked", base=RequestAwareTask)
    @one_instance(key, **options)
    def locked(request):
        return gate(request.one_instance)

    return locked


def test_the_loss_is_told_while_the_store_is_silent_and_the_run_ends(
    cut_off, start_worker, key, caplog
):
    held, told, entered = [], threading.Event(), threading.Event()

    def gate(lock):
        held.append(lock)
        entered.set()
        return told.wait(SOON) and lock.lost

    locked = locked_task(gate, key, timeout=1)
    app, proxy = cut_off(locked)
    app.config.add_subscriber(lambda _event: told.set(), LockLost)
    app.config.commit()
    start_worker(app)
    with caplog.at_level(logging.WARNING, "ws_celery.locks"):
        result = locked.delay(app.request())
        assert entered.wait(SOON)
        proxy.freeze()
        assert result.get(SOON) is True

    assert "could not be renewed for 1 seconds" in caplog.text
    assert not app.celery.locks._renewal._held


def test_a_run_looks_at_its_lock_and_waits_no_longer_than_it_is_held(cut_off, start_worker, key):
    entered, frozen = threading.Event(), threading.Event()

    def gate(lock):
        entered.set()
        assert frozen.wait(SOON)
        while True:  # LocksUnavailable as long as nobody can tell
            try:
                lock.check()
            except LocksUnavailable:
                continue

    locked = locked_task(gate, key, timeout=1)
    app, proxy = cut_off(locked)
    start_worker(app)
    result = locked.delay(app.request())
    assert entered.wait(SOON)
    proxy.freeze()
    frozen.set()

    with pytest.raises(LockGone, match="has lost the lock"):
        result.get(SOON)


def test_a_run_ends_though_its_lock_cannot_be_given_back(cut_off, start_worker, key, caplog):
    entered, frozen = threading.Event(), threading.Event()

    def gate(lock):
        entered.set()
        return frozen.wait(SOON)

    locked = locked_task(gate, key, timeout=3600)
    app, proxy = cut_off(locked)
    start_worker(app)
    result = locked.delay(app.request())
    assert entered.wait(SOON)
    proxy.freeze()
    frozen.set()

    assert result.get(SOON) is True
    assert "is left to run out" in caplog.text
    assert "has lost the lock" not in caplog.text


def test_more_runs_have_locks_than_the_application_has_connections(
    make_app, redis_url, postgres_url, database, key
):
    include = database(postgres_url, pool_size=1, max_overflow=0, pool_timeout=1)
    app = make_app(setup=include, broker=redis_url, ws_celery__locks="database")
    store = app.celery.locks.store
    runs = [
        Held(f"{key} {n}", 60, task="t", id="i", store=store, on_loss=lambda *_: None)
        for n in range(20)
    ]

    assert [store.acquire(run) for run in runs] == [None] * 20
    assert len([holder for holder in store.holders() if key in holder.key]) == 20
    for run in runs:
        run.end()
    assert store.holder_of(runs[0].key) is None
