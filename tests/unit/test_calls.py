"""How tasks are called, and what fails at the call because of the caller."""

from __future__ import annotations

import pytest
import transaction
from celery import chain, group
from kombu.exceptions import EncodeError

from ws_celery import RequestAwareTask, TransactionalTask, task


@task(name="add")
def add(request, x, y=0):
    return x + y


@task(name="bound", bind=True)
def bound(self, request, x):
    return self.name, x


@task(name="class")
class Class(TransactionalTask):
    def run(self, request, x):
        return self.name, x


@task(name="keywords", base=RequestAwareTask)
def keywords(request, **values):
    return values


@pytest.fixture
def app(make_app):
    return make_app(add, bound, Class, keywords)


def sent_arguments(app):
    (message,) = app.sent()
    return message.args, message.kwargs


# Ways to call


def test_delay_takes_the_arguments_of_the_function(app):
    add.delay(1, y=2)

    assert sent_arguments(app) == ([1], {"y": 2})


def test_delay_takes_the_request_first(app):
    add.delay(app.request(), 1)

    assert sent_arguments(app) == ([1], {})


def test_delay_takes_the_request_by_name(app):
    add.delay(request=app.request(), x=1)

    assert sent_arguments(app) == ([], {"x": 1})


def test_apply_async_takes_the_request_among_the_arguments(app):
    add.apply_async(args=(app.request(), 1), countdown=5)

    (message,) = app.sent()
    assert message.args == [1]
    assert message.headers["eta"] is not None


def test_apply_async_takes_the_request_among_the_keywords(app):
    add.apply_async(kwargs={"request": app.request(), "x": 1})

    assert sent_arguments(app) == ([], {"x": 1})


def test_the_arguments_of_the_caller_are_left_as_they_are(app):
    arguments = {"request": app.request(), "x": 1}
    add.apply_async(kwargs=arguments)

    assert set(arguments) == {"request", "x"}


def test_a_value_called_request_that_is_none_travels(app):
    keywords.delay(request_id=5)

    assert sent_arguments(app) == ([], {"request_id": 5})


def test_a_bound_task_and_a_class_are_called_alike(app):
    bound.delay(app.request(), 1)
    Class.delay(app.request(), 1)

    assert [(message.task, message.args) for message in app.sent()] == [
        ("bound", [1]),
        ("class", [1]),
    ]


def test_a_signature_leaves_the_request_out(app):
    add.s(app.request(), 1).delay()

    assert sent_arguments(app) == ([1], {})


def test_a_signature_takes_more_arguments_when_it_is_called(app):
    add.s(y=3).delay(1)

    assert sent_arguments(app) == ([1], {"y": 3})


def test_a_group_is_deferred_as_a_whole(app):
    transaction.begin()
    result = group(add.s(number) for number in range(10)).delay()
    assert app.names() == []
    transaction.commit()

    assert [message.id for message in app.sent()] == [child.id for child in result.children]


def test_the_group_of_an_aborted_transaction_is_never_sent(app):
    transaction.begin()
    group(add.s(number) for number in range(10)).delay()
    transaction.abort()

    assert app.names() == []


def test_a_chain_is_deferred_and_carries_what_follows(app):
    transaction.begin()
    result = chain(add.s(1), add.s(2)).delay()
    assert app.names() == []
    transaction.commit()

    (message,) = app.sent()
    assert message.id == result.parent.id
    assert [step["args"] for step in message.embed["chain"]] == [[2]]


def test_chunks_are_deferred(app):
    transaction.begin()
    add.chunks([(number, 1) for number in range(4)], 2).apply_async()
    assert app.names() == []
    transaction.commit()

    assert app.names() == ["celery.starmap"] * 2


def test_a_task_sent_by_name_is_deferred(app):
    transaction.begin()
    result = app.celery.send_task("elsewhere.add", (1,))
    assert app.names() == []
    transaction.commit()

    assert [(message.task, message.id) for message in app.sent()] == [("elsewhere.add", result.id)]


# Results


def test_a_deferred_call_returns_the_id_in_the_message(app):
    with transaction.manager:
        result = add.delay(1)

    assert [message.id for message in app.sent()] == [result.id]


def test_a_call_without_a_transaction_returns_the_id_in_the_message(app):
    result = add.delay(1)

    assert [message.id for message in app.sent()] == [result.id]


def test_the_caller_may_choose_the_id(app):
    with transaction.manager:
        add.apply_async((1,), task_id="mine")

    assert [message.id for message in app.sent()] == ["mine"]


# What fails at the call


@pytest.mark.parametrize("called", [add, bound, Class], ids=["function", "bound", "class"])
@pytest.mark.parametrize("arguments", [(), (1, 2, 3)], ids=["too few", "too many"])
@pytest.mark.parametrize("with_request", [False, True])
def test_wrong_arguments_fail_at_the_call(app, called, arguments, with_request):
    transaction.begin()
    first = (app.request(),) if with_request else ()
    with pytest.raises(TypeError, match="argument"):
        called.delay(*first, *arguments)
    transaction.commit()

    assert app.names() == []


def test_an_unknown_keyword_fails_at_the_call(app):
    with pytest.raises(TypeError, match="unknown"):
        add.delay(1, unknown=2)


def test_a_value_that_does_not_serialise_fails_at_the_call(app):
    transaction.begin()
    with pytest.raises(EncodeError):
        add.delay(object())
    transaction.commit()

    assert app.names() == []


def test_arguments_changed_after_the_call_are_sent_as_they_were(app):
    transaction.begin()
    values = [1, 2]
    add.delay(values)
    values.append(3)
    transaction.commit()

    assert sent_arguments(app) == ([[1, 2]], {})


# Called like a function


def test_a_task_called_with_a_request_runs_in_place(app):
    assert add(app.request(), 1, y=2) == 3


def test_a_task_called_with_a_request_by_name_runs_in_place(app):
    assert add(request=app.request(), x=1) == 1


def test_a_bound_task_runs_in_place(app):
    assert bound(app.request(), 1) == ("bound", 1)


def test_a_class_runs_in_place(app):
    assert Class(app.request(), 1) == ("class", 1)


def test_a_task_in_place_gets_the_request_of_its_caller(make_app):
    @task(name="identity")
    def identity(request):
        return request

    request = make_app(identity).request()

    assert identity(request) is request


def test_a_task_in_place_leaves_the_transaction_of_its_caller_open(app):
    begun = transaction.begin()
    add(app.request(), 1)

    assert transaction.get() is begun


def test_a_task_called_by_one_in_place_belongs_to_the_callers_transaction(make_app):
    @task(name="parent")
    def parent(request):
        add.delay(1)

    app = make_app(parent, add)
    manager = transaction.TransactionManager(explicit=True)
    manager.begin()
    parent(app.request(**{"tm.manager": manager}))
    assert app.names() == []
    manager.commit()

    assert app.names() == ["add"]


def test_an_error_in_place_reaches_the_caller(app):
    with pytest.raises(TypeError):
        add(app.request(), 1, "text")


def test_a_task_called_without_a_request_says_what_to_do(app):
    with pytest.raises(TypeError, match=r"add\(\).* without a request.*\.delay\(\)"):
        add(1)


def test_a_task_that_calls_itself_without_a_request_says_what_to_do(make_app):
    @task(name="again")
    def again(request):
        return again()

    make_app(again)

    with pytest.raises(TypeError, match=r"again\(\).* without a request"):
        again.apply().get()


def test_a_task_that_calls_itself_with_its_request_runs_in_place(make_app):
    @task(name="countdown")
    def countdown(request, n):
        return n if n == 0 else countdown(request, n - 1)

    make_app(countdown)

    assert countdown.apply((3,)).get() == 0


# Eager execution


def test_an_eager_call_runs_at_once_with_a_request_of_its_own(make_app):
    seen = []

    @task(name="eager")
    def eager(request, x):
        seen.append(request)
        return x

    app = make_app(eager, celery="task_always_eager = true")
    request = app.request()

    assert eager.delay(request, 1).get() == 1
    assert seen != [request]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("backend", ["cache+memory://", "db+sqlite://"])
def test_an_election_is_held_with_every_result_backend(make_app, backend, begun):
    app = make_app(add, celery=f"result_backend = {backend}")
    with app.celery.connection_for_read() as connection:
        heard = app.celery.control.mailbox.get_queue("test")(connection)
        heard.declare()
        if begun:
            transaction.begin()
        result = app.celery.tasks["add"].s(1, 2).election()
        transaction.abort()
        election = heard.get(accept=["json"]).payload
        heard.delete()

    assert election["method"] == "election"
    assert election["arguments"]["id"] == result.id
    assert election["arguments"]["action"]["args"] == [1, 2]
