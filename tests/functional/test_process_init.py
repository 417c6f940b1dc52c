"""Each process that runs tasks tells the application that it has started, once."""

from __future__ import annotations

import re

import pytest

APPLICATION = """
import os
from pyramid.config import Configurator
from ws_celery.events import WorkerProcessInit

def started(event):
    text = f"started in {os.getpid()} {event.registry.settings['mark']}"
    print(text, flush=True)

def app(global_config, **settings):
    config = Configurator(settings=settings)
    config.include("ws_celery")
    config.add_subscriber(started, WorkerProcessInit)
    return config.make_wsgi_app()
"""

INI = """
[app:main]
paste.app_factory = announcing:app
ws_celery.config_uri = %(__file__)s
mark = of-this-application

[celery]
broker_url = memory://
"""


@pytest.fixture
def ini(tmp_path):
    (tmp_path / "announcing.py").write_text(APPLICATION)
    path = tmp_path / "announcing.ini"
    path.write_text(INI)
    return path


@pytest.fixture
def start_worker(start, ini):
    """Start a worker of the application with these options; returns when it is ready."""

    def start_worker(*options):
        command = ("worker", "--ini", str(ini), "--loglevel", "info", *options)
        worker = start(*command, PYTHONPATH=str(ini.parent))
        worker.says("ready.")
        return worker

    return start_worker


def announced(worker):
    return [int(pid) for pid in re.findall(r"started in (\d+) of-this-application", worker.text)]


def test_each_child_of_a_prefork_pool_is_told(start_worker, wait_for):
    worker = start_worker("--concurrency", "2")
    wait_for(lambda: len(announced(worker)) == 2, "the start of both children")

    assert len(set(announced(worker)) - {worker.process.pid}) == 2


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_a_worker_that_runs_its_tasks_itself_is_told_once(start_worker, pool):
    worker = start_worker("--pool", pool)
    worker.says("started in")
    worker.process.terminate()
    worker.ends()

    assert announced(worker) == [worker.process.pid]
