"""A forked process opens connections of its own, to the database and to the broker."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ws_celery.worker import PooledConnections

#: Forks as a prefork pool does, and prints the PostgreSQL backend that each process talks to.
PROGRAM = """
import gc, os, sys
from celery import signals
from pyramid.config import Configurator
from sqlalchemy import create_engine, text

url, ini, preparation = sys.argv[1:]
engine = create_engine(url, pool_pre_ping=True)
config = Configurator(settings={"ws_celery.config_uri": ini})
config.include("ws_celery")
app = config.make_celery_app()

def backend():
    with engine.connect() as connection:
        return connection.execute(text("SELECT pg_backend_pid()")).scalar()

before_start = "worker_init" not in preparation
if before_start:
    print("parent", backend(), flush=True)
exec(preparation)
if not before_start:
    print("parent", backend(), flush=True)
if (child := os.fork()) == 0:
    try:
        signals.worker_process_init.send(sender=None)
        print("child", backend(), flush=True)
    finally:
        os._exit(0)
os.waitpid(child, 0)
print("parent", backend(), flush=True)
signals.worker_process_init.send(sender=None)  # what the solo pool does
print("parent", backend(), flush=True)
"""


@pytest.fixture
def backends(postgres_url, write_ini):
    """Run the program after a preparation; return whose backend was which."""
    ini = write_ini("[celery]\nbroker_url = memory://")

    def backends(preparation=""):
        command = [sys.executable, "-c", PROGRAM, postgres_url, ini, preparation]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        lines = [line.split() for line in done.stdout.splitlines()]
        return (
            [pid for who, pid in lines if who == "parent"],
            [pid for who, pid in lines if who == "child"],
        )

    return backends


@pytest.mark.parametrize(
    "preparation",
    [
        "",
        "gc.freeze()",  # as programs do that want to share memory with their children
        "other = engine.execution_options(isolation_level='SERIALIZABLE')",
        "signals.worker_init.send(sender=None)",  # the connection is opened after it
    ],
    ids=["as it is", "frozen", "engine with options", "after the worker's start"],
)
def test_a_forked_process_gets_a_connection_of_its_own(backends, preparation):
    parent, (child,) = backends(preparation)

    assert child not in parent


def test_the_parent_keeps_its_connection(backends):
    (before, after, _), _ = backends()

    assert before == after


def test_a_process_that_has_not_forked_keeps_its_connection(backends):
    (*_, before, after), _ = backends()

    assert before == after


def test_connections_are_forgotten_and_not_closed(postgres):
    with postgres.engine.connect() as connection:
        pooled = connection.connection.driver_connection
    connections = PooledConnections()
    connections.forget()

    with postgres.engine.connect() as connection:
        assert connection.connection.driver_connection is not pooled
    assert not pooled.closed
    pooled.close()


def test_an_application_without_a_database_has_nothing_to_forget():
    program = "from ws_celery import worker; worker.PooledConnections().forget()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


#: Forks as a worker does that shares a large application; prints by how much the child's own memory
#: grows when it begins, in MB.
SHARING = """
import gc, os, sys
from celery import signals
from pyramid.config import Configurator
from sqlalchemy import create_engine, text

url, ini = sys.argv[1:]
engine = create_engine(url)
with engine.connect() as connection:
    connection.execute(text("SELECT 1"))
config = Configurator(settings={"ws_celery.config_uri": ini})
config.include("ws_celery")
config.make_celery_app()
large = [{number: [number]} for number in range(300_000)]
signals.worker_init.send(sender=None)
gc.collect()
gc.freeze()

def own():
    with open("/proc/self/smaps_rollup") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024

if (child := os.fork()) == 0:
    try:
        before = own()
        signals.worker_process_init.send(sender=None)
        print(own() - before, flush=True)
    finally:
        os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells whose memory it is")
def test_a_child_goes_on_sharing_its_parent_s_memory(postgres_url, write_ini):
    ini = write_ini("[celery]\nbroker_url = memory://")
    command = [sys.executable, "-c", SHARING, postgres_url, ini]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)

    assert float(done.stdout) < 5  # a walk over the 600,000 objects costs some 50


# The broker

#: Publishes before a fork, in the child, and again; prints how many sockets each process has then.
PUBLISHING = """
import os, sys
import psutil, transaction
from pyramid.config import Configurator
from ws_celery import task

@task(name="add")
def add(request, x): ...

config = Configurator(settings={"ws_celery.config_uri": sys.argv[1]})
config.include("ws_celery")
config.add_celery_task(add)
app = config.make_celery_app()

def publish(number):
    with transaction.manager:
        add.delay(number)
    print(len(psutil.Process().net_connections("all")), flush=True)

publish(1)
if (child := os.fork()) == 0:
    try:
        publish(2)
    finally:
        os._exit(0)
os.waitpid(child, 0)
publish(3)
"""


#: Closes what a child has inherited; prints whether the parent publishes by the connection that it
#: had.
CLOSING = PUBLISHING.replace("publish(2)", "app.publisher.close()").replace(
    "publish(3)",
    "(before,) = app.publisher._idle\npublish(3)\nprint(app.publisher._idle[0] is before)",
)


@pytest.fixture(params=["redis_url", "rabbitmq_url"])
def publishing(request, make_app, write_ini):
    """Run a program that publishes; return what it has printed, and the numbers it has sent."""
    url = request.getfixturevalue(request.param)
    app = make_app(broker=url)
    queue = app.celery.conf.task_default_queue
    ini = write_ini(f"[celery]\nbroker_url = {url}\ntask_default_queue = {queue}")

    def publishing(program):
        command = [sys.executable, "-c", program, ini]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        return done.stdout.split(), [number for message in app.sent() for number in message.args]

    return publishing


def test_a_forked_process_closes_no_connection_of_its_parent_s(publishing):
    printed, sent = publishing(CLOSING)

    assert printed[-1] == "True"
    assert sent == [1, 3]


def test_a_forked_process_publishes_on_a_connection_of_its_own(publishing):
    printed, sent = publishing(PUBLISHING)

    before, child, after = map(int, printed)
    assert sent == [1, 2, 3]
    assert child > before == after  # the child keeps the inherited ones, and never uses them
