"""What is wrong with a call is said by the call."""

from __future__ import annotations

import pytest
import transaction
from celery.exceptions import QueueNotFound
from kombu.exceptions import EncodeError

from ws_celery import task
from ws_celery.exceptions import ArgumentNotSerializable


@task(name="add")
def add(request, x, y=0):
    """Do nothing."""


@pytest.fixture(params=["deferred", "at once", "eager"])
def app(request, make_app):
    app = make_app(add, celery="task_always_eager = true" if request.param == "eager" else "")
    if request.param == "deferred":
        transaction.begin()
    return app


@pytest.mark.parametrize(
    ("args", "kwargs", "name"),
    [
        ((object(),), {}, "argument 1"),
        ((1, object()), {}, "argument 2"),
        ((1,), {"y": object()}, "argument 'y'"),
        (([1, {"deep": (object(),)}],), {}, "argument 1"),
    ],
)
def test_the_argument_that_does_not_serialise_is_named(app, args, kwargs, name):
    message = f"add: {name} cannot be serialized with json: it has a object"
    with pytest.raises(ArgumentNotSerializable, match=message):
        add.delay(*args, **kwargs)


def test_the_request_is_not_counted_among_the_arguments(app):
    with pytest.raises(ArgumentNotSerializable, match="argument 1 cannot"):
        add.delay(app.request(), object())


def test_it_is_the_error_that_celery_raises(app):
    with pytest.raises(EncodeError):
        add.delay(object())


@pytest.mark.parametrize("deferred", [True, False])
def test_an_argument_of_a_task_known_by_name_is_named(make_app, deferred):
    app = make_app()
    if deferred:
        transaction.begin()
    with pytest.raises(ArgumentNotSerializable, match="elsewhere: argument 'x'"):
        app.celery.send_task("elsewhere", kwargs={"x": object()})


def test_a_link_that_does_not_serialise_is_not_blamed_on_an_argument(make_app):
    make_app(add)
    with pytest.raises(EncodeError) as caught:
        add.apply_async((1,), link=add.s(object()))

    assert not isinstance(caught.value, ArgumentNotSerializable)


@pytest.mark.parametrize("deferred", [True, False])
def test_an_unknown_queue_fails_at_the_call(make_app, deferred):
    make_app(add, celery="task_create_missing_queues = false")
    if deferred:
        transaction.begin()
    with pytest.raises(QueueNotFound, match="slow"):
        add.apply_async((1,), queue="slow")


# As in Django


def test_what_djangos_users_call_is_deferred(make_app):
    app = make_app(add)
    request = app.request()
    with transaction.manager:
        results = [
            add.delay_on_commit(request, 1),
            add.apply_async_on_commit((request, 2)),
            app.celery.tasks["add"].delay_on_commit(3),
            app.celery.tasks["add"].apply_async_on_commit((4,)),
        ]
        assert app.names() == []

    messages = app.sent()
    assert [message.args for message in messages] == [[1], [2], [3], [4]]
    assert [message.id for message in messages] == [result.id for result in results]


def test_without_a_transaction_what_djangos_users_call_is_sent_at_once(make_app):
    app = make_app(add)
    add.delay_on_commit(1)

    assert app.names() == ["add"]
