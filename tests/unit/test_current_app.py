"""Celery's current app, which ``shared_task``, names of tasks and ids of results ask for."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import celery
import pytest
import transaction
from celery import Celery, _state, chain, chord, current_app, group, shared_task, signature
from celery.result import AsyncResult
from pyramid.config import PHASE3_CONFIG
from pyramid.paster import bootstrap
from pyramid.request import Request
from pyramid.response import Response
from pyramid.scripting import prepare
from pyramid.threadlocal import RequestContext

from ws_celery import RequestAwareTask, TransactionalTask, get_celery_app, shell, task
from ws_celery.config import make_celery_app


@pytest.fixture(autouse=True)
def _shared_tasks_end_with_their_test(monkeypatch):
    monkeypatch.setattr(_state, "_on_app_finalizers", set(_state._on_app_finalizers))


@pytest.fixture
def other():
    """An app of Celery's, which the thread has been told of."""
    before = _state._tls.current_app
    app = Celery("other", broker="memory://", set_as_current=True)
    yield app
    _state._tls.current_app = before
    app.close()


def pass_on(x):
    return x


@pytest.fixture
def shared():
    """A task of no application; always of one function, as an app of Celery's may have it."""
    return shared_task(name="shared")(pass_on)


@task(name="add")
def add(request, x, y=0):
    return x + y


def current():
    return current_app._get_current_object()


@pytest.fixture
def make(make_app):
    """Make an application whose only view does this."""

    def make(view, *tasks, **settings):
        def respond(request):
            view(request)
            return Response("done")

        def setup(config):
            config.add_route("home", "/")
            config.add_view(respond, route_name="home")

        return make_app(*tasks, setup=setup, **settings)

    return make


DISPATCHES = {
    "shared task": (lambda shared: shared.delay(1), ["shared"]),
    "name": (lambda _: signature("add", (1,)).delay(), ["add"]),
    "name of another program": (lambda _: signature("elsewhere").apply_async(), ["elsewhere"]),
    "group": (lambda shared: group(signature("add", (1,)), shared.s(1))(), ["add", "shared"]),
    "chain": (lambda shared: chain(signature("add", (1,)), shared.s())(), ["add"]),
    "chord": (
        lambda shared: chord([signature("add", (1,)), shared.s(1)])(signature("add", (1,))),
        ["add", "shared"],
    ),
    "current app": (lambda _: current_app.send_task("add", (1,)), ["add"]),
}


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_what_asks_for_the_current_app_waits_for_the_commit(make, shared, dispatch):
    call, expected = DISPATCHES[dispatch]
    held = []

    def view(_request):
        call(shared)
        held.append(app.names())

    # The counter of a chord is in the result backend.
    app = make(view, add, celery="result_backend = cache+memory://")
    app.web.get("/")

    assert held == [[]]
    assert sorted(app.names()) == expected


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_a_request_that_fails_sends_nothing_of_it(make, shared, dispatch):
    call, _ = DISPATCHES[dispatch]

    def view(_request):
        call(shared)
        raise LookupError("no such thing")

    app = make(view, add, celery="result_backend = cache+memory://")
    with pytest.raises(LookupError, match="no such thing"):
        app.web.get("/")

    assert app.names() == []


def test_an_id_finds_its_result(make):
    states = []

    def view(_request):
        states.append((AsyncResult("1").state, AsyncResult("2").state))

    app = make(view, celery="result_backend = cache+memory://")
    app.celery.backend.store_result("2", 3, "SUCCESS")
    app.web.get("/")

    assert states == [("PENDING", "SUCCESS")]


# For how long


def test_it_is_that_of_the_request_while_it_lasts(make, other):
    seen = []
    app = make(lambda _: seen.append(current()))
    app.web.get("/")

    assert (seen, current()) == ([app.celery], other)


def test_a_request_that_fails_leaves_it_as_it_was(make, other):
    def view(_request):
        raise LookupError("no such thing")

    app = make(view)
    with pytest.raises(LookupError, match="no such thing"):
        app.web.get("/")

    assert current() is other


def test_a_request_in_a_request_has_its_own(make, other):
    seen = []

    def outer(_request):
        seen.append(current())
        Request.blank("/").get_response(second.web.app)
        seen.append(current())

    first, second = make(outer), make(lambda _: seen.append(current()))
    first.web.get("/")

    assert seen == [first.celery, second.celery, first.celery]
    assert current() is other


def test_a_subrequest_leaves_it_as_it_was(make):
    seen = []

    def view(request):
        seen.append(current())
        if not request.params:
            request.invoke_subrequest(Request.blank("/?again=1"), use_tweens=True)
            seen.append(current())

    app, _ = make(view), make(view)
    app.web.get("/")

    assert seen == [app.celery] * 3


def test_the_request_that_is_passed_says_it(make_app):
    first, second = make_app(add), make_app(add)
    with RequestContext(first.request()):
        signature("add", (1,)).delay()
        add.s(2).delay()
    with RequestContext(second.request()):
        current_app.send_task("add", (3,))

    assert [message.args for message in first.sent()] == [[1], [2]]
    assert [message.args for message in second.sent()] == [[3]]


def test_an_application_without_celery_does_not_get_that_of_another(make_app, other):
    from pyramid.config import Configurator

    make_app()
    stranger = Request.blank("/")
    stranger.registry = Configurator().registry
    with RequestContext(stranger):
        assert current() is other


# Threads


def in_thread(function):
    result = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]


def test_each_thread_has_that_of_its_own_request(make):
    both = threading.Barrier(2, timeout=60)
    seen = {}

    def view(request):
        both.wait()
        seen[request.celery_app] = current()
        both.wait()

    apps = make(view), make(view)
    threads = [threading.Thread(target=app.web.get, args=("/",)) for app in apps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert seen == {app.celery: app.celery for app in apps}


def test_a_thread_of_a_view_has_the_only_application(make, shared):
    app = make(lambda _: in_thread(lambda: shared.delay(1)))
    app.web.get("/")

    assert app.names() == ["shared"]


def test_a_thread_that_is_handed_the_request_has_its_application(make, shared):
    def view(request):
        def work():
            with RequestContext(request):
                return shared.delay(1)

        in_thread(work)

    first, _ = make(view), make(view)
    first.web.get("/")

    assert first.names() == ["shared"]


def test_a_thread_without_a_request_has_none_of_two_applications(make):
    seen = []
    first, second = (make(lambda _: seen.append(in_thread(current))) for _ in range(2))
    first.web.get("/")

    assert seen[0] not in (first.celery, second.celery)


GREENLETS = """
    from gevent import monkey
    monkey.patch_all()
    import gevent
    from celery import current_app
    from pyramid.config import Configurator
    from pyramid.request import Request
    from pyramid.response import Response

    seen = []

    def view(request):
        for _ in range(3):
            gevent.sleep()  # to the other one
            seen.append((request.celery_app, current_app._get_current_object()))
        return Response("done")

    def make(name):
        settings = {"celery.broker_url": "memory://"}
        with Configurator(settings=settings) as config:
            config.include("ws_celery")
            config.add_route("home", "/")
            config.add_view(view, route_name="home")
            return config.make_wsgi_app()

    apps = make("one"), make("two")
    gevent.joinall([gevent.spawn(Request.blank("/").get_response, app) for app in apps])
    assert len({own for own, _ in seen[:2]}) == 2, "they did not take turns"
    assert all(own is found for own, found in seen), seen
    print(len(seen))
"""


def test_each_greenlet_has_that_of_its_own_request():
    # Only a fresh process can be patched.
    command = [sys.executable, "-c", textwrap.dedent(GREENLETS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert (done.stdout, done.stderr) == ("6\n", "")


# Runs, scripts, shells


@pytest.mark.parametrize("base", [RequestAwareTask, TransactionalTask])
def test_a_run_has_that_of_its_task(make_app, other, base):
    seen = []

    @task(name="look", base=base)
    def look(request):
        seen.append(current())

    first, second = make_app(look), make_app(look)
    for app in (first, second):
        app.celery.tasks["look"].apply().get()

    assert (seen, current()) == ([first.celery, second.celery], other)


def test_what_a_run_dispatches_waits_for_its_commit(make_app, shared):
    @task(name="outer")
    def outer(request, fails):
        shared.delay(1)
        signature("add", (1,)).delay()
        held.extend(app.names())
        if fails:
            raise LookupError("no such thing")

    held = []
    app, _ = make_app(outer, add), make_app(outer, add)
    app.celery.tasks["outer"].apply((True,))
    assert app.names() == []
    app.celery.tasks["outer"].apply((False,)).get()

    assert (held, app.names()) == ([], ["shared", "add"])


def test_a_script_has_that_of_its_application_until_it_is_closed(
    make_app, shared, other, tmp_path, monkeypatch
):
    make_app()
    ini = tmp_path / "script.ini"
    ini.write_text(
        "[app:main]\nuse = call:scripted:main\ncelery.broker_url = memory://\n"
        "celery.task_default_queue = scripted\n"
    )
    (tmp_path / "scripted.py").write_text(
        "from pyramid.config import Configurator\n\n"
        "def main(_, **settings):\n"
        "    config = Configurator(settings=settings)\n"
        "    config.include('ws_celery')\n"
        "    return config.make_wsgi_app()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with bootstrap(str(ini)) as env:
        assert current() is env["request"].celery_app
        shared.delay(1)
        with current().connection_for_read() as connection:
            assert connection.SimpleQueue("scripted").get_nowait().headers["task"] == "shared"
        current().close()
    sys.modules.pop("scripted")

    assert current() is other


def test_a_shell_keeps_it_until_commit(make_app, shared):
    app, _ = make_app(), make_app()
    with prepare(registry=app.registry) as env:
        for _ in shell.setup(env):
            shared.delay(1)
            signature("add", (1,)).delay()
            assert app.names() == []
            env["commit"]()

    assert app.names() == ["shared", "add"]


def test_a_script_that_only_loads_the_application_has_it(make_config, shared):
    config = make_config()
    app = make_celery_app(config)

    assert (current(), shared.delay(1).app) == (app, app)
    with transaction.manager:
        shared.delay(1)
    app.close()


def test_what_celery_was_told_beats_the_only_application(make_app, other):
    make_app(add)

    assert current() is other


# While an application is made


def test_an_application_that_is_being_configured_is_not_finalized(
    make_config, tmp_path, monkeypatch
):
    (tmp_path / "with_shared.py").write_text(
        "from celery import shared_task\n\n@shared_task(name='found')\ndef found():\n    ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = make_config(celery="imports = with_shared")
    app, after_imports = get_celery_app(config.registry), []
    config.action(None, lambda: after_imports.append(app.finalized), order=PHASE3_CONFIG + 1)
    make_celery_app(config)
    sys.modules.pop("with_shared")

    assert after_imports == [False]
    assert "found" in app.tasks
    app.close()


def test_celery_is_told_once(make_app):
    make_app()
    kept = _state._tls
    make_app()

    assert _state._tls is kept
    assert celery.current_app
