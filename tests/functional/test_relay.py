"""The relay in real processes: alone, in beat, with others, and while the broker loses its data."""

from __future__ import annotations

import json
import signal
import sys
import uuid

import pytest
import redis
from sqlalchemy import create_engine, func, select, text

from ws_celery.embedded import EmbeddedBroker

APPLICATION = """
import sqlalchemy as sa
import transaction
import zope.sqlalchemy
from pyramid.config import Configurator
from sqlalchemy.orm import sessionmaker
from ws_celery import task

@task(name="note")
def note(request, number):
    request.dbsession.execute(
        sa.text("INSERT INTO notes (id) VALUES (:id)"), {"id": number}
    )
    zope.sqlalchemy.mark_changed(request.dbsession, request.tm)

def app(global_config, **settings):
    config = Configurator(settings=settings)
    sessions = sessionmaker(sa.create_engine(settings["sqlalchemy.url"]))
    def dbsession(request):
        session = sessions()
        zope.sqlalchemy.register(session, transaction_manager=getattr(
            request, "tm", transaction.manager))
        return session
    config.add_request_method(dbsession, reify=True)
    config.include("pyramid_tm")
    config.include("ws_celery")
    config.add_celery_task(note)
    return config.make_wsgi_app()
"""

INI = """
[app:main]
paste.app_factory = noting:app
sqlalchemy.url = {database}
ws_celery.config_uri = %(__file__)s
ws_celery.outbox = {outbox}

[celery]
broker_url = {broker}
task_default_queue = {queue}
beat_schedule_filename = %(here)s/schedule
worker_concurrency = 2
"""

#: Dispatches so many tasks; with "unsent" it dies between the commit and the publish.
DISPATCH = """
import os, sys
import transaction
from pyramid.paster import bootstrap
with bootstrap(sys.argv[1]) as env:
    request = env["request"]
    app = request.celery_app
    if sys.argv[3] == "unsent":
        app.publish = lambda publications: os._exit(0)
    with transaction.manager:
        for number in range(int(sys.argv[2])):
            app.tasks["note"].delay(request, number)
"""


class Shop:
    """The application with its database and its broker."""

    def __init__(self, folder, start, client, *, database, broker, outbox="true"):
        self.queue = f"test-{uuid.uuid4().hex}"
        self.ini = folder / f"{self.queue}.ini"
        self.ini.write_text(
            INI.format(database=database, broker=broker, queue=self.queue, outbox=outbox)
        )
        self.engine = create_engine(database)
        self.client = client
        self._path = {"PYTHONPATH": str(folder)}
        self._start = start

    def start(self, *arguments):
        return self._start(*arguments, "--ini", str(self.ini), **self._path)

    def dispatch(self, number, how="sent"):
        program = (sys.executable, "-c", DISPATCH)
        running = self._start(str(self.ini), str(number), how, program=program, **self._path)
        assert running.ends() == 0, running.text

    def ids(self):
        """Return the ids of the tasks in the queue."""
        return [json.loads(each)["headers"]["id"] for each in self.client.lrange(self.queue, 0, -1)]

    def waiting(self):
        return self.client.llen(self.queue)

    def count(self, what):
        with self.engine.connect() as connection:
            return connection.scalar(select(func.count()).select_from(text(what)))


@pytest.fixture
def make_shop(tmp_path, postgres_url, redis_url, start):
    """Make the application with a database of its own, and a broker."""
    from ws_celery.outbox import outbox_table

    (tmp_path / "noting.py").write_text(APPLICATION)
    made = []

    def make(broker=redis_url, client=None, create=True, **options):
        client = client or redis.Redis.from_url(broker)
        shop = Shop(tmp_path, start, client, database=postgres_url, broker=broker, **options)
        made.append(shop)
        if create:
            outbox_table().create(shop.engine)
            with shop.engine.begin() as connection:
                connection.execute(text("CREATE TABLE notes (id INTEGER PRIMARY KEY)"))
        return shop

    yield make
    for shop in made:
        with shop.engine.begin() as connection:
            connection.execute(text("DROP TABLE IF EXISTS notes, ws_celery_outbox"))
        shop.engine.dispose()
        shop.client.delete(shop.queue)
        shop.client.close()


@pytest.fixture
def shop(make_shop):
    return make_shop()


def make_due(shop):
    with shop.engine.begin() as connection:
        connection.execute(text("UPDATE ws_celery_outbox SET due_at = created_at"))


@pytest.fixture
def stop(wait_for):
    """End a process that has a relay."""

    def stop(running, signum=signal.SIGTERM):
        running.process.send_signal(signum)
        assert running.ends() == 0, running.text
        wait_for(lambda: "The relay has ended" in running.text, "the end of the relay")

    return stop


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_relay_that_is_stopped_finishes_its_batch(shop, wait_for, stop, signum):
    shop.dispatch(3000, "unsent")
    make_due(shop)
    relay = shop.start("relay", "--batch", "20")
    wait_for(shop.waiting, "the first batch")
    stop(relay, signum)
    sent = shop.waiting()
    assert shop.count("ws_celery_outbox WHERE deliveries = 1") == sent

    relay = shop.start("relay")
    wait_for(lambda: shop.waiting() == 3000, "the rest")
    stop(relay)
    assert len(set(shop.ids())) == 3000


def test_two_relays_share_the_work(shop, wait_for, stop, tmp_path):
    files = [tmp_path / name for name in ("one", "two")]
    relays = [shop.start("relay", "--batch", "10", "--health-file", str(file)) for file in files]
    # Both have seen the new broker: who sees it makes all that is unfinished due again.
    wait_for(lambda: all(file.exists() for file in files), "a turn of both")
    shop.dispatch(3000, "unsent")
    make_due(shop)
    wait_for(lambda: not shop.count("ws_celery_outbox WHERE deliveries = 0"), "the end")
    for relay in relays:
        stop(relay)

    assert len(shop.ids()) == len(set(shop.ids())) == 3000, [relay.text for relay in relays]


def test_beat_is_the_relay(shop, wait_for, stop):
    shop.dispatch(3, "unsent")
    make_due(shop)
    beat = shop.start("beat", "--loglevel", "info")
    wait_for(lambda: shop.waiting() == 3, "what is due")

    stop(beat)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_the_embedded_beat_of_a_worker_is_the_relay(shop, wait_for, pool):
    shop.dispatch(20, "unsent")
    make_due(shop)
    worker = shop.start("worker", "--beat", "--pool", pool, "--loglevel", "info")
    wait_for(lambda: shop.count("notes") == 20, "all effects")
    worker.process.terminate()

    assert worker.ends() == 0, worker.text


def test_what_an_emptied_broker_has_lost_takes_effect(start_broker, make_shop, tmp_path, wait_for):
    broker = EmbeddedBroker(tmp_path / "broker")
    start_broker(broker)
    client = redis.Redis(unix_socket_path=str(broker.socket))
    shop = make_shop(broker.url(0), client)
    shop.start("beat", "--loglevel", "info").says("The broker is watched")
    shop.dispatch(200)
    assert shop.waiting() == 200
    client.flushall()
    wait_for(lambda: shop.waiting() == 200, "the return of what was lost")
    shop.start("worker", "--loglevel", "info")

    wait_for(lambda: shop.count("notes") == 200, "all effects")
    assert shop.count("ws_celery_outbox") == 0


def test_a_missing_table_is_an_error_with_its_remedy(make_shop):
    relay = make_shop(create=False).start("relay")

    assert relay.ends() == 2
    relay.says("ws-celery outbox create")


def test_an_application_without_an_outbox_has_nothing_to_send(make_shop):
    relay = make_shop(create=False, outbox="false").start("relay")

    assert relay.ends() == 2
    relay.says("ws_celery.outbox = true")
