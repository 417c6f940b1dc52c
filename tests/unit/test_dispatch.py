"""When a dispatched task is sent: with the transaction that somebody finishes, or at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import transaction
from pyramid.request import Request
from pyramid.response import Response
from transaction.interfaces import (
    IDataManagerSavepoint,
    ISavepointDataManager,
    ISynchronizer,
    TransactionFailedError,
)
from zope.interface.verify import verifyObject

from ws_celery import immediately, task
from ws_celery.app import PyramidCelery
from ws_celery.interfaces import ICeleryApp
from ws_celery.shell import open_transaction


@task(name="add")
def add(request, x, y=0):
    return x + y


@task(name="other")
def other(request):
    """Do nothing."""


@pytest.fixture
def app(make_app):
    return make_app(add, other)


# Commit and abort


def test_nothing_is_sent_before_the_commit(app):
    transaction.begin()
    add.delay(1)

    assert app.names() == []


def test_a_task_is_sent_when_the_transaction_commits(app):
    transaction.begin()
    add.delay(1)
    transaction.commit()

    assert app.names() == ["add"]


def test_tasks_are_sent_in_the_order_of_their_calls(app):
    with transaction.manager:
        other.delay()
        add.delay(1)
        other.delay()

    assert app.names() == ["other", "add", "other"]


def test_a_task_of_an_aborted_transaction_is_never_sent(app):
    transaction.begin()
    add.delay(1)
    transaction.abort()
    transaction.begin()
    transaction.commit()

    assert app.names() == []


def test_a_task_of_a_doomed_transaction_is_never_sent(app):
    transaction.begin()
    add.delay(1)
    transaction.doom()
    add.delay(2)
    transaction.abort()

    assert app.names() == []


def test_a_transaction_abandoned_by_begin_sends_nothing(app):
    transaction.begin()
    add.delay(1)
    transaction.begin()
    add.delay(2)
    transaction.commit()

    assert [message.args for message in app.sent()] == [[2]]


class Refusing:
    """A data manager that votes no."""

    transaction_manager = transaction.manager

    def tpc_vote(self, txn):
        raise RuntimeError("no")

    def abort(self, txn):
        """Nothing to undo."""

    tpc_begin = commit = tpc_finish = tpc_abort = abort

    def sortKey(self):  # noqa: N802 - the name is the interface's
        return "~refusing"


def test_a_task_is_not_sent_if_another_data_manager_votes_no(app):
    transaction.begin()
    add.delay(1)
    transaction.get().join(Refusing())

    with pytest.raises(RuntimeError, match="no"):
        transaction.commit()
    transaction.abort()

    assert app.names() == []


def test_the_transaction_after_a_failed_commit_sends_its_own_tasks_only(app):
    transaction.begin()
    add.delay(1)
    transaction.get().join(Refusing())
    with pytest.raises(RuntimeError, match="no"):
        transaction.commit()

    with transaction.manager:
        add.delay(2)

    assert [message.args for message in app.sent()] == [[2]]


def test_two_managers_in_one_thread_keep_apart(app):
    first, second = (transaction.TransactionManager(explicit=True) for _ in range(2))
    requests = [app.request(**{"tm.manager": manager}) for manager in (first, second)]
    first.begin()
    second.begin()
    add.delay(requests[0], 1)
    add.delay(requests[1], 2)

    first.abort()
    second.commit()

    assert [message.args for message in app.sent()] == [[2]]


# Savepoints


def test_a_task_of_a_rolled_back_savepoint_is_never_sent(app):
    transaction.begin()
    add.delay(1)
    savepoint = transaction.savepoint()
    add.delay(2)
    savepoint.rollback()
    add.delay(3)
    transaction.commit()

    assert [message.args for message in app.sent()] == [[1], [3]]


def test_the_first_task_of_a_rolled_back_savepoint_is_never_sent(app):
    transaction.begin()
    savepoint = transaction.savepoint()
    add.delay(1)
    savepoint.rollback()
    transaction.commit()

    assert app.names() == []


def test_a_task_is_sent_although_the_first_one_was_rolled_back(app):
    transaction.begin()
    savepoint = transaction.savepoint()
    add.delay(1)
    savepoint.rollback()
    add.delay(2)
    transaction.commit()

    assert [message.args for message in app.sent()] == [[2]]


def test_savepoints_count_after_the_first_task_was_rolled_back(app):
    transaction.begin()
    savepoint = transaction.savepoint()
    add.delay(1)
    savepoint.rollback()
    add.delay(2)
    later = transaction.savepoint()
    add.delay(3)
    later.rollback()
    add.delay(4)
    transaction.commit()

    assert [message.args for message in app.sent()] == [[2], [4]]


def test_a_savepoint_can_be_rolled_back_twice(app):
    transaction.begin()
    savepoint = transaction.savepoint()
    add.delay(1)
    savepoint.rollback()
    add.delay(2)
    savepoint.rollback()
    add.delay(3)
    transaction.commit()

    assert [message.args for message in app.sent()] == [[3]]


def test_an_inner_savepoint_is_rolled_back_alone(app):
    transaction.begin()
    add.delay(1)
    transaction.savepoint()
    add.delay(2)
    inner = transaction.savepoint()
    add.delay(3)
    inner.rollback()
    transaction.commit()

    assert [message.args for message in app.sent()] == [[1], [2]]


def test_an_outer_savepoint_takes_the_inner_ones_along(app):
    transaction.begin()
    add.delay(1)
    outer = transaction.savepoint()
    add.delay(2)
    transaction.savepoint()
    add.delay(3)
    outer.rollback()
    transaction.commit()

    assert [message.args for message in app.sent()] == [[1]]


def test_a_task_called_after_a_failed_savepoint_fails_at_the_call(app):
    transaction.begin()
    transaction.get().join(Refusing())
    with pytest.raises(TypeError, match="Savepoints unsupported"):
        transaction.savepoint()

    with pytest.raises(TransactionFailedError):
        add.delay(1)


# Which transactions


def test_without_a_transaction_a_task_is_sent_at_once(app):
    add.delay(1)

    assert app.names() == ["add"]


def test_an_implicit_transaction_of_the_thread_does_not_defer(app):
    add.delay(1)  # the manager has been seen
    transaction.get()
    add.delay(2)

    assert len(app.names()) == 2


def test_an_implicit_transaction_older_than_the_first_call_does_not_defer(app):
    transaction.get()
    add.delay(1)

    assert app.names() == ["add"]


def test_a_transaction_begun_in_a_with_statement_defers(app):
    with transaction.manager:
        add.delay(1)
        assert app.names() == []

    assert app.names() == ["add"]


def test_a_transaction_begun_by_the_manager_of_the_request_defers(app):
    manager = transaction.TransactionManager(explicit=True)
    request = app.request(**{"tm.manager": manager})

    with manager:
        add.delay(request, 1)
        assert app.names() == []

    assert app.names() == ["add"]


def test_an_explicit_manager_without_a_transaction_does_not_defer(app):
    manager = transaction.TransactionManager(explicit=True)

    add.delay(app.request(**{"tm.manager": manager}), 1)

    assert app.names() == ["add"]


def test_the_thread_defers_where_the_manager_of_the_request_has_no_transaction(app):
    request = app.request(**{"tm.manager": transaction.TransactionManager(explicit=True)})

    with transaction.manager:
        add.delay(request, 1)
        assert app.names() == []


@pytest.fixture(params=["pyramid_tm.explicit_manager", None])
def visit(request, make_app):
    """Request a page, with each kind of manager; returns the application and what the view does."""

    def visit(view):
        def setup(config):
            config.add_route("home", "/")
            config.add_view(view, route_name="home")

        hook = {"tm__manager_hook": request.param} if request.param else {}
        app = make_app(add, other, setup=setup, **hook)
        app.web.get("/")
        return app

    return visit


def in_a_thread(*call):
    function, *arguments = call
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *arguments).result()


@pytest.mark.parametrize("doomed", [True, False])
def test_a_thread_that_is_handed_the_request_defers_until_that_commits(visit, doomed):
    def view(request):
        in_a_thread(add.delay, request, 1)
        if doomed:
            request.tm.doom()
        return Response("done")

    assert visit(view).names() == ([] if doomed else ["add"])


def test_a_thread_that_has_kept_the_request_does_not_meet_the_next_transaction(visit):
    kept = []

    def view(request):
        kept.append(request)
        return Response("done")

    app = visit(view)
    transaction.begin()
    in_a_thread(add.delay, kept[0], 1)
    transaction.abort()

    assert app.names() == ["add"]


def implicitly():
    transaction.get()
    add.delay(1)


def unfinished():
    transaction.begin()
    add.delay(1)


def committed():
    with transaction.manager:
        add.delay(1)


def aborted():
    transaction.begin()
    add.delay(1)
    transaction.abort()


@pytest.mark.parametrize(
    ("call", "sent", "told"),
    [
        (implicitly, 0, 1),
        (unfinished, 0, 1),
        (committed, 1, 0),
        (aborted, 0, 0),
        (lambda: (aborted(), committed()), 1, 0),
        (lambda: (committed(), unfinished()), 1, 1),
    ],
)
def test_a_thread_that_ends_in_the_middle_of_its_transaction_says_what_is_not_sent(
    app, caplog, call, sent, told
):
    in_a_thread(call)

    assert len(app.names()) == sent
    warnings = [each for each in caplog.messages if "nobody has committed" in each]
    assert len(warnings) == told
    assert all("not sent: add. Dispatch in" in each for each in warnings)


def test_a_thread_that_is_handed_a_request_leaves_its_transaction_to_others(visit, caplog):
    def view(request):
        in_a_thread(add.delay, request, 1)
        return Response("done")

    assert visit(view).names() == ["add"]
    assert "nobody has committed" not in caplog.text


# At once, on purpose


def test_immediately_sends_before_the_commit(app):
    transaction.begin()
    with immediately():
        add.delay(1)

    assert app.names() == ["add"]


def test_after_immediately_tasks_are_deferred_again(app):
    transaction.begin()
    with immediately():
        other.delay()
    add.delay(1)

    assert app.names() == ["other"]


def test_an_explicit_producer_sends_at_once(app):
    transaction.begin()
    with app.celery.producer_pool.acquire(block=True) as producer:
        add.apply_async((1,), producer=producer)

    assert app.names() == ["add"]


def test_an_explicit_connection_sends_at_once(app):
    transaction.begin()
    with app.celery.connection_for_write() as connection:
        add.apply_async((1,), connection=connection)

    assert app.names() == ["add"]


# Hooks


def test_a_task_called_in_a_before_commit_hook_is_sent(app):
    transaction.begin()
    transaction.get().addBeforeCommitHook(add.delay, (1,))
    transaction.commit()

    assert app.names() == ["add"]


def test_a_task_called_in_an_after_commit_hook_is_sent(app):
    transaction.begin()
    transaction.get().addAfterCommitHook(lambda _committed: add.delay(1))
    transaction.commit()

    assert app.names() == ["add"]


def test_a_task_called_in_an_after_commit_hook_is_sent_besides_the_deferred_ones(app):
    transaction.begin()
    transaction.get().addAfterCommitHook(lambda _committed: add.delay(1))
    other.delay()
    transaction.get().addAfterCommitHook(lambda _committed: add.delay(2))
    transaction.commit()

    assert sorted(app.names()) == ["add", "add", "other"]


class Dispatching(Refusing):
    """A data manager that dispatches while the transaction commits."""

    def tpc_begin(self, txn):
        add.delay(1)

    def tpc_vote(self, txn):
        """Agree."""


def test_a_task_called_while_the_transaction_commits_is_sent(app):
    transaction.begin()
    transaction.get().join(Dispatching())
    transaction.commit()

    assert app.names() == ["add"]


def test_a_task_called_while_the_transaction_commits_is_not_sent_if_it_fails(app):
    transaction.begin()
    transaction.get().join(Dispatching())
    transaction.get().join(Refusing())
    with pytest.raises(RuntimeError, match="no"):
        transaction.commit()

    assert app.names() == []


@pytest.mark.parametrize("doomed", [True, False])
def test_a_task_called_in_an_after_abort_hook_is_sent_at_once(app, doomed):
    transaction.begin()
    other.delay()
    transaction.get().addAfterAbortHook(add.delay, (1,))
    if doomed:
        transaction.doom()
    transaction.abort()

    assert app.names() == ["add"]


def test_a_task_called_by_a_synchronizer_after_an_abort_is_sent_at_once(make_app):
    class Synchronizer:
        def newTransaction(self, txn):  # noqa: N802
            pass

        beforeCompletion = newTransaction  # noqa: N815

        def afterCompletion(self, txn):  # noqa: N802
            add.delay(1)

    synchronizer = Synchronizer()
    transaction.manager.registerSynch(synchronizer)  # before ours, and so called before
    app = make_app(add)
    transaction.begin()
    transaction.abort()
    transaction.manager.unregisterSynch(synchronizer)

    assert app.names() == ["add"]


# Transactions that the function ends itself, while somebody else finishes the last one


def end(request, how):
    getattr(request.tm, how)()
    if request.tm is not transaction.manager:
        request.tm.begin()


@pytest.mark.parametrize("doomed", [True, False])
@pytest.mark.parametrize("how", ["commit", "abort"])
def test_a_view_that_ends_its_transaction_dispatches_with_the_next_one(visit, how, doomed):
    def view(request):
        other.delay()
        end(request, how)
        add.delay(1)
        if doomed:
            request.tm.doom()
        return Response("done")

    committed = ["other"] if how == "commit" else []
    assert visit(view).names() == committed + ([] if doomed else ["add"])


def test_what_the_last_commit_of_a_view_dispatches_itself_is_not_sent_if_it_fails(make_app):
    def view(request):
        transaction.commit()
        transaction.get().addBeforeCommitHook(add.delay, (1,))
        transaction.get().join(Refusing())
        return Response("done")

    def setup(config):
        config.add_route("home", "/")
        config.add_view(view, route_name="home")

    app = make_app(add, setup=setup)
    with pytest.raises(RuntimeError, match="no"):
        app.web.get("/")

    assert app.names() == []


@pytest.mark.parametrize("how", ["commit", "abort"])
def test_a_hook_of_what_a_view_has_ended_is_outside_of_the_next_transaction(visit, how):
    def view(request):
        end(request, "commit")
        request.tm.get().addAfterCommitHook(lambda _committed: add.delay(1))
        request.tm.get().addAfterAbortHook(add.delay, (1,))
        end(request, how)
        request.tm.doom()
        return Response("done")

    assert visit(view).names() == ["add"]


def test_a_hook_of_a_commit_of_a_view_that_fails_is_outside_of_it(visit):
    def view(request):
        request.tm.get().addAfterCommitHook(lambda committed: committed or add.delay(1))
        request.tm.get().join(Refusing())
        with pytest.raises(RuntimeError, match="no"):
            request.tm.commit()
        request.tm.abort()
        if request.tm is not transaction.manager:
            request.tm.begin()
        request.tm.doom()
        return Response("done")

    assert visit(view).names() == ["add"]


@pytest.mark.parametrize("doomed", [True, False])
def test_what_follows_a_subrequest_with_a_transaction_of_its_own_waits_for_the_view(
    make_app, doomed
):
    def view(request):
        request.invoke_subrequest(Request.blank("/inner"), use_tweens=True)
        add.delay(1)
        if doomed:
            request.tm.doom()
        return Response("done")

    def setup(config):
        config.add_route("home", "/")
        config.add_view(view, route_name="home")
        config.add_route("inner", "/inner")
        config.add_view(lambda _request: Response("inner"), route_name="inner")

    app = make_app(add, setup=setup)
    app.web.get("/")

    assert app.names() == ([] if doomed else ["add"])


def test_after_a_request_an_implicit_transaction_is_waited_for_no_more(visit):
    kept = []

    def view(request):
        kept.append(request)
        end(request, "commit")
        add.delay(1)
        return Response("done")

    app = visit(view)
    assert app.names() == ["add"]
    transaction.get()
    add.delay(kept[0], 2)

    assert app.names() == ["add"]


def test_what_follows_a_commit_by_hand_in_a_shell_waits_for_the_shell(app):
    env = {"request": app.request()}
    with open_transaction(env):
        transaction.commit()
        add.delay(env["request"], 1)
        assert app.names() == []
        env["commit"]()
        assert app.names() == ["add"]
        transaction.commit()
        add.delay(env["request"], 2)

    assert app.names() == []


# Events travel along


def test_a_task_sent_event_waits_with_its_task(make_app):
    app = make_app(add, celery="task_send_sent_event = true")
    transaction.begin()
    add.delay(1)
    data_manager = transaction.get().data(app.celery)

    tasks = [
        (publication.task_name, publication.task_id is None)
        for publication in data_manager.publications
    ]

    assert tasks == [("add", False), (None, True)]


# Interfaces


def test_the_data_manager_keeps_the_contract_of_savepoints(app):
    transaction.begin()
    add.delay(1)
    data_manager = transaction.get().data(app.celery)

    assert verifyObject(ISavepointDataManager, data_manager)
    assert verifyObject(IDataManagerSavepoint, data_manager.savepoint())


def test_the_data_manager_sorts_before_one_that_commits_while_it_votes(app):
    transaction.begin()
    add.delay(1)

    assert transaction.get().data(app.celery).sortKey() < "~sqlalchemy"


def test_what_watches_a_manager_is_a_synchronizer(app):
    watching = app.celery.transactions.watch(transaction.manager, begun=True)

    assert verifyObject(ISynchronizer, watching)


def test_the_celery_app_provides_its_interface(app):
    assert isinstance(app.celery, PyramidCelery)
    assert verifyObject(ICeleryApp, app.celery)


def test_a_transaction_made_in_passing_before_the_first_request_of_a_thread_is_nobodys(make_app):
    app = make_app(add, include=())

    def thread():
        transaction.get()
        app.celery.transactions.watch(transaction.manager, begun=False)
        add.delay(1, 2)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(thread).result()

    assert app.names() == ["add"]
