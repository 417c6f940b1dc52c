"""What subscribers are told of a call before it is sent, and of a run when it is over."""

from __future__ import annotations

import threading

import pytest
import transaction
from celery import chain
from celery.app.trace import build_tracer
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from kombu import Queue
from pyramid.threadlocal import get_current_request

from ws_celery import task
from ws_celery.events import BeforeDispatch, TaskFinished, TasksPublished, has_subscriber
from ws_celery.interfaces import IBeforeDispatch, ITaskFinished, ITasksPublished


@task(name="add")
def add(request, x, y=0):
    return x + y


@task(name="fail")
def fail(request):
    raise LookupError("no such thing")


@task(name="again", bind=True)
def again(self, request):
    raise self.retry(countdown=60)


@task(name="ignore")
def ignore(request):
    raise Ignore


@task(name="reject")
def reject(request):
    raise Reject("no")


@task(name="exit")
def leave(request):
    raise SystemExit


TASKS = add, fail, again, ignore, reject, leave


@pytest.fixture
def events():
    """What the subscriber has been told."""
    return []


@pytest.fixture
def make(make_app, events):
    """Make an application with a subscriber to one kind of event."""

    def make(event, subscriber=None, **options):
        def setup(config):
            config.add_subscriber(subscriber or events.append, event)

        return make_app(*TASKS, setup=setup, **options)

    return make


def set_option(name, value):
    def subscriber(event):
        event.options[name] = value

    return subscriber


# Before a dispatch


@pytest.mark.parametrize("kind", [BeforeDispatch, IBeforeDispatch])
def test_a_subscriber_is_told_of_a_call_and_the_request_it_is_made_for(make, events, kind):
    app = make(kind)
    request = app.request()
    add.apply_async((request, 1), {"y": 2}, countdown=5)

    (event,) = events
    assert type(event) is BeforeDispatch
    assert (event.app, event.registry) == (app.celery, app.registry)
    assert (event.name, event.args, event.kwargs) == ("add", (1,), {"y": 2})
    assert event.request is request
    assert event.options["countdown"] == 5


def test_a_call_without_a_request_has_none(make, events):
    make(BeforeDispatch)
    add.delay(1)

    assert events[0].request is None


@pytest.mark.parametrize(
    "call",
    [
        lambda _app: add.delay(1),
        lambda _app: add.s(1).apply_async(),
        lambda app: app.send_task("add", (1,)),
        lambda app: app.send_task("add", (1,), None, 0.0),
        lambda _app: chain(add.s(1), add.s(2)).delay(),
    ],
    ids=["delay", "signature", "by name", "by position", "chain"],
)
def test_every_way_of_calling_is_told(make, events, call):
    app = make(BeforeDispatch)
    with transaction.manager:
        call(app.celery)

    assert [(event.name, event.args) for event in events] == [("add", (1,))]


def test_a_subscriber_changes_the_queue(make):
    app = make(BeforeDispatch, set_option("queue", "other-queue"))
    app.celery.amqp.queues.add(Queue("other-queue"))
    add.delay(1)

    assert [message.task for message in app.sent("other-queue")] == ["add"]
    assert app.sent() == []


def test_a_subscriber_adds_a_header(make):
    def subscriber(event):
        event.options["headers"]["tenant"] = "a"

    app = make(BeforeDispatch, subscriber)
    headers = {"mine": 1}
    add.apply_async((1,), headers=headers)

    (message,) = app.sent()
    assert (message.headers["tenant"], message.headers["mine"]) == ("a", 1)
    assert headers == {"mine": 1}


def test_a_subscriber_beats_the_options_of_the_call_and_of_its_route(make):
    app = make(
        BeforeDispatch,
        set_option("countdown", 60),
        celery="[celeryroute:add]\ncountdown = 5\npriority = 1\n",
    )
    for call in (lambda: add.delay(1), lambda: app.celery.send_task("add", (1,), None, 5)):
        call()
    first, second = app.sent()

    assert first.headers["eta"] > "2000"
    assert second.headers["eta"] > "2000"


def test_a_subscriber_does_not_change_the_arguments(make):
    def subscriber(event):
        event.kwargs["y"] = 7

    app = make(BeforeDispatch, subscriber)
    kwargs = {"y": 1}
    add.apply_async((1,), kwargs)

    assert kwargs == app.sent()[0].kwargs == {"y": 1}


@pytest.mark.parametrize("eager", ["true", "false"])
def test_an_error_of_a_subscriber_stops_the_call(make, events, eager):
    def subscriber(event):
        raise PermissionError("not today")

    app = make(BeforeDispatch, subscriber, celery=f"task_always_eager = {eager}")
    app.config.add_subscriber(events.append, TaskFinished)
    app.config.commit()
    with pytest.raises(PermissionError, match="not today"), transaction.manager:
        add.delay(1)

    assert (app.names(), events) == ([], [])


def test_an_eager_call_is_told_once(make, events):
    make(BeforeDispatch, celery="task_always_eager = true")
    with transaction.manager:
        add.delay(1)

    assert [(event.name, event.args) for event in events] == [("add", (1,))]


def test_a_subscriber_runs_in_the_thread_of_the_caller_within_its_transaction(make):
    seen = []

    def subscriber(event):
        seen.append((threading.get_ident(), transaction.manager.manager._txn is not None))

    app = make(BeforeDispatch, subscriber)
    with transaction.manager:
        add.delay(1)
        assert app.names() == []

    assert seen == [(threading.get_ident(), True)]


# Whether anybody listens


def test_a_listener_to_something_else_is_none_of_ours(make):
    app = make(TasksPublished)

    assert app.registry.has_listeners
    assert not has_subscriber(app.registry, BeforeDispatch)
    assert has_subscriber(app.registry, TasksPublished)


def test_a_subscriber_that_comes_later_is_told(make_app, events):
    app = make_app(add)
    add.delay(1)
    app.config.add_subscriber(events.append, BeforeDispatch)
    app.config.commit()
    add.delay(2)

    assert [event.args for event in events] == [(2,)]


@pytest.mark.parametrize("kind", [TasksPublished, ITasksPublished])
def test_publications_are_told_by_class_and_by_interface(make, events, kind):
    make(kind)
    with transaction.manager:
        add.delay(1)

    assert [task.name for task in events[0].tasks] == ["add"]


# After a run


def finished(app, name, *args, **options):
    """Run a task as a worker does, but that it is eager."""
    app.celery.tasks[name].apply(args, **options)


@pytest.mark.parametrize("kind", [TaskFinished, ITaskFinished])
def test_a_run_that_has_succeeded_is_told(make, events, kind):
    app = make(kind)
    finished(app, "add", 1, task_id="x")

    (event,) = events
    assert type(event) is TaskFinished
    assert (event.name, event.id, event.args, event.kwargs) == ("add", "x", (1,), {})
    assert (event.state, event.result, event.error) == ("SUCCESS", 1, None)
    assert 0 < event.runtime < 20
    assert event.task is app.celery.tasks["add"]


@pytest.mark.parametrize(
    ("name", "state", "error"),
    [
        ("fail", "FAILURE", "LookupError"),
        ("again", "RETRY", "Retry"),
        ("ignore", "IGNORED", "Ignore"),
        ("reject", "REJECTED", "Reject"),
    ],
)
def test_the_end_of_a_run_is_told(make, events, name, state, error):
    app = make(TaskFinished)
    # As a worker does: an eager task would be retried in place.
    run = build_tracer(name, app.celery.tasks[name], app=app.celery)
    run("x", (), {}, {"id": "x", "delivery_info": {}})

    (event,) = events
    assert (event.state, event.result, type(event.error).__name__) == (state, None, error)


def test_an_error_that_is_raised_to_the_caller_is_told_too(make, events):
    app = make(TaskFinished)
    with pytest.raises(LookupError):
        finished(app, "fail", throw=True)

    (event,) = events
    assert (event.state, str(event.error)) == ("FAILURE", "no such thing")


def test_what_ends_the_process_ends_no_run(make, events):
    app = make(TaskFinished)
    with pytest.raises(SystemExit):
        finished(app, "exit")

    assert events == []


def test_the_transaction_and_the_request_of_the_run_are_over(make):
    seen = []

    def subscriber(event):
        seen.append((get_current_request(), transaction.manager.manager._txn))

    finished(make(TaskFinished, subscriber), "add", 1)

    assert seen == [(None, None)]


@pytest.mark.parametrize("error", [ValueError("odd"), SoftTimeLimitExceeded()])
def test_an_error_of_a_subscriber_changes_nothing(make, caplog, error):
    def subscriber(event):
        raise error

    app = make(TaskFinished, subscriber)

    assert app.celery.tasks["add"].apply((1,)).get() == 1
    assert type(error).__name__ in caplog.text


def test_the_runs_of_another_application_are_not_told(make, make_app, events):
    make(TaskFinished)
    finished(make_app(*TASKS), "add", 1)

    assert events == []
