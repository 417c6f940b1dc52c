"""Tasks that run in the calling process: after the commit, in a transaction of their own."""

from __future__ import annotations

import sys

import pytest
import transaction
from celery import chain, chord, group
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from celery.exceptions import TimeoutError as CeleryTimeoutError
from kombu.exceptions import EncodeError
from pyramid.response import Response
from pyramid_retry import RetryableException

from ws_celery import RequestAwareTask, immediately, task
from ws_celery.exceptions import NotRunYet, TaskNotRegistered

EXPLICIT = {"tm__manager_hook": "pyramid_tm.explicit_manager"}
EAGER = "task_always_eager = true"
PROPAGATING = f"{EAGER}\ntask_eager_propagates = true"


@pytest.fixture
def runs():
    """What the tasks have done: argument, domain, and whether a transaction was open."""
    return []


@pytest.fixture(params=["explicit manager", "manager of the thread"])
def make(request, make_app, runs):
    @task(name="note")
    def note(request, x):
        runs.append((x, request.domain, request.tm.get().status))

    @task(name="fail")
    def fail(request):
        runs.append("fail")
        raise LookupError("no such thing")

    @task(name="outer")
    def outer(request):
        note.delay(1)
        runs.append("outer")

    @task(name="add")
    def add(request, x, y):
        runs.append(x + y)
        return x + y

    @task(name="total", base=RequestAwareTask)
    def total(request, numbers):
        runs.append(numbers)
        return sum(numbers)

    options = EXPLICIT if request.param == "explicit manager" else {}

    def make(celery=EAGER, view=None, **more):
        def setup(config):
            config.add_route("home", "/")
            config.add_view(lambda request: view(app, request), route_name="home")

        app = make_app(note, fail, outer, add, total, celery=celery, setup=setup, **options, **more)
        return app

    return make


def arguments(runs):
    return [run[0] for run in runs]


def test_a_task_runs_when_the_transaction_commits(make, runs):
    note = make().celery.tasks["note"]
    with transaction.manager:
        note.delay(1)
        assert runs == []

    assert arguments(runs) == [1]


def test_without_a_transaction_a_task_runs_at_once(make, runs):
    result = make().celery.tasks["note"].delay(1)

    assert arguments(runs) == [1]
    assert result.ready()


def test_a_task_of_an_aborted_transaction_never_runs(make, runs):
    note = make().celery.tasks["note"]
    transaction.begin()
    result = note.delay(1)
    transaction.abort()

    assert (runs, result.state) == ([], "PENDING")


def test_a_task_of_a_rolled_back_savepoint_never_runs(make, runs):
    note = make().celery.tasks["note"]
    with transaction.manager as txn:
        note.delay(1)
        savepoint = txn.savepoint()
        note.delay(2)
        savepoint.rollback()

    assert arguments(runs) == [1]


def test_a_view_is_over_when_its_task_runs_in_a_transaction_of_its_own(make, runs):
    def view(app, request):
        app.celery.tasks["note"].delay(request, 1)
        runs.append("view")
        return Response("done")

    make(view=view).web.get("/", extra_environ={"HTTP_HOST": "shop.example"})

    assert runs == ["view", (1, "shop.example", "Active")]


def test_the_tasks_of_a_canvas_have_the_host_of_the_view(make, runs):
    def view(app, request):
        note = app.celery.tasks["note"]
        chain(note.si(1), note.si(2)).delay()
        runs.append("view")
        return Response("done")

    make(view=view).web.get("/", extra_environ={"HTTP_HOST": "shop.example"})

    assert runs == ["view", (1, "shop.example", "Active"), (2, "shop.example", "Active")]


def test_the_next_transaction_of_the_thread_can_begin(make, runs):
    note = make().celery.tasks["note"]
    for number in range(3):
        with transaction.manager:
            note.delay(number)

    assert arguments(runs) == [0, 1, 2]


def test_a_task_of_a_task_runs_after_the_commit_of_the_first(make, runs):
    outer = make().celery.tasks["outer"]
    with transaction.manager:
        outer.delay()

    assert runs[0] == "outer"
    assert arguments(runs[1:]) == [1]


def test_the_arguments_are_those_of_the_call(make, runs):
    note = make().celery.tasks["note"]
    argument = [1]
    with transaction.manager:
        note.delay(argument)
        argument.append(2)

    assert arguments(runs) == [[1]]


def test_a_value_that_does_not_serialise_fails_at_the_call(make):
    note = make().celery.tasks["note"]
    transaction.begin()
    with pytest.raises(EncodeError):
        note.delay(object())


def test_immediately_runs_before_the_commit(make, runs):
    note = make().celery.tasks["note"]
    with transaction.manager, immediately():
        note.delay(1)
        assert arguments(runs) == [1]


# Canvases, and tasks that are known by name


def of_chain(app):
    add = app.tasks["add"]
    return chain(add.s(1, 2), add.s(3), add.s(4)).apply_async()


def of_group(app):
    add = app.tasks["add"]
    return group(add.s(1, 2), add.s(3, 4)).apply_async()


def of_chord(app):
    add = app.tasks["add"]
    return chord([add.s(1, 2), add.s(3, 4)])(app.tasks["total"].s())


def of_chunks(app):
    return app.tasks["add"].chunks([(1, 2), (3, 4), (5, 6)], 2).apply_async()


def of_starmap(app):
    return app.tasks["add"].starmap([(1, 2), (3, 4)]).apply_async()


def of_link(app):
    add = app.tasks["add"]
    return add.apply_async((1, 2), link=add.s(10))


def of_name(app):
    return app.send_task("add", (1, 2))


CANVASES = [
    (of_chain, [3, 6, 10], 10),
    (of_group, [3, 7], [3, 7]),
    (of_chord, [3, 7, [3, 7]], 10),
    (of_chunks, [3, 7, 11], [[3, 7], [11]]),
    (of_starmap, [3, 7], [3, 7]),
    (of_link, [3, 13], 3),
    (of_name, [3], 3),
]


@pytest.mark.parametrize(("dispatch", "expected", "value"), CANVASES)
def test_a_canvas_runs_when_the_transaction_commits(make, runs, dispatch, expected, value):
    app = make().celery
    with transaction.manager:
        result = dispatch(app)
        assert (runs, result.ready()) == ([], False)
        with pytest.raises(NotRunYet):
            result.get()

    assert (runs, result.get()) == (expected, value)


@pytest.mark.parametrize(("dispatch", "expected", "value"), CANVASES)
def test_without_a_transaction_a_canvas_runs_at_once(make, runs, dispatch, expected, value):
    result = dispatch(make().celery)

    assert (runs, result.get()) == (expected, value)


@pytest.mark.parametrize("dispatch", [case[0] for case in CANVASES])
def test_a_canvas_of_an_aborted_transaction_never_runs(make, runs, dispatch):
    app = make().celery
    transaction.begin()
    result = dispatch(app)
    transaction.abort()

    assert (runs, result.ready()) == ([], False)


def test_a_callback_for_errors_runs(make, runs):
    app = make().celery
    with transaction.manager:
        app.tasks["fail"].apply_async(link_error=app.tasks["add"].si(1, 2))

    assert runs == ["fail", 3]


def test_a_task_of_another_program_is_an_error_that_says_so(make):
    with pytest.raises(TaskNotRegistered, match="elsewhere"):
        make().celery.send_task("elsewhere")


def test_after_the_commit_it_is_logged_and_the_others_run(make, runs, caplog):
    app = make().celery
    with transaction.manager:
        app.send_task("elsewhere")
        app.tasks["add"].delay(1, 2)

    assert "'elsewhere' is not registered" in caplog.text
    assert runs == [3]


# Nothing is sent


@pytest.mark.parametrize("broker", ["redis://127.0.0.1:1", "amqp://127.0.0.1:1"])
def test_no_broker_is_asked(make, runs, broker):
    app = make(f"{EAGER}\ntask_send_sent_event = true", broker=broker).celery
    add = app.tasks["add"]
    add.delay(1, 2)
    with transaction.manager:
        add.delay(3, 4)
    with app.connection_for_write() as connection:
        add.apply_async((5, 6), connection=connection)
        assert not connection.connected

    assert runs == [3, 7, 11]


def test_celery_is_not_told(make):
    assert make().celery.conf.task_always_eager is False


# What a run sends


def test_what_a_task_sends_runs_when_it_is_over(make_app, runs):
    @task(name="child")
    def child(request):
        runs.append("child")

    @task(name="parent", base=RequestAwareTask)
    def parent(request):
        with pytest.raises(NotRunYet):
            child.delay().get(disable_sync_subtasks=False)
        runs.append("parent")

    make_app(parent, child, celery=PROPAGATING)
    parent.delay()

    assert runs == ["parent", "child"]


def test_a_task_may_send_itself_more_often_than_python_can_call(make_app, runs):
    @task(name="again")
    def again(request, times):
        runs.append(times)
        if times:
            again.delay(times - 1)

    make_app(again, celery=EAGER)
    again.delay(sys.getrecursionlimit())

    assert runs[-1] == 0


def test_a_retry_runs_at_once_when_the_run_is_over(make_app, runs):
    @task(name="flaky", bind=True, default_retry_delay=3600)
    def flaky(self, request):
        request.add_finished_callback(lambda _: runs.append("over"))
        runs.append(self.request.retries)
        if self.request.retries < 2:
            raise self.retry(exc=LookupError())
        return "done"

    make_app(flaky, celery=PROPAGATING)
    with transaction.manager:
        result = flaky.delay()

    assert runs == [0, "over", 1, "over", 2, "over"]
    assert result.get() == "done"


def test_a_retry_that_is_one_too_many_is_an_error(make_app, runs):
    @task(name="broken", autoretry_for=(LookupError,), max_retries=1)
    def broken(request):
        runs.append("run")
        raise LookupError("no such thing")

    make_app(broken, celery=EAGER)
    with pytest.raises(LookupError, match="no such thing"):
        broken.delay().get()

    assert runs == ["run", "run"]


def test_a_replaced_task_has_the_result_of_the_other(make_app):
    @task(name="other")
    def other(request):
        return 7

    @task(name="one", bind=True)
    def one(self, request):
        return self.replace(other.s())

    make_app(one, other, celery=PROPAGATING)

    assert one.delay().get() == 7


@pytest.mark.parametrize("end", [Ignore, Reject])
def test_what_ends_a_run_without_result_is_no_error(make_app, end):
    @task(name="ending", base=RequestAwareTask)
    def ending(request):
        raise end

    make_app(ending, celery=PROPAGATING)
    ending.delay()


def test_a_task_of_another_application_runs_at_once_in_that_one(make_app, runs):
    @task(name="there")
    def there(request):
        runs.append(request.registry)

    other = make_app(there, celery=EAGER)

    @task(name="here", base=RequestAwareTask)
    def here(request):
        there.delay(other.request())
        runs.append(request.registry)

    app = make_app(here, celery=EAGER)
    here.delay(app.request())

    assert runs == [other.registry, app.registry]


# Results


def test_the_result_is_pending_until_the_commit(make):
    note = make().celery.tasks["note"]
    with transaction.manager:
        result = note.delay(1)
        assert (result.state, result.ready()) == ("PENDING", False)
        with pytest.raises(NotRunYet, match=f"{result.id} has not run"):
            result.get()
        with pytest.raises(CeleryTimeoutError):
            result.get(timeout=60)

    assert result.ready()
    assert result.get() is None


# Errors


def test_an_error_is_kept_in_the_result(make):
    fail = make().celery.tasks["fail"]
    with transaction.manager:
        result = fail.delay()

    with pytest.raises(LookupError):
        result.get()


def test_an_error_ends_the_request_if_it_shall_propagate(make, runs):
    def view(app, request):
        app.celery.tasks["fail"].delay()
        app.celery.tasks["note"].delay(1)
        return Response("done")

    app = make(PROPAGATING, view)
    with pytest.raises(LookupError):
        app.web.get("/")

    assert runs[0] == "fail"
    assert arguments(runs[1:]) == [1]


def test_a_request_that_has_committed_is_not_attempted_again_for_an_error(make_app):
    attempts = []

    @task(name="busy", base=RequestAwareTask)
    def busy(request):
        raise RetryableException

    def view(request):
        attempts.append(request.environ["retry.attempt"])
        if len(attempts) == 1:
            raise RetryableException  # before the commit
        busy.delay()
        return Response("done")

    def setup(config):
        config.add_route("home", "/")
        config.add_view(view, route_name="home")

    app = make_app(busy, celery=PROPAGATING, include=("pyramid_tm", "pyramid_retry"), setup=setup)
    with pytest.raises(RetryableException):
        app.web.get("/")

    assert attempts == [0, 1]


def test_an_error_does_not_end_the_request_otherwise(make):
    def view(app, request):
        app.celery.tasks["fail"].delay()
        return Response("done")

    assert make(view=view).web.get("/").text == "done"


def test_an_error_after_a_commit_by_hand_is_logged(make, caplog):
    fail = make(PROPAGATING).celery.tasks["fail"]
    with transaction.manager:
        fail.delay()

    assert "no such thing" in caplog.text


def test_an_error_of_a_task_dispatched_by_a_task_ends_that_one(make, make_app):
    @task(name="failing", base=RequestAwareTask)
    def failing(request):
        raise SoftTimeLimitExceeded

    @task(name="first")
    def first(request):
        failing.delay(request)

    app = make_app(failing, first, celery=PROPAGATING)
    with pytest.raises(SoftTimeLimitExceeded):
        app.celery.tasks["first"].delay()
