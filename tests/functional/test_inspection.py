"""Looking into queues and stopping tasks with the console script; the outbox is on."""

from __future__ import annotations

import json
import sys
from configparser import RawConfigParser

import pytest
import redis
import sqlalchemy as sa

DISPATCH = """
import sys
from myapp import hazards
from pyramid.paster import bootstrap

with bootstrap(sys.argv[1]) as env, env["request"].tm:
    for _ in range(int(sys.argv[2])):
        print(getattr(hazards, sys.argv[3]).delay(env["request"], *sys.argv[4:]).id)
"""
ROWS = "SELECT task_id FROM ws_celery_outbox"
RUNS = "SELECT task_id FROM run WHERE task LIKE 'myapp.hazards.%'"


@pytest.fixture
def site(make_site, postgres_url, redis_url, run):
    site = make_site(postgres_url, redis_url)
    text = site.ini.read_text()
    site.ini.write_text(text.replace("[app:main]\n", "[app:main]\nws_celery.outbox = true\n"))
    created = run("outbox", "create", "--ini", str(site.ini))
    assert created.returncode == 0, created.stderr
    return site


@pytest.fixture
def queue(site):
    parser = RawConfigParser()
    parser.read(site.ini)
    return parser["celery"]["task_default_queue"]


@pytest.fixture
def query(postgres_url):
    engine = sa.create_engine(postgres_url, poolclass=sa.NullPool)

    def query(statement):
        with engine.connect() as connection:
            return connection.execute(sa.text(statement)).scalars().all()

    yield query
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE IF EXISTS ws_celery_outbox, run, delivery"))


@pytest.fixture
def dispatch(site, start, query):
    def dispatch(number, name, *args):
        program = (sys.executable, "-c", DISPATCH, str(site.ini), str(number), name, *args)
        dispatched = start(program=program)
        assert dispatched.ends() == 0, dispatched.text

    return dispatch


@pytest.fixture
def ws_celery(site, run):
    """Run the console script with the site's INI; returns exit code, output and errors."""

    def ws_celery(*arguments):
        done = run(*arguments, "--ini", str(site.ini))
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    return ws_celery


def test_queues_are_looked_into_and_emptied(dispatch, ws_celery, queue, query):
    dispatch(3, "dies_always")

    assert f"{queue}  3" in ws_celery("queues")[1]
    shown = json.loads(ws_celery("queues", "peek", queue, "--limit", "2", "--json")[1])
    assert [each["task"] for each in shown["messages"]] == ["myapp.hazards.dies_always"] * 2
    purged = ws_celery("queues", "purge", queue, "--yes")
    assert purged[:2] == (0, "Threw away 3 messages and 3 rows of the outbox.\n")
    assert query(ROWS) == []
    assert "myapp.hazards.dies_always" in ws_celery("tasks")[1]
    assert ws_celery("queues", "drop", queue, "--yes")[0] == 0


def test_what_is_wrong_is_a_sentence_with_its_exit_code(ws_celery, query):
    for code, sentence, arguments in (
        (1, "There is no queue 'nothing'", ("queues", "peek", "nothing")),
        (1, "There is no queue 'nothing'", ("queues", "purge", "nothing", "--yes")),
        (69, "No worker has answered", ("tasks", "running", "--timeout", "0.2")),
        (1, "There is no result of the task nothing", ("results", "show", "nothing")),
        (1, "by the id of its task only", ("results",)),
        (2, "'nothing' is not registered", ("tasks", "show", "nothing")),
    ):
        returned, _, error = ws_celery(*arguments)
        assert (returned, sentence in error) == (code, True), error


def test_a_broker_that_is_down_is_exit_code_69(site, ws_celery, query):
    parser = RawConfigParser()
    parser.optionxform = str
    parser.read(site.ini)
    parser["celery"]["broker_url"] = "redis://127.0.0.1:1"
    with site.ini.open("w") as file:
        parser.write(file)

    for command in (("queues",), ("purge", "-f"), ("workers",), ("tasks", "revoke", "x", "--yes")):
        code, _, error = ws_celery(*command)
        assert (code, "The broker does not answer" in error) == (69, True), error


def test_a_worker_that_purges_settles_the_rows(dispatch, site, start, query):
    dispatch(4, "dies_always")

    worker = start("worker", "--ini", str(site.ini), "--purge", "--concurrency=1")
    worker.says("purge: Erased 4 messages")

    assert query(ROWS) == []
    assert query(RUNS) == []


@pytest.fixture
def worker(site, start):
    quick = ("--without-mingle", "--without-gossip", "--concurrency=1", "--loglevel=info")
    worker = start("worker", "--ini", str(site.ini), *quick)
    worker.says(" ready.")
    return worker


@pytest.mark.usefixtures("worker")
def test_a_terminated_task_lets_go_of_its_row(dispatch, query, ws_celery, wait_for, tmp_path):
    mark = tmp_path / "mark"
    dispatch(1, "is_terminated", str(mark))
    task_id = wait_for(lambda: mark.exists() and mark.read_text(), "the run")

    patient = ("--timeout", "5")
    held = json.loads(ws_celery("tasks", "running", "--state", "active", "--json", *patient)[1])
    assert [each["id"] for each in held] == [task_id]
    assert ws_celery("tasks", "terminate", task_id, "--yes", *patient)[0] == 0

    wait_for(lambda: not query(ROWS), "the end of the row")
    assert query(RUNS) == []


def test_a_million_messages_are_counted(ws_celery, queue, redis_url, query):
    with redis.Redis.from_url(redis_url) as client:
        for _ in range(100):
            client.lpush(queue, *["{}"] * 10_000)
        try:
            assert f"{queue}  1000000" in ws_celery("queues")[1]
        finally:
            client.delete(queue)
