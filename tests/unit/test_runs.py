"""One run of a task: its request, its transaction, and what each way to end does to both."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
import transaction
from celery import group
from celery.exceptions import Ignore, MaxRetriesExceededError, Reject, Retry
from pyramid.threadlocal import get_current_registry, get_current_request
from pyramid_tm import is_tm_active
from transaction.interfaces import TransientError
from zope.interface.verify import verifyObject

from ws_celery import ConfigurationError, RequestAwareTask, immediately, task
from ws_celery.interfaces import ITaskRequest
from ws_celery.worker import run_of

EXPLICIT = {"tm__manager_hook": "pyramid_tm.explicit_manager"}


class Ledger:
    """A data manager that writes down how its transaction ends."""

    def __init__(self, manager):
        self.transaction_manager = manager
        self.end = None
        manager.get().join(self)

    def abort(self, txn):
        self.end = self.end or "aborted"  # a transaction cleans up after its hooks, too

    def tpc_finish(self, txn):
        self.end = "committed"

    def tpc_begin(self, txn):
        """Nothing to prepare."""

    commit = tpc_vote = tpc_abort = tpc_begin

    def sortKey(self):  # noqa: N802 - the name is the interface's
        return "ledger"


@task(name="later")
def later(request, x=None):
    """Do nothing."""


@pytest.fixture(params=["explicit manager", "manager of the thread", "no pyramid_tm"])
def options(request):
    """Options of an application with each kind of transaction manager."""
    return {
        "explicit manager": EXPLICIT,
        "manager of the thread": {},
        "no pyramid_tm": {"include": ()},
    }[request.param]


@pytest.fixture
def ledgers():
    """What the runs of the tasks of one test have joined to their transactions."""
    return []


@pytest.fixture
def run(make_app, options, ledgers):
    """Run a function as the task of an application of its own, as a worker would."""

    def run(function, **task_options):
        def body(self, request):
            ledgers.append(Ledger(getattr(request, "tm", transaction.manager)))
            return function(self, request)

        decorated = task(name="task", bind=True, **task_options)(body)
        run.app = make_app(decorated, later, **options)
        return run.app.celery.tasks["task"].apply()

    return run


def ends(ledgers):
    return [ledger.end for ledger in ledgers]


# How the transaction ends


def test_a_task_that_returns_commits(run, ledgers):
    result = run(lambda _self, _request: 5)

    assert result.get() == 5
    assert ends(ledgers) == ["committed"]


def test_a_task_that_raises_aborts(run, ledgers):
    def fail(self, request):
        raise LookupError("no such thing")

    result = run(fail)

    assert result.state == "FAILURE"
    assert ends(ledgers) == ["aborted"]


def test_a_task_that_is_interrupted_aborts(run, ledgers):
    def interrupt(self, request):
        raise SystemExit

    with pytest.raises(SystemExit):
        run(interrupt)

    assert ends(ledgers) == ["aborted"]


def test_a_task_that_is_ignored_commits(run, ledgers):
    def ignore(self, request):
        raise Ignore

    result = run(ignore)

    assert result.state == "IGNORED"
    assert ends(ledgers) == ["committed"]


def test_a_task_that_is_rejected_aborts(run, ledgers):
    def reject(self, request):
        raise Reject

    run(reject)

    assert ends(ledgers) == ["aborted"]


def test_a_task_that_dooms_its_transaction_aborts(run, ledgers):
    def doom(self, request):
        getattr(request, "tm", transaction.manager).doom()
        return 5

    result = run(doom)

    assert result.get() == 5
    assert ends(ledgers) == ["aborted"]


def test_a_commit_that_fails_is_a_failure_of_the_task(run, ledgers):
    def refuse_to_commit(self, request):
        def no():
            raise LookupError("no")

        ledgers[-1].transaction_manager.get().addBeforeCommitHook(no)

    result = run(refuse_to_commit)

    assert result.state == "FAILURE"
    assert ends(ledgers) == ["aborted"]


def test_a_run_has_a_transaction_of_its_own(run, ledgers, options):
    transactions = [run(lambda _self, _request: id(ledgers[-1])) for _ in range(2)]

    assert len({result.get() for result in transactions}) == 2


# Tasks that a task calls


def test_a_task_called_by_a_task_is_sent_when_that_one_commits(run):
    sent = []

    def call(self, request):
        later.delay()
        sent.append(run.app.names())

    run(call)

    assert sent == [[]]
    assert run.app.names() == ["later"]


def test_a_task_called_by_a_task_that_fails_is_never_sent(run):
    def call_and_fail(self, request):
        later.delay()
        raise LookupError("no such thing")

    run(call_and_fail)

    assert run.app.names() == []


def test_a_task_called_by_a_task_that_is_ignored_is_sent(run):
    def call_and_ignore(self, request):
        later.delay()
        raise Ignore

    run(call_and_ignore)

    assert run.app.names() == ["later"]


def test_a_task_called_by_a_task_that_is_rejected_is_never_sent(run):
    def call_and_reject(self, request):
        later.delay()
        raise Reject

    run(call_and_reject)

    assert run.app.names() == []


# The request


def test_a_task_has_a_request_of_the_application(run):
    def look(self, request):
        assert verifyObject(ITaskRequest, request)
        return request.registry is run.app.registry and request.celery_app is run.app.celery

    assert run(look).get()


def test_the_request_is_pyramids_current_one_while_the_task_runs(run):
    def look(self, request):
        return get_current_request() is request and get_current_registry() is request.registry

    assert run(look).get()
    assert get_current_request() is None


def test_the_request_is_no_longer_current_when_its_extensions_fail(make_app):
    def broken(request):
        raise LookupError("no such thing")

    @task(name="task")
    def unreachable(request):
        return request.broken

    app = make_app(
        unreachable, setup=lambda c: c.add_request_method(broken, "broken", property=True)
    )

    assert app.celery.tasks["task"].apply().state == "FAILURE"
    assert get_current_request() is None


def test_the_request_is_made_by_the_request_factory_of_the_application(make_app):
    from pyramid.request import Request

    class OwnRequest(Request):
        pass

    @task(name="task")
    def look(request):
        return isinstance(request, OwnRequest)

    app = make_app(look, setup=lambda config: config.set_request_factory(OwnRequest))

    assert app.celery.tasks["task"].apply().get()


def test_finished_callbacks_run_when_the_task_has_returned(run):
    called = []

    run(lambda _self, request: request.add_finished_callback(called.append))

    assert len(called) == 1


def test_finished_callbacks_run_when_the_task_has_failed(run):
    called = []

    def fail(self, request):
        request.add_finished_callback(called.append)
        raise LookupError("no such thing")

    run(fail)

    assert len(called) == 1


def test_finished_callbacks_run_after_the_commit(run, ledgers):
    seen = []

    def remember(request):
        seen.append(ledgers[-1].end)

    run(lambda _self, request: request.add_finished_callback(remember))

    assert seen == ["committed"]


def test_a_finished_callback_that_fails_leaves_no_request_behind(run):
    def fail(request):
        raise LookupError("no such thing")

    run(lambda _self, request: request.add_finished_callback(fail))

    assert get_current_request() is None


def test_a_transaction_is_active_inside_a_task_and_not_after(run):
    requests = []

    def look(self, request):
        requests.append(request)
        return is_tm_active(request)

    assert run(look).get()
    assert not is_tm_active(requests[0])


def test_a_transaction_is_not_active_after_a_failure(run):
    requests = []

    def fail(self, request):
        requests.append(request)
        raise LookupError("no such thing")

    run(fail)

    assert not is_tm_active(requests[0])


# Conflicts


def test_a_conflict_is_tried_again_in_place(run, ledgers):
    def succeed_at_last(self, request):
        if len(ledgers) < 3:
            raise TransientError
        return len(ledgers)

    assert run(succeed_at_last).get() == 3
    assert ends(ledgers) == ["aborted", "aborted", "committed"]


def test_a_conflict_is_tried_as_often_as_the_setting_says(run, ledgers, options):
    def conflict(self, request):
        raise TransientError

    options["retry__attempts"] = "2"
    result = run(conflict, max_retries=0)
    del options["retry__attempts"]

    assert isinstance(result.result, TransientError)
    assert ends(ledgers) == ["aborted", "aborted"]


def test_a_conflict_that_stays_goes_on_by_retries(run, ledgers):
    retries = []

    def conflict(self, request):
        retries.append(self.request.retries)
        raise TransientError

    result = run(conflict, max_retries=1)

    assert isinstance(result.result, TransientError)
    assert retries == [0, 0, 0, 1, 1, 1]
    assert ends(ledgers) == ["aborted"] * 6


@pytest.mark.parametrize("error", [TransientError, LookupError])
def test_a_conflict_that_would_be_retried_is_tried_in_place_first(run, ledgers, error):
    retries = []

    def fail(self, request):
        retries.append(self.request.retries)
        raise error

    result = run(fail, autoretry_for=(Exception,), max_retries=1, retry_backoff=True)

    assert isinstance(result.result, error)
    assert retries == ([0, 0, 0, 1, 1, 1] if error is TransientError else [0, 1])


@pytest.mark.parametrize("value", ["0", "-1", "many", ""])
def test_a_number_of_attempts_that_is_none_ends_the_start(make_app, value):
    with pytest.raises(ConfigurationError, match=r"retry\.attempts = "):
        make_app(include=(), retry__attempts=value)


@pytest.mark.parametrize(
    ("called", "again", "expected"),
    [
        (((1, 2), {}), {"args": (3, 4)}, ((3, 4), {})),
        (((1,), {"y": 2}), {"args": (3,)}, ((3,), {"y": 2})),
        (((1,), {"y": 2}), {"args": (3, 4)}, ((3, 4), {})),
        (((1, 2), {}), {"kwargs": {"y": 4}}, ((1, 4), {})),
        (((1,), {"y": 2}), {"kwargs": {"y": 4}}, ((1,), {"y": 4})),
        (((), {"x": 1}), {"args": (), "kwargs": {"x": 3}}, ((), {"x": 3})),
        (((1,), {"y": 2}), {}, ((1,), {"y": 2})),
    ],
)
@pytest.mark.parametrize("with_request", [False, True])
def test_a_retry_takes_arguments_without_the_request(
    make_app, called, again, expected, with_request
):
    seen = []

    @task(name="task", bind=True, autoretry_for=(OSError,))
    def again_once(self, request, x, y=None):
        seen.append((tuple(self.request.args), self.request.kwargs))
        if self.request.retries == 0:
            options = dict(again)
            if with_request and "args" in options:
                options["args"] = (request, *options["args"])
            raise self.retry(**options)

    make_app(again_once).celery.tasks["task"].apply(*called).get()

    assert seen == [called, expected]


def test_a_retry_counts_arguments_that_have_no_name(make_app):
    seen = []

    @task(name="task", bind=True)
    def again_once(self, request, x, /, y):
        seen.append((x, y))
        if self.request.retries == 0:
            raise self.retry(kwargs={"y": 3})

    make_app(again_once).celery.tasks["task"].apply((1, 2)).get()

    assert seen == [(1, 2), (1, 3)]


def test_a_conflict_at_the_commit_is_tried_again(run, ledgers):
    def conflict_at_the_commit(self, request):
        def conflict():
            raise TransientError

        if len(ledgers) == 1:
            ledgers[0].transaction_manager.get().addBeforeCommitHook(conflict)

    run(conflict_at_the_commit).get()

    assert ends(ledgers) == ["aborted", "committed"]


def test_each_attempt_has_a_request_of_its_own(run):
    requests = []

    def conflict_once(self, request):
        requests.append(request)
        if len(requests) == 1:
            raise TransientError

    run(conflict_once).get()

    assert requests[0] is not requests[1]


def test_the_finished_callbacks_of_each_attempt_run(run):
    called = []

    def conflict_once(self, request):
        request.add_finished_callback(called.append)
        if not called:
            raise TransientError

    run(conflict_once).get()

    assert len(called) == 2


def test_only_the_last_attempt_sends_its_tasks(run, ledgers):
    def conflict_once(self, request):
        later.delay(len(ledgers))
        if len(ledgers) == 1:
            raise TransientError

    run(conflict_once).get()

    assert [message.args for message in run.app.sent()] == [[2]]


def test_other_errors_are_not_tried_again(run, ledgers):
    def fail(self, request):
        raise LookupError("no such thing")

    run(fail)

    assert len(ledgers) == 1


# Retries are not eager here: a worker would call the task like this.


@pytest.fixture
def as_worker():
    """Run a task as a worker does, where ``retry`` sends a message; returns how it ended."""

    def as_worker(registered, retries=0, **headers):
        registered.push_request(
            id="id",
            called_directly=False,
            is_eager=False,
            args=(),
            kwargs={},
            retries=retries,
            delivery_info={},
            headers=headers or None,
        )
        try:
            return registered()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            return error
        finally:
            registered.request_stack.pop()

    return as_worker


def test_a_retry_is_sent_although_the_transaction_aborts(make_app, options, as_worker, ledgers):
    @task(name="task", bind=True)
    def try_again(self, request):
        ledgers.append(Ledger(getattr(request, "tm", transaction.manager)))
        later.delay()
        self.retry(countdown=1)

    app = make_app(try_again, later, **options)
    ended = as_worker(app.celery.tasks["task"])

    assert isinstance(ended, Retry)
    assert ends(ledgers) == ["aborted"]
    assert [(message.task, message.headers["retries"]) for message in app.sent()] == [("task", 1)]


def test_an_automatic_retry_is_sent_although_the_transaction_aborts(make_app, options, as_worker):
    @task(name="task", autoretry_for=(LookupError,))
    def fail(request):
        raise LookupError("no such thing")

    app = make_app(fail, **options)
    ended = as_worker(app.celery.tasks["task"])

    assert isinstance(ended, Retry)
    assert app.names() == ["task"]


@pytest.mark.parametrize("option", ["countdown", "eta"])
def test_a_retry_is_sent_for_the_time_that_it_asks_for(make_app, as_worker, option):
    hour = timedelta(hours=1)
    in_an_hour = datetime.now(timezone.utc) + hour
    when = {"countdown": hour.total_seconds()} if option == "countdown" else {"eta": in_an_hour}

    @task(name="task", bind=True)
    def try_again(self, request):
        self.retry(**when)

    app = make_app(try_again)
    as_worker(app.celery.tasks["task"])

    (message,) = app.sent()
    assert abs(datetime.fromisoformat(message.headers["eta"]) - in_an_hour) < timedelta(minutes=10)


def test_a_retry_for_a_conflict_is_sent_for_its_time_after_the_last_try_in_place(
    make_app, as_worker
):
    tries = []

    @task(name="task", bind=True)
    def try_again(self, request):
        tries.append(run_of(self.request).attempts_left)
        self.retry(exc=TransientError(), countdown=3600)

    app = make_app(try_again)
    as_worker(app.celery.tasks["task"])

    (message,) = app.sent()
    in_an_hour = datetime.now(timezone.utc) + timedelta(hours=1)
    assert tries == [2, 1, 0]
    assert abs(datetime.fromisoformat(message.headers["eta"]) - in_an_hour) < timedelta(minutes=10)


def test_an_automatic_retry_waits_longer_each_time(make_app, as_worker):
    @task(name="task", autoretry_for=(LookupError,), retry_backoff=10, retry_jitter=False)
    def fail(request):
        raise LookupError("no such thing")

    app = make_app(fail)
    waits = [as_worker(app.celery.tasks["task"], retries=retries).when for retries in range(2)]

    assert waits == [10, 20]
    assert len(app.sent()) == 2


@pytest.mark.parametrize(
    ("exc", "expected"), [(LookupError("not yet"), LookupError), (None, MaxRetriesExceededError)]
)
def test_a_retry_too_many_is_the_error_that_was_its_reason(make_app, as_worker, exc, expected):
    @task(name="task", bind=True)
    def try_again(self, request):
        self.retry(exc=exc, max_retries=1)

    app = make_app(try_again)

    assert isinstance(as_worker(app.celery.tasks["task"], retries=0), Retry)
    assert isinstance(as_worker(app.celery.tasks["task"], retries=1), expected)
    assert app.names() == ["task"]


def test_a_retry_may_have_other_arguments(make_app, as_worker):
    @task(name="task", bind=True)
    def try_again(self, request, x=0):
        self.retry(args=(request, x + 1))

    app = make_app(try_again)
    as_worker(app.celery.tasks["task"])

    assert [message.args for message in app.sent()] == [[1]]


def test_a_replacement_is_sent_when_the_transaction_commits(make_app, as_worker, ledgers):
    @task(name="task", bind=True)
    def replace(self, request):
        ledgers.append(Ledger(transaction.manager))
        self.replace(later.s(7))

    app = make_app(replace, later)
    ended = as_worker(app.celery.tasks["task"])

    assert isinstance(ended, Ignore)
    assert ends(ledgers) == ["committed"]
    assert [(message.task, message.id, message.args) for message in app.sent()] == [
        ("later", "id", [7])
    ]


@pytest.mark.parametrize("doomed", ["before", "after"])
def test_a_replacement_is_sent_although_the_transaction_is_doomed(
    make_app, options, as_worker, ledgers, doomed
):
    @task(name="task", bind=True)
    def replace(self, request):
        manager = getattr(request, "tm", transaction.manager)
        ledgers.append(Ledger(manager))
        later.delay()
        if doomed == "before":
            manager.doom()
        try:
            self.replace(group(later.si(number) for number in (7, 8)))
        finally:
            manager.doom()

    app = make_app(replace, later, celery="result_backend = cache+memory://", **options)
    ended = as_worker(app.celery.tasks["task"])

    assert isinstance(ended, Ignore)
    assert ends(ledgers) == ["aborted"]
    assert [message.args for message in app.sent() if message.task == "later"] == [[7], [8]]


def test_a_replacement_is_sent_although_its_savepoint_is_rolled_back(make_app, as_worker):
    @task(name="task", bind=True)
    def replace(self, request):
        savepoint = transaction.savepoint()
        try:
            self.replace(later.s(7))
        finally:
            savepoint.rollback()

    app = make_app(replace, later)
    ended = as_worker(app.celery.tasks["task"])

    assert isinstance(ended, Ignore)
    assert [message.args for message in app.sent()] == [[7]]


@pytest.mark.parametrize("how", ["in the commit", "in the function"])
def test_only_the_last_attempt_sends_its_replacement(make_app, as_worker, how):
    attempts = []

    def conflict():
        raise TransientError

    @task(name="task", bind=True)
    def replace(self, request):
        attempts.append(request)
        first = len(attempts) == 1
        if first and how == "in the commit":
            transaction.get().addBeforeCommitHook(conflict)
        try:
            self.replace(later.s(len(attempts)))
        except Ignore:
            if first and how == "in the function":
                conflict()
            raise

    app = make_app(replace, later)
    ended = as_worker(app.celery.tasks["task"])

    assert isinstance(ended, Ignore)
    assert [message.args for message in app.sent()] == [[2]]


def test_a_run_that_fails_after_all_has_no_replacement(make_app, as_worker):
    @task(name="task", bind=True)
    def replace(self, request):
        try:
            self.replace(later.s(7))
        except Ignore:
            raise LookupError from None

    app = make_app(replace, later)

    assert isinstance(as_worker(app.celery.tasks["task"]), LookupError)
    assert app.names() == []


def test_a_replacement_is_sent_at_once_where_that_is_asked_for(make_app, as_worker):
    sent = []

    @task(name="task", bind=True)
    def replace(self, request):
        try:
            with immediately():
                self.replace(later.s(7))
        finally:
            sent.extend(app.names())

    app = make_app(replace, later)
    ended = as_worker(app.celery.tasks["task"])

    assert isinstance(ended, Ignore)
    assert sent == ["later"]


def test_a_replacement_is_sent_when_the_function_has_ended_its_transaction(make_app, as_worker):
    @task(name="task", bind=True)
    def replace(self, request):
        with transaction.manager:
            self.replace(later.s(7))

    app = make_app(replace, later)
    ended = as_worker(app.celery.tasks["task"])

    assert isinstance(ended, Ignore)
    assert app.names() == ["later"]


def test_work_left_over_in_the_manager_of_the_thread_is_not_committed(make_app, as_worker, ledgers):
    @task(name="task")
    def work(request):
        ledgers.append(Ledger(request.tm))

    app = make_app(work)
    ledgers.append(Ledger(transaction.manager))
    as_worker(app.celery.tasks["task"])

    assert ends(ledgers) == ["aborted", "committed"]


def test_a_transaction_that_an_earlier_run_left_open_is_aborted(make_app, as_worker, ledgers):
    @task(name="careless", base=RequestAwareTask)
    def careless(request):
        transaction.begin()
        ledgers.append(Ledger(transaction.manager))

    app = make_app(careless, later)
    as_worker(app.celery.tasks["careless"])
    as_worker(app.celery.tasks["later"])

    assert ends(ledgers) == ["aborted"]


def test_a_task_in_a_worker_uses_the_manager_of_the_thread_though_it_was_in_use(
    make_app, as_worker
):
    @task(name="task")
    def look(request):
        return request.tm is transaction.manager

    app = make_app(look)
    transaction.get()

    assert as_worker(app.celery.tasks["task"]) is True


def test_a_task_in_a_worker_uses_the_manager_of_the_thread_though_others_left_it_in_a_transaction(
    make_app, as_worker
):
    @task(name="task")
    def look(request):
        return request.tm is transaction.manager

    app = make_app(look)
    as_worker(app.celery.tasks["task"])
    transaction.begin()

    assert as_worker(app.celery.tasks["task"]) is True


# Eager execution inside a transaction


def test_an_eager_task_leaves_the_transaction_of_its_caller_open(make_app, ledgers):
    @task(name="task")
    def work(request):
        ledgers.append(Ledger(request.tm))

    app = make_app(work)
    with transaction.manager as begun:
        app.celery.tasks["task"].apply().get()
        assert transaction.get() is begun

    assert ends(ledgers) == ["committed"]


# Without a transaction


def test_a_request_aware_task_has_no_transaction(make_app, options):
    @task(name="task", base=RequestAwareTask)
    def look(request):
        return is_tm_active(request)

    app = make_app(look, **options)

    assert not app.celery.tasks["task"].apply().get()


def test_what_a_request_aware_task_calls_is_sent_at_once(make_app):
    sent = []

    @task(name="task", base=RequestAwareTask)
    def call(request):
        later.delay()
        sent.extend(app.names())

    app = make_app(call, later)
    app.celery.tasks["task"].apply().get()

    assert sent == ["later"]


def test_what_is_left_over_in_the_thread_does_not_defer_a_request_aware_task(make_app):
    @task(name="task", base=RequestAwareTask)
    def call(request):
        later.delay()

    app = make_app(call, later)
    transaction.get()
    app.celery.tasks["task"].apply().get()

    assert app.names() == ["later"]


def test_a_request_aware_task_may_begin_a_transaction_itself(make_app):
    @task(name="task", base=RequestAwareTask)
    def call(request):
        with request.tm:
            later.delay()
            assert app.names() == []

    app = make_app(call, later, **EXPLICIT)
    app.celery.tasks["task"].apply().get()

    assert app.names() == ["later"]


# What is left over at the end


@pytest.fixture(params=["as a worker", "eagerly", "eagerly, in a transaction"])
def end_of(request, make_app, as_worker, options):
    """Run a function as a RequestAwareTask; returns the application."""

    def run(function):
        app = make_app(task(name="task", base=RequestAwareTask)(function), later, **options)
        registered = app.celery.tasks["task"]
        if request.param == "as a worker":
            as_worker(registered)
        elif request.param == "eagerly":
            registered.apply()
        else:
            with transaction.manager as begun:
                registered.apply()
                assert transaction.get() is begun
        return app

    return run


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("error", [LookupError, None])
def test_what_is_open_at_the_end_of_a_run_is_aborted(end_of, ledgers, begun, error):
    def work(request):
        manager = getattr(request, "tm", transaction.manager)
        if begun or manager.explicit:
            manager.begin()
        ledgers.append(Ledger(manager))
        if manager is not transaction.manager:
            ledgers.append(Ledger(transaction.manager))
        request.add_finished_callback(lambda _: ledgers.append(Ledger(transaction.manager)))
        if error:
            raise error

    end_of(work)

    assert set(ends(ledgers)) == {"aborted"}


def test_what_is_left_open_by_others_does_not_reach_a_run_without_a_transaction(
    make_app, as_worker, ledgers
):
    @task(name="task", base=RequestAwareTask)
    def commit(request):
        transaction.commit()

    app = make_app(commit)
    ledgers.append(Ledger(transaction.manager))
    as_worker(app.celery.tasks["task"])

    assert ends(ledgers) == ["aborted"]
