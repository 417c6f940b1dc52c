"""Whose transaction a row is written in: that of the dispatch, or the call is refused."""

from __future__ import annotations

import pytest
import transaction
import zope.sqlalchemy
from sqlalchemy import event, text
from transaction import TransactionManager

from ws_celery import task
from ws_celery.exceptions import SessionError

EXPLICIT = {"tm__manager_hook": "pyramid_tm.explicit_manager"}


@task(name="work")
def work(request, number):
    pass


@task(name="careless", outbox=False)
def careless(request):
    pass


class _Synchronizer:
    """Calls something when the transaction is about to complete."""

    def __init__(self, call):
        self._call = call

    def newTransaction(self, txn):  # noqa: N802
        pass

    def beforeCompletion(self, txn):  # noqa: N802
        self._call()

    def afterCompletion(self, txn):  # noqa: N802
        pass


@pytest.fixture
def before_completion():
    """Call something before the completion of each transaction of this thread."""
    registered = []

    def register(call):
        registered.append(_Synchronizer(call))
        transaction.manager.registerSynch(registered[-1])

    yield register
    transaction.abort()
    for synchronizer in registered:
        transaction.manager.unregisterSynch(synchronizer)


def row_ids(rows):
    return sorted(str(row.id) for row in rows)


def headers(messages):
    return sorted(message.headers["ws_celery_outbox"] for message in messages)


@pytest.mark.parametrize("earlier", [0, 1])
def test_what_a_synchronizer_dispatches_before_the_completion_has_a_row(
    make_outbox, database, rows_of, before_completion, earlier
):
    app = make_outbox(database, work)
    request = app.request()
    before_completion(lambda: work.delay(request, 2))
    with transaction.manager:
        for number in range(earlier):
            work.delay(request, number)

    assert len(rows_of(app)) == earlier + 1
    assert row_ids(rows_of(app)) == headers(app.sent())


def test_what_a_synchronizer_dispatches_before_an_abort_is_dropped(
    make_outbox, database, rows_of, before_completion
):
    app = make_outbox(database, work)
    request = app.request()
    before_completion(lambda: work.delay(request, 2))
    transaction.begin()
    transaction.abort()

    assert rows_of(app) == app.sent() == []


class _Late:
    """A data manager that dispatches when it commits."""

    transaction_manager = None

    def __init__(self, call, when="commit"):
        self._calls = {when: call}

    def tpc_begin(self, txn):
        pass

    def commit(self, txn):
        self._calls.get("commit", bool)()

    def tpc_vote(self, txn):
        self._calls.get("tpc_vote", bool)()

    def abort(self, txn):
        pass

    tpc_finish = tpc_abort = abort

    def sortKey(self):  # noqa: N802
        return "~zzz"


def test_a_dispatch_in_the_middle_of_the_commit_is_refused(make_outbox, database, rows_of):
    app = make_outbox(database, work)
    request = app.request()
    transaction.begin()
    transaction.get().join(_Late(lambda: work.delay(request, 1)))

    with pytest.raises(SessionError, match="dispatch before it commits"):
        transaction.commit()

    transaction.abort()
    assert rows_of(app) == app.sent() == []


@pytest.fixture(params=["postgres", "sqlite", "mariadb in two phases"])
def committing(request):
    """A database whose sessions commit in one phase, or in two."""
    kind, _, phases = request.param.partition(" in ")
    found = request.getfixturevalue(kind)
    found.sessions.configure(twophase=bool(phases))
    return found


@pytest.mark.parametrize("earlier", [0, 1])
@pytest.mark.parametrize("name", ["after_commit", "after_transaction_end"])
def test_a_dispatch_when_the_session_has_committed_has_a_row_of_its_own(
    make_outbox, committing, rows_of, name, earlier
):
    app = make_outbox(committing, work)
    request = app.request()
    with transaction.manager:
        for number in range(earlier):
            work.delay(request, number)
        session = request.dbsession
        session.execute(text("INSERT INTO notes VALUES (1, 'written')"))
        zope.sqlalchemy.mark_changed(session)
        event.listen(session, name, lambda *_: work.delay(request, 2), once=True)

    assert committing.notes() == ["written"]
    assert len(rows_of(app)) == earlier + 1
    assert row_ids(rows_of(app)) == headers(app.sent())


def test_a_dispatch_when_the_session_has_committed_is_dropped_if_another_one_does_not(
    make_outbox, database, rows_of
):
    app = make_outbox(database, work)
    request = app.request()

    def refuse():
        raise LookupError("no")

    transaction.begin()
    event.listen(request.dbsession, "after_commit", lambda *_: work.delay(request, 2))
    zope.sqlalchemy.mark_changed(request.dbsession)
    transaction.get().join(_Late(refuse, "tpc_vote"))
    with pytest.raises(LookupError):
        transaction.commit()
    transaction.abort()

    assert rows_of(app) == app.sent() == []


def test_a_dispatch_when_the_session_has_committed_is_sent_though_its_row_cannot_be_written(
    make_outbox, database
):
    app = make_outbox(database, work)
    request = app.request()

    with transaction.manager:
        event.listen(request.dbsession, "after_commit", lambda *_: work.delay(request, 2))
        zope.sqlalchemy.mark_changed(request.dbsession)
        app.celery.outbox.table.drop(database.engine)

    (message,) = app.sent()
    assert message.args == [2]
    assert "ws_celery_outbox" not in message.headers


def test_a_request_whose_own_transaction_is_not_open_is_refused_at_the_call(
    make_outbox, database, rows_of
):
    app = make_outbox(database, work, **EXPLICIT)
    request = app.request()

    with transaction.manager, pytest.raises(SessionError, match="whose transaction is open"):
        work.delay(request, 1)

    assert rows_of(app) == app.sent() == []


def test_a_row_is_written_with_the_session_of_the_request_that_dispatches_it(
    make_outbox, database, rows_of
):
    app = make_outbox(database, work, careless, **EXPLICIT)
    other, request = app.request(), app.request()
    request.tm = transaction.manager
    with transaction.manager:
        careless.delay(other)  # whose own transaction is not open
        work.delay(request, 1)

    assert row_ids(rows_of(app)) == headers(app.sent()[1:])


def test_a_session_that_works_in_another_transaction_is_refused_at_the_call(
    make_outbox, database, rows_of
):
    app = make_outbox(database, work)
    request = app.request()
    other = TransactionManager()
    session = database.sessions()
    zope.sqlalchemy.register(session, transaction_manager=other)
    session.execute(text("SELECT 1"))
    request.dbsession = session

    with transaction.manager, pytest.raises(SessionError, match="belongs to another"):
        work.delay(request, 1)

    other.abort()
    assert rows_of(app) == app.sent() == []


def test_a_dispatch_after_a_savepoint_that_was_rolled_back_has_a_row(
    make_outbox, postgres, rows_of
):
    app = make_outbox(postgres, work)
    request = app.request()
    with transaction.manager:
        savepoint = transaction.savepoint()
        work.delay(request, 1)
        savepoint.rollback()
        work.delay(request, 2)

    assert len(rows_of(app)) == 1
    assert row_ids(rows_of(app)) == headers(app.sent())
