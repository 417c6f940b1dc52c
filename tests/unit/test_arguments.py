"""What is wrong with a call is said by the call."""

from __future__ import annotations

from collections import OrderedDict
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from uuid import UUID

import pytest
import transaction
from celery.exceptions import QueueNotFound
from kombu.exceptions import EncodeError

from ws_celery import one_instance, task
from ws_celery.exceptions import ArgumentNotSerializable, OptionNotSendable
from ws_celery.testing import capture


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


#: What kombu writes for a value that JSON does not have, with other values in its place.
FORMS = [
    {"__type__": "uuid", "__value__": "no number"},
    {"__type__": "datetime", "__value__": "tomorrow"},
    {"__type__": "unknown", "__value__": 1},
    {"__type__": "bytes", "__value__": "text"},  # it would be read, as bytes
    OrderedDict(__value__={"hex": "0" * 32}, __type__="uuid"),
]


@pytest.mark.parametrize("form", FORMS)
def test_an_argument_that_would_be_read_otherwise_is_refused_at_the_call(app, form):
    with pytest.raises(ArgumentNotSerializable, match=r"add: argument 2 .*__type__ and __value__"):
        add.delay(1, [{"deep": (form,)}])
    with pytest.raises(ArgumentNotSerializable, match=r"add: argument 'y' .*json.dumps"):
        add.delay(1, y=form)
    with pytest.raises(OptionNotSendable, match="add: the option 'link'"):
        add.apply_async((1,), link=add.s(form))
    with pytest.raises(OptionNotSendable, match="add: the option 'headers'"):
        add.apply_async((1,), headers={"note": form})
    with pytest.raises(ArgumentNotSerializable, match="add, call 1: argument 1"):
        add.delay_many([(1,), (form,)])


def test_keyword_arguments_of_these_two_names_are_refused_at_the_call(app):
    with pytest.raises(ArgumentNotSerializable, match=r"others\.add: argument '__type__'"):
        app.celery.send_task("others.add", kwargs={"__type__": "uuid", "__value__": "x"})


VALUES = [
    {"__type__": "uuid"},
    {"__type__": "uuid", "__value__": "x", "more": 1},
    {"__value__": {"__type__": 1}},
    UUID(int=7),
    datetime(2026, 3, 4, 5, 6, 7, 8, tzinfo=timezone(timedelta(hours=5, minutes=30))),
    date(2026, 3, 4),
    time(5, 6, 7, 8, tzinfo=timezone.utc),
    Decimal("1.10"),
    b"text",
    b"\xff\x00",
    "half \udc80 of a pair, \0 and \u2028",
    float("inf"),
    2**70,
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_what_is_accepted_is_read_as_it_was(make_app, value):
    app = make_app(add)
    with capture(app.registry) as captured:
        add.delay(value, y=[{"deep": value}])
        (call,) = captured

    assert (call.args, call.kwargs) == ([value], {"y": [{"deep": value}]})
    assert type(call.args[0]) is type(value)


def test_an_argument_that_is_its_own_part_is_refused_at_the_call(app):
    endless = []
    endless.append(endless)
    with pytest.raises(ArgumentNotSerializable, match=r"argument 1 .* it has a list"):
        add.delay(endless)


def test_with_pickle_an_object_may_have_any_keys(make_app):
    app = make_app(add, celery="task_serializer = pickle\naccept_content = pickle")
    with capture(app.registry) as captured:
        add.delay(FORMS[0])
        (call,) = captured

    assert list(call.args) == [FORMS[0]]


@one_instance(key="person:{name}:{number:d}")
def keyed(request, name, number=1):
    """Do nothing."""


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("half \udc80",), "UnicodeEncodeError.*surrogates not allowed"),
        (("ada", "one"), "ValueError: Unknown format code 'd'"),
    ],
)
def test_a_lock_s_key_that_cannot_be_made_is_refused_at_the_call(make_app, args, said):
    app = make_app(task(name="keyed")(keyed))
    transaction.begin()
    with pytest.raises(TypeError, match=f"keyed: the key .* of one_instance .*{said}"):
        app.celery.tasks["keyed"].delay(*args)
    with pytest.raises(TypeError, match=said):
        app.celery.send_task("keyed", args)
    with pytest.raises(TypeError, match=said):
        app.celery.tasks["keyed"].delay_many([("ada",), args])


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
