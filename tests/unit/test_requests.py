"""What a task's request inherits of the one that called the task."""

from __future__ import annotations

import pytest
import transaction
from celery import group
from pyramid.response import Response

from ws_celery import task
from ws_celery.request import HEADER


@task(name="link")
def link(request, x=None):
    return request.route_url("home")


@task(name="parent")
def parent(request):
    link.delay()


def add_home(config):
    config.add_route("home", "/home")


@pytest.fixture
def app(make_app):
    return make_app(link, parent, setup=add_home)


def run(app, message):
    """Run a message as a worker does; return the result of the task."""
    return app.celery.tasks[message.task].apply(message.args, headers=header(message)).get()


def header(message):
    return {HEADER: message.headers[HEADER]} if HEADER in message.headers else None


@pytest.mark.parametrize(
    "environ",
    [
        {"HTTP_HOST": "shop.example.com"},
        {"HTTP_HOST": "shop.example.com:8080"},
        {"HTTP_HOST": "shop.example.com", "wsgi.url_scheme": "https"},
        {"HTTP_HOST": "shop.example.com:8443", "wsgi.url_scheme": "https"},
        {"HTTP_HOST": "shop.example.com", "SCRIPT_NAME": "/shop"},
        {"HTTP_HOST": "shop.example.com", "SCRIPT_NAME": "/caf\xc3\xa9 1"},
        {"HTTP_HOST": "127.0.0.1:6543"},
        {"HTTP_HOST": "[::1]:6543"},
        {"HTTP_HOST": "[::1]"},
    ],
    ids=lambda environ: "".join(environ.values()),
)
def test_a_link_in_a_task_is_the_link_of_its_caller(app, environ):
    request = app.request(**environ)
    link.delay(request)
    (message,) = app.sent()

    assert run(app, message) == request.route_url("home")


def visited(make_app, dispatch):
    """Make an application whose view dispatches, and visit it at a host of its own."""

    def view(request):
        dispatch(request)
        return Response("done")

    def setup(config):
        add_home(config)
        config.add_view(view, route_name="home")

    app = make_app(link, setup=setup)
    app.web.get("/home", extra_environ={"HTTP_HOST": "shop.example.com"})
    return app


def test_a_view_passes_its_host_on_without_naming_its_request(make_app):
    app = visited(make_app, lambda _request: link.delay())
    (message,) = app.sent()

    assert run(app, message) == "http://shop.example.com/home"


def test_a_task_without_a_caller_has_a_request_of_localhost(app):
    link.delay()
    (message,) = app.sent()

    assert HEADER not in message.headers
    assert run(app, message) == "http://localhost/home"


def test_a_task_called_by_a_task_keeps_the_host(app):
    parent.delay(app.request(HTTP_HOST="shop.example.com"))
    (first,) = app.sent()
    run(app, first)
    (second,) = app.sent()

    assert run(app, second) == "http://shop.example.com/home"


def test_every_task_of_a_group_keeps_the_host(make_app):
    app = visited(make_app, lambda _request: group(link.s(number) for number in range(3)).delay())

    assert {run(app, message) for message in app.sent()} == {"http://shop.example.com/home"}


def test_a_task_sent_by_name_keeps_the_host(make_app):
    app = visited(make_app, lambda request: request.celery_app.send_task("link"))
    (message,) = app.sent()

    assert run(app, message) == "http://shop.example.com/home"


def test_headers_of_the_caller_are_sent_as_well(app):
    headers = {"trace": "1"}
    link.apply_async((app.request(),), headers=headers)
    (message,) = app.sent()

    assert message.headers["trace"] == "1"
    assert headers == {"trace": "1"}


def test_an_eager_task_keeps_the_host(make_app):
    app = make_app(link, setup=add_home, celery="task_always_eager = true")

    assert link.delay(app.request(HTTP_HOST="shop.example.com")).get() == (
        "http://shop.example.com/home"
    )


def test_a_task_keeps_the_host_in_a_deferred_call(app):
    with transaction.manager:
        link.delay(app.request(HTTP_HOST="shop.example.com"))
    (message,) = app.sent()

    assert run(app, message) == "http://shop.example.com/home"
