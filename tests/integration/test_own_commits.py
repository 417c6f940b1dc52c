"""Functions that commit, abort or begin by themselves: what they do, and how their runs end."""

from __future__ import annotations

import itertools
import json
from contextlib import suppress

import pytest
import transaction
from pyramid.response import Response
from tests.notes import follow, insert, write
from tests.waiting import wait_for
from transaction.interfaces import TransientError

from ws_celery import task
from ws_celery.exceptions import Abandoned
from ws_celery.outbox.relay import Deliveries
from ws_celery.recording import Publication
from ws_celery.testing.captured import run_as_worker
from ws_celery.worker import run_of

EXPLICIT = {"tm__manager_hook": "pyramid_tm.explicit_manager"}


def commit(request, _number):
    request.tm.commit()
    _begin(request)


def abort(request, _number):
    request.tm.abort()
    _begin(request)


def _begin(request):
    if request.tm is not transaction.manager:
        request.tm.begin()


def with_manager(request, number):
    with request.tm:
        insert(request, number + 5)
        write.delay(number + 6)


#: What the function does between its two effects.
DEEDS = {
    "commit": commit,
    "abort": abort,
    "begin": lambda request, _number: request.tm.begin(),
    "doom": lambda request, _number: request.tm.doom(),
    "with request.tm": with_manager,
    "transaction.begin()": lambda _request, _number: transaction.begin(),
}
ENDS = ("return", "raise", "retry", "replace")


@task(name="work", bind=True)
def work(self, request, deed, end):
    """Write a row and dispatch a task, before and after the deed."""
    number = 10 * self.request.retries
    insert(request, number + 1)
    write.delay(number + 2)
    DEEDS[deed](request, number)
    insert(request, number + 3)
    write.delay(number + 4)
    if end == "raise":
        raise LookupError("no such thing")
    if end == "retry" and not self.request.retries:
        raise self.retry(countdown=0)
    if end == "replace":
        self.replace(write.s(9))


def expected(deed, end, *, explicit):
    """Return the numbers of the rows that there are to be, and how many dead letters."""
    if explicit and deed in ("begin", "with request.tm"):
        return [], 1  # AlreadyInTransaction
    if explicit and deed == "transaction.begin()":
        deed = "nothing"  # that is not the manager of the request
    numbers = committed(deed, end, 0)
    if end == "retry":
        numbers |= committed(deed, "return", 10)
    if end == "replace":
        numbers.add(9)
    return sorted(numbers), int(end == "raise")


def committed(deed, end, number):
    at_the_end = end in ("return", "replace") and deed != "doom"
    found = {3, 4} if at_the_end else set()
    if deed == "commit" or (deed == "nothing" and at_the_end):
        found |= {1, 2}
    if deed == "with request.tm":
        found |= {5, 6}
    return {number + each for each in found}


@pytest.fixture
def run_all(rows_of):
    """Run all messages as a worker does, and those that they send; returns how each run ended."""

    def run_all(app, *, twice=False):
        ended = []
        while messages := app.sent():
            for message in messages * (2 if twice else 1):
                try:
                    run_as_worker(app.celery, publication_of(message), {})
                    ended.append(None)
                except Exception as error:  # noqa: BLE001 - as the tests look at it
                    ended.append(type(error).__name__)
        return ended

    return run_all


def publication_of(message):
    body = json.dumps([message.args, message.kwargs, message.embed])
    headers = dict(message.headers)
    kind = {"content_type": "application/json", "content_encoding": "utf-8"}
    return Publication(body, {"headers": headers, **kind})


def numbers(database):
    return [int(note.removeprefix("note ")) for note in database.notes()]


@pytest.fixture(params=["explicit manager", "manager of the thread"])
def options(request):
    return EXPLICIT if request.param == "explicit manager" else {}


@pytest.mark.parametrize("kind", ["postgres", "sqlite", "mariadb"])
def test_each_commit_of_a_function_is_once_and_its_run_comes_to_an_end(
    request, make_outbox, rows_of, run_all, options, kind
):
    database = request.getfixturevalue(kind)
    app = make_outbox(database, work, write, **options)
    found, right = {}, {}
    for each in itertools.product(DEEDS, ENDS):
        send(app, work, *each)
        run_all(app, twice=True)
        dead = [row for row in rows_of(app) if row.due_at is None]
        assert len(dead) == len(rows_of(app)), each
        found[each] = numbers(database), len(dead)
        right[each] = expected(*each, explicit=bool(options))
        database.execute("DELETE FROM notes")
        with app.celery.outbox.begin() as connection:
            connection.execute(app.celery.outbox.table.delete())

    assert found == right


def test_each_commit_of_a_function_is_its_own_without_an_outbox(make_app, sqlite, run_all, options):
    app = make_app(work, write, setup=sqlite.includeme, **options)
    found, right = {}, {}
    for each in itertools.product(DEEDS, ENDS):
        send(app, work, *each)
        failures = [error for error in run_all(app) if error not in (None, "Retry", "Ignore")]
        found[each] = numbers(sqlite), len(failures)
        right[each] = expected(*each, explicit=bool(options))
        sqlite.execute("DELETE FROM notes")

    assert found == right


def send(app, task, *args, **options):
    request = app.request()
    with request.tm:
        return task.apply_async((request, *args), **options)


# One by one


@task(name="ending", bind=True)
def ending(self, request, end):
    """End the transaction, and go on without one."""
    insert(request, 1 + self.request.retries)
    write.delay(3 + self.request.retries)
    request.tm.commit()
    if end == "raise":
        raise LookupError("no such thing")
    if end == "retry" and not self.request.retries:
        raise self.retry(countdown=0)
    if end == "replace":
        self.replace(write.s(9))


@pytest.mark.parametrize(
    ("end", "right"),
    [
        ("return", ([1, 3], None)),
        ("raise", ([1, 3], "LookupError")),
        ("retry", ([1, 2, 3, 4], None)),
        ("replace", ([1, 3, 9], None)),
    ],
)
def test_a_function_may_end_its_transaction_and_open_no_other(
    make_outbox, database, rows_of, run_all, options, end, right
):
    app = make_outbox(database, ending, write, **options)
    send(app, ending, end)
    run_all(app, twice=True)

    dead = [row.error.splitlines()[-1].partition(":")[0] for row in rows_of(app)]
    assert (numbers(database), dead) == (right[0], [right[1]] if right[1] else [])


@pytest.mark.parametrize("end", ENDS)
def test_a_function_may_end_its_transaction_without_an_outbox(
    make_app, sqlite, run_all, options, end
):
    app = make_app(ending, write, setup=sqlite.includeme, **options)
    send(app, ending, end)
    ended = run_all(app)

    own = {"return": None, "raise": "LookupError", "retry": "Retry", "replace": "Ignore"}
    assert ended[0] == own[end]
    also = {"retry": [2, 4], "replace": [9]}.get(end, [])
    assert numbers(sqlite) == sorted([1, 3, *also])


def test_a_conflict_after_a_commit_of_the_function_does_not_repeat_it(
    make_outbox, database, rows_of, run_all, options
):
    runs = []

    @task(name="conflicting", bind=True)
    def conflicting(self, request):
        runs.append(run_of(self.request).attempts_left)
        insert(request, len(runs))
        commit(request, 0)
        raise TransientError("in the second half")

    app = make_outbox(database, conflicting, **options)
    send(app, conflicting)
    run_all(app, twice=True)

    (row,) = rows_of(app)
    assert runs == [2]
    assert numbers(database) == [1]
    assert row.due_at is None
    assert "in the second half" in row.error


def test_a_function_that_wants_to_be_retried_after_a_conflict_has_its_way(
    make_outbox, database, rows_of, run_all, options
):
    @task(name="batches", bind=True, autoretry_for=(TransientError,), default_retry_delay=0)
    def batches(self, request):
        insert(request, 1 + self.request.retries)
        commit(request, 0)
        if not self.request.retries:
            raise TransientError

    app = make_outbox(database, batches, **options)
    send(app, batches)
    run_all(app, twice=True)

    assert numbers(database) == [1, 2]
    assert rows_of(app) == []


def test_a_process_that_dies_after_a_commit_of_its_function_leaves_a_dead_letter(
    make_outbox, database, rows_of, options
):
    @task(name="dying")
    def dying(request):
        insert(request, 1)
        commit(request, 0)
        insert(request, 2)
        raise SystemExit

    app = make_outbox(database, dying, **options)
    send(app, dying, expires=3600)
    (message,) = app.sent()
    with pytest.raises(SystemExit):
        run_as_worker(app.celery, publication_of(message), {})
    with pytest.raises(Abandoned, match="has run"):
        run_as_worker(app.celery, publication_of(message), {})

    (rest,) = rows_of(app)
    assert rest.due_at is not None
    assert rest.expires is None  # or the relay would delete it
    outbox = app.celery.outbox
    outbox.execute(outbox.rows.make_all_due, outbox.lease)
    assert Deliveries(outbox).lease(10, lambda _queue: 0).publications == []
    (rest,) = rows_of(app)
    assert rest.due_at is None
    assert "committed by itself" in rest.error
    assert app.celery.outbox.publication_of(rest).task_name == "dying"
    assert numbers(database) == [1]


class _Refusing:
    """A data manager that votes no."""

    transaction_manager = None

    def tpc_vote(self, txn):
        raise LookupError("no")

    def abort(self, txn):
        pass

    tpc_begin = commit = tpc_finish = tpc_abort = abort

    def sortKey(self):  # noqa: N802
        return "refusing"


def commit_twice(request, _number):
    commit(request, 0)
    commit(request, 0)


def commit_nothing(request, _number):
    abort(request, 0)
    commit(request, 0)


def commit_in_vain(request, _number):
    request.tm.get().join(_Refusing())
    with suppress(LookupError):
        request.tm.commit()
    abort(request, 0)


@pytest.mark.parametrize(
    ("deed", "right"),
    [(commit_twice, [1, 2, 3]), (commit_nothing, [2, 3]), (commit_in_vain, [2, 3])],
)
def test_a_function_may_go_on_after_commits_of_its_own(
    make_outbox, database, rows_of, run_all, options, deed, right
):
    @task(name="going_on")
    def going_on(request):
        insert(request, 1)
        deed(request, 0)
        insert(request, 2)
        commit(request, 0)
        insert(request, 3)

    app = make_outbox(database, going_on, **options)
    send(app, going_on)
    run_all(app, twice=True)

    assert numbers(database) == right
    assert rows_of(app) == []


def test_a_run_that_outlives_its_lease_after_a_commit_of_its_own_ends(
    make_outbox, database, rows_of, run_all, options
):
    @task(name="long")
    def long(request):
        insert(request, 1)
        commit(request, 0)
        outbox = app.celery.outbox
        outbox.execute(outbox.rows.make_all_due, outbox.lease)
        Deliveries(outbox).lease(10, lambda _queue: 0)
        (row,) = rows_of(app)
        assert row.due_at is None
        insert(request, 2)

    app = make_outbox(database, long, **options)
    send(app, long)
    run_all(app)

    assert numbers(database) == [1, 2]
    assert rows_of(app) == []


def test_a_chain_goes_on_once_after_a_commit_of_the_function(
    make_outbox, database, rows_of, run_all, options
):
    app = make_outbox(database, work, write, follow, **options)
    send(app, work, "commit", "return", link=follow.si(None, 9))
    run_all(app, twice=True)

    assert numbers(database) == [1, 2, 3, 4, 9]
    assert rows_of(app) == []


def test_a_run_whose_claim_was_given_back_by_an_abort_ends_as_a_duplicate_of_another(
    make_outbox, postgres, rows_of, run_all, options
):
    messages, runs = [], []

    @task(name="aborting")
    def aborting(request):
        runs.append(request)
        if len(runs) > 1:  # the other one
            insert(request, 1)
            return
        abort(request, 0)
        insert(request, 2)
        run_as_worker(app.celery, publication_of(messages[0]), {})

    app = make_outbox(postgres, aborting, **options)
    send(app, aborting)
    messages += app.sent()
    with pytest.raises(Abandoned, match="has run"):
        run_as_worker(app.celery, publication_of(messages[0]), {})

    assert len(runs) == 2
    assert numbers(postgres) == [1]
    assert rows_of(app) == []


def test_a_worker_retries_and_buries_what_comes_after_a_commit_of_the_function(
    make_outbox, postgres, rows_of, start_worker
):
    app = make_outbox(postgres, work, write)
    send(app, work, "commit", "retry")
    start_worker(app)
    wait_for(lambda: rows_of(app) == [])
    assert numbers(postgres) == [1, 2, 11, 12, 13, 14]

    postgres.execute("DELETE FROM notes")
    send(app, work, "commit", "raise")
    wait_for(lambda: [row.due_at for row in rows_of(app)] == [None] and len(numbers(postgres)) == 2)
    assert numbers(postgres) == [1, 2]
    assert "no such thing" in rows_of(app)[0].error


# Views


def serving(view):
    """Let an application have one view."""

    def setup(config):
        config.add_route("home", "/")
        config.add_view(view, route_name="home")

    return setup


@pytest.mark.parametrize("doomed", [True, False])
@pytest.mark.parametrize("how", ["commit", "abort"])
def test_what_a_view_dispatches_after_a_commit_or_abort_of_its_own_has_a_row(
    make_outbox, database, rows_of, options, how, doomed
):
    def view(request):
        write.delay(request, 1)
        {"commit": commit, "abort": abort}[how](request, 0)
        write.delay(request, 2)
        if doomed:
            request.tm.doom()
        return Response("done")

    app = make_outbox(database, write, setup=serving(view), **options)
    app.web.get("/")

    messages = app.sent()
    right = ([[1]] if how == "commit" else []) + ([] if doomed else [[2]])
    assert sorted(message.args for message in messages) == right
    assert {str(row.id) for row in rows_of(app)} == {
        message.headers["ws_celery_outbox"] for message in messages
    }


def test_what_a_hook_after_an_abort_dispatches_is_sent_at_once_and_has_no_row(
    make_outbox, sqlite, rows_of, options
):
    app = make_outbox(sqlite, write, **options)
    request = app.request()
    request.tm.begin()
    write.delay(request, 1)
    request.tm.get().addAfterAbortHook(write.delay, (request, 2))
    request.tm.abort()

    (message,) = app.sent()
    assert message.args == [2]
    assert "ws_celery_outbox" not in message.headers
    assert rows_of(app) == []


def test_what_a_hook_of_a_view_s_own_commit_dispatches_is_sent_at_once_and_has_no_row(
    make_outbox, sqlite, rows_of, options
):
    def view(request):
        request.tm.get().addAfterCommitHook(lambda _: write.delay(request, 1))
        commit(request, 0)
        request.tm.doom()
        return Response("done")

    app = make_outbox(sqlite, write, setup=serving(view), **options)
    app.web.get("/")

    (message,) = app.sent()
    assert "ws_celery_outbox" not in message.headers
    assert rows_of(app) == []


@pytest.mark.parametrize("kind", ["postgres", "sqlite", "mariadb"])
def test_a_function_that_rolls_back_its_session_itself_fails_and_has_no_effect(
    request, make_outbox, rows_of, run_all, options, kind
):
    @task(name="rolling_back")
    def rolling_back(request):
        insert(request, 1)
        request.dbsession.rollback()  # the claim, too, behind the back of the transaction
        insert(request, 2)

    database = request.getfixturevalue(kind)
    app = make_outbox(database, rolling_back, **options)
    send(app, rolling_back)
    ended = run_all(app, twice=True)

    assert ended == ["ResourceClosedError", "Abandoned"]
    assert numbers(database) == []
    assert [row.due_at for row in rows_of(app)] == [None]
