"""Retries of runs with a row: none is lost, and none is multiplied."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import pytest
import transaction
from celery import Task, chord
from celery.exceptions import Ignore, Reject, Retry
from pyramid.threadlocal import RequestContext
from tests.notes import dispatch, insert, write
from tests.waiting import SOON, wait_for
from transaction.interfaces import TransientError

from ws_celery import RequestAwareTask, task
from ws_celery.events import BeforeDispatch
from ws_celery.testing.captured import run_as_worker
from ws_celery.worker import run_of


@task(name="swallowing", bind=True)
def swallowing(self, request, number):
    """Ask for a retry inside of a try that catches everything."""
    insert(request, number + self.request.retries)
    if not self.request.retries:
        try:
            self.retry(countdown=0)
        except Exception:  # noqa: BLE001 - as careless functions do
            return "swallowed"
    return "retried"


@task(name="swallowing_all", bind=True)
def swallowing_all(self, request, how, number=0):
    """Ask for three retries, and end in this way."""
    if number:
        insert(request, number)
        return
    for each in (1, 2, 3):
        with suppress(Retry):
            self.retry(args=(how, each), countdown=0)
    if how.startswith("doom"):
        request.tm.doom()
    if how == "doom and ignore":
        raise Ignore
    if how == "fail":
        raise LookupError


@task(name="aware_and_swallowing_all", bind=True, base=RequestAwareTask)
def aware_and_swallowing_all(self, request, how, number=0):
    if number:
        write.delay(number)
    else:
        for each in (1, 2, 3):
            with suppress(Retry):
                self.retry(args=(how, each), countdown=0)


@task(name="swallowing_and_dooming", bind=True)
def swallowing_and_dooming(self, request, number):
    insert(request, number)
    if not self.request.retries:
        try:
            self.retry(countdown=0)
        except Retry:
            request.tm.doom()


@task(name="swallowing_and_failing", bind=True)
def swallowing_and_failing(self, request, number):
    insert(request, number)
    if not self.request.retries:
        try:
            self.retry(countdown=0)
        except Retry:
            raise LookupError from None


@task(name="swallowing_and_conflicting", bind=True)
def swallowing_and_conflicting(self, request, number):
    insert(request, number)
    if run_of(self.request).attempts_left == 2:
        try:
            self.retry(countdown=0)
        except Retry:
            meet_a_conflict(request)


@task(name="conflicting_then_rejecting", bind=True)
def conflicting_then_rejecting(self, request):
    if run_of(self.request).attempts_left == 1:
        raise Reject("not mine")
    meet_a_conflict(request)


def meet_a_conflict(request):
    """Let the commit of this transaction fail, late."""
    request.tm.get().join(_Conflict())


class _Conflict:
    transaction_manager = None

    def should_retry(self, error):
        return isinstance(error, TransientError)

    def tpc_begin(self, txn):
        pass

    def commit(self, txn):
        raise TransientError

    def abort(self, txn):
        pass

    tpc_abort = abort

    def sortKey(self):  # noqa: N802
        return "~conflict"


@task(name="retrying", bind=True)
def retrying(self, request, number):
    if not self.request.retries:
        raise self.retry(countdown=0)
    insert(request, number)


@task(name="aware_and_retrying", bind=True, base=RequestAwareTask)
def aware_and_retrying(self, request, number):
    if not self.request.retries:
        raise self.retry(countdown=0)


@task(name="audit", base=RequestAwareTask)
def audit(request, name):
    pass


class Polling(Task):
    """A plain task that asks again, as Celery's own ``chord_unlock`` does."""

    name = "polling"
    max_retries = None

    def run(self):
        raise self.retry(countdown=200)


@task(name="total")
def total(request, numbers):
    insert(request, 100 + sum(numbers))
    return sum(numbers)


TASKS = (
    write, swallowing, swallowing_all, aware_and_swallowing_all, swallowing_and_dooming,
    swallowing_and_failing, swallowing_and_conflicting, conflicting_then_rejecting, retrying,
    aware_and_retrying, audit, total,
)  # fmt: skip


@pytest.fixture
def app(make_outbox, database):
    return make_outbox(database, *TASKS)


def finish(app, *numbers):
    """Wait until the only worker has done what it had to do, and what followed from that."""
    for number in numbers:
        dispatch(app, write, number).get(SOON)


def test_a_retry_that_the_function_catches_is_sent_with_its_commit(
    app, start_worker, database, rows_of
):
    result = dispatch(app, swallowing, 1)
    start_worker(app)
    assert result.get(SOON) in ("swallowed", "retried")  # the second run stores under the same id

    finish(app, 8, 9)
    assert database.notes()[:2] == ["note 1", "note 2"]
    assert rows_of(app) == []


def test_a_retry_that_a_doomed_run_catches_is_sent(app, start_worker, database, rows_of):
    dispatch(app, swallowing_and_dooming, 1)
    start_worker(app)

    finish(app, 8, 9)
    assert database.notes() == ["note 1", "note 8", "note 9"]
    assert rows_of(app) == []


def test_a_doomed_run_whose_row_holds_its_retry_ends_well(app, rows_of):
    dispatch(app, swallowing_and_dooming, 1)
    (row,) = rows_of(app)
    publication = app.celery.outbox.publication_of(row)
    publication.options["headers"]["ws_celery_outbox"] = str(row.id)

    assert run_as_worker(app.celery, publication, {}) is None

    (kept,) = rows_of(app)
    assert app.celery.outbox.publication_of(kept).options["headers"]["retries"] == 1


@pytest.mark.parametrize("how", ["go on", "doom", "doom and ignore", "fail"])
def test_all_retries_that_the_function_catches_are_sent(app, start_worker, database, rows_of, how):
    dispatch(app, swallowing_all, how)
    assert len(rows_of(app)) == 1
    start_worker(app)

    finish(app, 8, 9)
    assert database.notes() == [f"note {number}" for number in (1, 2, 3, 8, 9)]
    assert rows_of(app) == []


def test_all_retries_that_a_run_without_a_transaction_catches_are_sent(
    app, start_worker, database, rows_of
):
    dispatch(app, aware_and_swallowing_all, "go on")
    start_worker(app)

    finish(app, 7, 8, 9)
    assert database.notes() == [f"note {number}" for number in (1, 2, 3, 7, 8, 9)]
    assert rows_of(app) == []


def test_a_retry_of_a_run_that_fails_after_all_is_sent(app, start_worker, database, rows_of):
    dispatch(app, swallowing_and_failing, 1)
    start_worker(app)

    finish(app, 8, 9)
    assert database.notes() == ["note 1", "note 8", "note 9"]
    assert rows_of(app) == []


def test_a_retry_of_a_try_that_is_undone_is_not_sent(app, start_worker, database, rows_of):
    dispatch(app, swallowing_and_conflicting, 1)
    start_worker(app)

    finish(app, 8, 9)
    assert database.notes() == ["note 1", "note 8", "note 9"]
    assert rows_of(app) == []


def test_a_run_that_is_rejected_after_a_conflict_is_a_dead_letter(app, start_worker, rows_of):
    dispatch(app, conflicting_then_rejecting)
    start_worker(app)

    finish(app, 8, 9)
    (row,) = rows_of(app)
    assert row.due_at is None
    assert "not mine" in row.error


@pytest.mark.parametrize("name", ["retrying", "aware_and_retrying"])
def test_what_a_subscriber_sends_during_a_retry_is_not_the_retry(
    make_outbox, database, start_worker, rows_of, name
):
    audited = []

    def tell_the_audit(event):
        if event.name == name and (run := event.app.current_worker_task):
            audited.append(event.name)
            audit.delay(run.name)

    def setup(config):
        config.add_subscriber(tell_the_audit, BeforeDispatch)

    app = make_outbox(database, *TASKS, setup=setup)
    result = dispatch(app, app.celery.tasks[name], 1)
    start_worker(app)

    result.get(SOON)
    finish(app, 8, 9)
    assert audited == [name]
    assert database.notes() == (["note 1"] if name == "retrying" else []) + ["note 8", "note 9"]
    assert rows_of(app) == []


def test_a_message_of_before_the_retry_that_comes_again_is_not_run(
    make_outbox, database, start_worker, rows_of
):
    runs = []

    @task(name="hoping", bind=True)
    def hoping(self, request):
        runs.append(self.request.retries)
        raise self.retry(countdown=3000)

    app = make_outbox(database, hoping, write)
    dispatch(app, hoping)
    (row,) = rows_of(app)
    app.celery.publisher.publish([app.celery.outbox.publication_of(row)])
    start_worker(app)
    dispatch(app, write, 1).get(SOON)

    (kept,) = rows_of(app)
    assert runs == [0]
    assert app.celery.outbox.publication_of(kept).options["headers"]["retries"] == 1


def test_the_row_of_a_plain_task_holds_its_retry(make_outbox, database, rows_of):
    app = make_outbox(database, write)
    app.celery.register_task(Polling())
    with RequestContext(app.request()), transaction.manager:
        app.celery.send_task("polling")
    (row,) = rows_of(app)
    app.sent()
    publication = app.celery.outbox.publication_of(row)
    publication.options["headers"]["ws_celery_outbox"] = str(row.id)

    with pytest.raises(Retry):
        run_as_worker(app.celery, publication, {})

    (kept,) = rows_of(app)
    (retry,) = app.sent()
    assert kept.id != row.id  # a message of before the retry finds nothing
    # The relay has to leave it alone until the retry has had its time.
    assert (kept.due_at - row.due_at).total_seconds() > 190
    assert app.celery.outbox.publication_of(kept).options["headers"]["retries"] == 1
    assert (retry.headers["ws_celery_outbox"], retry.headers["retries"]) == (str(kept.id), 1)


@task(name="odd", bind=True)
def odd(self, request):
    """Ask for a retry at a time that cannot be kept."""
    self.retry(eta="9999-12-31T23:59:59+00:00")


@task(name="aware_and_odd", bind=True, base=RequestAwareTask)
def aware_and_odd(self, request):
    self.retry(eta="9999-12-31T23:59:59+00:00")


@pytest.mark.parametrize("each", [odd, aware_and_odd])
def test_a_retry_at_a_time_that_cannot_be_kept_fails_the_run(
    make_outbox, postgres, start_worker, rows_of, each
):
    app = make_outbox(postgres, each)
    start_worker(app)

    result = dispatch(app, each)

    with pytest.raises(ValueError, match="9998"):
        result.get(SOON)
    wait_for(lambda: rows_of(app)[0].due_at is None)
    assert "9998" in rows_of(app)[0].error


def test_a_retry_of_a_plain_task_whose_row_is_gone_ends_there(make_outbox, database, rows_of):
    app = make_outbox(database, write)
    app.celery.register_task(Polling())
    with RequestContext(app.request()), transaction.manager:
        app.celery.send_task("polling")
    (row,) = rows_of(app)
    app.sent()
    publication = app.celery.outbox.publication_of(row)
    publication.options["headers"]["ws_celery_outbox"] = str(row.id)
    app.celery.outbox.settlement.delete(row.id)

    with pytest.raises(Retry):
        run_as_worker(app.celery, publication, {})

    assert app.sent() == []


def test_headers_that_are_copied_to_another_call_do_not_take_the_row_with_them(
    make_outbox, database, start_worker, rows_of
):
    @task(name="copying", bind=True, base=RequestAwareTask)
    def copying(self, request, number):
        write.apply_async((number,), headers=dict(self.request.headers))

    app = make_outbox(database, write, copying)
    dispatch(app, copying, 1)
    start_worker(app)

    finish(app, 8, 9)
    assert database.notes() == ["note 1", "note 8", "note 9"]
    assert rows_of(app) == []


def test_a_call_with_the_headers_of_a_run_that_fails_is_not_sent(
    make_outbox, database, start_worker, rows_of
):
    @task(name="copying_and_failing", bind=True)
    def copying_and_failing(self, request, number):
        write.apply_async((number,), headers=dict(self.request.headers))
        raise LookupError

    app = make_outbox(database, write, copying_and_failing)
    dispatch(app, copying_and_failing, 1)
    start_worker(app)

    finish(app, 8, 9)
    assert database.notes() == ["note 8", "note 9"]
    assert [row.task for row in rows_of(app)] == ["copying_and_failing"]


def test_a_chord_that_is_polled_calls_its_body_once_and_leaves_no_row(
    make_outbox, postgres, postgres_results, start_worker, rows_of
):
    gate = threading.Event()

    @task(name="waiting", bind=True, base=RequestAwareTask, max_retries=None)
    def waiting(self, request):
        if not gate.is_set():
            raise self.retry(countdown=0.2)
        return 1

    interval = "result_chord_retry_interval = 0.2\n"
    app = make_outbox(postgres, *TASKS, waiting, celery=interval, ws_celery__outbox__lease="3")
    app.celery.conf.result_backend = postgres_results
    with RequestContext(app.request()), transaction.manager:
        result = chord([waiting.s(), waiting.s()], total.s()).apply_async()
    start_worker(app)

    deadline = time.monotonic() + SOON
    while max(retries(app, rows_of), default=0) < 45:  # that is three leases
        assert time.monotonic() < deadline
        app.celery.outbox.relay.turn()
    assert {row.deliveries for row in rows_of(app)} == {0}
    gate.set()

    assert result.get(SOON) == 2
    finish(app, 8, 9)
    assert postgres.notes() == ["note 8", "note 9", "note 102"]
    assert rows_of(app) == []


def retries(app, rows_of):
    """Return how often what asks for the parts of a chord has been tried again."""
    found = [row for row in rows_of(app) if row.task == "celery.chord_unlock"]
    return [app.celery.outbox.publication_of(row).options["headers"]["retries"] for row in found]
