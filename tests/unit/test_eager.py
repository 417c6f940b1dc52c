"""Tasks that run in the calling process: after the commit, in a transaction of their own."""

from __future__ import annotations

import pytest
import transaction
from celery.exceptions import SoftTimeLimitExceeded
from kombu.exceptions import EncodeError
from pyramid.response import Response

from ws_celery import RequestAwareTask, immediately, task
from ws_celery.exceptions import NotRunYet

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

    options = EXPLICIT if request.param == "explicit manager" else {}

    def make(celery=EAGER, view=None):
        def setup(config):
            config.add_route("home", "/")
            config.add_view(lambda request: view(app, request), route_name="home")

        app = make_app(note, fail, outer, celery=celery, setup=setup, **options)
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


# Results


def test_the_result_is_pending_until_the_commit(make):
    note = make().celery.tasks["note"]
    with transaction.manager:
        result = note.delay(1)
        assert (result.state, result.ready()) == ("PENDING", False)
        with pytest.raises(NotRunYet, match=r"note\[.*\] has not run"):
            result.get()

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
