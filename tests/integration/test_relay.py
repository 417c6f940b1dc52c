"""The relay against real databases and brokers: what it sends, and what it must not send."""

from __future__ import annotations

import json
import logging
import threading
from datetime import datetime, timedelta, timezone

import pytest
import redis
import transaction
from kombu import Connection
from pyramid.threadlocal import RequestContext
from sqlalchemy import create_engine, text, update
from tests.waiting import SOON, wait_for

from ws_celery import task
from ws_celery.embedded import EmbeddedBroker
from ws_celery.exceptions import BrokerUnavailable
from ws_celery.inspection import outbox_rows
from ws_celery.outbox.relay import Deliveries, Relay

NOWHERE = "redis://127.0.0.1:1"


@task(name="work")
def work(request, number):
    pass


@pytest.fixture
def make(make_app, database, redis_url):
    """Make an application with an outbox in this database; its tables and queues go."""
    made = []

    def make(broker=redis_url, **settings):
        app = make_app(
            work,
            setup=database.includeme,
            broker=broker,
            **{"ws_celery__outbox": "true", **settings},
        )
        app.celery.outbox.rows.table.create(database.engine, checkfirst=True)
        made.append(app)
        return app

    yield make
    transaction.abort()
    for app in made:
        outbox = app.celery.outbox
        outbox.rows.table.drop(database.engine, checkfirst=True)
        with Connection(app.celery.conf.broker_url) as connection:
            if connection.transport.driver_type == "amqp":
                connection.default_channel.queue_delete(outbox.relay.canary.name)
        outbox.relay.close()


@pytest.fixture
def app(make):
    """An application whose broker has a canary already."""
    app = make()
    app.relay = app.celery.outbox.relay
    app.relay.turn()
    return app


@pytest.fixture
def app_alone(make, start_broker, tmp_path):
    """An application with a broker of its own."""
    broker = EmbeddedBroker(tmp_path / "broker")
    start_broker(broker)
    app = make(broker=broker.url(0))
    app.relay = app.celery.outbox.relay
    return app


def dispatch(app, *numbers, **options):
    """Dispatch tasks; return the ids."""
    with transaction.manager:
        return [work.apply_async((app.request(), n), **options).id for n in numbers]


def dispatch_unsent(app, *numbers, **options):
    """Dispatch tasks that nobody can publish."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app.celery, "publish", lambda _: None)
        ids = dispatch(app, *numbers, **options)
    change(app, due_at=ago(1))
    return ids


def rows(app):
    with app.celery.outbox.begin() as connection:
        return connection.execute(app.celery.outbox.rows.select()).all()


def change(app, **values):
    """Change all rows that are no dead letters."""
    table = app.celery.outbox.rows.table
    with app.celery.outbox.begin() as connection:
        connection.execute(update(table).where(table.c.due_at.is_not(None)).values(values))


def ago(seconds):
    return datetime.now(timezone.utc) - timedelta(seconds=seconds)


def ids(messages):
    return [message.id for message in messages]


def lines(caplog):
    """Take what the relay has logged as a warning or worse."""
    loggers = ("ws_celery.outbox.relay", "ws_celery.outages")
    found = [each.getMessage() for each in caplog.records if each.name in loggers]
    caplog.clear()
    return found


@pytest.fixture(autouse=True)
def _changes_of_state_are_logged(caplog):
    caplog.set_level(logging.WARNING, "ws_celery")


def test_what_is_due_is_sent_once_and_counted(app):
    expected = dispatch_unsent(app, 1, 2)
    app.relay.turn()
    app.relay.turn()

    messages = app.sent()
    assert sorted(ids(messages)) == sorted(expected)
    assert {message.headers["ws_celery_outbox"] for message in messages} == {
        str(row.id) for row in rows(app)
    }
    assert [(row.deliveries, row.lease) for row in rows(app)] == [(1, 600)] * 2


def test_a_lease_is_never_longer_than_an_hour(app):
    dispatch_unsent(app, 1)
    change(app, lease=3000)
    app.relay.turn()

    assert [(row.deliveries, row.lease) for row in rows(app)] == [(1, 3600)]


def test_what_is_not_due_is_left_alone(app):
    dispatch(app, 1)
    app.sent()

    wait = app.relay.turn()
    assert app.sent() == []
    assert wait == app.relay.poll


def test_a_far_eta_is_sent_shortly_before(app):
    expected = dispatch(app, 1, countdown=3600)
    assert app.relay.turn() == app.relay.poll
    assert app.sent() == []
    (row,) = rows(app)
    assert 20 < (row.eta - row.due_at).total_seconds() < 40

    change(app, due_at=ago(1), eta=ago(-25))
    app.relay.turn()
    assert ids(app.sent()) == expected


def test_what_is_due_long_before_its_eta_is_put_back_uncounted(app):
    """After a jump of the database's clock."""
    dispatch_unsent(app, 1, countdown=4000)
    change(app, deliveries=10)
    app.relay.turn()

    assert app.sent() == []
    (row,) = rows(app)
    assert (row.deliveries, row.lease) == (10, 300)
    assert 20 < (row.eta - row.due_at).total_seconds() < 40


def test_a_message_that_was_sent_too_often_is_a_dead_letter(app):
    dispatch_unsent(app, 1)
    change(app, deliveries=10)
    expected = dispatch_unsent(app, 2)
    app.relay.turn()

    assert ids(app.sent()) == expected
    dead, _ = rows(app)
    assert (dead.due_at, dead.deliveries) == (None, 11)
    assert "max_deliveries" in dead.error


@pytest.mark.parametrize("options", ["{", "[]", json.dumps({"declare": [], "text": True})])
def test_a_broken_row_is_a_dead_letter_and_the_others_go_on(app, options):
    dispatch_unsent(app, 1)
    change(app, options=options)
    expected = dispatch_unsent(app, 2)
    app.relay.turn()

    assert ids(app.sent()) == expected
    assert "cannot be published" in rows(app)[0].error


def test_a_row_whose_message_is_of_another_task_is_a_dead_letter(app):
    dispatch_unsent(app, 1)
    change(app, task_id="another")
    expected = dispatch_unsent(app, 2)
    app.relay.turn()

    assert ids(app.sent()) == expected
    assert "its headers are of another task" in rows(app)[0].error


def test_a_row_that_cannot_be_read_is_a_dead_letter_and_the_others_go_on(app, database):
    dispatch_unsent(app, 1)
    infinite = {"postgresql": "infinity", "sqlite": "never"}[database.engine.dialect.name]
    database.execute("UPDATE ws_celery_outbox SET expires = :time", time=infinite)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app.celery, "publish", lambda _: None)
        expected = dispatch(app, 2)
    database.execute("UPDATE ws_celery_outbox SET due_at = created_at")
    app.relay.turn()

    assert ids(app.sent()) == expected
    (dead,) = outbox_rows(app.registry)
    assert "the row cannot be read" in dead.error
    assert infinite in dead.error


def test_an_error_of_another_kind_is_told_and_makes_no_dead_letter(app, monkeypatch, caplog):
    dispatch_unsent(app, 1)
    lines(caplog)
    with monkeypatch.context() as patch:
        patch.setattr(app.celery.outbox.rows, "lease_due", lambda *_: int("odd"))
        app.relay.turn()

    (said,) = lines(caplog)
    assert "The relay has failed" in said
    assert [row.due_at is None for row in rows(app)] == [False]


def test_an_expired_task_is_not_sent_and_its_row_goes(app):
    dispatch_unsent(app, 1, expires=1)
    change(app, expires=ago(5))
    app.relay.turn()

    assert app.sent() == []
    assert rows(app) == []


def test_the_row_of_a_task_of_another_program_goes_when_it_is_sent(app, monkeypatch):
    monkeypatch.setattr(app.celery, "publish", lambda _: None)
    with RequestContext(app.request()), transaction.manager:
        app.celery.send_task("elsewhere")
    change(app, due_at=ago(1))
    app.relay.turn()

    assert app.names() == ["elsewhere"]
    assert rows(app) == []


@pytest.mark.parametrize("name", ["elsewhere", "work"])
def test_a_relay_that_knows_other_tasks_obeys_the_process_that_has_dispatched(
    make, app, monkeypatch, name
):
    with RequestContext(app.request()), transaction.manager:
        app.celery.send_task(name, (1,), countdown=3600)
    change(app, due_at=ago(1), eta=None)
    other = make()
    if name == "work":
        del other.celery.tasks["work"]
    else:
        other.celery.tasks["elsewhere"] = other.celery.tasks["work"]
    monkeypatch.setattr(other.celery.outbox.relay, "_look", lambda: None)
    other.celery.outbox.relay.turn()

    (message,) = app.sent()
    assert ("ws_celery_outbox" in message.headers) == (name == "work")
    assert len(rows(app)) == (name == "work")


def test_two_relays_send_nothing_twice(app):
    expected = dispatch_unsent(app, *range(300))
    relays = [Relay(app.celery.outbox, batch=7) for _ in range(2)]
    threads = [threading.Thread(target=relay.turn) for relay in relays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for relay in relays:
        relay.turn()  # where the one was refused by a busy SQLite
        relay.close()

    assert sorted(ids(app.sent())) == sorted(expected)


# A backlog


def test_what_still_waits_in_a_long_queue_is_not_doubled(app):
    expected = dispatch(app, 1, 2)
    change(app, due_at=ago(1), created_at=ago(301))
    app.relay.turn()

    assert sorted(ids(app.sent())) == sorted(expected)
    assert [(row.deliveries, row.lease) for row in rows(app)] == [(0, 300)] * 2


def test_of_a_backlog_only_what_is_missing_is_sent_again(app):
    (missing,) = dispatch(app, 1)
    app.sent()
    dispatch(app, 2)
    dispatch(app, 3)
    change(app, due_at=ago(0), lease=0.000001)
    app.relay.turn()

    assert ids(app.sent())[2:] == [missing]
    assert sum(row.deliveries for row in rows(app)) == 1


def test_what_could_not_be_sent_is_sent_though_others_wait_in_its_queue(app, monkeypatch):
    expected = dispatch(app, 1)
    with monkeypatch.context() as patch:
        patch.setattr(app.celery, "publish", app.celery.outbox.not_published)
        expected += dispatch(app, 2)
    app.relay.turn()

    assert ids(app.sent()) == expected


def test_what_waits_nowhere_any_more_is_sent_again(app):
    expected = dispatch(app, 1, 2)
    app.sent()
    change(app, due_at=ago(1), created_at=ago(301))
    app.relay.turn()

    assert sorted(ids(app.sent())) == sorted(expected)


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_the_task_that_runs_is_not_sent_again(app):
    dispatch_unsent(app, 1)
    (row,) = rows(app)
    with app.celery.outbox.begin() as run:
        app.celery.outbox.rows.claim(run, row.id)
        assert app.relay.turn() == app.relay.poll

    assert app.sent() == []


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_what_a_relay_has_locked_is_free_soon_after_its_machine_has_lost_its_power(app):
    show = text("SELECT current_setting('tcp_keepalives_idle')::integer")
    with app.celery.outbox.begin() as connection:
        if not connection.scalar(show):
            pytest.skip("a Unix socket has no keepalives")
        app.celery.outbox.rows.lease_due(connection, 1)
        assert connection.scalar(show) == 30


# The broker


def test_a_broker_that_is_down_counts_no_delivery_and_is_logged_once(app, caplog, monkeypatch):
    expected = dispatch_unsent(app, 1)
    lines(caplog)
    with monkeypatch.context() as patch:
        patch.setitem(app.celery.conf, "broker_write_url", NOWHERE)
        relay = Relay(app.celery.outbox)
        waits = [relay.turn() for _ in range(3)]
    assert [row.deliveries for row in rows(app)] == [0]
    assert waits == sorted(set(waits))
    relay.turn()

    assert ids(app.sent()) == expected
    failed, back = lines(caplog)
    assert "broker has failed" in failed
    assert "broker is back" in back
    relay.close()


@pytest.mark.parametrize("age", [1, 1000], ids=["first", "again"])
def test_a_broker_that_goes_in_the_middle_counts_no_delivery(make, start_broker, tmp_path, age):
    broker = EmbeddedBroker(tmp_path / "broker")
    process = start_broker(broker)
    app = make(broker=broker.url(0))
    relay = app.celery.outbox.relay
    relay.turn()
    dispatch_unsent(app, 1, 2)
    change(app, created_at=ago(age))  # after a lease it asks how many messages wait
    process.kill()
    process.wait()
    broker.socket.unlink(missing_ok=True)
    relay.turn()
    assert [(row.deliveries, row.lease) for row in rows(app)] == [(0, 300)] * 2

    start_broker(broker)
    relay.turn()
    assert len(app.sent()) == 2


def test_a_broker_that_goes_between_two_messages_counts_what_it_has_been_sent(
    app, redis_url, monkeypatch
):
    """Of a batch that was refused each is sent alone; the second meets no broker any more."""
    dispatch_unsent(app, 1, 2, 3)
    flush, sent = app.celery.publisher.flush, []

    def failing(publications):
        if len(publications) > 1:
            raise LookupError("not together")
        if sent:
            with redis.Redis.from_url(redis_url) as client:
                client.delete(app.relay.canary.name)
            raise ConnectionError
        flush(publications)
        sent.append(publications[0].row_id)

    monkeypatch.setattr(app.celery.publisher, "flush", failing)
    app.relay.turn()

    assert {row.id for row in rows(app) if row.deliveries} == set(sent)
    assert len(app.sent()) == 1


@pytest.mark.parametrize("now", [True, False])
def test_what_has_failed_meanwhile_is_not_given_back(app, now):
    dispatch(app, 1)
    change(app, deliveries=1)
    (row,) = rows(app)
    app.celery.outbox.settlement.make_dead_letter(row.id, "enough")

    Deliveries(app.celery.outbox).release([row.id], now=now)

    (dead,) = rows(app)
    assert (dead.due_at, dead.deliveries, dead.lease) == (None, 1, 300)


def empty_redis(connection, names):
    connection.default_channel.client.flushall()  # a server of the test's own


def empty_rabbitmq(connection, names):
    for name in names:
        connection.default_channel.queue_delete(name)


@pytest.fixture(params=["redis", "rabbitmq"])
def emptying(request, start_broker, tmp_path):
    """URL of a broker, and how it loses its data."""
    if request.param == "rabbitmq":
        return request.getfixturevalue("rabbitmq_url"), empty_rabbitmq
    broker = EmbeddedBroker(tmp_path / "broker")
    start_broker(broker)
    return broker.url(0), empty_redis


def test_a_broker_that_has_lost_its_data_gets_all_that_is_unfinished(make, emptying, caplog):
    url, empty = emptying
    app = make(broker=url)
    relay = app.celery.outbox.relay
    relay.watch = 0
    relay.turn()
    expected = dispatch(app, 1, 2)
    dispatch(app, 3, countdown=4000)
    relay.turn()
    lines(caplog)
    with Connection(url) as connection:
        empty(connection, [app.celery.conf.task_default_queue, relay.canary.name])
    relay.turn()
    relay.turn()

    assert sorted(ids(app.sent())) == sorted(expected)
    (said,) = lines(caplog)
    assert "lost its data" in said
    assert ": 2 unfinished tasks" in said


def test_a_broker_that_is_new_to_an_outbox_has_lost_nothing(make, redis_url, caplog):
    caplog.set_level(logging.INFO, "ws_celery")
    app = make().celery
    with redis.Redis.from_url(redis_url) as client:  # other tests have the same database
        client.delete(app.outbox.relay.canary.name)
    app.outbox.relay.turn()

    assert lines(caplog) == ["The broker is watched from now on; no task is unfinished"]


def test_a_loss_is_seen_by_whoever_comes_back_to_an_empty_broker(app_alone):
    app_alone.relay.turn()
    expected = dispatch(app_alone, 1) + dispatch_unsent(app_alone, 2)
    change(app_alone, due_at=ago(1))
    with Connection(app_alone.celery.conf.broker_url) as connection:
        client = connection.default_channel.client
        client.flushall()
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "no")
    app_alone.relay.turn()
    app_alone.relay.turn()

    assert set(ids(app_alone.sent())) == set(expected)


def test_a_loss_is_seen_again_by_whoever_could_not_make_the_rows_due(app_alone):
    """The canary comes last: were it laid first, nobody would know of the loss any more."""
    relay = app_alone.relay
    relay.watch = 0
    relay.turn()
    expected = dispatch(app_alone, 1)
    with Connection(app_alone.celery.conf.broker_url) as connection:
        empty_redis(connection, [])
    with pytest.MonkeyPatch.context() as patch:
        nowhere = create_engine("postgresql+psycopg://postgres@127.0.0.1:1/none")
        patch.setattr(app_alone.celery.outbox, "engine", nowhere)
        relay.turn()
    relay.turn()
    relay.turn()

    assert ids(app_alone.sent()) == expected


def test_a_loss_that_is_met_while_sending_is_left_to_be_seen(app, redis_url):
    canary = app.relay.canary
    with Connection(redis_url) as connection:
        connection.default_channel.client.delete(canary.name)

    with pytest.raises(BrokerUnavailable, match="has lost its data"):
        canary.replace()
    assert not canary.is_there()


def test_a_broker_that_answers_and_takes_nothing_is_down_until_it_does(app_alone, caplog):
    """A Redis that was demoted answers what is read, and refuses what is written."""
    relay = app_alone.relay
    relay.watch = 0
    relay.turn()
    expected = dispatch_unsent(app_alone, 1)
    lines(caplog)
    with Connection(app_alone.celery.conf.broker_url) as connection:
        client = connection.default_channel.client
        client.replicaof("127.0.0.1", 1)
        for _ in range(3):
            relay.turn()
        (failed,) = lines(caplog)
        client.replicaof("NO", "ONE")
        relay.turn()

    (back,) = lines(caplog)
    assert "the broker has failed" in failed
    assert "read only replica" in failed
    assert "the broker is back" in back
    assert ids(app_alone.sent()) == expected


def test_a_message_that_no_broker_takes_stops_no_other(make, rabbitmq_url, caplog):
    app = make(broker=rabbitmq_url)
    relay = app.celery.outbox.relay
    relay.turn()
    dispatch_unsent(app, 1)
    (row,) = rows(app)
    change(app, options=json.dumps({**json.loads(row.options), "exchange": "nowhere"}))
    expected = dispatch_unsent(app, 2, 3)
    lines(caplog)
    relay.turn()

    assert sorted(ids(app.sent())) == sorted(expected)
    (said,) = lines(caplog)
    assert f"work[{row.task_id}] cannot be sent" in said
    assert [each.deliveries for each in rows(app)] == [1, 1, 1]


def test_applications_that_share_a_broker_have_canaries_of_their_own(make, sqlite, tmp_path):
    one = make()
    other = make(ws_celery__outbox__table="other_outbox")
    names = [app.celery.outbox.relay.canary.name for app in (one, other)]

    assert len(set(names)) == 2
    assert all(name.startswith("ws_celery_canary.") for name in names)


# The database


def test_a_database_that_is_gone_is_logged_once_and_tried_again(app, caplog, monkeypatch):
    expected = dispatch_unsent(app, 1)
    lines(caplog)
    with monkeypatch.context() as patch:
        nowhere = create_engine("postgresql+psycopg://postgres@127.0.0.1:1/none")
        patch.setattr(app.celery.outbox, "engine", nowhere)
        app.relay.turn()
        app.relay.turn()
    app.relay.turn()

    assert ids(app.sent()) == expected
    failed, back = lines(caplog)
    assert "database has failed" in failed
    assert "database is back" in back


def test_a_table_that_is_missing_says_what_to_do(app, database, caplog):
    app.celery.outbox.rows.table.drop(database.engine)
    lines(caplog)
    app.relay.turn()

    (said,) = lines(caplog)
    assert "ws-celery outbox create" in said


def test_the_health_file_tells_of_turns_that_have_succeeded(app, tmp_path, monkeypatch):
    relay = Relay(app.celery.outbox, health_file=tmp_path / "healthy")
    with monkeypatch.context() as patch:
        patch.setitem(app.celery.conf, "broker_write_url", NOWHERE)
        relay.turn()
    assert not relay.health_file.exists()

    relay.turn()
    assert relay.health_file.exists()
    relay.close()


def test_a_health_file_that_cannot_be_written_is_told_once_and_stops_nothing(app, tmp_path, caplog):
    relay = Relay(app.celery.outbox, health_file=tmp_path / "run" / "healthy")
    lines(caplog)
    waits = [relay.turn() for _ in range(2)]
    relay.health_file.parent.mkdir()
    relay.turn()
    relay.close()

    assert waits == [relay.poll] * 2
    failed, back = lines(caplog)
    assert "health file has failed" in failed
    assert "health file is back" in back


def test_the_relay_ends_with_the_thread_that_it_belongs_to(app):
    relays = []
    done = threading.Event()

    def beat():
        relays.append(app.relay.start())
        done.wait(SOON)

    owner = threading.Thread(target=beat)
    owner.start()
    expected = dispatch_unsent(app, 1)
    messages = wait_for(app.sent)
    done.set()
    owner.join()
    relays[0].join(SOON)

    assert ids(messages) == expected
    assert not relays[0].is_alive()
