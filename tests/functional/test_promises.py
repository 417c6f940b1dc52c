"""The promises 1 to 7 of the design, sentence by sentence, with real brokers and a real worker.

The worker takes one task at a time and in order. So the task ``notes`` tells what all tasks have
written that were sent before it: what is not there was never sent.
"""

from __future__ import annotations

import gc
import socket
import sys
import threading
import time
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa
import transaction
from celery import chain, chord, group
from celery.exceptions import QueueNotFound
from celery.result import AsyncResult
from kombu.exceptions import EncodeError
from pyramid.config import global_registries
from pyramid.events import NewRequest, NewResponse
from pyramid.paster import bootstrap, get_app
from pyramid.response import Response
from pyramid.scripting import prepare
from pyramid_retry import RetryableException
from tests.functional.conftest import APPS
from tests.waiting import SOON
from webtest import TestApp
from zope.interface import implementedBy

from ws_celery import get_celery_app, immediately


@dataclass
class Promised:
    """The web side of the application ``promised``, in this process; its worker runs."""

    ini: str
    web: TestApp
    registry: Any
    label: str = ""

    @property
    def celery(self) -> Any:
        return get_celery_app(self.registry)

    @property
    def tasks(self) -> Any:
        return self.celery.tasks

    def visit(self, view: Any, path: str = "/", **options: Any) -> Any:
        """Request a page whose view is this function; return what the function returns."""
        returned = []

        def run(request):
            returned.append(view(request))
            return request.response if isinstance(request.response, Response) else Response()

        self.registry["view"] = run
        self.web.get(path, **options)
        return returned[-1]

    def note(self, text: Any = "ran") -> AsyncResult:
        return self.tasks["note"].delay(self.label, text)

    def noted(self) -> list[str]:
        """Return what has been written by the tasks that were sent until now."""
        with immediately():
            return self.tasks["notes"].delay(self.label).get(timeout=SOON)


@pytest.fixture(scope="module", params=["redis", "rabbitmq"])
def running(request, promised_site, start_once):
    """A worker of the application, with this broker, and its web side."""
    ini = str(promised_site(request.getfixturevalue(f"{request.param}_url")).ini)
    worker = start_once(
        *("worker", "--ini", ini, "--concurrency=1", "--loglevel=info"),
        *("--without-mingle", "--without-gossip", "--hostname", f"{uuid.uuid4().hex}@localhost"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(APPS)
        app = get_app(ini)
        worker.says(" ready.")
        yield Promised(ini, TestApp(app), app.registry)
        worker.process.terminate()
        worker.ends()
        celery = get_celery_app(app.registry)
        with celery.connection_for_write() as connection:
            connection.default_channel.queue_delete(celery.conf.task_default_queue)
            connection.default_channel.exchange_delete(celery.conf.task_default_exchange)
        celery.close()
        app.registry["engine"].dispose()
        global_registries.remove(app.registry)
        sys.modules.pop("promised")


@pytest.fixture(scope="module", autouse=True)
def _sockets_end_with_their_module():
    # Celery leaves those of result backends to the garbage collector, which warns of each.
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def promised(running):
    """The running application, with a label of the test's own for its notes."""
    running.label = uuid.uuid4().hex
    return running


# 1. No phantom


def test_a_message_of_a_transaction_that_aborted_is_never_sent(promised):
    def view(request):
        promised.note()
        raise LookupError("no such thing")

    with pytest.raises(LookupError):
        promised.visit(view)

    assert promised.noted() == []


@pytest.mark.parametrize("answer", [{"status": 409}, {"headers": {"X-Tm": "abort"}}])
def test_a_message_of_a_transaction_that_was_vetoed_is_never_sent(promised, answer):
    def view(request):
        promised.note()
        request.response.status = answer.get("status", 200)
        request.response.headers.update(answer.get("headers", {}))

    promised.visit(view, expect_errors=True)

    assert promised.noted() == []


def test_a_message_of_a_transaction_that_was_doomed_is_never_sent(promised):
    def view(request):
        promised.note()
        request.tm.doom()

    promised.visit(view)

    assert promised.noted() == []


def test_a_message_of_a_transaction_that_was_retried_by_pyramid_retry_is_never_sent(promised):
    def view(request):
        attempt = request.environ["retry.attempt"]
        promised.note(f"attempt {attempt}")
        if attempt < 2:
            raise RetryableException

    promised.visit(view)

    assert promised.noted() == ["attempt 2"]


def test_a_message_of_a_rolled_back_savepoint_of_transaction_is_never_sent(promised):
    def view(request):
        promised.note(1)
        savepoint = request.tm.savepoint()
        promised.note(2)
        savepoint.rollback()
        promised.note(3)

    promised.visit(view)

    assert promised.noted() == ["1", "3"]


def test_a_message_of_a_rolled_back_savepoint_of_sqlalchemy_is_never_sent(promised):
    def view(request):
        promised.note(1)
        with suppress(LookupError), request.dbsession.begin_nested():
            promised.note(2)
            raise LookupError("no such thing")
        promised.note(3)

    promised.visit(view)

    assert promised.noted() == ["1", "3"]


def test_a_message_after_a_rolled_back_savepoint_is_sent_though_the_first_was_inside(promised):
    def view(request):
        savepoint = request.tm.savepoint()
        promised.note(1)
        savepoint.rollback()
        promised.note(2)

    promised.visit(view)

    assert promised.noted() == ["2"]


def test_messages_in_bulk_belong_to_the_savepoint_that_they_are_made_in(promised):
    def view(request):
        promised.tasks["note"].delay_many(calls(request))

    def calls(request):
        yield promised.label, 1
        with suppress(LookupError), request.dbsession.begin_nested():
            yield promised.label, 2
            raise LookupError("no such thing")
        yield promised.label, 3

    promised.visit(view)

    assert promised.noted() == ["1", "3"]


# 2. No surprise after the commit


@pytest.mark.parametrize(
    ("error", "args", "options"),
    [
        pytest.param(TypeError, (1, 2, 3), {}, id="unknown arguments"),
        pytest.param(EncodeError, (object(),), {}, id="values that do not serialise"),
        pytest.param(QueueNotFound, (1,), {"queue": "missing"}, id="unknown queue"),
    ],
)
def test_what_can_fail_because_of_the_caller_fails_at_the_call(promised, error, args, options):
    def view(request):
        promised.note("before")
        with pytest.raises(error):
            promised.tasks["note"].apply_async((promised.label, *args), **options)
        promised.note("after")

    promised.visit(view)

    assert promised.noted() == ["before", "after"]


def test_the_body_is_frozen_at_the_call(promised):
    def view(request):
        argument = [1]
        promised.note(argument)
        argument.append(2)

    promised.visit(view)

    assert promised.noted() == ["[1]"]


def test_the_headers_are_frozen_and_checked_at_the_call(promised):
    def view(request):
        headers = {"tags": ["before"]}
        promised.tasks["header"].apply_async((promised.label, "tags"), headers=headers)
        headers["tags"].append("after")
        with pytest.raises(EncodeError, match="header: the header 'tags'"):
            promised.tasks["header"].apply_async(
                (promised.label, "tags"), headers={"tags": object()}
            )

    promised.visit(view)

    assert promised.noted() == ["['before']"]


# 3. A real id


def test_a_deferred_call_returns_the_async_result_that_celery_returns(promised):
    result = promised.visit(lambda _request: promised.note("returned"))

    assert type(result) is promised.celery.AsyncResult
    assert result.get(timeout=SOON) == "returned"


def test_a_deferred_group_returns_the_group_result_that_celery_returns(promised):
    note = promised.tasks["note"]
    result = promised.visit(
        lambda _request: group(note.s(promised.label, number) for number in range(3)).delay()
    )

    assert type(result) is promised.celery.GroupResult
    assert result.get(timeout=SOON) == [0, 1, 2]


# 4. Whole canvases

WAYS = {
    "delay": lambda note, label: note.delay(label),
    "apply_async": lambda note, label: note.apply_async((label,)),
    "signature": lambda note, label: note.signature((label,)).apply_async(),
    "chain": lambda note, label: chain(note.si(label), note.si(label)).delay(),
    "group": lambda note, label: group(note.s(label), note.s(label)).delay(),
    "chord": lambda note, label: chord([note.s(label)] * 2)(note.app.tasks["note_all"].s(label)),
    "chunks": lambda note, label: note.chunks([(label,)] * 3, 2).apply_async(),
    "starmap": lambda note, label: note.starmap([(label,), (label,)]).apply_async(),
    "map": lambda note, label: note.map([label, label]).apply_async(),
    "delay_many": lambda note, label: note.delay_many([(label,), (label,)]),
    "delay_on_commit": lambda note, label: note.delay_on_commit(label),
    "apply_async_on_commit": lambda note, label: note.apply_async_on_commit((label,)),
    "app.send_task": lambda note, label: note.app.send_task("note", (label,)),
}
NOTES = {"chain": 2, "group": 2, "chunks": 3, "starmap": 2, "map": 2, "delay_many": 2}


@pytest.mark.parametrize("way", WAYS)
def test_whole_canvases_are_deferred(promised, way):
    def view(request):
        result = WAYS[way](promised.tasks["note"], promised.label)
        return result, promised.noted()

    result, before_the_commit = promised.visit(view)
    result.get(timeout=SOON)

    assert before_the_commit == []
    noted = promised.noted()
    if way == "chord":
        assert noted == ["ran", "ran", "['ran', 'ran']"]
    else:
        assert noted == ["ran"] * NOTES.get(way, 1)


@pytest.mark.parametrize("way", WAYS)
def test_whole_canvases_of_a_transaction_that_aborted_are_never_sent(promised, way):
    def view(request):
        WAYS[way](promised.tasks["note"], promised.label)
        request.tm.doom()

    promised.visit(view)

    assert promised.noted() == []


@pytest.mark.parametrize("event", ["before_flush", "after_flush", "after_insert"])
@pytest.mark.parametrize("doomed", [False, True])
def test_a_call_by_a_listener_of_the_flush_that_the_commit_makes_is_deferred(
    promised, event, doomed
):
    notes = sys.modules["promised"].Note
    calls = []

    def call(*_):
        calls.append(promised.note("by the listener"))

    def view(request):
        target = notes if event == "after_insert" else request.dbsession
        sa.event.listen(target, event, call, once=True)
        request.dbsession.add(notes(label=promised.label, text="row"))
        if doomed:
            request.dbsession.flush()
            request.tm.doom()

    promised.visit(view)

    assert len(calls) == 1
    assert promised.noted() == ([] if doomed else ["row", "by the listener"])


@pytest.mark.parametrize(("event", "before"), [(NewRequest, []), (NewResponse, ["subscribed"])])
def test_a_call_by_a_subscriber_of_pyramid_is_of_the_request_that_is_going_on(
    promised, event, before
):
    """A response is new when its transaction is over."""
    noted = []

    def call(_event):
        promised.note("subscribed")
        noted.extend(promised.noted())

    promised.registry.registerHandler(call, (implementedBy(event),))
    try:
        promised.visit(lambda _request: None)
    finally:
        promised.registry.unregisterHandler(call, (implementedBy(event),))

    assert noted == before
    assert promised.noted() == ["subscribed"]


# 5. Only to a transaction that somebody will finish


def test_a_call_in_a_request_with_tm_active_is_deferred(promised):
    def view(request):
        promised.note()
        return request.environ["tm.active"], promised.noted()

    assert promised.visit(view) == (True, [])
    assert promised.noted() == ["ran"]


def test_a_call_after_begin_is_deferred(promised):
    transaction.begin()
    promised.note()
    assert promised.noted() == []
    transaction.commit()

    assert promised.noted() == ["ran"]


def test_a_call_inside_with_manager_is_deferred(promised):
    with transaction.manager:
        promised.note()
        assert promised.noted() == []

    assert promised.noted() == ["ran"]


def test_a_call_in_a_transaction_that_was_made_in_passing_is_sent_at_once(promised):
    """The transaction that ``get()`` makes, which nobody finishes."""
    promised.visit(lambda _: None)  # since then the manager of this thread is watched
    transaction.get()
    promised.note()

    assert promised.noted() == ["ran"]
    transaction.abort()


def test_a_call_in_a_thread_that_shares_the_manager_of_the_request_is_deferred(promised):
    def view(request):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(promised.tasks["note"].delay, request, promised.label).result()
        return promised.noted()

    assert promised.visit(view) == []
    assert promised.noted() == ["ran"]


def test_a_call_in_a_script_is_sent_at_once(promised):
    with bootstrap(promised.ini) as environment:
        celery = get_celery_app(environment["registry"])
        celery.tasks["note"].delay(environment["request"], promised.label)
        assert promised.noted() == ["ran"]
        celery.close()
        environment["registry"]["engine"].dispose()


@pytest.mark.parametrize("begun", [True, False])
def test_a_call_in_a_prepared_request_is_deferred_if_its_transaction_is_begun(promised, begun):
    """As ``pyramid.scripting.prepare`` makes it, which bootstrap and pshell use."""
    with prepare(registry=promised.registry) as environment:
        request = environment["request"]
        with request.tm if begun else nullcontext():
            promised.note()
            before = promised.noted()

    assert before == ([] if begun else ["ran"])
    assert promised.noted() == ["ran"]


def test_a_call_with_a_producer_or_a_connection_is_sent_at_once(promised):
    note, celery = promised.tasks["note"], promised.celery

    def view(request):
        with celery.producer_pool.acquire(block=True) as producer:
            note.apply_async((promised.label, "producer"), producer=producer)
        with celery.connection_for_write() as connection:
            note.apply_async((promised.label, "connection"), connection=connection)
        request.tm.doom()

    promised.visit(view)

    assert promised.noted() == ["producer", "connection"]


def test_what_beat_sends_is_sent_at_once(promised, start, wait_for):
    promised.label = "beat"
    before = len(promised.noted())
    beat = start("beat", "--ini", promised.ini, "--loglevel=info")
    wait_for(lambda: len(promised.noted()) > before, "a tick")
    beat.process.terminate()

    assert beat.ends() == 0


def test_a_callback_by_the_worker_is_sent_at_once(promised):
    note = promised.tasks["note"]
    callback = note.si(promised.label, "callback").set(task_id=uuid.uuid4().hex)
    promised.visit(
        lambda _request: note.apply_async((promised.label,), link=callback),
    )
    AsyncResult(callback.options["task_id"], app=note.app).get(timeout=SOON)

    assert promised.noted() == ["ran", "callback"]


@pytest.mark.parametrize("kind", ["response", "finished"])
def test_a_call_in_a_callback_of_the_request_is_sent_at_once(promised, kind):
    noted = []

    def call(*_):
        promised.note()
        noted.append(promised.noted())

    promised.visit(lambda request: getattr(request, f"add_{kind}_callback")(call))

    assert noted == [["ran"]]


def test_a_call_on_an_excluded_path_is_sent_at_once(promised):
    def view(request):
        promised.note()
        return promised.noted()

    assert promised.visit(view, "/excluded") == ["ran"]


# 6. Retries survive


@pytest.mark.parametrize("name", ["try_again", "fail_once"])
def test_a_retry_inside_a_transaction_that_aborts_is_still_sent(promised, name):
    """By ``self.retry()`` and by ``autoretry_for``."""
    result = promised.visit(lambda _request: promised.tasks[name].delay(promised.label))

    assert result.get(timeout=SOON) == 1
    assert promised.noted() == ["try 1"]


def test_a_replacement_is_still_sent(promised):
    result = promised.visit(lambda _request: promised.tasks["replaced"].delay(promised.label))

    assert result.get(timeout=SOON) == "replacement"
    assert promised.noted() == ["replacement"]


@pytest.mark.parametrize(
    ("how", "noted"),
    [("ignore", ["written", "dispatched"]), ("reject", ["error"]), ("fail", ["error"])],
)
def test_a_run_that_ends_otherwise_commits_or_aborts_with_what_it_has_dispatched(
    promised, how, noted
):
    note = promised.tasks["note"]
    promised.visit(
        lambda _request: promised.tasks["note_and_end"].apply_async(
            (promised.label, how), link_error=note.si(promised.label, "error")
        )
    )
    promised.noted()  # what the run has sent is before the next question

    assert promised.noted() == noted


# 7. No wait


@pytest.fixture
def silent():
    """What a broker that hangs is: it takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_broker_that_is_down_costs_a_response_a_bounded_short_time_and_then_nothing(
    make_app, silent, scheme, caplog
):
    """The second half of the sentence: and nothing at all while it is known to be down."""

    def view(request):
        request.celery_app.send_task("note")
        return Response("done")

    def setup(config):
        config.add_route("home", "/")
        config.add_view(view, route_name="home")

    port = silent.getsockname()[1]
    app = make_app(
        setup=setup, broker=f"{scheme}://127.0.0.1:{port}//", ws_celery__publish_timeout="0.5"
    )
    publisher, tried_by = app.celery.publisher, []
    attempt = publisher.attempt
    publisher.attempt = lambda them: tried_by.append(threading.current_thread()) or attempt(them)
    began = time.monotonic()
    assert app.web.get("/").text == "done"
    assert time.monotonic() - began < 0.5 + 3  # a busy machine's; kombu alone would go on waiting
    assert tried_by[0] is threading.current_thread()
    assert app.web.get("/").text == "done"

    assert "this process sends these tasks later" in caplog.records[-1].getMessage()
    assert threading.current_thread() not in tried_by[1:]  # the second request has not even tried
