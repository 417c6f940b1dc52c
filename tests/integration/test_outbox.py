"""The outbox on real databases: what is written with the dispatch, and what becomes of it."""

from __future__ import annotations

import logging
from datetime import datetime, timezone
from uuid import uuid4

import pytest
import transaction
from billiard.exceptions import WorkerLostError
from celery import chain, group, signals
from celery.app.task import Context
from celery.exceptions import Ignore, Reject
from kombu.exceptions import OperationalError
from pyramid.threadlocal import RequestContext
from sqlalchemy import create_engine, event, text
from tests.notes import dispatch, follow, insert, write
from tests.waiting import SOON

from ws_celery import RequestAwareTask, immediately, publishing, task
from ws_celery.converters import aware as aware_of
from ws_celery.eager import received as received_by_worker
from ws_celery.events import PublishFailed
from ws_celery.exceptions import Abandoned, SessionError, TableError
from ws_celery.inspection import health
from ws_celery.testing.captured import run_as_worker


@task(name="fail", bind=True)
def fail(self, request, number):
    insert(request, number)
    raise LookupError("no such thing")


@task(name="retrying", bind=True, max_retries=2)
def retrying(self, request, number):
    insert(request, number)
    if self.request.retries < 1:
        raise self.retry(countdown=0)


@task(name="rejecting")
def rejecting(request, number):
    insert(request, number)
    raise Reject("not mine")


@task(name="ignoring")
def ignoring(request, number):
    insert(request, number)
    raise Ignore


@task(name="dooming_and_ignoring")
def dooming_and_ignoring(request):
    request.tm.doom()
    raise Ignore


@task(name="aware_and_ignoring", base=RequestAwareTask)
def aware_and_ignoring(request):
    raise Ignore


@task(name="aware", base=RequestAwareTask)
def aware(request):
    return "done"


@task(name="aware_and_failing", base=RequestAwareTask)
def aware_and_failing(request):
    raise LookupError("no such thing")


@task(name="aware_and_retrying", base=RequestAwareTask, bind=True)
def aware_and_retrying(self, request):
    if self.request.retries < 1:
        raise self.retry(countdown=0)


@task(name="careless", outbox=False)
def careless(request):
    pass


TASKS = (
    write, follow, fail, retrying, rejecting, ignoring,
    aware, aware_and_failing, aware_and_retrying, careless,
)  # fmt: skip


@pytest.fixture
def make(make_app, database, redis_url):
    """Make an application with an outbox in this database."""
    tables = []

    def make(*tasks, view=None, celery="", **settings):
        def setup(config):
            database.includeme(config)
            if view:
                config.add_route("home", "/")
                config.add_view(view, route_name="home", renderer="json")

        celery = f"result_backend = {redis_url}\n{celery}"
        settings = {"ws_celery__outbox": "true", **settings}
        app = make_app(*TASKS, *tasks, setup=setup, broker=redis_url, celery=celery, **settings)
        tables.append(app.celery.outbox.rows.table)
        tables[-1].create(database.engine)
        return app

    yield make
    transaction.abort()
    for table in tables:
        table.drop(database.engine, checkfirst=True)


@pytest.fixture
def app(make):
    return make()


def rows(app):
    """Return what the outbox holds."""
    with app.celery.outbox.begin() as connection:
        return connection.execute(app.celery.outbox.rows.select()).all()


def seconds_until_due(app):
    with app.celery.outbox.begin() as connection:
        return app.celery.outbox.rows.seconds_until_due(connection)


# Dispatch


def test_a_dispatch_is_a_row_and_a_message_once_its_transaction_has_committed(app):
    with transaction.manager:
        result = write.delay(app.request(), 1)
        assert rows(app) == []

    (row,) = rows(app)
    (message,) = app.sent()
    assert (row.task_id, row.task, row.deliveries) == (result.id, "write", 0)
    assert message.id == result.id
    assert message.headers["ws_celery_outbox"] == str(row.id)
    assert 290 < seconds_until_due(app) <= 300


def test_what_runs_in_the_calling_process_has_no_row(make, database):
    app = make(celery="task_always_eager = true")
    with transaction.manager:
        chain(write.s(1), follow.s(2)).delay()
        result = retrying.delay(3)

    assert database.notes() == ["note 1", "note 2", "note 3"]
    assert result.state == "SUCCESS"
    assert rows(app) == app.sent() == []


def test_an_aborted_transaction_leaves_no_row(app):
    request = app.request()
    with transaction.manager:
        write.delay(request, 1)
        transaction.doom()
        transaction.abort()

    assert rows(app) == []
    assert app.sent() == []


def test_a_rolled_back_savepoint_of_sqlalchemy_leaves_no_row(app):
    request = app.request()
    with transaction.manager:
        write.delay(request, 1)
        savepoint = request.dbsession.begin_nested()
        write.delay(request, 2)
        savepoint.rollback()

    assert len(rows(app)) == len(app.sent()) == 1


def test_a_commit_that_fails_leaves_no_row(app):
    request = app.request()
    transaction.begin()
    write.delay(request, 1)
    transaction.get().addBeforeCommitHook(lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        transaction.commit()

    transaction.abort()
    assert rows(app) == []


def test_what_a_listener_of_the_commit_s_own_flush_dispatches_has_a_row(app):
    request = app.request()
    with transaction.manager:
        session = request.dbsession
        session.connection()
        event.listen(session, "before_commit", lambda _: write.delay(request, 2))
        write.delay(request, 1)

    assert len(rows(app)) == len(app.sent()) == 2


def test_what_another_hook_of_the_commit_dispatches_has_a_row(app):
    request = app.request()
    with transaction.manager:
        write.delay(request, 1)
        transaction.get().addBeforeCommitHook(lambda: write.delay(request, 2))

    assert len(rows(app)) == len(app.sent()) == 2


def test_without_a_transaction_the_message_is_sent_at_once_and_has_no_row(app):
    write.delay(app.request(), 1)

    (message,) = app.sent()
    assert "ws_celery_outbox" not in message.headers
    assert rows(app) == []


def test_immediately_goes_round_the_outbox(app):
    request = app.request()
    with transaction.manager, immediately():
        write.delay(request, 1)

    assert len(app.sent()) == 1
    assert rows(app) == []


def test_a_task_can_opt_out(app):
    with transaction.manager:
        careless.delay(app.request())

    assert app.names() == ["careless"]
    assert rows(app) == []


def test_a_dispatch_that_cannot_reach_the_session_fails_at_the_call(app):
    with transaction.manager, pytest.raises(SessionError, match="Pass the request"):
        app.celery.send_task("write", (1,))

    assert app.sent() == []


def test_a_task_of_another_program_has_its_row_until_it_is_published(app):
    with RequestContext(app.request()), transaction.manager:
        app.celery.send_task("elsewhere")

    assert app.names() == ["elsewhere"]
    assert rows(app) == []


def test_a_far_eta_waits_in_the_outbox(app):
    with transaction.manager:
        write.apply_async((app.request(), 1), countdown=3600)

    assert app.sent() == []
    assert 3500 < seconds_until_due(app) < 3600


def test_a_near_eta_is_published_at_once_and_due_after_it(app):
    with transaction.manager:
        write.apply_async((app.request(), 1), countdown=60)

    assert app.names() == ["write"]
    assert 350 < seconds_until_due(app) <= 360


@pytest.mark.parametrize("zone", ["Europe/Berlin", "UTC"])
@pytest.mark.parametrize(
    "time", ["2040-07-01T12:00:00", "2040-07-01T12:00:00Z", "2040-07-01 12:00"]
)
def test_times_mean_in_the_table_what_they_mean_in_the_worker(make, zone, time):
    app = make(celery=f"timezone = {zone}\n")
    eta = time if "Z" in time else datetime.fromisoformat(time)
    with transaction.manager:
        write.apply_async((app.request(), 1), eta=eta, expires=eta)

    message = received_by_worker(app.celery, _publication(app))
    (row,) = rows(app)
    assert aware_of(row.eta) == message.eta
    assert aware_of(row.expires) == message.expires


def test_a_time_that_is_none_is_refused_at_the_call(app):
    with transaction.manager, pytest.raises(ValueError, match="tomorrow"):
        write.apply_async((app.request(), 1), eta="tomorrow")

    assert app.sent() == rows(app) == []


@pytest.mark.parametrize(
    ("option", "time"),
    [
        ("expires", datetime.max.replace(tzinfo=timezone.utc)),
        ("eta", "9999-12-31T23:59:59-01:00"),
        ("eta", "0001-01-01T00:00:00+01:00"),
    ],
)
def test_a_time_that_not_every_zone_can_show_is_refused_at_the_call(app, option, time):
    with transaction.manager, pytest.raises(ValueError, match="years 2 to 9998"):
        write.apply_async((app.request(), 1), **{option: time})

    assert app.sent() == rows(app) == []


@pytest.mark.parametrize("name", ["x" * 256, "a\0b", "a\udcffb"], ids=["long", "nul", "half"])
@pytest.mark.parametrize("option", ["task_id", "queue"])
def test_a_name_that_no_column_holds_is_refused_at_the_call(app, option, name):
    with transaction.manager, pytest.raises(ValueError, match="at most 255 characters"):
        write.apply_async((app.request(), 1), **{option: name})

    assert rows(app) == []


def test_an_id_that_is_no_text_is_refused_at_the_call(app):
    with transaction.manager, pytest.raises(ValueError, match="no task id"):
        write.apply_async((app.request(), 1), task_id=uuid4())

    assert rows(app) == []


def test_a_long_name_that_its_column_holds_is_kept(app):
    with transaction.manager:
        write.apply_async((app.request(), 1), task_id="\U0001f600" * 255)

    assert [row.task_id for row in rows(app)] == ["\U0001f600" * 255]


def test_a_missing_table_says_what_to_do(make, database):
    app = make()
    app.celery.outbox.rows.table.drop(database.engine)
    request = app.request()
    transaction.begin()
    write.delay(request, 1)

    with pytest.raises(TableError, match="ws-celery outbox create"):
        transaction.commit()

    transaction.abort()
    assert app.sent() == []


def test_a_broker_that_is_down_leaves_rows_that_are_due_at_once(app, monkeypatch):
    monkeypatch.setitem(app.celery.conf, "broker_write_url", "redis://127.0.0.1:1")
    with transaction.manager:
        write.delay(app.request(), 1)

    assert seconds_until_due(app) <= 0


def test_what_may_have_been_sent_is_due_at_once_and_not_told_as_lost(app, monkeypatch, caplog):
    def publish(producer, publication, **options):
        raise OperationalError("gone")

    lost = []
    app.registry.registerHandler(lost.append, [PublishFailed])
    monkeypatch.setattr(publishing, "publish", publish)
    with transaction.manager:
        write.delay(app.request(), 1)

    assert lost == []
    assert "The outbox keeps 1 tasks for the relay" in caplog.text
    assert seconds_until_due(app) <= 0


def test_a_dead_letter_stays_one_though_its_publisher_has_given_up_late(app):
    dispatch(app, write, 1)
    publication = _publication(app)
    app.celery.outbox.settlement.make_dead_letter(publication.row_id, "enough")

    app.celery.outbox.not_published([publication])

    (row,) = rows(app)
    assert (row.due_at, row.error) == (None, "enough")


def test_an_event_that_was_not_sent_is_no_task_that_may_be_lost(make, monkeypatch, caplog):
    app = make(celery="task_send_sent_event = true")
    monkeypatch.setitem(app.celery.conf, "broker_write_url", "redis://127.0.0.1:1")
    with transaction.manager:
        write.delay(app.request(), 1)

    assert "The outbox keeps 1 tasks" in caplog.text
    assert "may not have been sent" not in caplog.text


def test_a_relay_that_leaves_what_is_due_is_not_healthy(postgres, make_outbox, monkeypatch):
    app = make_outbox(postgres, write)

    def relay():
        (part,) = health(app.registry, parts=["relay"], max_age=0, timeout=30)
        return part

    with transaction.manager:
        result = write.delay(app.request(), 1)
    assert relay().healthy  # its lease has not ended

    monkeypatch.setitem(app.celery.conf, "broker_write_url", "redis://127.0.0.1:1")
    app.celery.publisher.close()
    with transaction.manager:
        result = write.delay(app.request(), 1)
    assert not relay().healthy
    assert "nothing sends what is due" in relay().detail

    with app.celery.outbox.begin() as running:
        (row,) = app.celery.outbox.rows.find(running, result.id)
        app.celery.outbox.rows.claim(running, row.id)
        assert relay().healthy  # what is due is being run


# Runs


def test_the_effect_of_a_task_and_the_end_of_its_row_are_one(app, start_worker, database):
    result = dispatch(app, write, 1)
    start_worker(app)

    assert result.get(SOON) == 1
    assert database.notes() == ["note 1"]
    assert rows(app) == []


def test_a_message_that_comes_twice_takes_effect_once(app, start_worker, database):
    dispatch(app, write, 1)
    publication = _publication(app)
    app.celery.publish([publication, publication])
    last = dispatch(app, write, 2)
    start_worker(app)

    assert last.get(SOON) == 2
    assert database.notes() == ["note 1", "note 2"]


def test_a_chain_is_dispatched_in_the_transactions_of_its_tasks(app, start_worker, database):
    with RequestContext(app.request()), transaction.manager:
        result = chain(write.s(1), follow.s(2), follow.s(3)).apply_async()
    start_worker(app)

    assert result.get(SOON) == 1
    assert database.notes() == ["note 1", "note 2", "note 3"]
    assert rows(app) == []


def test_a_callback_is_dispatched_in_the_transaction_of_its_task(app, start_worker, database):
    request = app.request()
    with transaction.manager:
        result = write.apply_async((request, 1), link=follow.s(2))
    start_worker(app)

    result.get(SOON)
    result.children[0].get(SOON)
    assert database.notes() == ["note 1", "note 2"]


def test_a_group_has_a_row_for_each_of_its_tasks(app, start_worker, database):
    with RequestContext(app.request()), transaction.manager:
        result = group(write.s(number) for number in range(3)).apply_async()
    assert len(rows(app)) == 3
    start_worker(app)

    assert result.get(SOON) == [0, 1, 2]
    assert rows(app) == []


def test_a_retry_is_sent_after_the_abort_and_keeps_the_row(app, start_worker, database):
    result = dispatch(app, retrying, 1)
    start_worker(app)

    result.get(SOON)
    assert database.notes() == ["note 1"]
    assert rows(app) == []


def test_a_retry_is_delivered_as_often_as_a_new_message_may_be(app):
    dispatch(app, retrying, 1)
    publication = _publication(app)
    with app.celery.outbox.begin() as connection:
        connection.execute(app.celery.outbox.rows.table.update().values(deliveries=9))

    headers = {"ws_celery_outbox": str(publication.row_id)}
    app.celery.outbox.runs.retry(Context(headers), [publication])

    assert [row.deliveries for row in rows(app)] == [0]


@pytest.mark.parametrize(("name", "said"), [("fail", "LookupError"), ("rejecting", "not mine")])
def test_a_task_that_fails_for_good_is_a_dead_letter(app, start_worker, database, name, said):
    dispatch(app, app.celery.tasks[name], 1)
    last = dispatch(app, write, 2)
    start_worker(app)

    last.get(SOON)
    (row,) = rows(app)
    assert (row.task, row.due_at) == (name, None)
    assert row.died_at
    assert said in row.error
    assert database.notes() == ["note 2"]


@pytest.mark.parametrize(("text", "shown"), [("\0", "\\x00"), ("\udcff", "\\udcff")])
def test_a_failure_whose_text_no_database_keeps_is_a_dead_letter(
    make, start_worker, caplog, text, shown
):
    caplog.set_level(logging.CRITICAL, "celery.app.trace")  # pytest-xdist cannot report such text

    @task(name="garbled")
    def garbled(request):
        raise LookupError(f"no {text} here")

    app = make(garbled)
    dispatch(app, garbled)
    start_worker(app)
    dispatch(app, write, 2).get(SOON)

    (row,) = rows(app)
    assert row.died_at
    assert f"no {shown} here" in row.error


def test_a_loss_whose_text_no_database_keeps_is_counted(app):
    dispatch(app, write, 1)
    (row,) = rows(app)
    for _ in range(10):
        app.celery.outbox.settlement.count_lost_run(row.id, "lost at \0\udcff")

    (dead,) = rows(app)
    assert dead.error == r"lost at \x00\udcff"


def test_a_task_that_ends_with_ignore_has_had_its_effect(app, start_worker, database):
    dispatch(app, ignoring, 1)
    dispatch(app, write, 2)
    start_worker(app)

    last = dispatch(app, write, 3)
    last.get(SOON)
    assert database.notes() == ["note 1", "note 2", "note 3"]
    assert rows(app) == []


@pytest.mark.parametrize("each", [dooming_and_ignoring, aware_and_ignoring])
def test_a_task_that_ends_with_ignore_and_commits_nothing_is_not_sent_again(
    make, start_worker, each
):
    app = make(each)
    dispatch(app, each)
    start_worker(app)
    dispatch(app, write, 1).get(SOON)

    assert rows(app) == []


def test_a_task_without_a_transaction_of_its_own_loses_its_row_after_the_run(app, start_worker):
    first = dispatch(app, aware)
    second = dispatch(app, aware_and_retrying)
    last = dispatch(app, aware)
    start_worker(app)

    assert first.get(SOON) == "done"
    second.get(SOON)
    last.get(SOON)
    dispatch(app, aware).get(SOON)
    assert [row.task for row in rows(app) if row.died_at] == []


def test_a_task_that_is_not_registered_is_a_dead_letter(app, start_worker):
    dispatch(app, aware)
    del app.celery.tasks["aware"]
    start_worker(app)
    dispatch(app, write, 1).get(SOON)

    (row,) = rows(app)
    assert "not registered" in row.error


def test_a_message_that_nobody_can_read_is_a_dead_letter(app, start_worker):
    dispatch(app, write, 1)
    app.sent()
    publication = _publication(app)
    publication.payload = "["
    app.celery.publisher.publish([publication])
    start_worker(app)
    dispatch(app, write, 2).get(SOON)

    (row,) = rows(app)
    assert "the worker cannot read the message" in row.error


def test_a_worker_may_read_messages_in_a_way_of_its_own(make):
    consumer = "celery.worker.consumer:Consumer"
    app = make(celery=f"worker_consumer = {consumer}")

    assert app.celery.conf.worker_consumer == consumer


def test_a_run_whose_process_was_killed_keeps_its_row(app):
    dispatch(app, write, 1)
    publication = _publication(app)
    headers = {"ws_celery_outbox": str(publication.row_id)}
    app.celery.tasks["write"].push_request(headers=headers)

    signals.task_failure.send(app.celery.tasks["write"], exception=WorkerLostError("signal 9"))

    app.celery.tasks["write"].pop_request()
    (row,) = rows(app)
    assert row.died_at is None


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
@pytest.mark.parametrize(("times", "lease_is_left"), [(1, False), (3, True)])
def test_a_run_that_loses_its_database_is_no_dead_letter(
    make, start_worker, database, times, lease_is_left
):
    left = iter(range(times))

    @task(name="unlucky")
    def unlucky(request, number):
        insert(request, number)
        if next(left, None) is not None:
            _terminate(request.dbsession, database)
        insert(request, number + 1)

    app = make(unlucky)
    dispatch(app, unlucky, 1)
    start_worker(app)
    dispatch(app, write, 3).get(SOON)

    assert database.notes() == (["note 3"] if lease_is_left else ["note 1", "note 2", "note 3"])
    assert [row.died_at for row in rows(app)] == ([None] if lease_is_left else [])


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_a_run_that_cannot_connect_to_its_database_is_no_dead_letter(app, database):
    result = dispatch(app, write, 1)
    publication = _publication(app)
    publication.options["headers"]["ws_celery_outbox"] = str(publication.row_id)
    nowhere = create_engine("postgresql+psycopg://postgres@127.0.0.1:1/none")
    database.sessions.configure(bind=nowhere)

    with pytest.raises(Abandoned):
        run_as_worker(app.celery, publication, {})

    assert [row.died_at for row in rows(app)] == [None]
    assert result.state == "PENDING"


def _terminate(session, database):
    pid = session.scalar(text("SELECT pg_backend_pid()"))
    database.execute("SELECT pg_terminate_backend(:pid, 5000)", pid=pid)


def _publication(app):
    """Return the message of the only row."""
    (row,) = rows(app)
    return app.celery.outbox.publication_of(row)
