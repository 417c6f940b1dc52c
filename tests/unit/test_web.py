"""Tasks called in views: the transaction of pyramid_tm decides."""

from __future__ import annotations

import pytest
import transaction
from pyramid.response import Response
from transaction.interfaces import TransientError

from ws_celery import task


@task(name="add")
def add(request, x):
    """Do nothing."""


@pytest.fixture(params=["explicit manager", "manager of the thread"])
def settings(request):
    """Settings of both kinds of managers that pyramid_tm offers."""
    if request.param == "explicit manager":
        return {"tm__manager_hook": "pyramid_tm.explicit_manager"}
    return {}


@pytest.fixture
def serve(make_app, settings):
    """Make an application with one view, at ``/``."""

    def serve(view, setup=None, **options):
        def prepare(config):
            config.add_route("home", "/")
            config.add_view(view, route_name="home")
            if setup:
                setup(config)

        return make_app(add, setup=prepare, **settings, **options)

    return serve


def call_and_return(request):
    """A view that calls a task."""
    add.delay(1)
    return Response("done")


def call_and_fail(request):
    """A view that calls a task, and fails."""
    add.delay(1)
    raise LookupError("no such thing")


def test_a_task_of_a_view_is_sent_when_the_request_commits(serve):
    app = serve(call_and_return)
    app.web.get("/")

    assert app.names() == ["add"]


def test_nothing_is_sent_while_the_view_runs(serve):
    seen = []

    def view(request):
        add.delay(1)
        seen.append(app.names())
        return Response("done")

    app = serve(view)
    app.web.get("/")

    assert seen == [[]]


def test_a_task_of_an_aborted_request_is_never_sent(serve):
    app = serve(call_and_fail)
    with pytest.raises(LookupError):
        app.web.get("/")

    assert app.names() == []


def test_a_task_is_never_sent_if_an_exception_view_answers(serve):
    def apologise(error, request):
        return Response("sorry", status=404)

    app = serve(call_and_fail, lambda config: config.add_exception_view(apologise, LookupError))
    app.web.get("/", status=404)

    assert app.names() == []


def test_a_task_called_by_an_exception_view_is_never_sent(serve):
    def apologise(error, request):
        add.delay(2)
        return Response("sorry", status=404)

    app = serve(call_and_fail, lambda config: config.add_exception_view(apologise, LookupError))
    app.web.get("/", status=404)

    assert app.names() == []


def test_a_task_of_a_doomed_request_is_never_sent(serve):
    def view(request):
        add.delay(1)
        request.tm.doom()
        return Response("done")

    app = serve(view)
    app.web.get("/")

    assert app.names() == []


def test_a_task_of_a_vetoed_request_is_never_sent(serve):
    def view(request):
        add.delay(1)
        return Response("no", status=400)

    app = serve(view, tm__commit_veto="pyramid_tm.default_commit_veto")
    app.web.get("/", status=400)

    assert app.names() == []


def test_a_request_tried_again_sends_its_task_once(serve):
    attempts = []

    def view(request):
        add.delay(len(attempts))
        attempts.append(request)
        if len(attempts) < 3:
            raise TransientError
        return Response("done")

    app = serve(view, include=("pyramid_tm", "pyramid_retry"))
    app.web.get("/")

    assert [message.args for message in app.sent()] == [[2]]


def test_a_task_called_in_a_response_callback_is_sent_at_once(serve):
    def view(request):
        request.add_response_callback(lambda request, _response: add.delay(request, 1))
        return Response("done")

    app = serve(view)
    app.web.get("/")

    assert app.names() == ["add"]


def test_a_task_called_in_a_finished_callback_is_sent_at_once(serve):
    def view(request):
        request.add_finished_callback(add_later)
        return Response("done")

    def add_later(request):
        add.delay(request, 1)

    app = serve(view)
    app.web.get("/")

    assert app.names() == ["add"]


def test_a_task_of_a_path_without_transactions_is_sent_at_once(serve):
    app = serve(call_and_fail, tm__activate_hook=lambda _request: False)
    with pytest.raises(LookupError):
        app.web.get("/")

    assert app.names() == ["add"]


def test_a_task_is_sent_at_once_although_the_thread_has_a_transaction_left_over(serve):
    app = serve(call_and_fail, tm__activate_hook=lambda _request: False)
    transaction.get()
    with pytest.raises(LookupError):
        app.web.get("/")

    assert app.names() == ["add"]


def test_an_application_without_pyramid_tm_sends_at_once(serve):
    app = serve(call_and_fail, include=())
    with pytest.raises(LookupError):
        app.web.get("/")

    assert app.names() == ["add"]


def test_a_request_sends_nothing_of_the_one_before(serve):
    views = iter([call_and_fail, call_and_return])

    def view(request):
        return next(views)(request)

    app = serve(view)
    with pytest.raises(LookupError):
        app.web.get("/")
    app.web.get("/")

    assert len(app.names()) == 1


def test_a_request_has_the_celery_app_of_its_application(serve):
    def view(request):
        return Response(str(request.celery_app is app.celery))

    app = serve(view)

    assert app.web.get("/").text == "True"
