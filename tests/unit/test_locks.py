"""What @one_instance takes, and what it does in one process."""

from __future__ import annotations

import os
import pickle
import threading
import warnings

import pytest
from celery import Task
from pyramid.exceptions import ConfigurationExecutionError
from zope.interface.verify import verifyObject

from ws_celery import ConfigurationError, RequestAwareTask, get_celery_app, one_instance, task
from ws_celery.events import LockLost, TaskSkipped
from ws_celery.exceptions import LockGone, LocksUnavailable, Skipped
from ws_celery.interfaces import ILockLost, ITaskSkipped
from ws_celery.locks import Held, Holder
from ws_celery.locks.holding import MemoryStore, Renewal


def key_of(template, function, *args, **kwargs):
    """Return the key of a run of a class task with this ``run``."""

    class Any(RequestAwareTask):
        name = "any"
        run = one_instance(template)(function)

    return Any.run.one_instance.key_of(Any(), args, kwargs)


def plain(self, request, source_id, *rest, mode="full"):
    pass


def keywords(self, request, **kwargs):
    pass


# The key


@pytest.mark.parametrize(
    ("template", "args", "kwargs", "key"),
    [
        (None, (1,), {}, "any"),
        ("import", (1,), {}, "import"),
        ("import {{all}}", (1,), {}, "import {all}"),
        ("import:{source_id}", (1,), {}, "import:1"),
        ("import:{source_id}", (), {"source_id": "{a} b"}, "import:{a} b"),
        ("{source_id:03d} {mode}", (7, 8), {}, "007 full"),
        ("{mode!r}", (1,), {"mode": "quick"}, "'quick'"),
    ],
)
def test_the_key_is_made_of_the_arguments(template, args, kwargs, key):
    assert key_of(template, plain, *args, **kwargs) == key


def test_the_key_may_name_any_keyword_argument_of_a_function_that_takes_all():
    assert key_of("{source}", keywords, source=3) == "3"


def test_a_run_without_an_argument_of_the_key_fails():
    with pytest.raises(TypeError, match=r"'{source}' .* KeyError: 'source'"):
        key_of("{source}", keywords, mode=1)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{sourceid}", "names 'sourceid', .* are source_id, mode. Did you mean source_id?"),
        ("{request}", "names 'request', which is no argument"),
        ("{rest}", "names 'rest', which is no argument"),
        ("{source_id.name}", "names of arguments between braces"),
        ("{}", "names of arguments between braces"),
        ("{source_id", "braces in pairs"),
    ],
)
def test_a_key_that_cannot_be_made_is_refused_by_the_decorator(template, message):
    with pytest.raises(ConfigurationError, match=message):
        one_instance(template)(plain)


def test_a_key_of_a_function_without_arguments_says_so():
    def bare(request):
        pass

    with pytest.raises(ConfigurationError, match="it has no arguments"):
        one_instance("{source}")(bare)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0.5}, "timeout = '0.5': expected 1 to 86400 seconds"),
        ({"wait": -1}, "wait = '-1': expected 0 or more seconds"),
        ({"wait": float("inf")}, "expected 0 or more seconds"),
        ({"on_lost": "abort"}, 'expected "log" or "raise"'),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        one_instance(**options)


def test_the_decorator_is_called():
    with pytest.raises(ConfigurationError, match="with parentheses"):
        one_instance(plain)


def test_the_decorator_is_below_task():
    with pytest.raises(ConfigurationError, match="Put it below @task"):
        one_instance()(task(name="any")(plain))


def test_one_rule_is_enough():
    with pytest.raises(ConfigurationError, match="has one_instance twice"):
        task(name="any", one_instance=True)(one_instance("key")(plain))


# The option


@pytest.mark.parametrize(
    ("option", "key"),
    [
        (True, "any"),
        ("a key", "a key"),
        ({"key": "{number}", "timeout": 20}, "1"),
        (one_instance("{number}"), "1"),
    ],
)
def test_the_option_of_task_is_a_key_or_arguments(make_app, option, key):
    @task(name="any", one_instance=option)
    def any_task(request, number):
        return request.one_instance.key

    app = make_app(any_task)

    assert app.celery.tasks["any"].apply((1,)).get() == key


def test_the_option_works_on_classes(make_app):
    @task(one_instance="{number}")
    class Any(RequestAwareTask):
        """Do it."""

        name = "any"

        def run(self, request, number):
            return request.one_instance.key

    app = make_app(Any)

    assert app.celery.tasks["any"].apply((1,)).get() == "1"
    assert Any.target == f"{__name__}.Any"


def test_a_class_obeys_the_rule_of_the_run_that_it_overrides(make_app):
    class Base(RequestAwareTask):
        @one_instance("{number}")
        def run(self, request, number):
            return request.one_instance.key

    class PlainBase(Task):
        @one_instance("{number}")
        def run(self, number):
            return self.request.one_instance.key

    class Aware(Base):
        name = "aware"

        def run(self, request, **kwargs):
            assert request.one_instance.key == "7"  # all of it has the lock
            return super().run(request, **kwargs)

    class Plain(PlainBase):
        name = "plain"

        def run(self, **kwargs):
            return super().run(**kwargs)

    class Other(Base):
        name = "other"

        @one_instance("other {number}")
        def run(self, request, number):
            return super().run(request, number)

    app = make_app(task(Aware), task(Plain), task(Other))
    keys = [
        app.celery.tasks[name].apply(kwargs={"number": 7}).get()
        for name in ("aware", "plain", "other")
    ]

    assert sorted(keys) == ["7", "7", "other 7"]
    other_run = other(app, "7")
    for name in ("aware", "plain"):
        assert app.celery.tasks[name].apply(kwargs={"number": 7}).state == "IGNORED"
    other_run.end()


def test_a_rule_that_the_overriding_run_cannot_obey_is_refused(make_app):
    class Base(RequestAwareTask):
        @one_instance("{number}")
        def run(self, request, number):
            pass

    class Fixed(Base):
        name = "fixed"

        def run(self, request, numbers):
            return super().run(request, 1)

    with pytest.raises(ConfigurationExecutionError, match=r"Fixed\.run: the key '{number}' names"):
        make_app(task(Fixed))


@pytest.mark.parametrize("option", [False, None])
def test_no_rule_is_no_rule(make_app, option):
    @task(name="any", one_instance=option)
    def any_task(request):
        return hasattr(request, "one_instance")

    assert make_app(any_task).celery.tasks["any"].apply().get() is False


@pytest.mark.parametrize("option", [{"ttl": 1}, 3])
def test_another_option_is_refused(option):
    with pytest.raises(ConfigurationError, match="a dictionary with key, timeout, wait, on_lost"):
        task(one_instance=option)(plain)


def test_calls_are_checked_against_the_function_itself(make_app):
    @task(name="any")
    @one_instance("{number}")
    def any_task(request, number):
        pass

    app = make_app(any_task)

    with pytest.raises(TypeError, match="unexpected keyword argument 'nummer'"):
        any_task.delay(app.request(), nummer=1)


# Runs in memory


@pytest.fixture
def app(make_app):
    @task(name="locked", one_instance=True)
    def locked(request):
        return request.one_instance.token

    class Plain(Task):
        name = "plain"

        @one_instance(on_lost="raise")
        def run(self, **kwargs):
            if kwargs.get("lose"):
                store = self.app.locks.store
                store.free(store.holder_of("plain"))
            return self.request.one_instance.token

    return make_app(locked, task(Plain))


def other(app, key, task_id="another"):
    store = app.celery.locks.store
    held = Held(key, 8, task="other", id=task_id, store=store, on_loss=lambda *_: None)
    assert store.acquire(held) is None
    return held


def test_locks_of_a_broker_in_memory_are_in_memory(app):
    assert isinstance(app.celery.locks.store, MemoryStore)
    held = other(app, "locked")

    assert app.celery.tasks["locked"].apply().state == "IGNORED"
    held.end()
    assert app.celery.tasks["locked"].apply().get() == held.token + 1


def test_a_skipped_run_is_told_to_subscribers(app):
    seen = []
    app.config.add_subscriber(seen.append, TaskSkipped)
    app.config.commit()
    other(app, "locked")
    app.celery.tasks["locked"].apply(task_id="this")

    (event,) = seen
    assert verifyObject(ITaskSkipped, event)
    assert (event.name, event.id, event.key) == ("locked", "this", "locked")
    assert str(event.holder).startswith("other[another] on ")


def test_a_plain_task_that_has_lost_its_lock_fails_if_it_is_to(app):
    lost = []
    app.config.add_subscriber(lost.append, LockLost)
    app.config.commit()
    result = app.celery.tasks["plain"].apply(kwargs={"lose": True})

    assert isinstance(result.result, LockGone)
    (event,) = lost
    assert verifyObject(ILockLost, event)
    assert (event.name, event.key) == ("plain", "plain")


def test_a_store_shows_its_holders_in_order(app):
    runs = [other(app, key) for key in ("b", "a")]
    holders = app.celery.locks.store.holders()

    assert [holder.key for holder in holders] == ["a", "b"]
    assert holders[0].task == "other"
    assert not app.celery.locks.store.free(Holder("a", token=99))
    assert app.celery.locks.store.free(holders[0])
    assert not app.celery.locks.store.release(runs[1])


# What goes wrong


class Faulty(MemoryStore):
    """A store that stops answering."""

    down = False
    error = LocksUnavailable("it is down")

    def renew(self, held):
        if self.down:
            raise self.error
        return super().renew(held)

    def release(self, held):
        if self.down:
            raise self.error
        return super().release(held)


def hold(timeout=8.0):
    losses = []
    store = Faulty()
    held = Held(
        "key", timeout, task="t", id="i", store=store, on_loss=lambda _, why: losses.append(why)
    )
    assert store.acquire(held) is None
    return held, store, losses


def test_a_store_that_does_not_answer_is_asked_again_sooner(caplog):
    held, store, losses = hold()
    store.down = True
    due = held.due

    assert held.renew()
    assert held.due < due
    assert losses == []
    assert "could not be renewed" in caplog.text


def test_a_lock_that_cannot_be_renewed_for_its_timeout_is_lost_once():
    held, store, losses = hold(timeout=0.0)
    store.down = True

    assert not held.renew()
    assert not held.renew()
    assert losses == ["it could not be renewed for 0 seconds"]
    assert held.lost
    with pytest.raises(LockGone, match="has lost the lock 'key'"):
        held.check()


def test_a_lock_that_a_bug_keeps_from_being_renewed_is_lost_too(caplog):
    held, store, losses = hold(timeout=0.0)
    store.down, store.error = True, RuntimeError("a bug")

    assert not held.renew()
    assert losses == ["it could not be renewed for 0 seconds"]
    assert "RuntimeError: a bug" in caplog.text


def test_a_lock_that_cannot_be_given_back_runs_out(caplog):
    held, store, losses = hold()
    store.down = True
    held.end()

    assert "is left to run out" in caplog.text
    assert losses == []


def test_a_renewal_that_meets_the_end_of_the_run_is_no_loss():
    held, _, losses = hold()
    held.end()

    assert not held.renew()
    assert losses == []


class Silent(Faulty):
    """A store that is waited for, until it answers that it is down."""

    def __init__(self):
        super().__init__()
        self.asked, self.answer, self.abandoned = (threading.Event() for _ in range(3))

    def renew(self, held):
        self.asked.set()
        assert self.answer.wait(60)
        raise LocksUnavailable("it is down")

    release = renew

    def abandon(self, held):
        self.abandoned.set()
        self.answer.set()


def hold_silent(timeout):
    told = threading.Event()
    store = Silent()
    held = Held("key", timeout, task="t", id="i", store=store, on_loss=lambda *_: told.set())
    assert store.acquire(held) is None
    return held, store, told


def test_a_lock_that_was_not_heard_of_for_its_timeout_counts_as_lost():
    held, _, losses = hold(timeout=0.0)

    assert held.lost
    assert losses == []  # nobody has asked yet: it may turn out to be there
    held.end()
    assert not held.lost


def test_a_failure_that_comes_late_is_a_loss():
    held, store, told = hold_silent(timeout=0.05)
    threading.Thread(target=wait_until_lost, args=(held, store.answer)).start()

    assert not held.renew()
    assert told.is_set()


def wait_until_lost(held, event):
    while not held.lost:
        event.wait(0.01)
    event.set()


def test_a_silent_store_keeps_neither_its_loss_back_nor_the_renewal_of_others():
    renewal = Renewal()
    held, store, told = hold_silent(timeout=0.4)
    store.abandon = lambda _: store.abandoned.set()  # its attempt goes on
    renewal.add(held)
    assert store.asked.wait(60)
    other, _, losses = hold(timeout=60.0)
    other.due = 0.0
    renewal.add(other)

    assert told.wait(60)
    assert store.abandoned.wait(60)
    assert held.lost
    assert not store.answer.is_set()
    while not 0 < other.due < other._good_until:  # it has been renewed
        store.answer.wait(0.01)
    store.answer.set()
    renewal.end(other)
    renewal.remove(other)
    assert losses == []


def test_the_end_of_a_run_gives_up_a_store_that_is_silent(caplog):
    renewal = Renewal()
    held, store, told = hold_silent(timeout=60.0)
    held._schedule(held.due + 1000)
    renewal.add(held)
    while not renewal._wakes_at:
        renewal._thread.join(0.01)
    renewal.end(held)

    assert store.abandoned.is_set()
    assert "is left to run out" in caplog.text
    assert not told.is_set()


def test_renewing_goes_on_after_an_error_that_nobody_expects(caplog):
    held, store, losses = hold(timeout=0.01)
    held.on_loss = lambda *_: renewal.remove(held)
    store.down, store.error = True, RuntimeError("a bug")
    renewal = Renewal()
    renewal.add(held)
    thread = renewal._thread
    while "a bug" not in caplog.text:
        thread.join(0.01)
    store.error = LocksUnavailable("it is down")
    thread.join(30)

    assert not thread.is_alive()
    assert losses == []


def test_a_run_that_nobody_can_look_after_fails_and_gives_its_lock_back(app, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    locked = app.celery.tasks["locked"]
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        result = locked.apply()

    assert isinstance(result.result, RuntimeError)
    assert app.celery.locks.store.holders() == []
    assert locked.apply().state == "SUCCESS"
    thread = app.celery.locks._renewal._thread
    assert thread is None or thread.ident is not None


def test_a_lock_that_is_due_sooner_is_renewed_sooner():
    late, _, _ = hold(timeout=1000.0)
    soon, store, _ = hold(timeout=0.1)
    renewal = Renewal()
    renewal.add(late)
    while not renewal._wakes_at:
        renewal._thread.join(0.01)
    soon.on_loss = lambda *_: renewal.remove(late)
    del store._held["key"]
    thread = renewal._thread  # it forgets itself when it ends
    renewal.add(soon)
    thread.join(30)

    assert not thread.is_alive()
    assert soon.lost


def test_after_a_fork_renewing_begins_anew():
    renewal = Renewal()
    held, _, _ = hold()
    renewal.add(held)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a thread is there: it is the point
        pid = os.fork()
    if not pid:
        renewal.add(held)
        os._exit(17 if renewal._thread.is_alive() else 1)
    renewal.remove(held)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 17


@pytest.mark.parametrize(
    "error",
    [
        Skipped("t", "i", "k", Holder("k", 1, "o", "x", "h", 2)),
        LockGone("t", "i", "k"),
    ],
)
def test_errors_travel_between_processes(error):
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own

    assert type(copy) is type(error)
    assert str(copy) == str(error)


def test_a_holder_that_is_not_told_is_unknown():
    assert str(Holder("key")) == "an unknown holder"


# Where they are


REDIS = "redis://127.0.0.1:6379/5"


@pytest.mark.parametrize(
    ("broker", "celery", "locks", "name"),
    [
        (REDIS, "", "auto", "RedisStore"),
        ("amqp://", f"result_backend = {REDIS}", "auto", "RedisStore"),
        ("amqp://", "", REDIS, "RedisStore"),
        ("amqp://", "", "auto", "PostgresqlStore"),
        (REDIS, "", "database", "PostgresqlStore"),
        ("memory://", "", "auto", "MemoryStore"),
        (REDIS, "", "memory", "MemoryStore"),
    ],
)
def test_a_setting_says_where_the_locks_are(make_config, broker, celery, locks, name):
    config = make_config(broker=broker, celery=celery, ws_celery__locks=locks)
    config.commit()
    store = get_celery_app(config.registry).locks.store

    assert type(store).__name__ == name


def test_another_place_is_refused(make_config):
    with pytest.raises(ConfigurationError, match=r"ws_celery.locks.*Did you mean database"):
        make_config(ws_celery__locks="databse").commit()
