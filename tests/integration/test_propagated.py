"""What travels reaches every task that a request causes, by a real worker and broker."""

from __future__ import annotations

import queue

import pytest
from celery import chain, group
from pyramid.response import Response
from tests.waiting import SOON

from ws_celery import task


@pytest.fixture
def arrived():
    """What tasks have found in their requests."""
    return queue.Queue()


@pytest.fixture
def make(make_app, broker_url, arrived, start_worker):
    """Make an application that dispatches in its view, and a worker of it."""

    @task(name="tell")
    def tell(request, *_):
        found = (request.application_url, request.locale_name, request.id)
        arrived.put((*found, request.authenticated_userid))

    @task(name="add")
    def add(request, x):
        return x

    @task(name="fail")
    def fail(request):
        raise LookupError("no such thing")

    @task(name="second_try", bind=True)
    def second_try(self, request):
        if not self.request.retries:
            raise self.retry(countdown=0)
        tell.delay()

    def make(view):
        def setup(config):
            config.set_locale_negotiator(lambda request: request.cookies.get("lang"))
            config.set_security_policy(Policy())
            config.add_route("home", "/")
            config.add_view(lambda _request: Response(str(view(tasks))), route_name="home")

        settings = {"ws_celery__propagate": "locale request_id user", "broker": broker_url}
        app = make_app(tell, add, fail, second_try, setup=setup, **settings)
        tasks = app.celery.tasks
        start_worker(app)
        return app

    return make


class Policy:
    def authenticated_userid(self, request):
        return request.cookies.get("userid")


CANVASES = {
    "delay": lambda tasks: tasks["tell"].delay(),
    "group": lambda tasks: group(tasks["tell"].s(number) for number in range(2)).delay(),
    "chain": lambda tasks: chain(tasks["add"].s(1), tasks["tell"].s()).delay(),
    "link": lambda tasks: tasks["add"].apply_async((1,), link=tasks["tell"].s()),
    "link_error": lambda tasks: tasks["fail"].apply_async(link_error=tasks["tell"].s()),
    "retry": lambda tasks: tasks["second_try"].delay(),
    "map": lambda tasks: tasks["tell"].map([1]).delay(),
    "send_task": lambda tasks: tasks["tell"].app.send_task("tell"),
    "headers of an instrumentation": lambda tasks: tasks["tell"].apply_async(
        headers={"headers": {"trace": "1"}}
    ),
}


@pytest.mark.parametrize("canvas", CANVASES)
def test_everything_arrives_by_every_way_of_calling(make, arrived, canvas):
    app = make(CANVASES[canvas])
    environ = {"HTTP_HOST": "shop.example.com", "HTTP_COOKIE": "lang=de; userid=kim"}
    app.web.get("/", headers={"X-Request-ID": "4f1c"}, extra_environ=environ)

    assert arrived.get(timeout=SOON) == ("http://shop.example.com", "de", "4f1c", "kim")


@pytest.mark.parametrize("broker", ["redis_url", "rabbitmq_url"])
def test_a_json_value_arrives_as_it_was(make_app, start_worker, arrived, request, broker):
    value = {"text": "ä", "list": [1, -2.5, None, True, {}], "large": 2**40, "": ""}

    @task(name="tell")
    def tell(request):
        arrived.put(request.value)

    def setup(config):
        config.add_request_propagator("value", lambda _request: value, restore)

    def restore(request, value):
        request.value = value

    url = request.getfixturevalue(broker)
    app = make_app(tell, setup=setup, broker=url, ws_celery__propagate="value")
    start_worker(app)
    tell.delay(app.request())

    assert arrived.get(timeout=SOON) == value
