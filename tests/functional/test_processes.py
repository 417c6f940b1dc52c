"""Each pool and each way to start a process: a run is alone with its request and transaction."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from tests.waiting import SOON

pytestmark = pytest.mark.usefixtures("sockets_end_with_their_test")


@pytest.fixture
def worker(start, promised_site, celery_app_of):
    """Start a worker with these options; returns a Celery app that sends to it."""
    with ExitStack() as stack:

        def worker(*options, celery=""):
            site = promised_site(celery=celery)
            quick = ("--without-mingle", "--without-gossip", "--loglevel=info")
            start("worker", "--ini", str(site.ini), *quick, *options).says(" ready.")
            return stack.enter_context(celery_app_of(site))

        yield worker


#: Options, settings, and how many tasks run at the same time in one process.
POOLS = {
    "prefork": (("--pool=prefork", "--concurrency=2"), "", 1),
    "threads": (("--pool=threads", "--concurrency=4"), "", 4),
    "solo": (("--pool=solo",), "", 1),
    "gevent": (("-P", "gevent", "--concurrency=4"), "", 4),
    "spawn": (("--concurrency=2",), "worker_pool_start_method = spawn", 1),
}


@pytest.mark.parametrize("pool", POOLS)
def test_each_run_is_alone_with_its_request_and_its_transaction(worker, pool):
    options, celery, together = POOLS[pool]
    app = worker(*options, celery=celery)
    hosts = [f"shop{number}.example" for number in range(together * 3)]
    runs = [
        app.send_task("look", (number, together), headers={"ws_celery": {"url": f"http://{host}"}})
        for number, host in enumerate(hosts)
    ]

    seen = [run.get(timeout=SOON) for run in runs]
    assert all(each["same"] and each["current"] for each in seen)
    assert [each["number"] for each in seen] == list(range(len(runs)))
    assert [each["host"] for each in seen] == hosts
    assert [each["id"] for each in seen] == [run.id for run in runs]


WAYS_TO_END = ["return", "fail", "ignore", "reject", "retry", "give up", "conflict"]
STATES = dict.fromkeys(WAYS_TO_END, "SUCCESS") | {"fail": "FAILURE", "give up": "FAILURE"}


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent"])
def test_a_run_gives_its_connection_back_however_it_ends(worker, pool):
    app = worker(f"--pool={pool}", "--concurrency=1")

    for how in WAYS_TO_END:
        end = app.send_task("end", (how,))
        checked_out, _ = app.send_task("checked_out").get(timeout=SOON)
        assert (how, checked_out) == (how, 0)
        if how not in ("ignore", "reject"):
            end.get(timeout=SOON, propagate=False)
            checked_out, _ = app.send_task("checked_out").get(timeout=SOON)
            assert (how, end.state, checked_out) == (how, STATES[how], 0)


def test_a_pool_that_would_come_too_late_is_refused(run, promised_site):
    site = promised_site(celery="worker_pool = gevent")
    ended = run("worker", "--ini", str(site.ini))

    assert ended.returncode == 2
    assert "worker_pool = gevent comes too late" in ended.stderr
    assert "--pool gevent" in ended.stderr
