"""Errors that a worker's child tells its main process, which has to be able to read them."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
from tests.errors import error_classes
from tests.functional.conftest import APPS, Site
from tests.waiting import SOON

pytestmark = pytest.mark.usefixtures("sockets_end_with_their_test")

ROOT = Path(__file__).parents[2]

INI = """
[app:main]
use = call:erring:main
pyramid.includes = ws_celery
ws_celery.config_uri = %(__file__)s

[celery]
broker_url = {redis}
result_backend = {redis}
result_expires = 600
task_default_queue = {queue}
"""

#: How often a task is tried again, by Celery's default.
RETRIES = 3


@pytest.fixture
def worker(tmp_path, redis_url, start, celery_app_of):
    """A prefork worker with one child, and a Celery app that sends to it."""
    ini = tmp_path / "development.ini"
    ini.write_text(INI.format(redis=redis_url, queue=f"test-{uuid.uuid4()}"))
    options = ("--concurrency=1", "--without-mingle", "--without-gossip", "--loglevel=info")
    python_path = os.pathsep.join((str(APPS), str(ROOT)))
    running = start("worker", "--ini", str(ini), *options, PYTHONPATH=python_path)
    running.says(" ready.")
    with celery_app_of(Site(ini)) as app:
        yield running, app


def test_no_error_of_a_task_ends_the_work_of_a_worker(worker):
    running, app = worker
    names = [cls.__name__ for cls in error_classes()] + ["Surprise"]
    for number, _ in enumerate(names):
        for how in ("raise", "reject", "retry"):
            app.send_task("fail", (how, number))
    app.send_task("retry_badly")

    # The retries of a task come behind what is in the queue. A prefork child that is stopped while
    # it hands over a large error would wait for a main process that reads no more.
    for _ in range(RETRIES + 1):
        answer = app.send_task("answer")
        assert answer.get(timeout=SOON) == 42
    running.says(f"answer[{answer.id}] succeeded")
    running.process.terminate()
    assert running.ends() == 0
    assert "Unrecoverable error" not in running.text
    assert [name for name in names if name not in running.text] == []
