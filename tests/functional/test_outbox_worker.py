"""The outbox under a real worker whose pool processes are killed."""

from __future__ import annotations

import json
import sys
from functools import partial

import pytest
import sqlalchemy as sa
from celery import Celery

DISPATCH = """
import json
import sys
from myapp import hazards
from pyramid.paster import bootstrap

with bootstrap(sys.argv[1]) as env, env["request"].tm:
    options = json.loads(sys.argv[3])
    getattr(hazards, sys.argv[2]).apply_async((env["request"], *sys.argv[4:]), **options)
"""


@pytest.fixture
def site(make_site, postgres_url, redis_url, run):
    site = make_site(postgres_url, redis_url)
    text = site.ini.read_text()
    ours = "[app:main]\nws_celery.outbox = true\nws_celery.outbox.max_deliveries = 3\n"
    site.ini.write_text(text.replace("[app:main]\n", ours))
    created = run("outbox", "create", "--ini", str(site.ini))
    assert created.returncode == 0, created.stderr
    return site


@pytest.fixture
def query(postgres_url):
    engine = sa.create_engine(postgres_url, poolclass=sa.NullPool)

    def query(statement):
        with engine.connect() as connection:
            return connection.execute(sa.text(statement)).scalars().all()

    query("SELECT 1")
    yield query
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE ws_celery_outbox, run, delivery"))


@pytest.fixture
def dispatch(site, start):
    def dispatch(name, *args, **options):
        options = json.dumps(options)
        program = (sys.executable, "-c", DISPATCH, str(site.ini), name, options, *args)
        assert start(program=program).ends() == 0

    return dispatch


@pytest.fixture
def worker(site, start):
    quick = ("--without-mingle", "--without-gossip", "--concurrency=1", "--loglevel=info")
    worker = start("worker", "--ini", str(site.ini), *quick)
    worker.says(" ready.")
    return worker


RUNS = "SELECT task_id FROM run WHERE task LIKE 'myapp.hazards.%'"
WAITING = "SELECT id FROM ws_celery_outbox WHERE due_at IS NOT NULL"
ERRORS = "SELECT error FROM ws_celery_outbox WHERE due_at IS NULL"


def test_a_killed_pool_process_gives_the_row_back_and_the_effect_comes_once(
    worker, dispatch, query, wait_for, tmp_path
):
    dispatch("dies_once", str(tmp_path / "mark"))

    wait_for(partial(query, RUNS), "the effect")
    assert (tmp_path / "mark").exists()
    wait_for(lambda: not query(WAITING), "the end of the row")
    assert len(query(RUNS)) == 1


def test_a_task_that_always_kills_its_process_is_a_dead_letter_in_the_end(
    worker, dispatch, query, wait_for
):
    dispatch("dies_always")

    (error,) = wait_for(partial(query, ERRORS), "the dead letter")
    assert "the process that ran it has ended too often" in error
    assert query(RUNS) == []


def test_a_hard_time_limit_makes_a_dead_letter(worker, dispatch, query, wait_for):
    dispatch("never_ends")

    (error,) = wait_for(partial(query, ERRORS), "the dead letter")
    assert "the hard time limit is exceeded" in error
    assert query(RUNS) == []


ROWS = "SELECT id FROM ws_celery_outbox"
IDS = "SELECT task_id FROM ws_celery_outbox"


@pytest.fixture
def revoke(redis_url):
    def revoke(task_id, **options):
        with Celery(broker=redis_url, set_as_current=False) as app:
            assert app.control.revoke(task_id, reply=True, timeout=30, limit=1, **options)

    return revoke


def test_a_revoked_task_lets_go_of_its_row(worker, dispatch, revoke, query, wait_for, tmp_path):
    revoke("unwanted")  # a worker remembers
    dispatch("dies_once", str(tmp_path / "mark"), task_id="unwanted")

    worker.says("Discarding revoked task")
    wait_for(lambda: not query(ROWS), "the end of the row")
    assert query(RUNS) == []


def test_an_expired_task_lets_go_of_its_row(site, dispatch, start, query, wait_for, tmp_path):
    dispatch("dies_once", str(tmp_path / "mark"), expires=0.1)
    wait_for(partial(query, f"{ROWS} WHERE expires < now()"), "the task to expire")
    quick = ("--without-mingle", "--without-gossip", "--concurrency=1", "--loglevel=info")
    start("worker", "--ini", str(site.ini), *quick).says(" ready.")

    wait_for(lambda: not query(ROWS), "the end of the row")
    assert query(RUNS) == []


def test_a_task_that_is_terminated_while_it_runs_lets_go_of_its_row(
    worker, dispatch, revoke, query, wait_for, tmp_path
):
    dispatch("goes_on_for_ever", str(tmp_path / "mark"))
    wait_for((tmp_path / "mark").exists, "the run")
    (task_id,) = query(IDS)
    revoke(task_id, terminate=True)

    wait_for(lambda: not query(ROWS), "the end of the row")
    assert query(RUNS) == []
