"""What a worker's consumer does otherwise on Redis: when it acknowledges."""

from __future__ import annotations

import pytest
from tests.waiting import SOON

pytestmark = pytest.mark.usefixtures("sockets_end_with_their_test")


@pytest.fixture
def broker(embedded_url, promised_site, celery_app_of):
    """A broker of the test's own, with its site, its Celery app and its client."""
    site = promised_site(embedded_url, "task_acks_late = true\nworker_prefetch_multiplier = 2")
    with celery_app_of(site) as app, app.connection_for_read() as connection:
        yield site, app, connection.default_channel.client


@pytest.fixture
def worker(broker, start):
    """A prefork worker of that site with one child."""
    options = ("--concurrency=1", "--without-mingle", "--without-gossip", "--loglevel=warning")
    return start("worker", "--ini", str(broker[0].ini), *options)


def test_what_has_run_is_acknowledged_though_nothing_follows(broker, worker, wait_for):
    _, app, client = broker
    for number in range(20):
        result = app.send_task("note", ("acknowledged", number))
    result.get(timeout=SOON)

    wait_for(lambda: not client.hlen("unacked"), "the acknowledgement")
    assert client.llen(app.conf.task_default_queue) == 0


def test_a_worker_that_ends_acknowledges_what_it_finishes(broker, worker, wait_for, tmp_path):
    _, app, client = broker
    started, finished = tmp_path / "started", tmp_path / "finished"
    app.send_task("myapp.tasks.slow", (str(started), str(finished), 1))
    wait_for(started.exists, "the start of the task", SOON)

    worker.process.terminate()

    assert worker.ends() == 0
    assert finished.exists()
    assert client.hlen("unacked") == client.llen(app.conf.task_default_queue) == 0


def test_after_a_lost_connection_tasks_are_acknowledged_on_the_new_one(
    broker, worker, wait_for, tmp_path
):
    _, app, client = broker
    started, finished = tmp_path / "started", tmp_path / "finished"
    app.send_task("myapp.tasks.slow", (str(started), str(finished), 0))
    wait_for(finished.exists, "the end of the first task", SOON)
    wait_for(lambda: not client.hlen("unacked"), "its acknowledgement")

    client.client_kill_filter(_type="normal", skipme=True)
    for number in range(20):
        result = app.send_task("note", ("reconnected", number))
    result.get(timeout=SOON)

    wait_for(lambda: not client.hlen("unacked"), "the acknowledgement")
    assert worker.process.poll() is None


def test_workers_greet_each_other(broker, start, wait_for):
    for name in ("first", "second"):
        options = ("--concurrency=1", "--loglevel=info", "-n", f"{name}@%h")
        start("worker", "--ini", str(broker[0].ini), *options).says(" ready.")

    def greeted():
        # It waits a second for answers, and never asks again.
        worker = start("worker", "--ini", str(broker[0].ini), "--concurrency=1", "--loglevel=info")
        worker.says(" ready.")
        worker.process.terminate()
        worker.ends()
        return "sync with 2 nodes" in worker.text

    wait_for(greeted, "the answers of both in time", 180)
