"""The main job in real processes: a request stores and calls, a worker runs, the page shows."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial

import pytest
from celery.result import AsyncResult

PSERVE = (sys.executable, "-m", "pyramid.scripts.pserve")


@pytest.fixture(
    params=[
        pytest.param(("postgres_url", "redis_url"), id="PostgreSQL and Redis"),
        pytest.param(("sqlite_url", "embedded_url"), id="SQLite and embedded broker"),
    ]
)
def site(request, make_site):
    return make_site(*(request.getfixturevalue(name) for name in request.param))


@pytest.fixture
def web(site, start, wait_for):
    web = start(str(site.ini), program=PSERVE)
    web.says("Starting server")
    wait_for(lambda: answers(site), "the web server answering")
    return web


def answers(site) -> bool:
    try:
        return site.http("GET", "/deliveries")[0] == 200
    except OSError:
        return False


def written(site, path):
    review = site.get(path)
    return review if review["review_url"] else None


def ready_worker(start, site, *options, **env):
    quick = ("--without-mingle", "--without-gossip", "--concurrency=1")
    worker = start("worker", "--ini", str(site.ini), "--loglevel=info", *quick, *options, **env)
    worker.says(" ready.")
    return worker


def test_a_request_stores_a_row_and_a_worker_in_another_process_runs_its_task(
    site, web, start, wait_for
):
    ready_worker(start, site)

    for how in ("delay", "delay with request", "apply_async", "apply_async by keyword"):
        status, delivery = site.http("POST", "/deliveries", how=how)

        assert status == 200
        path = f"/reviews/{delivery['id']}"
        review = wait_for(partial(written, site, path), "the review")
        assert review["review_url"] == f"http://127.0.0.1:{site.port}{path}"
        assert review["pid"] != delivery["pid"]
        assert site.get(review["review_url"]) == review


def test_a_request_that_fails_after_the_call_never_becomes_a_task(site, web, start, wait_for):
    worker = ready_worker(start, site)

    before = site.get("/deliveries")
    assert site.http("POST", "/deliveries", fail="1")[0] == 500
    # A later request's task shows that the worker would have run an earlier one.
    delivery = site.http("POST", "/deliveries")[1]
    wait_for(partial(written, site, f"/reviews/{delivery['id']}"), "the review")

    after = site.get("/deliveries")
    assert after == {"deliveries": before["deliveries"] + 1, "runs": before["runs"]}
    assert worker.text.count(" received") == 1


def test_beat_sends_what_the_ini_schedules(site, web, start, wait_for):
    ready_worker(start, site)
    before = len(site.get("/deliveries")["runs"])
    beat = start("beat", "--ini", str(site.ini), "--loglevel=info")

    wait_for(lambda: len(site.get("/deliveries")["runs"]) >= before + 2, "two ticks")

    assert "Sending due task record (myapp.tasks.record)" in beat.text
    os.kill(beat.process.pid, signal.SIGTERM)
    assert beat.ends() == 0


@pytest.mark.parametrize("command", ["worker", "beat"])
def test_the_older_spelling_of_the_command_line_works(site, start, command):
    running = start(
        command,
        *("-A", "ws_celery.celery_app", "--ini", str(site.ini), "--loglevel=debug"),
    )

    started = " ready." if command == "worker" else "beat: Starting..."
    running.says(started)
    assert running.process.poll() is None


def test_the_environment_names_the_ini_for_celerys_own_command(site, start):
    celery = (sys.executable, "-m", "celery")
    worker = start(
        *("-A", "ws_celery.celery_app", "worker", "--loglevel=info"),
        program=celery,
        WS_CELERY_INI=str(site.ini),
    )

    worker.says(" ready.")
    assert "myapp.tasks.send_review" in worker.text


def test_term_lets_the_running_task_finish(site, web, start, wait_for, tmp_path):
    worker = ready_worker(start, site)
    started, finished = tmp_path / "started", tmp_path / "finished"
    site.http("PUT", "/deliveries", started=started, finished=finished, seconds="1")
    wait_for(started.exists, "the start of the task")

    worker.process.terminate()

    assert worker.ends() == 0
    assert finished.exists()


def test_a_failing_task_leaves_nothing_in_the_database(site, web, start, celery_app_of):
    ready_worker(start, site)

    with celery_app_of(site) as app:
        result = app.send_task("myapp.tasks.record_and_fail")
        result.get(timeout=60, propagate=False)
        assert isinstance(result, AsyncResult)
        assert result.state == "FAILURE"

    assert "record_and_fail" not in site.get("/deliveries")["runs"]


def test_children_of_a_worker_open_database_connections_of_their_own(
    make_site, postgres_url, redis_url, start, celery_app_of
):
    site = make_site(postgres_url, redis_url)
    ready_worker(start, site, "--concurrency=2")

    with celery_app_of(site) as app:
        results = [app.send_task("myapp.tasks.backend_pid") for _ in range(20)]
        connections = {tuple(result.get(timeout=60)) for result in results}

    processes = {process for process, _ in connections}
    assert len(connections) == len({backend for _, backend in connections}) == len(processes)
