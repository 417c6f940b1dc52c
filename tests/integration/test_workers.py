"""Tasks that a real worker runs, with Redis for messages and results."""

from __future__ import annotations

import queue
import threading

import pytest
import transaction
import zope.sqlalchemy
from celery import chain, chord, group
from celery.exceptions import Ignore
from pyramid.response import Response
from sqlalchemy import text
from tests.waiting import SOON

from ws_celery import RequestAwareTask, immediately, task

# Celery's result backend calls what redis-py has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")


@task(name="add")
def add(request, x, y=1):
    return x + y


@task(name="total")
def total(request, numbers):
    return sum(numbers)


@task(name="link")
def link(request, *_):
    return request.route_url("home")


@pytest.fixture
def make(make_app, redis_url):
    """Make an application with results in Redis, and one view at ``/``."""

    def make(*tasks, view=None, results=redis_url):
        def setup(config):
            config.add_route("home", "/")
            if view:
                config.add_view(view, route_name="home")

        return make_app(
            add,
            total,
            link,
            *tasks,
            setup=setup,
            broker=redis_url,
            celery=f"result_backend = {results}\nresult_expires = 600",
        )

    return make


def committed(signature):
    """Call a signature in a transaction, commit; return the result."""
    with transaction.manager:
        return signature.delay()


# Canvases


def test_a_task_of_a_transaction_returns_its_result(make, start_worker):
    start_worker(make())

    assert committed(add.s(1)).get(timeout=SOON) == 2


def test_a_group_of_a_transaction_runs(make, start_worker):
    start_worker(make())
    result = committed(group(add.s(number) for number in range(5)))

    assert result.get(timeout=SOON) == [1, 2, 3, 4, 5]


def test_a_chain_of_a_transaction_runs(make, start_worker):
    start_worker(make())

    assert committed(chain(add.s(1), add.s(10), add.s(100))).get(timeout=SOON) == 112


def test_a_chord_of_a_transaction_runs(make, start_worker):
    start_worker(make())
    result = committed(chord([add.s(number) for number in range(5)], total.s()))

    assert result.get(timeout=SOON) == 15


@pytest.mark.parametrize("committing", [True, False])
def test_a_chord_with_results_in_a_database_runs_when_its_transaction_commits(
    make, postgres_results, start_worker, committing
):
    """There Celery sends one task more, which looks again and again whether the header is done."""
    app = make(results=postgres_results)
    start_worker(app)
    transaction.begin()
    result = chord([add.s(number) for number in range(3)], total.s(), interval=0.1).delay()
    with immediately():
        assert add.delay(1).get(timeout=SOON) == 2  # nothing of the chord was sent before it
    assert result.state == "PENDING"
    if committing:
        transaction.commit()
        assert result.get(timeout=SOON) == 6
    else:
        transaction.abort()
        with immediately():
            assert add.delay(1).get(timeout=SOON) == 2
        assert result.state == "PENDING"
    app.celery.backend.ResultSession().get_bind().dispose()


def test_chunks_and_starmap_run_with_a_request(make, start_worker):
    start_worker(make())
    with transaction.manager:
        chunks = add.chunks([(1, 1), (2, 2), (3, 3)], 2).apply_async()
        starmap = add.starmap([(1, 2), (3, 4)]).delay()

    assert chunks.get(timeout=SOON) == [[2, 4], [6]]
    assert starmap.get(timeout=SOON) == [3, 7]


# Requests


def test_links_lead_to_the_host_of_the_caller(make, start_worker):
    def view(request):
        return Response(link.delay().id)

    app = make(view=view)
    start_worker(app)
    task_id = app.web.get("/", extra_environ={"HTTP_HOST": "shop.example.com"}).text

    assert app.celery.AsyncResult(task_id).get(timeout=SOON) == "http://shop.example.com/"


@pytest.mark.parametrize(
    "canvas",
    [
        pytest.param(lambda: chain(add.s(1), add.s(1), link.s()), id="chain"),
        pytest.param(lambda: chord([add.s(1), add.s(2)], link.s()), id="chord"),
        pytest.param(lambda: chain(add.s(1), group(add.s(1), add.s(2)), link.s()), id="both"),
    ],
)
def test_the_last_task_of_a_canvas_keeps_the_host(make, start_worker, canvas):
    def view(request):
        return Response(canvas().apply_async().id)

    app = make(view=view)
    start_worker(app)
    task_id = app.web.get("/", extra_environ={"HTTP_HOST": "shop.example.com"}).text

    assert app.celery.AsyncResult(task_id).get(timeout=SOON) == "http://shop.example.com/"


def test_a_callback_keeps_the_host(make, start_worker):
    links = queue.Queue()

    @task(name="callback")
    def callback(request, *_):
        links.put(request.route_url("home"))

    app = make(callback)
    start_worker(app)
    add.apply_async(
        (app.request(HTTP_HOST="shop.example.com"), 1), link=app.celery.tasks["callback"].s()
    )

    assert links.get(timeout=SOON) == "http://shop.example.com/"


def test_an_error_callback_keeps_the_host(make, start_worker):
    links = queue.Queue()

    @task(name="errback")
    def errback(request, *_):
        links.put(request.route_url("home"))

    @task(name="fail")
    def fail(request):
        raise LookupError("no such thing")

    app = make(errback, fail)
    start_worker(app)
    fail.apply_async(
        (app.request(HTTP_HOST="shop.example.com"),), link_error=app.celery.tasks["errback"].s()
    )

    assert links.get(timeout=SOON) == "http://shop.example.com/"


def test_a_retry_keeps_the_host(make, start_worker):
    @task(name="second_try", bind=True)
    def second_try(self, request):
        if not self.request.retries:
            raise self.retry(countdown=0)
        return request.route_url("home")

    app = make(second_try)
    start_worker(app)
    result = second_try.delay(app.request(HTTP_HOST="shop.example.com"))

    assert result.get(timeout=SOON) == "http://shop.example.com/"


# Retries, replacement and ignoring, which a transaction must not swallow


def test_a_retry_runs_again_although_its_transaction_aborted(make, start_worker):
    @task(name="third_try", bind=True)
    def third_try(self, request):
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        return self.request.retries

    start_worker(make(third_try))

    assert committed(third_try.s()).get(timeout=SOON) == 2


def test_an_automatic_retry_runs_again_although_its_transaction_aborted(make, start_worker):
    @task(name="second_try", bind=True, autoretry_for=(LookupError,), default_retry_delay=0)
    def second_try(self, request):
        if not self.request.retries:
            raise LookupError("not yet")
        return self.request.retries

    start_worker(make(second_try))

    assert committed(second_try.s()).get(timeout=SOON) == 1


def test_a_replacement_runs_in_place_of_its_task(make, start_worker):
    @task(name="replaced", bind=True)
    def replaced(self, request):
        return self.replace(add.s(1))

    start_worker(make(replaced))

    assert committed(replaced.s()).get(timeout=SOON) == 2


def test_a_task_that_is_ignored_sends_what_it_has_called(make, start_worker):
    results = queue.Queue()

    @task(name="ignored")
    def ignored(request):
        results.put(add.delay(1))
        raise Ignore

    start_worker(make(ignored))
    committed(ignored.s())

    assert results.get(timeout=SOON).get(timeout=SOON, disable_sync_subtasks=False) == 2


# Inside a task


def test_a_task_called_by_a_task_runs_after_it_has_returned(make, start_worker):
    order = queue.Queue()

    @task(name="child")
    def child(request):
        order.put("child")

    @task(name="parent")
    def parent(request):
        child.delay()
        order.put("parent")

    start_worker(make(parent, child))
    committed(parent.s())

    assert [order.get(timeout=SOON) for _ in range(2)] == ["parent", "child"]


def test_a_task_called_by_a_task_that_fails_never_runs(make, start_worker):
    ran = []

    @task(name="child")
    def child(request):
        ran.append("child")

    @task(name="parent")
    def parent(request):
        child.delay()
        raise LookupError("no such thing")

    start_worker(make(parent, child))
    committed(parent.s())
    committed(add.s(1)).get(timeout=SOON)  # it would have come after the child

    assert ran == []


def test_a_task_may_call_another_one_in_place(make, start_worker):
    @task(name="caller")
    def caller(request):
        return add(request, 1) + 10

    start_worker(make(caller))

    assert committed(caller.s()).get(timeout=SOON) == 12


def test_a_task_may_call_itself_in_place(make, start_worker):
    @task(name="countdown")
    def countdown(request, number):
        return [number, *countdown(request, number - 1)] if number else []

    start_worker(make(countdown))

    assert committed(countdown.s(3)).get(timeout=SOON) == [3, 2, 1]


def test_a_task_that_calls_itself_without_a_request_fails(make, start_worker):
    @task(name="again")
    def again(request):
        return again()

    start_worker(make(again))
    result = committed(again.s())

    with pytest.raises(TypeError, match="without a request"):
        result.get(timeout=SOON)


def test_a_request_aware_task_sends_at_once(make, start_worker):
    child_ran = threading.Event()

    @task(name="child")
    def child(request):
        child_ran.set()

    @task(name="parent", base=RequestAwareTask)
    def parent(request):
        return child.delay().id

    app = make(parent, child)
    start_worker(app)
    committed(parent.s()).get(timeout=SOON)

    assert child_ran.wait(SOON)


def test_a_task_finds_the_row_of_the_request_that_called_it(
    make_app, start_worker, redis_url, postgres
):
    found = queue.Queue()

    @task(name="look")
    def look(request, number):
        found.put(postgres.execute("SELECT id FROM notes WHERE id = :id", id=number))

    def view(request):
        number = int(request.params["number"])
        look.delay(number)
        request.dbsession.execute(text("INSERT INTO notes VALUES (:id, '')"), {"id": number})
        zope.sqlalchemy.mark_changed(request.dbsession)
        return Response("done")

    def setup(config):
        postgres.includeme(config)
        config.add_route("home", "/")
        config.add_view(view, route_name="home")

    start_worker(app := make_app(look, setup=setup, broker=redis_url))
    for number in range(20):
        app.web.get("/", {"number": number})

    assert [found.get(timeout=SOON) for _ in range(20)] == [[number] for number in range(20)]


def test_results_are_those_of_the_right_application(make, start_worker):
    start_worker(first := make())
    result = add.delay(first.request(), 1)

    assert result.app is first.celery
    assert result.get(timeout=SOON) == 2
