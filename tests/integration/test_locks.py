"""One run at a time, by locks in Redis and in PostgreSQL."""

from __future__ import annotations

import logging
import threading
import uuid

import pytest
import zope.sqlalchemy
from celery import Task, chain, chord
from celery.exceptions import ChordError
from pyramid.threadlocal import RequestContext
from sqlalchemy import text
from tests.waiting import SOON, wait_for

from ws_celery import RequestAwareTask, one_instance, task
from ws_celery.events import LockLost, TaskFinished, TaskSkipped
from ws_celery.exceptions import Abandoned, LockGone
from ws_celery.locks import Held
from ws_celery.testing.captured import run_as_worker


def ended(result):
    """Wait until a task has ended, in a state that Celery does not know, too."""
    wait_for(lambda: result.state not in ("PENDING", "STARTED", "RETRY"), "the end of the task")
    return result


class Gate:
    """Where a run stays until the test lets it go."""

    def __init__(self):
        self.entered, self.leave = threading.Event(), threading.Event()

    def __call__(self):
        self.entered.set()
        assert self.leave.wait(SOON)

    def reached(self):
        assert self.entered.wait(SOON), "no run has begun"


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.leave.set()


@pytest.fixture
def key():
    return f"a key {{with}} braces */ {uuid.uuid4().hex}"


@pytest.fixture(params=["redis", "database"])
def place(request, redis_url):
    return redis_url if request.param == "redis" else "database"


@pytest.fixture
def make(make_app, redis_url, place, postgres):
    """Make an application whose locks are there, and whose requests have a database."""

    def make(*tasks, setup=None, **settings):
        def include(config):
            postgres.includeme(config)
            if setup:
                setup(config)

        settings = {"ws_celery__locks": place, **settings}
        results = f"result_backend = {redis_url}\n"
        return make_app(*tasks, setup=include, broker=redis_url, celery=results, **settings)

    return make


@pytest.fixture
def other_run():
    """Take a lock as the run of another process would."""
    runs = []

    def take(app, key, task_id="another", timeout=SOON):
        store = app.celery.locks.store
        held = Held(key, timeout, task="other", id=task_id, store=store, on_loss=lambda *_: None)
        assert store.acquire(held) is None
        runs.append(held)
        return held

    yield take
    for held in runs:
        if held.store.renew(held):
            held.end()


@pytest.fixture
def subscribe():
    def subscribe(app, *events):
        seen = []
        for event in events:
            app.config.add_subscriber(seen.append, event)
        app.config.commit()
        return seen

    return subscribe


def note(request, number):
    session = request.dbsession
    session.execute(text("INSERT INTO notes VALUES (:id, 'note')"), {"id": number})
    zope.sqlalchemy.mark_changed(session, request.tm)


@task(name="locked", bind=True, one_instance="{key}")
def locked(self, request, key, number=1):
    note(request, number)
    return request.one_instance.token


@task(name="after", base=RequestAwareTask)
def after(request, before):
    raise AssertionError("what follows a skipped run was called")


def test_a_run_that_meets_another_is_skipped_and_tells_who_has_the_lock(
    make, start_worker, other_run, key, postgres
):
    app = make(locked)
    other = other_run(app, key)
    start_worker(app)
    result = ended(locked.delay(app.request(), key))

    assert result.state == "SKIPPED"
    assert result.info["key"] == key
    assert result.info["holder"]["id"] == "another"
    assert result.info["holder"]["pid"] == other.pid
    assert "is held by other[another]" in result.info["reason"]
    assert not result.successful()
    assert not result.failed()
    assert postgres.notes() == []


def test_a_later_holder_has_the_greater_token(make, start_worker, other_run, key):
    app = make(locked)
    other = other_run(app, key)
    other.end()
    start_worker(app)
    first, second = (locked.delay(app.request(), key, number).get(SOON) for number in (1, 2))

    assert other.token < first < second


def test_a_run_waits_for_the_lock_if_it_is_told_to(make, start_worker, other_run, key):
    @task(name="patient")
    @one_instance("{key}", wait=SOON)
    def patient(request, key):
        return "has waited"

    app = make(patient)
    other = other_run(app, key)
    start_worker(app)
    result = patient.delay(app.request(), key)
    threading.Timer(0.3, other.end).start()

    assert result.get(SOON) == "has waited"


def test_the_lock_is_held_until_the_commit_is_over(make, start_worker, key):
    holders = []

    @task(name="committing", one_instance="{key}")
    def committing(request, key):
        def look(committed):
            holders.append(app.celery.locks.store.holder_of(key))

        request.tm.get().addAfterCommitHook(look)
        note(request, 1)

    app = make(committing)
    start_worker(app)
    result = committing.delay(app.request(), key)

    result.get(SOON)
    assert [holder.id for holder in holders] == [result.id]
    wait_for(lambda: app.celery.locks.store.holder_of(key) is None, "the release")


def test_a_run_that_fails_gives_the_lock_back(make, start_worker, key):
    @task(name="failing", one_instance="{key}")
    def failing(request, key):
        raise LookupError

    app = make(failing, locked)
    start_worker(app)

    assert ended(failing.delay(app.request(), key)).state == "FAILURE"
    assert ended(locked.delay(app.request(), key)).state == "SUCCESS"


def test_a_retry_gets_the_lock_of_the_run_that_has_sent_it(make, start_worker, key):
    @task(name="retrying", bind=True, one_instance="{key}")
    def retrying(self, request, key):
        if not self.request.retries:
            raise self.retry(countdown=0)
        return "done"

    app = make(retrying)
    start_worker(app)

    assert retrying.delay(app.request(), key).get(SOON) == "done"


def test_nothing_follows_a_skipped_run(make, start_worker, other_run, key, subscribe):
    @task(name="callback", base=RequestAwareTask)
    def callback(request, *args):
        raise AssertionError("a callback of a skipped run was called")

    app = make(locked, after, callback)
    finished = subscribe(app, TaskFinished)
    other_run(app, key)
    start_worker(app)
    with RequestContext(app.request()):
        signature = locked.s(key).set(link=callback.s(), link_error=callback.s())
        chain(signature, after.s()).apply_async()
        result = ended(locked.delay(key))

    assert result.state == "SKIPPED"
    assert finished == []


def test_a_chord_with_a_skipped_part_fails_instead_of_waiting_for_ever(
    make, start_worker, other_run, key
):
    app = make(locked, after)
    other_run(app, key)
    start_worker(app)
    with RequestContext(app.request()):
        result = chord([locked.s(key), locked.s("free " + key)])(after.s())

    with pytest.raises(ChordError, match="is held by other"):
        result.get(SOON)


def test_a_skipped_run_is_an_event_of_its_own(make, start_worker, other_run, key, subscribe):
    app = make(locked)
    seen = subscribe(app, TaskSkipped, TaskFinished)
    other_run(app, key)
    start_worker(app)
    result = ended(locked.delay(app.request(), key))

    (event,) = wait_for(lambda: seen, "the event")
    assert isinstance(event, TaskSkipped)
    assert (event.name, event.id, event.key) == ("locked", result.id, key)
    assert event.holder.id == "another"


def test_a_skipped_run_keeps_no_result_if_nobody_wants_one(make, start_worker, other_run, key):
    @task(name="unheeded", one_instance="{key}", ignore_result=True)
    def unheeded(request, key):
        raise AssertionError

    app = make(unheeded, locked)
    other_run(app, key)
    start_worker(app)
    result = unheeded.delay(app.request(), key)
    ended(locked.delay(app.request(), key))

    assert app.celery.AsyncResult(result.id).state == "PENDING"


# While it runs


def test_the_lock_of_a_run_that_lives_does_not_run_out(make, start_worker, gate, key):
    @task(name="long")
    @one_instance("{key}", timeout=2)
    def long(request, key):
        gate()

    app = make(long)
    store = app.celery.locks.store
    start_worker(app)
    result = long.delay(app.request(), key)
    gate.reached()

    wait_for(lambda: store.holder_of(key).age > 4.5, "the age of the lock")
    gate.leave.set()
    result.get(SOON)


@pytest.mark.parametrize(
    ("on_lost", "state", "notes"), [("log", "SUCCESS", 1), ("raise", "FAILURE", 0)]
)
def test_a_lock_that_is_lost_is_told_at_once(
    make, start_worker, gate, key, subscribe, caplog, postgres, on_lost, state, notes
):
    @task(name="losing")
    @one_instance("{key}", timeout=4, on_lost=on_lost)
    def losing(request, key):
        note(request, 1)
        gate()

    app = make(losing)
    store = app.celery.locks.store
    lost = subscribe(app, LockLost)
    start_worker(app)
    with caplog.at_level(logging.ERROR, "ws_celery.locks"):
        result = losing.delay(app.request(), key)
        gate.reached()
        assert store.free(store.holder_of(key))
        (event,) = wait_for(lambda: list(lost), "the event")
        gate.leave.set()
        ended(result)

    assert (event.name, event.id, event.key) == ("losing", result.id, key)
    assert len(lost) == 1
    assert "has lost the lock" in caplog.text
    assert result.state == state
    assert len(postgres.notes()) == notes
    if state == "FAILURE":
        assert isinstance(result.result, LockGone)


def test_a_run_that_has_lost_its_lock_leaves_that_of_the_next_one_alone(
    make, start_worker, gate, key, other_run, caplog
):
    @task(name="outrun")
    @one_instance("{key}")
    def outrun(request, key):
        gate()

    app = make(outrun)
    store = app.celery.locks.store
    start_worker(app)
    result = outrun.delay(app.request(), key)
    gate.reached()
    assert store.free(store.holder_of(key))
    other = wait_for(lambda: other_run(app, key), "the next one")
    gate.leave.set()
    result.get(SOON)

    assert store.holder_of(key).id == other.id
    assert "has lost the lock" in caplog.text


def test_only_the_owner_renews_and_releases(make, key, other_run):
    app = make(locked)
    store = app.celery.locks.store
    other_run(app, key)
    stranger = Held(key, 30, task="other", id="another", store=store, on_loss=lambda *_: None)

    assert store.acquire(stranger).id == "another"
    assert not store.renew(stranger)
    assert store.holder_of(key)


@pytest.mark.parametrize("character", ["x", "ü", "\N{PILE OF POO}", '"', "\x01"], ids=ascii)
def test_the_holder_of_a_key_is_known_whatever_its_characters(make, character, other_run):
    app = make(locked)
    key = character * 400
    held = other_run(app, key)
    seen = app.celery.locks.store.holder_of(key)

    assert (seen.key, seen.task, seen.id) == (key, held.task, held.id)
    assert (seen.host, seen.pid, seen.token) == (held.host, held.pid, held.token)
    ours = [each for each in app.celery.locks.store.holders() if each.token == held.token]
    assert [key.startswith(each.key) for each in ours] == [True]


def test_freeing_names_the_holder_that_is_meant(make, key, other_run):
    app = make(locked)
    store = app.celery.locks.store
    first = other_run(app, key)
    seen = store.holder_of(key)
    first.end()
    assert not store.free(seen)
    second = other_run(app, key)

    assert not store.free(seen)
    assert store.renew(second)
    assert second.token > first.token


# Deliveries


def test_a_message_that_comes_twice_does_not_end_its_task(make, start_worker, gate, key):
    @task(name="twice")
    @one_instance("{key}", timeout=4)
    def twice(request, key):
        gate()
        return "once"

    app = make(twice, locked)
    start_worker(app)
    result = twice.delay(app.request(), key)
    gate.reached()
    run = threading.Thread(target=repeat, args=(app, twice, key, result.id))
    run.start()
    run.join(SOON)
    gate.leave.set()

    assert result.get(SOON) == "once"


def repeat(app, task, key, task_id):
    """Run a task as its message would, if it came again."""
    answer = app.celery.tasks[task.name].apply((key,), task_id=task_id)
    assert answer.state == "IGNORED"


def test_a_message_that_comes_again_after_a_crash_takes_over(make, start_worker, other_run, key):
    app = make(locked)
    crashed = other_run(app, key, task_id=uuid.uuid4().hex, timeout=1)
    if hasattr(crashed.store, "_sessions"):
        threading.Timer(0.5, crashed.store.abandon, [crashed]).start()  # as its process ends
    start_worker(app)
    result = locked.apply_async((app.request(), key), task_id=crashed.id)

    assert result.get(SOON) > crashed.token


# Tasks of all kinds


def test_class_tasks_with_any_keyword_arguments(make, start_worker, other_run, key):
    class Aware(RequestAwareTask):
        name = "aware"

        @one_instance(key="{source}")
        def run(self, request, **kwargs):
            return request.one_instance.key

    class Plain(Task):
        name = "plain"

        @one_instance(key="{source}")
        def run(self, **kwargs):
            return self.request.one_instance.key

    app = make(task(Aware), task(Plain))
    start_worker(app)
    for name in ("aware", "plain"):
        assert app.celery.send_task(name, kwargs={"source": key}).get(SOON) == key
    other_run(app, key)
    for name in ("aware", "plain"):
        assert ended(app.celery.send_task(name, kwargs={"source": key})).state == "SKIPPED"


def test_an_item_of_a_map_that_is_locked_fails_it(make, start_worker, other_run, key):
    app = make(locked)
    other_run(app, key)
    start_worker(app)
    with RequestContext(app.request()):
        result = locked.map([key]).delay()

    with pytest.raises(Exception, match="is held by other"):
        result.get(SOON)


def test_a_task_that_is_called_like_a_function_needs_no_lock(make, other_run, key, postgres):
    @task(name="called", one_instance="{key}")
    def called(request, key):
        return "called"

    app = make(called)
    other_run(app, key)

    assert called(app.request(), key) == "called"


# With the outbox


def outboxed(make_outbox, postgres, place, *tasks):
    return make_outbox(postgres, *tasks, ws_celery__locks=place)


def dispatch(app, task, *args):
    request = app.request()
    with request.tm:
        return task.apply_async((request, *args))


def test_the_row_of_a_skipped_run_is_settled(
    make_outbox, postgres, place, start_worker, other_run, key, rows_of
):
    app = outboxed(make_outbox, postgres, place, locked, after)
    other_run(app, key)
    start_worker(app)
    request = app.request()
    with RequestContext(request), request.tm:
        chain(locked.s(key), after.s()).apply_async()
    result = dispatch(app, locked, key)

    assert ended(result).state == "SKIPPED"
    wait_for(lambda: rows_of(app) == [], "the end of the rows")


def test_the_row_of_a_run_that_goes_on_is_not_settled_by_its_duplicate(
    make_outbox, postgres, place, other_run, key, rows_of
):
    @task(name="quick")
    @one_instance("{key}", timeout=1)
    def quick(request, key):
        raise AssertionError

    app = outboxed(make_outbox, postgres, place, quick)
    result = dispatch(app, quick, key)
    other = other_run(app, key, task_id=result.id)
    (row,) = rows_of(app)
    publication = app.celery.outbox.publication_of(row)

    with pytest.raises(Abandoned, match="runs elsewhere"):
        run_as_worker(app.celery, publication, {})
    assert [each.id for each in rows_of(app)] == [row.id]
    assert result.state == "PENDING"
    assert other.store.renew(other)
