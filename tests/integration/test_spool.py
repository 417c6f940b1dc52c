"""What a broker has not taken is sent when it does: nothing is lost, and nothing is sent twice."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
import redis
import transaction
from kombu import Connection, Exchange, Producer, Queue
from tests.waiting import SOON, wait_for

from ws_celery import task
from ws_celery.embedded import EmbeddedBroker
from ws_celery.events import PublishFailed, TasksPublished, TasksSpooled
from ws_celery.publishing import publish
from ws_celery.recording import Publication

log = logging.getLogger(__name__)


@task(name="add")
def add(request, x):
    """Do nothing."""


@task(name="elsewhere")
def elsewhere(request):
    """Go to a queue that the broker does not take."""


class Told:
    """What the events of an application have told."""

    def __init__(self):
        self.events = []

    def includeme(self, config):
        for event in (TasksPublished, TasksSpooled):
            config.add_subscriber(self.events.append, event)

    def ids(self, kind, **about):
        """Return the ids that events of exactly this class have named."""
        return [
            each.id
            for event in list(self.events)
            if type(event) is kind
            and all(getattr(event, name) == value for name, value in about.items())
            for each in event.tasks
        ]


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def broker(tmp_path):
    return EmbeddedBroker(tmp_path / "broker")


@pytest.fixture
def make(make_app, broker, told):
    """Make an application of this broker, with the time limits of the default."""

    def make(*tasks, **settings):
        settings = {"ws_celery__publish_timeout": "2", "broker": broker.url(0), **settings}
        return make_app(*(tasks or (add,)), setup=told.includeme, **settings)

    return make


def commit(app, *numbers):
    with transaction.manager:
        return [add.delay(app.request(), number).id for number in numbers]


def emptied(app):
    wait_for(lambda: not len(app.celery.publisher.spool), "the end of the spool")


@pytest.fixture
def has_tried(monkeypatch):
    """Wait until the thread of a spool has tried once, and waits until it is in a hurry."""
    monkeypatch.setattr("ws_celery.outages.BACKOFF", (SOON, SOON))

    def has_tried(app):
        spool = app.celery.publisher.spool
        wait_for(lambda: spool._broker.error is not None and not spool.in_hand)

    return has_tried


class Load:
    """Threads that commit steadily, one dispatch each time, until the block ends."""

    def __init__(self, app, threads, pause):
        self.ids, self.app, self._pause = [], app, pause
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self):
        while not self._ended.wait(self._pause):
            self.ids += commit(self.app, len(self.ids))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def makes(self, count):
        """Wait until there were so many commits more."""
        wanted = len(self.ids) + count
        wait_for(lambda: len(self.ids) >= wanted, f"{count} commits")


def outcome(load, told):
    """Return the ids that have not arrived; nothing has come twice, or was kept from us."""
    arrived = Counter(message.id for message in load.app.sent())
    missing = set(load.ids) - arrived.keys()
    for name, ids in (
        ("committed", load.ids),
        ("missing", missing),
        ("spooled", told.ids(TasksSpooled)),
        ("ambiguous", told.ids(PublishFailed, ambiguous=True)),
    ):
        log.info("%s: %d", name, len(ids))
    assert set(arrived.values()) == {1}
    assert not arrived.keys() - set(load.ids)
    assert told.ids(PublishFailed, ambiguous=False) == []
    assert missing <= set(told.ids(PublishFailed, ambiguous=True))
    return missing


# The three scenarios in which what was here before lost more than a hook that just sends


def test_a_broker_that_is_away_for_a_while_loses_at_most_what_was_on_its_way(
    make, broker, start_broker, told
):
    app = make()
    process = start_broker(broker)
    with Load(app, threads=8, pause=0.05) as load:
        load.makes(100)
        process.kill()
        process.wait()
        broker.socket.unlink()
        wait_for(lambda: len(told.ids(TasksSpooled)) > 400)  # some three seconds
        start_broker(broker)
        load.makes(50)
    emptied(app)

    assert len(outcome(load, told)) <= 8


def test_a_broker_that_is_frozen_for_a_moment_loses_nothing(make, broker, start_broker, told):
    app = make()
    process = start_broker(broker)
    with Load(app, threads=1, pause=0.05) as load:
        load.makes(5)
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: told.ids(TasksSpooled))  # a flush has waited for it in vain
        process.send_signal(signal.SIGCONT)
        load.makes(100)  # the cool-down is in this time
    emptied(app)

    assert outcome(load, told) == set()


def test_a_process_that_stands_still_in_its_flush_loses_nothing(
    make, broker, start_broker, told, monkeypatch
):
    app = make()
    start_broker(broker)
    paused = threading.Event()

    def standing_still(*args, **options):
        if len(load.ids) == 30 and not paused.is_set():
            paused.set()
            time.sleep(1.2)  # it stands still for so long
        publish(*args, **options)

    monkeypatch.setattr("ws_celery.publishing.publish", standing_still)
    with Load(app, threads=1, pause=0.05) as load:
        load.makes(133)

    assert paused.is_set()
    assert outcome(load, told) == set()
    assert told.ids(TasksPublished, late=False) == load.ids


# What is kept, and for how long


def test_events_tell_what_was_spooled_and_that_it_was_sent_late(make, broker, start_broker, told):
    app = make()
    ids = commit(app, 1, 2) + commit(app, 3)
    assert told.ids(TasksSpooled) == ids
    assert told.ids(TasksPublished) == []
    start_broker(broker)
    emptied(app)
    now = commit(app, 4)

    assert told.ids(TasksPublished, late=True) == ids
    assert told.ids(TasksPublished, late=False) == now
    assert [message.id for message in app.sent()] == ids + now


def test_the_oldest_are_lost_if_there_are_too_many(
    make, broker, start_broker, told, has_tried, caplog
):
    app = make(ws_celery__publish_spool="2")
    ids = commit(app, 1) + commit(app, 2)
    has_tried(app)
    ids += commit(app, 3)
    assert f"these tasks are lost: add[{ids[0]}]" in caplog.text
    start_broker(broker)
    app.celery.publisher.spool.end(SOON)

    assert told.ids(PublishFailed, ambiguous=False) == ids[:1]
    assert [message.id for message in app.sent()] == ids[1:]


def test_the_oldest_are_lost_if_they_are_too_large(
    make, broker, start_broker, told, has_tried, monkeypatch
):
    monkeypatch.setattr("ws_celery.spool.LARGEST", 100_000)
    app = make()
    ids = commit(app, "x" * 60_000)
    has_tried(app)
    ids += commit(app, "y" * 60_000)
    start_broker(broker)
    app.celery.publisher.spool.end(SOON)

    assert told.ids(PublishFailed, ambiguous=False) == ids[:1]
    assert [message.id for message in app.sent()] == ids[1:]


def test_a_commit_of_more_than_there_is_room_for_compares_none_of_its_messages(
    make, told, monkeypatch
):
    # Each with each would take minutes for a transaction of 100,000.
    compared = []
    seen = lambda one, other: compared.append(one) or one is other  # noqa: E731
    monkeypatch.setattr(Publication, "__eq__", seen, raising=False)
    ids = commit(make(ws_celery__publish_spool="20"), *range(50))

    assert told.ids(PublishFailed, ambiguous=False) == ids[:30]
    assert told.ids(TasksSpooled) == ids[30:]
    assert compared == []


def test_without_a_spool_all_that_is_not_sent_is_lost(make, told):
    app = make(ws_celery__publish_spool="0")
    ids = commit(app, 1)

    assert told.ids(PublishFailed, ambiguous=False) == ids
    assert told.ids(TasksSpooled) == []


def test_what_a_demoted_redis_refuses_is_sent_when_it_takes_it(
    make, broker, start_broker, told, has_tried
):
    app = make()
    start_broker(broker)
    with redis.Redis(unix_socket_path=str(broker.socket)) as client:
        client.replicaof("127.0.0.1", 1)
        ids = commit(app, 1, 2, 3)
        has_tried(app)
        ids += commit(app, 4)
        assert app.celery.publisher._down_until is None
        client.replicaof("NO", "ONE")
    app.celery.publisher.spool.end(SOON)

    assert told.ids(TasksSpooled) == ids
    assert told.ids(PublishFailed) == []
    assert [message.id for message in app.sent()] == ids


@pytest.fixture
def refusing(make, broker, start_broker):
    """An application with a task whose queue the broker does not take messages for."""
    app = make(add, elsewhere, celery="[celeryroute:elsewhere]\nqueue = wrong\n")
    start_broker(broker)
    with transaction.manager:  # declares both queues
        add.delay(app.request(), 0)
        elsewhere.delay(app.request())
    app.sent()
    with redis.Redis(unix_socket_path=str(broker.socket)) as client:
        client.set("wrong", "no list")
    return app


@pytest.mark.skipif(not hasattr(Producer, "batch"), reason="kombu sends batches from 5.7")
def test_a_flush_whose_time_is_over_as_it_begins_sends_its_first_batch(
    make, broker, start_broker, told, monkeypatch
):
    monkeypatch.setattr("ws_celery.publishing.BATCH", 2)
    monkeypatch.setattr("ws_celery.publishing.PER_MESSAGE", -SOON)
    app = make()
    start_broker(broker)
    ids = commit(app, 1, 2, 3)

    assert told.ids(TasksPublished, late=False) == ids[:2]
    assert told.ids(TasksSpooled) == ids[2:]
    emptied(app)
    assert [message.id for message in app.sent()] == ids


def test_a_message_that_no_broker_takes_stops_no_other(refusing, told):
    with transaction.manager:
        refused = elsewhere.delay(refusing.request())
    assert told.ids(TasksSpooled) == [refused.id]
    ids = commit(refusing, 1)
    emptied(refusing)

    assert told.ids(PublishFailed, ambiguous=False) == [refused.id]
    assert [message.id for message in refusing.sent()] == ids


@pytest.mark.skipif(not hasattr(Producer, "batch"), reason="kombu sends batches from 5.7")
def test_what_may_have_been_sent_with_others_that_were_refused_is_not_sent_again(refusing, told):
    with transaction.manager:
        sent = add.delay(refusing.request(), 1)
        refused = elsewhere.delay(refusing.request())

    assert told.ids(PublishFailed, ambiguous=True) == [sent.id, refused.id]
    assert told.ids(TasksSpooled) == []
    assert [message.id for message in refusing.sent()] == [sent.id]


def test_rabbitmq_gets_in_its_order_what_it_could_not_be_sent(make, rabbitmq_url, told):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    app = make(broker=f"amqp://guest:guest@127.0.0.1:{port}//")
    ids = commit(app, 1, 2) + commit(app, 3)
    assert told.ids(TasksSpooled) == ids
    app.celery.conf.broker_write_url = rabbitmq_url  # as if it listened there now
    app.celery.conf.broker_read_url = rabbitmq_url
    emptied(app)

    assert told.ids(TasksPublished, late=True) == ids
    assert [message.id for message in app.sent()] == ids
    app.celery.publisher.close()


def test_what_rabbitmq_refuses_alone_is_sent_when_it_takes_it(make, rabbitmq_url, told, has_tried):
    app = make(broker=rabbitmq_url)
    exchange = Exchange("ws_celery_tests_late", auto_delete=True)
    with transaction.manager:
        result = add.apply_async((app.request(), 1), exchange=exchange.name, routing_key="late")
    assert told.ids(TasksSpooled) == [result.id]
    has_tried(app)
    with Connection(rabbitmq_url) as connection:
        queue = Queue(app.celery.conf.task_default_queue, exchange, "late")
        queue(connection.default_channel).declare()
        app.celery.publisher.spool.end(SOON)

    assert told.ids(PublishFailed) == []
    assert [message.id for message in app.sent()] == [result.id]
    app.celery.publisher.close()


def test_a_message_that_rabbitmq_never_takes_stops_no_other(make, rabbitmq_url, told, has_tried):
    app = make(broker=rabbitmq_url)
    with transaction.manager:
        refused = add.apply_async((app.request(), 0), exchange="ws_celery_none", routing_key="x")
    has_tried(app)
    ids = commit(app, 1, 2)
    app.celery.publisher.spool.end(SOON)

    assert told.ids(PublishFailed, ambiguous=False) == [refused.id]
    assert told.ids(PublishFailed, ambiguous=True) == []
    assert [message.id for message in app.sent()] == ids
    app.celery.publisher.close()


# Processes

#: Dispatches without a broker, forks, and ends in an orderly way: parent and child.
PROGRAM = """
import os, sys
import transaction
from pyramid.config import Configurator
from ws_celery import task

@task(name="add")
def add(request, x): ...

config = Configurator(settings={
    "ws_celery.config_uri": sys.argv[1], "ws_celery.publish_timeout": "30",
})
config.include("ws_celery")
config.add_celery_task(add)
app = config.make_celery_app()

def commit(number):
    with transaction.manager:
        add.delay(number)

commit("parent")
child = os.fork()
if not child:
    assert not len(app.publisher.spool)
    commit("child")
print("spooled", flush=True)
if child:
    sys.exit(os.waitpid(child, 0)[1])
"""

GEVENT = "from gevent import monkey; monkey.patch_all()\n"


@pytest.mark.parametrize("prelude", ["", GEVENT], ids=["threads", "gevent"])
def test_an_orderly_end_waits_for_what_is_spooled_and_a_child_sends_its_own(
    make, broker, start_broker, write_ini, prelude
):
    app = make()
    queue = app.celery.conf.task_default_queue
    ini = write_ini(f"[celery]\nbroker_url = {broker.url(0)}\ntask_default_queue = {queue}")
    command = [sys.executable, "-c", prelude + PROGRAM, ini]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert [process.stdout.readline() for _ in range(2)] == ["spooled\n"] * 2
        start_broker(broker)
        assert process.wait(SOON) == 0

    assert sorted(message.args[0] for message in app.sent()) == ["child", "parent"]


def test_what_is_left_at_the_end_is_reported_lost(make, told):
    app = make(ws_celery__publish_timeout="0.2")
    ids = commit(app, 1)
    app.celery.publisher.end()

    assert told.ids(PublishFailed) == ids
    assert not len(app.celery.publisher.spool)
