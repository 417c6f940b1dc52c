"""What other integrations got wrong, with a real worker: each was reproduced with one of them.

What the promises cover is in ``test_promises``: retries that were lost, canvases and ``send_task``
that escaped, arguments that changed after the call, a transaction that nobody finishes. A lock that
somebody else releases, and a run that is skipped, are in ``tests/integration/test_locks``.
"""

from __future__ import annotations

import gc
import uuid
import warnings

import pytest
import transaction
from tests.waiting import SOON

from ws_celery.events import TasksSpooled

CELERY = """
task_acks_late = false
task_default_rate_limit = 10000/m

[celery:broker_transport_options]
visibility_timeout = 3600
option_of_tomorrow = 5
"""


@pytest.fixture(scope="module", autouse=True)
def _sockets_end_with_their_module():
    # Celery leaves those of result backends to the garbage collector, which warns of each.
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module", params=["explicit manager", "manager of the thread"])
def site(request, promised_site):
    return promised_site(celery=CELERY, explicit=request.param == "explicit manager")


@pytest.fixture(scope="module")
def worker(site, start_once):
    """The name of a worker that runs."""
    name = f"{uuid.uuid4().hex}@localhost"
    start_once(
        *("worker", "--ini", str(site.ini), "--concurrency=1", "--loglevel=info"),
        *("--without-mingle", "--without-gossip", "--hostname", name),
    ).says(" ready.")
    return name


@pytest.fixture
def app(site, worker, celery_app_of):
    """A Celery app that sends to the worker."""
    with celery_app_of(site) as app:
        yield app


@pytest.fixture
def run(app):
    """Run a task with a new label; return its result, and what then is in the database."""

    def run(name):
        label = uuid.uuid4().hex
        result = app.send_task(name, (label,))
        result.get(timeout=SOON, propagate=False)
        # The next task uses the same process, its session and its transaction manager.
        app.send_task("note", (label, "next")).get(timeout=SOON)
        return result, app.send_task("notes", (label,)).get(timeout=SOON)

    return run


@pytest.fixture
def ask(app, worker):
    """Ask the worker what it has."""
    inspect = app.control.inspect([worker], timeout=SOON, limit=1)
    return lambda what: getattr(inspect, what)()[worker]


@pytest.fixture
def conf(ask):
    """The configuration that the worker says it has."""
    return ask("conf")


def test_a_failed_commit_is_not_reported_as_success(run):
    result, notes = run("collide")

    assert result.state == "FAILURE"
    assert "IntegrityError" in str(result.result)
    assert notes == ["next"]


def test_half_the_work_of_a_retried_attempt_is_not_committed_by_the_next_task(run):
    result, notes = run("try_again")

    assert result.state == "SUCCESS"
    assert notes == ["try 1", "next"]


def test_false_is_false(conf):
    assert conf["task_acks_late"] is False


def test_a_rate_limit_is_a_rate(conf):
    assert conf["task_default_rate_limit"] == "10000/m"


def test_imports_of_several_lines_are_several_modules(ask, conf):
    assert conf["imports"] == ["promised", "myapp.tasks"]
    assert {"note [rate_limit=10000/m]", "backup [rate_limit=10000/m]"} <= set(ask("registered"))


def test_transport_options_that_nobody_knows_reach_the_transport(conf):
    assert conf["broker_transport_options"]["option_of_tomorrow"] == 5


def test_here_is_the_directory_of_the_file(conf, site):
    assert conf["beat_schedule_filename"] == str(site.ini.parent / "schedule")


def test_an_error_after_the_commit_is_not_swallowed(make_app, free_port, caplog):
    told = []
    app = make_app(
        setup=lambda config: config.add_subscriber(told.append, TasksSpooled),
        broker=f"redis://127.0.0.1:{free_port}/0",
    )
    with transaction.manager:
        result = app.celery.send_task("note")

    ((name, task_id),) = told[0].tasks
    assert (name, task_id) == ("note", result.id)
    (record,) = [each for each in caplog.records if each.name == "ws_celery.publishing"]
    assert f"note[{result.id}]" in record.getMessage()
