"""The embedded broker, running."""

from __future__ import annotations

import pytest
import redis
import transaction

from ws_celery import task
from ws_celery.embedded import EmbeddedBroker


@task(name="add")
def add(request, x):
    """Do nothing."""


@pytest.fixture
def broker(tmp_path):
    """An embedded broker that nobody has started, deep in the file system."""
    return EmbeddedBroker(tmp_path / ("deep/" * 40) / "broker")


def test_it_carries_tasks(make_app, broker, start_broker):
    start_broker(broker)
    app = make_app(add, broker=f"embedded://{broker.directory}")
    with transaction.manager:
        add.delay(1)

    assert app.names() == ["add"]


def test_it_keeps_what_waits_when_it_is_killed(make_app, broker, start_broker):
    app = make_app(add, broker=f"embedded://{broker.directory}")
    first = start_broker(broker)
    add.delay(1)
    first.kill()
    first.wait()
    start_broker(broker)

    assert app.names() == ["add"]


def test_a_slow_disk_holds_back_nothing_that_a_kill_would_lose(broker, start_broker):
    start_broker(broker)
    with redis.Redis(unix_socket_path=str(broker.socket)) as client:
        assert client.config_get("appendfsync") == {"appendfsync": "no"}


def test_it_does_not_listen_on_the_network(broker, start_broker):
    start_broker(broker)
    with redis.Redis(unix_socket_path=str(broker.socket)) as client:
        assert client.config_get("port") == {"port": "0"}


def test_it_tells_whether_it_is_running(broker, start_broker):
    assert not broker.is_running()
    start_broker(broker)
    assert broker.is_running()


def test_the_server_of_the_test_extra_is_a_server_like_any_other(
    make_app, broker, start_broker, monkeypatch
):
    monkeypatch.setenv("PATH", "")
    start_broker(broker)
    app = make_app(add, broker=f"embedded://{broker.directory}")
    with transaction.manager:
        add.delay(1)

    assert app.names() == ["add"]
