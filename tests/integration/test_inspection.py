"""Workers and what they have in hand, and the tasks of an application."""

from __future__ import annotations

import json
import uuid
from datetime import datetime, timedelta, timezone

import pytest
import transaction
from sqlalchemy import create_engine
from tests.waiting import wait_for

from ws_celery import inspection, task
from ws_celery.cli.tasks import status, tasks, workers
from ws_celery.exceptions import (
    ConfigurationError,
    TaskNotRegistered,
    Unavailable,
)


@task(name="send_mail", max_retries=7, acks_late=True)
def send_mail(request, address, password=None):
    pass


@pytest.fixture
def alone():
    """Workers of other tests, which share the Redis, do not hear what is asked here."""
    return f"control_exchange = control-{uuid.uuid4().hex}\n"


@pytest.fixture
def start_worker(start_worker):
    """Start a worker that hears what it is asked: it is ready a moment before it has subscribed."""

    def start(app):
        start_worker(app)
        wait_for(lambda: app.celery.control.ping(timeout=0.5), "an answer of the worker")

    return start


@pytest.fixture
def app(make_app, redis_url, alone):
    return make_app(send_mail, broker=redis_url, celery=alone)


def test_no_worker_is_an_error_that_says_so(app, run):
    with pytest.raises(Unavailable, match=r"within 0.1 seconds. Start one"):
        inspection.worker_states(app.registry, timeout=0.1)
    with pytest.raises(Unavailable, match="No worker"):
        inspection.held_tasks(app.registry, timeout=0.1)
    with pytest.raises(Unavailable, match="No worker"):
        run(app, tasks, "running", "--timeout", "0.1")
    with pytest.raises(Unavailable, match="No worker"):
        run(app, workers, "--timeout", "0.1")
    with pytest.raises(Unavailable, match="No worker"):
        run(app, tasks, "revoke", "one", "--yes", "--timeout", "0.1")
    with pytest.raises(Unavailable, match="No worker"):
        run(app, tasks, "terminate", "one", "--yes", "--timeout", "0.1")


def test_without_a_worker_the_outbox_revokes_what_it_holds(make_outbox, sqlite, alone, run):
    app = make_outbox(sqlite, send_mail, celery=alone)
    with transaction.manager:
        request = app.request()
        request.tm = transaction.manager
        first, second = (send_mail.delay(request, address) for address in ("one", "two"))

    revoke = (app, tasks, "revoke", "--yes", "--timeout", "0.1")
    assert run(*revoke, first.id) == (0, "Revoked 1 task.\n")
    with pytest.raises(Unavailable, match="No worker"):
        run(*revoke, second.id, "unknown")


def test_a_task_whose_row_cannot_be_deleted_is_not_called_revoked(
    make_outbox, sqlite, alone, run, monkeypatch
):
    app = make_outbox(sqlite, send_mail, celery=alone)
    nowhere = create_engine("postgresql+psycopg://postgres@127.0.0.1:1/none")
    monkeypatch.setattr(app.celery.outbox, "engine", nowhere)
    asked = []
    monkeypatch.setattr(app.celery.control, "broadcast", lambda *_, **__: asked.append(1) or [1])

    for command in ("revoke", "terminate"):
        with pytest.raises(Unavailable, match="does not answer"):
            run(app, tasks, command, "one", "--yes", "--timeout", "0.1")
    assert not asked


@pytest.mark.parametrize("signal", ["SIGFOO", "9", "KILL"])
def test_a_signal_that_is_none_is_refused(app, run, signal):
    code, output = run(app, tasks, "terminate", "one", "--yes", "--signal", signal)

    assert code == 2
    assert signal in output


@pytest.mark.parametrize("part", ["relay", "beat", "brokr"])
def test_a_part_that_cannot_be_asked_is_refused(app, part):
    with pytest.raises(ConfigurationError, match=rf"{part} .*broker, worker, database\."):
        inspection.health(app.registry, parts=["broker", part])


@pytest.mark.parametrize(
    ("option", "value"),
    [("--part", "broker"), ("--beat-file", "f"), ("--relay-file", "f"), ("--max-age", "60")],
)
def test_what_is_for_probes_only_is_refused_elsewhere(app, run, option, value):
    code, output = run(app, status, option, value, "--timeout", "0.1")

    assert code == 2
    assert f"{option} is for --healthy only" in output


def test_a_worker_tells_what_it_is(app, start_worker, run):
    start_worker(app)

    (worker,) = inspection.worker_states(app.registry)

    assert worker.name.endswith("@localhost")
    assert (worker.pool, worker.queues) == (
        "celery.concurrency.solo",
        (app.celery.conf.task_default_queue,),
    )
    assert worker.pid > 0
    ((listed),) = json.loads(run(app, workers, "--json")[1])
    assert listed["name"] == worker.name
    output = run(app, workers)[1]
    assert worker.name in output
    assert "solo" in output


def test_what_workers_hold_is_shown_by_state(make_app, redis_url, alone, start_worker, run):
    app = make_app(send_mail, broker=redis_url, celery=alone)
    start_worker(app)
    eta = datetime.now(timezone.utc) + timedelta(hours=1)
    result = send_mail.apply_async((app.request(), "a@b.c", "hunter2"), eta=eta)

    def found():
        return inspection.held_tasks(app.registry, ("scheduled",), timeout=5)

    (scheduled,) = wait_for(found)

    assert (scheduled.id, scheduled.task) == (result.id, "send_mail")
    assert (scheduled.state, scheduled.since) == ("scheduled", None)
    assert abs(scheduled.eta - eta) < timedelta(seconds=1)
    assert scheduled.arguments["args"] == ["a@b.c", "********"]
    output = run(app, tasks, "running", columns=200)[1]
    assert result.id in output
    assert "1 in the hands of workers." in output
    assert "hunter2" not in output
    listed = json.loads(run(app, tasks, "running", "--state", "active", "--json")[1])
    assert listed == []
    assert run(app, tasks, "running", "--state", "active") == (0, "0 in the hands of workers.\n")


def test_a_revoked_task_is_known_to_workers(app, start_worker, run):
    start_worker(app)
    task_id = str(uuid.uuid4())

    code, output = run(app, tasks, "revoke", task_id, answer="n\n")
    assert code == 1
    assert task_id not in inspection.revoked_ids(app.registry)
    assert "Revoke 1 task, so that they never run?" in output
    assert run(app, tasks, "revoke", task_id, "--yes") == (0, "Revoked 1 task.\n")

    assert wait_for(lambda: task_id in inspection.revoked_ids(app.registry))


def test_terminating_asks_with_numbers(app, start_worker, run):
    start_worker(app)

    code, output = run(app, tasks, "terminate", "one", "two", answer="n\n")

    assert code == 1
    assert "Terminate 2 tasks, of which 0 running: kill with SIGTERM?" in output
    output = run(app, tasks, "terminate", "one", "--yes")[1]
    assert output == "Asked workers to terminate 1 task.\n"


# Registered tasks


def test_a_task_tells_where_it_comes_from_and_what_was_decided(make_app):
    app = make_app(
        send_mail,
        celery="""\
        [celeryroute:send_mail]
        queue = mails
        [celerybeat:nightly]
        task = send_mail
        type = timedelta
        schedule = {"days": 1}
        """,
    )

    found = inspection.registered_task(app.registry, "send_mail")

    assert found.target == f"{__name__}.send_mail"
    assert (found.origin, found.plugin) == ("config.add_celery_task", None)
    assert found.base == "ws_celery.transactional.TransactionalTask"
    assert (found.queue, found.schedule, found.max_retries) == ("mails", ("nightly",), 7)
    assert found.outbox is False
    assert found.options["acks_late"] is True
    assert json.dumps(found.as_dict())


def test_a_task_has_its_entries_of_code_ini_and_database(make_schedule, sqlite, run, monkeypatch):
    @task(name="scheduled", schedule=60)
    def scheduled(request):
        pass

    ini = """        [celerybeat:of-ini]
        task = scheduled
        type = number
        schedule = 60
        """
    app = make_schedule(sqlite, scheduled, celery=ini)
    app.config.add_periodic_task("scheduled", 60, name="of-code")
    app.config.commit()
    fields = {"task": "scheduled", "type": "number", "schedule": "60"}
    inspection.add_schedule_entry(app.registry, "of-database", fields)
    inspection.disable_schedule_entry(app.registry, "of-ini")

    def entries():
        return inspection.registered_task(app.registry, "scheduled").schedule

    assert entries() == ("of-code", "of-database", "of-ini", "scheduled")
    assert ", ".join(entries()) in run(app, tasks)[1]

    nowhere = create_engine("postgresql+psycopg://postgres@127.0.0.1:1/none")
    monkeypatch.setattr(app.celery.schedule, "engine", nowhere)
    assert entries() == ("of-code", "of-ini", "scheduled")


def test_tasks_of_celery_and_of_app_task_are_told_apart(make_app):
    app = make_app(send_mail)

    @app.celery.task(name="plain", shared=False)
    def plain():
        pass

    found = {each.name: each for each in inspection.registered_tasks(app.registry)}

    assert found["celery.group"].origin == "celery"
    assert found["plain"].origin == "app.task"
    assert found["plain"].queue == app.celery.conf.task_default_queue
    assert list(found)[-1].startswith("celery.")


def test_a_task_that_is_not_there_is_refused(make_app):
    with pytest.raises(TaskNotRegistered, match="'nothing'"):
        inspection.registered_task(make_app().registry, "nothing")


def test_the_command_lists_tasks(make_app, run):
    @task(name="odd", retry_kwargs={"max_retries": 1}, autoretry_for=(OSError,))
    def odd(request):
        pass

    app = make_app(send_mail, odd)

    output = run(app, tasks, columns=100)[1]
    assert "send_mail" in output
    assert "celery." not in output.replace("ws_celery.", "")
    assert max(map(len, output.splitlines())) <= 100
    assert "celery.group" in run(app, tasks, "--all")[1]
    listed = json.loads(run(app, tasks, "--json")[1])
    assert [each["name"] for each in listed] == ["odd", "send_mail"]
    shown = json.loads(run(app, tasks, "show", "odd", "--json")[1])
    assert shown["options"]["autoretry_for"] == ["builtins.OSError"]
    assert "odd" in run(app, tasks, "show", "odd")[1]
