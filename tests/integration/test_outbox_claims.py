"""One effect per row, whatever happens to its run: conflicts, duplicates, other classes."""

from __future__ import annotations

import itertools
import threading
from contextlib import suppress

import pytest
import transaction
import zope.sqlalchemy
from celery import Task, chain, chord
from celery.exceptions import Ignore, Retry
from pyramid.threadlocal import RequestContext
from sqlalchemy import create_engine, event, text
from sqlalchemy.orm import scoped_session
from tests.notes import dispatch, follow, insert, write
from tests.waiting import SOON
from transaction.interfaces import TransientError

from ws_celery import RequestAwareTask, task
from ws_celery.events import TaskFinished
from ws_celery.exceptions import ConfigurationError
from ws_celery.testing.captured import run_as_worker
from ws_celery.worker import run_of


@task(name="conflicting", bind=True)
def conflicting(self, request, number):
    """Meet a conflict in its first commit."""
    insert(request, number)
    if run_of(self.request).attempts_left == 2:
        request.tm.get().addBeforeCommitHook(conflict)
        request.tm.get().join(_Conflicted())
    return number


class _Conflicted:
    transaction_manager = None

    def should_retry(self, error):
        return isinstance(error, TransientError)

    def abort(self, txn):
        pass

    def sortKey(self):  # noqa: N802
        return "conflicted"


def conflict():
    raise TransientError


@task(name="dooming")
def dooming(request, number):
    insert(request, number)
    request.tm.doom()
    return number


@task(name="replacing", bind=True)
def replacing(self, request, number):
    insert(request, number)
    return self.replace(write.s(number + 1))


@task(name="dooming_and_replacing", bind=True)
def dooming_and_replacing(self, request, number):
    insert(request, number)
    request.tm.doom()
    self.replace(write.s(number + 1))


@task(name="dooming_and_replacing_late", bind=True, acknowledge="late")
def dooming_and_replacing_late(self, request, number):
    insert(request, number)
    request.tm.doom()
    self.replace(write.s(number + 1))


@task(name="dooming_and_asking_for_all", bind=True)
def dooming_and_asking_for_all(self, request, number):
    """Ask for a retry, and for a replacement."""
    insert(request, number)
    request.tm.doom()
    if not self.request.retries:
        with suppress(Retry):
            self.retry(countdown=0)
        self.replace(write.s(number + 1))


@task(name="retrying_without_end", bind=True, max_retries=1)
def retrying_without_end(self, request):
    raise self.retry(countdown=0)


@task(name="going_on", bind=True)
def going_on(self, request, number):
    insert(request, number + self.request.retries)
    if not self.request.retries:
        self.retry(countdown=0, throw=False)


@task(name="aware_going_on", bind=True, base=RequestAwareTask)
def aware_going_on(self, request):
    if not self.request.retries:
        self.retry(countdown=0, throw=False)


class Plain(Task):
    name = "plain"
    runs = 0

    def run(self):
        type(self).runs += 1
        if not self.request.retries:
            raise self.retry(countdown=0)


@task(name="total", base=RequestAwareTask)
def total(request, numbers):
    return sum(numbers)


TASKS = (
    write, follow, conflicting, dooming, replacing, dooming_and_replacing,
    dooming_and_replacing_late, dooming_and_asking_for_all, retrying_without_end, going_on,
    aware_going_on, total,
)  # fmt: skip


@pytest.fixture
def app(make_outbox, database):
    return make_outbox(database, *TASKS)


def publication_of(app, rows_of):
    (row,) = rows_of(app)
    return app.celery.outbox.publication_of(row)


# Ends


def test_a_chain_goes_on_after_a_conflict(app, start_worker, database, rows_of):
    with RequestContext(app.request()), transaction.manager:
        result = chain(conflicting.s(1), follow.s(2)).apply_async()
    start_worker(app)

    assert result.get(SOON) == 1
    assert database.notes() == ["note 1", "note 2"]
    assert rows_of(app) == []


def test_a_doomed_run_has_no_effect_and_ends(app, start_worker, database, rows_of):
    result = dispatch(app, dooming, 1)
    start_worker(app)

    assert result.get(SOON) == 1
    dispatch(app, write, 2).get(SOON)
    assert database.notes() == ["note 2"]
    assert rows_of(app) == []


def test_a_chain_goes_on_after_a_doomed_run(app, start_worker, database):
    with RequestContext(app.request()), transaction.manager:
        result = chain(dooming.s(1), follow.s(2)).apply_async()
    start_worker(app)

    assert result.get(SOON) == 1
    assert database.notes() == ["note 2"]


def test_a_replaced_task_commits_with_the_row_of_its_replacement(
    app, start_worker, database, rows_of
):
    result = dispatch(app, replacing, 1)
    start_worker(app)

    assert result.get(SOON) == 2
    assert database.notes() == ["note 1", "note 2"]
    assert rows_of(app) == []


@pytest.mark.parametrize("name", ["dooming_and_replacing", "dooming_and_replacing_late"])
def test_the_replacement_of_a_doomed_run_has_a_row(app, start_worker, database, rows_of, name):
    result = dispatch(app, app.celery.tasks[name], 1)
    publication = publication_of(app, rows_of)
    app.sent()
    publication.options["headers"]["ws_celery_outbox"] = str(publication.row_id)
    with pytest.raises(Ignore):
        run_as_worker(app.celery, publication, {})

    (row,) = rows_of(app)
    assert (row.task, row.task_id) == ("write", result.id)
    assert database.notes() == []
    start_worker(app)
    assert result.get(SOON) == 2
    dispatch(app, write, 9).get(SOON)
    assert database.notes() == ["note 2", "note 9"]
    assert rows_of(app) == []


def test_a_doomed_run_may_ask_for_a_retry_and_a_replacement(app, start_worker, database, rows_of):
    dispatch(app, dooming_and_asking_for_all, 1)
    start_worker(app)

    for number in (8, 9):
        dispatch(app, write, number).get(SOON)
    assert database.notes() == ["note 2", "note 8", "note 9"]
    assert rows_of(app) == []


def test_too_many_retries_are_a_dead_letter(app, start_worker, rows_of):
    result = dispatch(app, retrying_without_end)
    start_worker(app)

    result.get(SOON, propagate=False)
    dispatch(app, write, 1).get(SOON)
    (row,) = rows_of(app)
    assert row.due_at is None
    assert "MaxRetriesExceededError" in row.error


def test_a_retry_of_a_run_that_goes_on_leaves_with_its_commit(app, start_worker, database, rows_of):
    dispatch(app, going_on, 1)
    start_worker(app)
    dispatch(app, write, 9).get(SOON)
    dispatch(app, write, 10).get(SOON)

    assert database.notes()[:2] == ["note 1", "note 2"]
    assert rows_of(app) == []


def test_a_retry_of_a_run_that_goes_on_has_a_row_of_its_own(app, database, rows_of):
    dispatch(app, going_on, 1)
    publication = publication_of(app, rows_of)
    app.sent()
    publication.options["headers"]["ws_celery_outbox"] = str(publication.row_id)

    run_as_worker(app.celery, publication, {})

    assert database.notes() == ["note 1"]
    (row,) = rows_of(app)
    (retry,) = app.sent()
    assert retry.headers["retries"] == 1
    assert retry.headers["ws_celery_outbox"] == str(row.id) != str(publication.row_id)


def test_a_run_without_a_transaction_leaves_its_row_to_its_retry(app, rows_of):
    dispatch(app, aware_going_on)
    publication = publication_of(app, rows_of)
    app.sent()
    publication.options["headers"]["ws_celery_outbox"] = str(publication.row_id)

    run_as_worker(app.celery, publication, {})

    (row,) = rows_of(app)
    (retry,) = app.sent()
    assert retry.headers["retries"] == 1
    assert retry.headers["ws_celery_outbox"] == str(row.id)


def test_items_of_chunks_share_the_row_of_their_chunk(app, start_worker, database, rows_of):
    with RequestContext(app.request()), transaction.manager:
        result = write.chunks([(number,) for number in range(4)], 2).apply_async()
    start_worker(app)

    assert result.get(SOON) == [[0, 1], [2, 3]]
    dispatch(app, write, 4).get(SOON)
    assert len(database.notes()) == 5
    assert rows_of(app) == []


def test_a_chord_has_rows_for_its_parts(app, start_worker, database, rows_of):
    with RequestContext(app.request()), transaction.manager:
        result = chord((write.s(number) for number in range(3)), total.s()).apply_async()
    assert len(rows_of(app)) == 3
    start_worker(app)

    assert result.get(SOON) == 3
    assert rows_of(app) == []


def test_a_plain_task_of_celery_runs_at_least_once(make_outbox, database, start_worker, rows_of):
    app = make_outbox(database, write)
    app.celery.register_task(Plain())
    Plain.runs = 0
    with RequestContext(app.request()), transaction.manager:
        app.celery.send_task("plain")
    assert len(rows_of(app)) == 1
    start_worker(app)
    dispatch(app, write, 1).get(SOON)
    dispatch(app, write, 2).get(SOON)

    assert Plain.runs == 2  # itself and its retry
    assert rows_of(app) == []


# Duplicates


def test_a_duplicate_stores_nothing_and_fires_nothing(make_outbox, database, start_worker, rows_of):
    finished = []
    app = make_outbox(
        database,
        *TASKS,
        setup=lambda config: config.add_subscriber(finished.append, TaskFinished),
    )
    with transaction.manager:
        result = write.apply_async((app.request(), 1), link=follow.s(2))
    publication = publication_of(app, rows_of)
    start_worker(app)
    result.get(SOON)
    result.children[0].get(SOON)
    result.forget()

    app.celery.publish([publication])
    dispatch(app, write, 3).get(SOON)

    assert result.state == "PENDING"
    assert database.notes() == ["note 1", "note 2", "note 3"]
    assert [event.id for event in finished].count(result.id) == 1


def test_a_message_for_another_program_does_not_tell_its_row(app):
    with RequestContext(app.request()), transaction.manager:
        app.celery.send_task("elsewhere")

    (message,) = app.sent()
    assert "ws_celery_outbox" not in message.headers


def test_the_message_of_a_dead_letter_that_comes_late_is_not_run(
    app, start_worker, database, rows_of
):
    dispatch(app, write, 1)
    (row,) = rows_of(app)
    app.celery.outbox.settlement.make_dead_letter(row.id, "enough")
    start_worker(app)

    dispatch(app, write, 2).get(SOON)
    assert database.notes() == ["note 2"]


def test_a_task_id_used_twice_is_two_dispatches(app, start_worker, database, rows_of):
    for number in (1, 2):
        dispatch(app, write, number, task_id="mine")
    start_worker(app)
    dispatch(app, write, 3).get(SOON)

    assert database.notes() == ["note 1", "note 2", "note 3"]
    assert rows_of(app) == []


@pytest.mark.parametrize("acknowledge", ["early", "late"])
def test_of_two_runs_at_a_time_one_commits(make_outbox, postgres, rows_of, acknowledge):
    barrier = threading.Barrier(2, timeout=60)
    numbers, entered = itertools.count(1), []

    @task(name="meeting", acknowledge=acknowledge)
    def meeting(request, number):
        mine = next(numbers)
        entered.append(mine)
        if acknowledge == "late":
            barrier.wait()
        insert(request, mine)

    app = make_outbox(postgres, meeting)
    dispatch(app, meeting, 1)
    headers = {"ws_celery_outbox": str(rows_of(app)[0].id)}
    outcomes = run_twice(app.celery.tasks["meeting"], headers)

    assert len(entered) == (2 if acknowledge == "late" else 1)
    assert sorted(outcomes) == ["IGNORED", "SUCCESS"]
    assert len(postgres.notes()) == 1
    assert rows_of(app) == []


def run_twice(task, headers):
    outcomes = []

    def run():
        outcomes.append(task.apply((1,), headers=headers, throw=False).state)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    return outcomes


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("acknowledge", ["early", "late"])
def test_a_claim_that_fails_by_a_serialization_error_is_tried_again_in_place(
    make_outbox, postgres, rows_of, level, acknowledge
):
    attempts = []

    @task(name="late", acknowledge=acknowledge, bind=True)
    def late(self, request, number):
        attempts.append(run_of(self.request).attempts_left)
        # Somebody else has had the effect, after this transaction has taken its snapshot.
        if acknowledge == "late":
            app.celery.outbox.settlement.delete(row.id)

    engine = create_engine(postgres.engine.url, isolation_level=level)
    postgres.sessions.configure(bind=engine)
    app = make_outbox(postgres, late)
    dispatch(app, late, 1)
    (row,) = rows_of(app)
    run = app.celery.tasks["late"]

    result = run.apply((1,), headers={"ws_celery_outbox": str(row.id)})

    assert result.state == ("IGNORED" if acknowledge == "late" else "SUCCESS")
    assert len(attempts) == 1
    assert rows_of(app) == []
    engine.dispose()


def test_a_run_without_effect_has_aborted_before_its_request_ends(make_outbox, postgres, rows_of):
    @task(name="late", acknowledge="late")
    def late(request):
        request.add_finished_callback(lambda request: write.delay(request, 2))
        app.celery.outbox.settlement.delete(row.id)  # somebody else has had the effect

    app = make_outbox(postgres, late, write)
    dispatch(app, late)
    (row,) = rows_of(app)
    app.sent()

    result = app.celery.tasks["late"].apply(headers={"ws_celery_outbox": str(row.id)})

    assert result.state == "IGNORED"
    assert app.names() == ["write"]


@pytest.mark.parametrize("acknowledge", ["early", "late"])
def test_the_lock_of_a_machine_that_has_lost_its_power_ends_soon(
    make_outbox, postgres, rows_of, acknowledge
):
    show = "SELECT current_setting('tcp_keepalives_idle')::integer"
    seen = []

    @task(name="looking", acknowledge=acknowledge)
    def looking(request):
        session = request.dbsession
        event.listen(session, "before_commit", lambda _: seen.append(session.scalar(text(show))))

    app = make_outbox(postgres, looking)
    (usual,) = postgres.execute(show)
    if not usual:
        pytest.skip("a Unix socket has no keepalives")
    dispatch(app, looking)
    headers = {"ws_celery_outbox": str(rows_of(app)[0].id)}

    assert app.celery.tasks["looking"].apply(headers=headers).state == "SUCCESS"
    assert seen == [30]
    assert postgres.execute(show) == [usual]


# Options


def test_acknowledge_is_early_or_late(make_outbox, sqlite):
    @task(name="wrong", acknowledge="never")
    def wrong(request):
        pass

    with pytest.raises(Exception, match="acknowledge = 'never'") as error:
        make_outbox(sqlite, wrong)

    assert isinstance(getattr(error.value, "evalue", error.value), ConfigurationError)


def test_messages_of_transactional_tasks_survive_their_worker_unless_somebody_says_otherwise(
    make_outbox, sqlite
):
    @task(name="own", acks_late=False)
    def own(request):
        pass

    tasks = make_outbox(sqlite, write, own, total).celery.tasks
    configured = make_outbox(sqlite, write, celery="task_acks_late = false\n").celery.tasks

    assert (tasks["write"].acks_late, tasks["write"].reject_on_worker_lost) == (True, True)
    assert (tasks["own"].acks_late, tasks["own"].reject_on_worker_lost) == (False, True)
    assert not tasks["total"].acks_late
    assert not configured["write"].acks_late


# Sessions


def test_the_session_may_be_another_attribute_and_scoped(make_outbox, database, rows_of):
    registry = scoped_session(database.sessions)
    zope.sqlalchemy.register(registry)

    def setup(config):
        config.add_request_method(lambda _: registry, "db", reify=True)

    app = make_outbox(database, write, setup=setup, ws_celery__dbsession="db")
    dispatch(app, write, 1)

    assert len(rows_of(app)) == len(app.sent()) == 1
    registry.remove()


def test_a_two_phase_session_keeps_and_claims(make_outbox, mariadb, rows_of, start_worker):
    mariadb.sessions.configure(twophase=True)
    app = make_outbox(mariadb, write)
    result = dispatch(app, write, 1)
    assert len(rows_of(app)) == 1
    start_worker(app)

    assert result.get(SOON) == 1
    assert mariadb.notes() == ["note 1"]
    assert rows_of(app) == []


def test_an_explicit_manager_keeps_and_claims(make_outbox, database, rows_of, start_worker):
    hook = {"tm__manager_hook": "pyramid_tm.explicit_manager"}
    app = make_outbox(database, write, **hook)
    request = app.request()
    with request.tm:
        result = write.delay(request, 1)
    assert len(rows_of(app)) == 1
    start_worker(app)

    assert result.get(SOON) == 1
    assert rows_of(app) == []


def test_eager_tasks_have_no_rows(make_outbox, database, rows_of):
    app = make_outbox(database, write, celery="task_always_eager = true\n")
    result = dispatch(app, write, 1)

    assert result.get() == 1
    assert database.notes() == ["note 1"]
    assert rows_of(app) == []
