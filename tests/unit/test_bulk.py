"""Many calls of one task as one dispatch: the messages of as many calls, and every promise."""

from __future__ import annotations

import pickle
from itertools import count, islice

import pytest
import transaction
from celery import Task, signals
from celery.result import GroupResult
from pyramid.config import Configurator

from ws_celery import RequestAwareTask, immediately, task
from ws_celery.bulk import BulkPublication
from ws_celery.events import BeforeDispatch, TasksPublished
from ws_celery.exceptions import ArgumentNotSerializable
from ws_celery.testing import capture


@task(name="add")
def add(request, x, y=0):
    return x + y


@task(name="named")
class Named(RequestAwareTask):
    """A task that is shown under a name of its own for each call."""

    def shadow_name(self, args, kwargs, options):
        return f"number {args[0]}"

    def run(self, request, x):
        """Do nothing."""


@pytest.fixture
def app(make_app):
    return make_app(add, Named)


@pytest.fixture
def recorded(app):
    """Return the kinds of what the open transaction has recorded."""

    def recorded():
        return [type(item) for item in transaction.get().data(app.celery).publications]

    return recorded


def arguments(app):
    return [message.args for message in app.sent()]


# The messages


def test_the_messages_are_those_of_single_calls_but_for_what_differs(app):
    with transaction.manager:
        many = add.apply_async_many(
            [((1,), {"y": 2}), ((3,), None)], countdown=60, headers={"my": "own"}, priority=3
        )
        one = add.apply_async((3,), countdown=60, headers={"my": "own"}, priority=3)
    _, second, single = (dict(message.headers) for message in app.sent())

    assert second.pop("eta") <= single.pop("eta")
    assert second == {**single, "id": many[1].id, "root_id": many[1].id, "group": many.id} | {
        "group_index": 1
    }
    assert single["id"] == one.id
    assert second["argsrepr"] == "(3,)"
    assert second["kwargsrepr"] == "{}"


def test_properties_of_the_call_are_those_of_all_messages(app):
    options = {"correlation_id": "mine", "reply_to": "me", "message_id": "one"}
    with transaction.manager:
        add.apply_async_many([((1,), {}), ((2,), {})], **options)
        many = add.delay_many([(1,), (2,)])
        publications = transaction.get().data(app.celery).publications
        given, own = publications[:2], publications[2:]

    for publication in given:
        assert {name: publication.options[name] for name in options} == options
    assert [publication.options["correlation_id"] for publication in own] == many.ids


def test_the_arguments_are_those_of_each_call(app):
    add.apply_async_many([((1,), {"y": 2}), ([3], {}), ((), {"x": 4})])
    messages = app.sent()

    assert [(message.args, message.kwargs) for message in messages] == [
        ([1], {"y": 2}),
        ([3], {}),
        ([], {"x": 4}),
    ]
    assert [message.headers["kwargsrepr"] for message in messages] == ["{'y': 2}", "{}", "{'x': 4}"]


def test_an_argument_changed_afterwards_changes_nothing(app):
    numbers = [1]
    with transaction.manager:
        add.delay_many([(0,), (numbers,)])
        numbers.append(2)

    assert arguments(app) == [[0], [[1]]]


def test_the_request_is_the_callers_and_does_not_travel(app):
    request = app.request(HTTP_HOST="shop.example")
    with request.tm:
        add.delay_many([(request, 1), (request, 2), (3,)])
        assert arguments(app) == []
    messages = app.sent()

    assert [message.args for message in messages] == [[1], [2], [3]]
    assert {message.headers["ws_celery"]["url"] for message in messages} == {"http://shop.example"}


def test_no_calls_are_no_messages(app):
    result = add.delay_many(iter([]))

    assert isinstance(result, GroupResult)
    assert result.ids == result.results == app.sent() == []


# When they leave


def test_they_leave_with_the_commit(app, recorded):
    transaction.begin()
    add.delay_many((number,) for number in range(3))
    assert arguments(app) == []
    assert recorded()[1:] == [BulkPublication] * 2
    transaction.commit()

    assert arguments(app) == [[0], [1], [2]]


def test_they_never_leave_if_the_transaction_aborts(app):
    transaction.begin()
    add.delay_many([(1,), (2,)])
    transaction.abort()

    assert app.names() == []


def test_a_savepoint_that_is_rolled_back_drops_them_all(app):
    with transaction.manager:
        add.delay_many([(1,), (2,)])
        savepoint = transaction.savepoint()
        add.delay_many([(3,), (4,)])
        savepoint.rollback()

    assert arguments(app) == [[1], [2]]


def test_a_savepoint_that_is_rolled_back_between_two_calls_drops_what_came_after_it(app):
    def calls():
        yield (1,)
        savepoint = transaction.savepoint()
        yield (2,)
        savepoint.rollback()
        yield (3,)

    with transaction.manager:
        add.delay_many(calls())

    assert arguments(app) == [[1], [3]]


def test_an_abort_between_two_calls_drops_what_came_before_it(app):
    def calls():
        transaction.begin()
        yield (1,)
        transaction.abort()
        transaction.begin()
        yield (2,)

    add.delay_many(calls())
    assert arguments(app) == []
    transaction.commit()

    assert arguments(app) == [[2]]


def test_each_call_belongs_to_the_transaction_that_is_open_when_it_is_made(app):
    sent = []

    def calls():
        yield (0,)
        transaction.begin()
        yield (1,)
        sent.append(arguments(app))
        transaction.commit()
        sent.append(arguments(app))
        yield (2,)
        transaction.begin()
        yield (3,)

    result = add.delay_many(calls())

    assert sent == [[[0]], [[1]]]
    assert arguments(app) == [[2]]
    transaction.abort()
    assert arguments(app) == []
    assert len(result) == 4


def test_they_leave_at_once_where_that_is_asked_for(app):
    transaction.begin()
    with immediately():
        add.delay_many([(1,), (2,)])
    with app.celery.producer_pool.acquire(block=True) as producer:
        add.apply_async_many([((3,), {}), ((4,), {})], producer=producer)
    with app.celery.connection_for_write() as connection:
        add.apply_async_many([((5,), {}), ((6,), {})], connection=connection)
    transaction.abort()

    assert arguments(app) == [[1], [2], [3], [4], [5], [6]]


def test_what_leaves_at_once_leaves_in_slices(app, monkeypatch):
    monkeypatch.setattr("ws_celery.bulk.SLICE", 2)
    sent = []

    def calls():
        for number in range(5):
            sent.append(len(arguments(app)))
            yield (number,)

    add.delay_many(calls())

    assert sent == [0, 0, 2, 0, 2]
    assert arguments(app) == [[4]]


def test_the_events_of_the_flush_tell_of_each(make_app):
    events = []
    make_app(add, setup=lambda config: config.add_subscriber(events.append, TasksPublished))
    with transaction.manager:
        result = add.delay_many([(1,), (2,)])

    assert events[0].tasks == [("add", result[0].id), ("add", result[1].id)]


# What is wrong with a call


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([(1,), (2, 3, 4)], r"add: call 1: .*(positional argument|takes)"),
        ([(1,), 2], r"add: call 1 has 2 as arguments: expected a tuple"),
        (["ab"], r"add: call 0 has 'ab' as arguments: expected a tuple"),
    ],
)
def test_wrong_arguments_are_an_error_that_names_the_call(app, calls, message):
    with pytest.raises(TypeError, match=message):
        add.delay_many(calls)

    assert app.names() == []


@pytest.mark.parametrize("call", [(1, 2), 1, ((1,), {}, 3), ((1,), [2])])
def test_a_call_is_a_pair_of_arguments(app, call):
    with pytest.raises(TypeError, match=r"call 0 has .* as arguments: expected a tuple"):
        add.apply_async_many([call])


@pytest.mark.parametrize("calls", [[(object(),), (1,)], [(1,), (object(),)]])
@pytest.mark.parametrize("eager", [False, True])
def test_a_value_that_does_not_serialise_is_named_with_its_call(make_app, calls, eager):
    app = make_app(add, celery=f"task_always_eager = {eager}")
    number = next(number for number, (value,) in enumerate(calls) if value != 1)
    with pytest.raises(
        ArgumentNotSerializable, match=r"argument 1 .*json: it has a object"
    ) as info:
        add.delay_many(calls)

    assert str(info.value).startswith(f"add, call {number}: ")
    assert app.names() == []


def test_one_request_is_the_callers_of_all(app):
    with pytest.raises(TypeError, match="call 1 has another request than the first"):
        add.delay_many([(app.request(), 1), (app.request(), 2)])


def test_one_id_is_not_for_many(app):
    with pytest.raises(TypeError, match="task_id cannot be the id of many tasks"):
        add.apply_async_many([((1,), {})], task_id="mine")


# Where a call could make more of a difference


@pytest.mark.parametrize(
    "signal", [signals.before_task_publish, signals.after_task_publish, signals.task_sent]
)
def test_signals_are_sent_for_each_when_somebody_listens(app, signal):
    heard = []

    def listener(sender, **_):
        heard.append(sender)

    signal.connect(listener)
    try:
        with transaction.manager:
            add.delay_many([(1,), (2,)])
    finally:
        signal.disconnect(listener)

    assert heard == ["add", "add"]
    assert arguments(app) == [[1], [2]]


def test_a_router_that_looks_at_arguments_sees_each(app):
    def route(name, args, kwargs, options, task=None, **_):
        return {"priority": args[0]}

    app.celery.conf.task_routes = (route,)
    app.celery.amqp.flush_routes()
    app.celery.amqp.router = app.celery.amqp.Router()
    with transaction.manager:
        add.delay_many([(1,), (2,)])
        publications = transaction.get().data(app.celery).publications
        assert [publication.options["priority"] for publication in publications] == [1, 2]


def test_a_name_of_its_own_is_asked_for_each(app):
    with transaction.manager:
        Named.delay_many([(1,), (2,)])

    assert [message.headers["shadow"] for message in app.sent()] == ["number 1", "number 2"]


def test_task_sent_events_travel_with_each(make_app):
    app = make_app(add, celery="task_send_sent_event = true")
    with transaction.manager:
        add.delay_many([(1,), (2,)])
        publications = transaction.get().data(app.celery).publications
        assert [publication.task_name for publication in publications] == ["add", None] * 2


def test_a_test_sees_each_call_with_its_options(app):
    with capture(transaction.manager) as captured:
        add.apply_async_many([((1,), {}), ((2,), {})], countdown=60)
        transaction.begin()
        add.delay_many([(3,), (4,)])

        captured.assert_sent("add", (2,), countdown=60)
        captured.assert_sent("add", (4,))
        assert captured.drain() == [1, 2, 3, 4]
    transaction.abort()


def test_eager_tasks_run_after_the_commit(make_app):
    make_app(add, celery="task_always_eager = true")
    with transaction.manager:
        result = add.delay_many([(1,), (2,)])
        assert not result.ready()

    assert result.get() == [1, 2]


# The result


def test_the_results_are_made_when_somebody_asks(app, monkeypatch):
    made = []
    make = Task.AsyncResult
    result = add.delay_many([(1,), (2,), (3,)])
    monkeypatch.setattr(Task, "AsyncResult", lambda *args: made.append(args[1]) or make(*args))

    assert len(result) == 3
    assert made == []
    ids = [message.id for message in app.sent()]
    assert [one.id for one in result] == result.ids == made == ids


@pytest.fixture(params=["nobody", "a subscriber", "a capture"])
def heard(app, request):
    """Let somebody listen to each call, or nobody."""
    if request.param == "a subscriber":
        config = Configurator(registry=app.celery.registry, autocommit=True)
        config.add_subscriber(lambda _: None, BeforeDispatch)
    if request.param == "a capture":
        with capture(app.celery.registry):
            yield
    else:
        yield


@pytest.mark.usefixtures("heard")
def test_the_ids_are_there_whoever_listens():
    result = add.delay_many([(1,), (2,)])

    assert result.ids == [one.id for one in result.results]
    assert add.delay_many([]).ids == []


def test_the_result_is_that_of_a_group(app):
    result = add.delay_many([(1,), (2,)])

    assert result.as_tuple() == ((result.id, None), [((one, None), None) for one in result.ids])
    assert result.then(print) is not None
    assert not hasattr(result, "missing")
    assert pickle.loads(pickle.dumps(result)) == GroupResult(result.id, result.results)  # noqa: S301 - our own


def test_what_was_sent_before_an_error_stays_sent(app):
    def calls():
        for number in islice(count(), 2500):
            yield (number,)
        raise LookupError("the end")

    with pytest.raises(LookupError, match="the end"):
        add.delay_many(calls())

    assert arguments(app) == [[number] for number in range(2000)]
