"""What an application learns of the flush after the commit, and what may interrupt it."""

from __future__ import annotations

import re
import socket
import threading
import time

import pytest
import transaction
from celery.exceptions import SoftTimeLimitExceeded
from kombu.exceptions import OperationalError
from tests.waiting import SOON, wait_for

from ws_celery import ConfigurationError, task
from ws_celery.events import PublishFailed, TasksPublished, TasksSpooled
from ws_celery.recording import Publication
from ws_celery.spool import Spool


@task(name="add")
def add(request, x):
    """Do nothing."""


@task(name="outer")
def outer(request):
    add.delay(1)


@pytest.fixture
def events():
    """What the subscriber of the application has been told."""
    return []


@pytest.fixture
def app(make_app, events):
    def setup(config):
        config.add_subscriber(events.append, TasksPublished)
        config.add_subscriber(events.append, TasksSpooled)

    return make_app(add, outer, setup=setup, ws_celery__publish_cooldown="1e-9")


@pytest.fixture
def fail(monkeypatch):
    """Let each publication raise an error."""

    def fail(error):
        def publish(producer, publication, **overrides):
            raise error

        monkeypatch.setattr("ws_celery.publishing.publish", publish)

    return fail


def test_what_has_been_published_is_told_once_for_a_commit(app, events):
    with transaction.manager:
        ids = [add.delay(number).id for number in range(2)]

    (event,) = events
    assert type(event) is TasksPublished
    assert event.app is app.celery
    assert event.tasks == [("add", ids[0]), ("add", ids[1])]
    assert event.tasks[0].name == "add"


def test_a_transaction_without_tasks_tells_nothing(app, events):
    with transaction.manager:
        pass

    assert events == []


def test_what_could_not_be_published_is_told_with_the_reason(app, events, fail):
    fail(OperationalError("gone"))
    with transaction.manager:
        result = add.delay(1)

    (event,) = events
    assert type(event) is PublishFailed
    assert event.tasks == [("add", result.id)]
    assert str(event.error) == "gone"


def test_a_broker_that_another_thread_finds_up_meanwhile_is_not_down(app, events, monkeypatch):
    publisher = app.celery.publisher
    publisher._down_until = time.monotonic()  # as after a failure

    def while_another_thread_publishes():
        publisher._down_until = None
        return time.monotonic()

    monkeypatch.setattr("ws_celery.publishing.monotonic", while_another_thread_publishes)
    with transaction.manager:
        add.delay(1)

    assert [type(event) for event in events] == [TasksPublished]


def test_an_error_that_is_not_the_brokers_does_not_mark_it_as_down(app, events, fail, monkeypatch):
    fail(ValueError("odd message"))
    with transaction.manager:
        first = add.delay(1)
    assert app.celery.publisher._down_until is None
    monkeypatch.undo()
    with transaction.manager:
        second = add.delay(2)
    wait_for(lambda: not len(app.celery.publisher.spool))

    assert type(events[0]) is TasksSpooled
    assert events[0].tasks == [("add", first.id)]
    published = [event for event in events if type(event) is TasksPublished]
    assert [each.id for event in published for each in event.tasks] == [first.id, second.id]
    assert published[0].late
    assert [message.args for message in app.sent()] == [[1], [2]]


def test_only_one_thread_waits_for_a_broker_that_may_be_up_again(make_app, events):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        app = make_app(
            add,
            setup=lambda config: config.add_subscriber(events.append, TasksSpooled),
            broker=f"redis://127.0.0.1:{silent.getsockname()[1]}/0",
        )
        publisher = app.celery.publisher
        publisher._down_until = time.monotonic()  # the cool-down is over
        thread = threading.Thread(target=_commit, args=(app, 1))
        thread.start()
        silent.settimeout(SOON)
        connection, _ = silent.accept()
        _commit(app, 2)
        (event,) = events
        connection.close()
        silent.close()
        thread.join()

    assert "ws_celery.publish_cooldown" in str(event.error)


def _commit(app, number):
    with transaction.manager:
        add.delay(app.request(), number)


@pytest.mark.parametrize("error", [None, OperationalError("gone")], ids=["published", "failed"])
def test_a_subscriber_that_fails_does_not_fail_the_commit(make_app, fail, caplog, error):
    def subscriber(event):
        raise LookupError("no such thing")

    make_app(add, setup=lambda config: config.add_subscriber(subscriber, TasksPublished))
    if error:
        fail(error)
    with transaction.manager:
        add.delay(1)

    assert "has failed" in caplog.text


def test_arguments_are_not_logged_unless_asked_for(app, fail, caplog):
    fail(OperationalError("gone"))
    with transaction.manager:
        result = add.delay("who knows")

    assert f"add[{result.id}]" in caplog.text
    assert "who knows" not in caplog.text


def test_arguments_are_logged_if_asked_for_without_their_secrets(make_app, fail, caplog):
    make_app(add, ws_celery__log_arguments="true")
    fail(OperationalError("gone"))
    with transaction.manager:
        add.delay({"password": "hunter2", "url": "redis://me:hunter3@here"})
        add.apply_async(("hunter4",), argsrepr="(hidden)")

    assert "args=({'password': ********" in caplog.text
    assert "redis://me:********@here" in caplog.text
    assert "args=(hidden) kwargs={}" in caplog.text
    assert "hunter" not in caplog.text


def test_arguments_that_the_settings_hide_are_not_logged(make_app, fail, caplog):
    make_app(add, ws_celery__log_arguments="true", ws_celery__mask_arguments="all")
    fail(OperationalError("gone"))
    with transaction.manager:
        add.delay("hunter2")
        add.delay_many([("hunter3",)])

    masked = re.findall(r"add\[(.{36})\] args=\('\*{8}',\) kwargs={}", caplog.text)
    assert len(set(masked)) == 2
    assert caplog.text.count("add[") == len(masked)
    assert "hunter" not in caplog.text


@pytest.mark.parametrize("is_in_hand", [False, True], ids=["waiting", "in hand"])
def test_nothing_overtakes_what_is_spooled(app, events, monkeypatch, is_in_hand):
    released = threading.Event()
    monkeypatch.setattr(Spool, "_run", lambda _: released.wait(SOON))
    spool = app.celery.publisher.spool
    spool.keep([Publication("{}", {"headers": {"task": "add", "id": "earlier"}})])
    if is_in_hand:
        spool._take(0)  # as the thread does before it sends
    with transaction.manager:
        later = add.delay(2)

    assert app.sent() == []
    assert [type(event) for event in events] == [TasksSpooled]
    assert events[0].tasks == [("add", later.id)]
    assert len(spool) == 2
    released.set()


# Interruptions


def test_a_time_limit_during_the_flush_ends_the_task(app, fail, events):
    fail(SoftTimeLimitExceeded())
    result = app.celery.tasks["outer"].apply()

    assert isinstance(result.result, SoftTimeLimitExceeded)
    assert [type(event) for event in events] == [PublishFailed]


def test_a_signal_to_exit_during_the_flush_ends_the_process(app, fail):
    fail(SystemExit())
    with pytest.raises(SystemExit):
        app.celery.tasks["outer"].apply()


def test_a_time_limit_during_a_subscriber_ends_the_task(make_app):
    def subscriber(event):
        raise SoftTimeLimitExceeded

    app = make_app(
        add, outer, setup=lambda config: config.add_subscriber(subscriber, TasksPublished)
    )

    assert isinstance(app.celery.tasks["outer"].apply().result, SoftTimeLimitExceeded)


# Settings


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", ""])
@pytest.mark.parametrize("key", ["publish_timeout", "publish_cooldown"])
def test_a_time_that_is_none_ends_the_start(make_app, key, value):
    with pytest.raises(ConfigurationError, match=rf"ws_celery\.{key} = .*more than 0 seconds"):
        make_app(**{f"ws_celery__{key}": value})


def test_a_flush_that_is_too_slow_is_cut_off_and_the_rest_is_sent_later(
    make_app, events, monkeypatch
):
    def setup(config):
        config.add_subscriber(events.append, TasksPublished)
        config.add_subscriber(events.append, TasksSpooled)

    app = make_app(add, setup=setup, ws_celery__publish_timeout="1e-9")
    monkeypatch.setattr("ws_celery.publishing.PER_MESSAGE", 0)
    with transaction.manager:
        ids = [add.delay(number).id for number in range(3)]
    wait_for(lambda: not len(app.celery.publisher.spool))

    told = {(type(event), each.id) for event in events for each in event.tasks}
    assert {each for kind, each in told if kind is TasksPublished} == set(ids)
    assert {each for kind, each in told if kind is TasksSpooled} == set(ids[1:])
    assert not any(isinstance(event, PublishFailed) for event in events)
    assert app.celery.publisher._down_until is None
