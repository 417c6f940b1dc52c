"""Callbacks for errors, in every form that Celery documents, on a worker with Redis."""

from __future__ import annotations

import queue

import celery
import pytest
import zope.sqlalchemy
from celery import chain, chord, group
from celery.app.task import Context
from sqlalchemy import text
from tests.notes import dispatch
from tests.waiting import SOON, wait_for

from ws_celery import RequestAwareTask, task

#: Celery 5.7 counts what the caller has not given; before, the whole function counts.
COUNTS_THE_REST = tuple(map(int, celery.__version__.split(".")[:2])) >= (5, 7)

ERROR = "LookupError('no such thing')"

#: A worker that stops at once.
POLLING = """
broker_transport_options = {"polling_interval": 0.1}
result_backend_transport_options = {"polling_interval": 0.1}
"""


@pytest.fixture(autouse=True)
def _errors_end_with_their_test(caplog):
    # What is logged of one holds its frames, and so the application and its connections.
    yield
    caplog.get_records("call").clear()


@pytest.fixture
def told():
    """What the callbacks were called with."""
    return queue.Queue()


@pytest.fixture
def runs():
    """The tasks that were run, one entry for each run."""
    return []


@pytest.fixture
def work(runs):
    @task(name="fail")
    def fail(request, *_):
        runs.append("fail")
        raise LookupError("no such thing")

    @task(name="fail_unclaimed", base=RequestAwareTask)
    def fail_unclaimed(request):
        runs.append("fail_unclaimed")
        raise LookupError("no such thing")

    @task(name="succeed")
    def succeed(request, *_):
        runs.append("succeed")

    return fail, fail_unclaimed, succeed


@pytest.fixture
def callbacks(told):
    @task(name="with_error")
    def with_error(request, failed, exc, traceback):
        told.put(("with_error", request.path, type(failed), failed.id, repr(exc)))

    @task(name="with_more")
    def with_more(request, failed, exc, traceback, first, second=None):
        told.put(("with_more", failed.id, repr(exc), first, second))

    @task(name="with_id")
    def with_id(request, task_id, *, first=None):
        told.put(("with_id", request.path, task_id, first))

    @task(name="with_id_and_more")
    def with_id_and_more(request, task_id, first):
        told.put(("with_id_and_more", task_id, first))

    @task(name="bound", bind=True)
    def bound(self, request, task_id):
        told.put((self.name, task_id))

    @task(name="of_neither")
    def of_neither(request, first, second):
        told.put(("of_neither", first, second))

    @task(name="of_no_request", base=celery.Task)
    def of_no_request(failed, exc, traceback):
        told.put(("of_no_request", failed.id, repr(exc)))

    @task(name="breaking")
    def breaking(request, failed, exc, traceback):
        told.put(("breaking", failed.id))
        raise TypeError("the fault of the callback")

    return (
        *(with_error, with_more, with_id, with_id_and_more),
        *(bound, of_neither, of_no_request, breaking),
    )


@pytest.fixture
def plain(make_app, start_worker, redis_url, work, callbacks):
    """An application without the outbox."""
    settings = f"result_backend = {redis_url}{POLLING}"
    app = make_app(*work, *callbacks, broker=redis_url, celery=settings)
    start_worker(app)
    return app


@pytest.fixture
def kept(make_outbox, start_worker, sqlite, work, callbacks):
    """An application with the outbox."""
    app = make_outbox(sqlite, *work, *callbacks, celery=POLLING.strip())
    start_worker(app)
    return app


@pytest.fixture(params=["plain", "kept"])
def app(request):
    """An application without the outbox, and one with it."""
    return request.getfixturevalue(request.param)


def taken(told, number):
    """Return what so many callbacks were called with, by name."""
    return sorted((told.get(timeout=SOON) for _ in range(number)), key=lambda each: each[0])


def test_a_callback_gets_what_celery_documents(app, told, runs):
    s = app.celery.signature
    signatures = [
        s("with_error"),
        s("with_more", (7,)),
        s("with_more", kwargs={"first": 7, "second": 8}),
        s("with_id"),
        s("with_id", kwargs={"first": 7}),
        s("bound"),
        s("of_neither", (1, 2), immutable=True),
        s("of_no_request"),
    ]
    result = dispatch(app, app.celery.tasks["fail"], link_error=signatures)

    assert taken(told, len(signatures)) == [
        ("bound", result.id),
        ("of_neither", 1, 2),
        ("of_no_request", result.id, ERROR),
        ("with_error", "/", Context, result.id, ERROR),
        ("with_id", "/", result.id, None),
        ("with_id", "/", result.id, 7),
        ("with_more", result.id, ERROR, 7, None),
        ("with_more", result.id, ERROR, 7, 8),
    ]
    with pytest.raises(LookupError, match="no such thing"):
        result.get(timeout=SOON)
    assert runs == ["fail"]


@pytest.mark.skipif(not COUNTS_THE_REST, reason="Celery calls it with the error before 5.7")
def test_a_callback_that_lacks_but_the_id_gets_it(app, told):
    callback = app.celery.signature("with_id_and_more", (7,))
    result = dispatch(app, app.celery.tasks["fail"], link_error=callback)

    assert taken(told, 1) == [("with_id_and_more", result.id, 7)]


CANVASES = {
    "chain": (lambda fail, succeed: chain(succeed, fail, succeed), ["fail", "succeed"], ERROR),
    "group": (group, ["fail", "succeed"], ERROR),
    "chord": (lambda *tasks: chord(tasks, tasks[1]), ["fail", "succeed"], "ChordError"),
    "body": (lambda fail, succeed: chord([succeed], fail), ["fail", "succeed"], ERROR),
}


@pytest.mark.filterwarnings("ignore:task_allow_error_cb_on_chord_header")
@pytest.mark.parametrize("canvas", CANVASES)
def test_a_canvas_calls_them_as_well(app, told, runs, canvas):
    make, expected, error = CANVASES[canvas]
    made = make(app.celery.tasks["fail"].si(), app.celery.tasks["succeed"].si())
    for callback in ("with_error", "with_id", "bound"):
        made.link_error(app.celery.signature(callback))
    made.apply_async()
    (_, bound_id), (*_, failed_id, exc), (*_, task_id, _) = taken(told, 3)

    assert exc.startswith(error)
    wait_for(lambda: len(runs) >= len(expected), "the last run")
    assert sorted(runs) == expected
    if canvas != "group":
        assert bound_id == failed_id == task_id


@pytest.mark.parametrize("failing", ["fail", "fail_unclaimed"])
def test_the_row_of_what_has_failed_is_a_dead_letter(kept, told, runs, rows_of, failing):
    s = kept.celery.signature
    signatures = [s("with_error"), s("with_id"), s("breaking"), s("with_more", (1, 2, 3))]
    dispatch(kept, kept.celery.tasks[failing], link_error=signatures)
    (row,) = wait_for(lambda: [row for row in rows_of(kept) if row.due_at is None], "a dead letter")

    assert (row.task, runs) == (failing, [failing])
    assert "LookupError: no such thing" in row.error


def test_an_error_of_a_callback_does_not_take_the_place_of_the_task_s(plain, runs, caplog):
    callback = plain.celery.signature("with_id", (1, 2, 3), immutable=True)  # it takes one
    result = dispatch(plain, plain.celery.tasks["fail"], link_error=callback)
    with pytest.raises(LookupError, match="no such thing"):
        result.get(timeout=SOON)

    wait_for(lambda: "Task fail[" in caplog.text, "the log of the failure")
    assert f"The callbacks for the error of fail[{result.id}] have failed" in caplog.text
    assert runs == ["fail"]


def test_a_callback_is_one_transaction(make_outbox, start_worker, database, rows_of):
    @task(name="fail")
    def fail(request):
        insert(request, 1, "by what has failed")
        raise LookupError("no such thing")

    @task(name="note")
    def note(request, words):
        insert(request, 3, words)

    @task(name="tell")
    def tell(request, failed, exc, traceback):
        note.delay("dispatched by the callback")
        insert(request, 2, f"{failed.task}: {exc}")

    app = make_outbox(database, fail, note, tell, celery=POLLING.strip())
    start_worker(app)
    dispatch(app, fail, link_error=app.celery.signature("tell"))

    wait_for(lambda: len(database.notes()) == 2, "the notes")
    assert database.notes() == ["fail: no such thing", "dispatched by the callback"]
    wait_for(lambda: [row.task for row in rows_of(app)] == ["fail"], "the end of the other row")


def insert(request, number, words):
    request.dbsession.execute(
        text("INSERT INTO notes (id, text) VALUES (:id, :text)"), {"id": number, "text": words}
    )
    zope.sqlalchemy.mark_changed(request.dbsession, request.tm)
