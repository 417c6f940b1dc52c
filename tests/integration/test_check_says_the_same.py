"""What a command refuses as it starts, or the first run of a task, ``ws-celery check`` says."""

from __future__ import annotations

import os
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from ws_celery.checks import examine
from ws_celery.cli import main

#: Fault to: the command that meets it; sections after [celery]; code; settings of the application.
FAULTS = {
    "an entry whose task is not registered": (
        "beat",
        "[celerybeat:a]\ntask = nowhere\ntype = integer\nschedule = 1\n",
    ),
    "an entry without a task": ("beat", "[celerybeat:a]\ntype = integer\nschedule = 1\n"),
    "an entry without a schedule": ("beat", "[celerybeat:a]\ntask = known\n"),
    "an entry that is empty": ("beat", "[celerybeat:a]\n"),
    "an entry whose arguments do not fit": (
        "beat",
        "[celerybeat:a]\ntask = known\nargs = [1]\ntype = integer\nschedule = 1\n",
    ),
    "an entry whose arguments do not serialise": (
        "beat",
        "",
        """
        @task(name="take", schedule={"type": "integer", "schedule": 1, "args": [object()]})
        def take(request, value):
            pass
        """,
    ),
    "an entry that is sent to no queue": (
        "beat",
        "task_create_missing_queues = false\n[celeryqueue:celery]\n"
        '[celerybeat:a]\ntask = known\noptions = {"queue": "slow"}\ntype = integer\nschedule = 1\n',
    ),
    "an entry that is not to overlap, and nobody knows": (
        "beat",
        "[celerybeat:a]\ntask = known\noverlap = skip\ntype = integer\nschedule = 1\n",
    ),
    "an entry that the database cannot know": (
        "beat",
        f"[celerybeat:{'a' * 300}]\ntask = known\ntype = integer\nschedule = 1\n",
        "",
        "ws_celery.beat = true\n",
    ),
    "a schedule from code that is none": (
        "beat",
        "",
        """
        @task(name="often", schedule={"type": "crontab", "schedule": "61 * * * *"})
        def often(request):
            pass
        """,
    ),
    "a pool that has to patch the standard library": ("worker", "worker_pool = gevent\n"),
    "an option that there is not": ("worker", "brokr_url = memory://\n"),
    "a module that there is not": ("worker", "imports =\n    no_such_module\n"),
    "a task with an unknown option": (
        "worker",
        "",
        """
        @task(name="odd", rate_limt="1/s")
        def odd(request):
            pass
        """,
    ),
    "a task that says that it takes no request": (
        "worker",
        "",
        """
        @task(name="odd", takes_request=False)
        def odd(request):
            pass
        """,
    ),
    "logging that is not complete": ("worker", "[loggers]\nkeys = root\n"),
    "a value of others that cannot be interpolated": ("worker", "", "", "mail.password = a%b\n"),
    "a factory that there is not": ("worker", "", "", "use = call:no_such_module:main\n"),
    "an outbox without a table": ("relay", "", "", "ws_celery.outbox = true\n"),
    "locks of a database that has none": ("locks list", "", "", "ws_celery.locks = database\n"),
}

DATABASE = """
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

def database(config):
    engine = create_engine(config.registry.settings["database"])
    config.add_request_method(lambda request: Session(engine), "dbsession", reify=True)

@task(name="alone", one_instance=True)
def alone(request):
    pass
"""


@pytest.fixture
def faulty(site, tmp_path, monkeypatch):
    """Write an application with a fault; returns the path of its INI file."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for variable in ("WS_CELERY_INI", "WS_CELERY_INI_VARS"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)

    def write(text, code="", app=""):
        app += f"database = sqlite:///{tmp_path}/db\npyramid.includes = .database\n"
        return site(text, DATABASE + textwrap.dedent(code), app=app)

    return write


@pytest.fixture
def said(capsys):
    """Run a command that refuses to start; returns the lines that it says, without their places."""

    def run(command, path):
        with pytest.raises(SystemExit) as ended:
            main([*command.split(), "--ini", path])
        assert ended.value.code not in (0, None)
        return capsys.readouterr().err.removeprefix("Error: ").splitlines()

    return run


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_command_refuses_as_it_starts_check_says_with_the_same_words(
    faulty, said, fault, capsys
):
    command, *application = FAULTS[fault]
    path = faulty(*application)
    refused = said(command, path)

    with pytest.raises(SystemExit) as ended:
        main(["check", "--ini", path])
    found = capsys.readouterr().out

    assert ended.value.code == 2
    assert refused
    assert [line for line in refused if line not in found] == []


@pytest.mark.parametrize(
    ("function", "severity", "reason"),
    [
        (
            "def remind(address, subject=None)",
            "warning",
            "has 'address' as its first parameter",
        ),
        ("def remind()", "error", "and has no parameter for it"),
        ("def remind(*, subject=None)", "error", "and has no parameter for it"),
    ],
)
def test_a_function_that_does_not_take_a_request_is_told_at_its_registration_and_by_check(
    faulty, caplog, function, severity, reason
):
    path = faulty("", f'@task(name="remind")\n{function}:\n    pass\n')
    (finding,) = (each for each in examine(path).findings if each.code == "request")

    assert finding.severity == severity
    assert reason in finding.text
    assert finding.text.startswith("the function of the task 'remind' is given a request first")
    assert finding.text in [each.getMessage() for each in caplog.records]


def test_messages_that_workers_would_refuse_are_an_error(faulty):
    path = faulty("", '@task(name="p", serializer="yaml")\ndef p(request):\n    pass\n')
    (finding,) = (each for each in examine(path).findings if each.severity == "error")

    assert finding.code == "serializer"
    assert "task 'p' are written with yaml, which is not in accept_content" in finding.text


def test_a_task_that_is_routed_to_no_queue_is_an_error_with_the_words_of_its_call(faulty):
    path = faulty(
        "task_create_missing_queues = false\n[celeryqueue:celery]\n"
        "[celeryroute:known]\nqueue = slow\n"
    )
    (finding,) = (each for each in examine(path).findings if each.severity == "error")

    assert finding.code == "unknown-queue"
    assert "Queue 'slow' missing from task_queues" in finding.text


def test_a_schedule_without_its_table_is_an_error_with_the_words_of_beat(faulty, said):
    path = faulty("", "", "ws_celery.beat = true\n")
    (finding,) = (each for each in examine(path).findings if each.severity == "error")

    assert said("schedule list", path) == [finding.text]
    assert "Create it with `ws-celery schedule create --ini FILE`" in finding.text


def test_what_beat_would_set_aside_of_the_database_is_a_warning(faulty):
    path = faulty("", "", "ws_celery.beat = true\n")
    fields = ("task=known", "type=integer", "schedule=1")
    for arguments in (["create"], ["add", "gone", *fields]):
        with suppress(SystemExit):
            main(["schedule", *arguments, "--ini", path])
    engine = create_engine(f"sqlite:///{Path(path).parent}/db")
    with engine.begin() as connection:
        edit = "UPDATE ws_celery_schedule SET fields = replace(fields, 'known', 'gone')"
        connection.execute(text(edit))
    engine.dispose()
    (finding,) = examine(path).findings

    assert finding.severity == "warning"
    assert finding.text.startswith("The entry gone is set aside: the task 'gone' is not registered")


def test_entries_are_listed_as_people_write_them_though_they_are_not_complete(
    faulty, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "500")  # nothing is cut
    code = """
        from ws_celery.schedules import ZonedCrontab

        @task(name="nightly", schedule=ZonedCrontab(minute="0", hour="3", zone="Asia/Tokyo"))
        def nightly(request):
            pass
    """
    path = faulty(
        "[celerybeat:remind]\ntask = known\ntype = crontab\nschedule = 0 7 * * mon\n"
        "timezone = Europe/Berlin\n"
        "[celerybeat:lost]\ntype = timedelta\nschedule = 24h\n"
        "[celerybeat:nightly]\nenabled = false\n",
        code,
    )
    with pytest.raises(SystemExit):
        main(["check", "--ini", path])
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}

    assert f"entry remind crontab: 0 7 * * mon, Europe/Berlin -> known crontab {path}:9" in lines
    assert f"entry lost timedelta: 24h timedelta {path}:14" in lines
    assert f"entry nightly (off) none {path}:17" in lines
    assert "entry alone" not in lines
    assert not [line for line in lines if "ZonedCrontab" in line]


def test_entries_of_code_are_listed_too(faulty):
    code = '@task(name="often", schedule="1h")\ndef often(request):\n    pass\n'
    rows = {row["name"]: row for row in examine(faulty("", code)).as_dict()["settings"]}

    assert rows["often"]["value"] == "timedelta: 1h -> often"
    assert (rows["often"]["file"], rows["often"]["type"]) == ("code", "timedelta")
