"""Everything that prints, with a secret of each kind planted where it could show it."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import click
import pytest
import transaction
from click.testing import CliRunner
from tests.waiting import SOON, wait_for

from ws_celery import inspection, task
from ws_celery.cli import main, main_group
from ws_celery.interfaces import ICeleryEvent
from ws_celery.logs import TaskFilter, log_arguments_of_failures
from ws_celery.masking import MASK, printable

pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")

#: Kind of secret to what must not be seen.
SECRETS = {
    "the password of a DSN in a traceback": "dsn-s3cr3t",
    "an argument that is called password": "named-s3cr3t",
    "an argument that ws_celery.mask_arguments names": "iban-s3cr3t",
    "the same, quoted by the error of a dead letter": "iban-s3cr3t",
    "the password of the broker": "broker-s3cr3t",
    "an argument of an entry of the schedule": "entry-s3cr3t",
    "a header of an entry of the schedule": "header-s3cr3t",
    "an option of a task": "option-s3cr3t",
    "what a task returns": "returned-s3cr3t",
}
#: What must not be seen with ``ws_celery.mask_arguments = all``.
PLAIN = "ada-plain"

#: What a terminal would obey: it sets the title of the window; and what turns text around.
OBEYED = "\x1b]0;evil\x07\u202e"
_COLOURS = re.compile(r"\x1b\[[\d;]*m")

#: Every command that prints what others have written: command to arguments, without the options
#: --json, which is tried wherever a command has it. ``{dead}`` is the id of a dead letter's task,
#: ``{done}`` that of a task that has returned something.
PRINTS = {
    "call": ["pay_later --args [1]"],  # refused, as the arguments do not fit
    "control": ["add_consumer nowhere"],
    "inspect": [
        *("active", "active_queues", "clock", "conf", "memdump", "ping", "query_task {waiting}"),
        *("registered", "report", "reserved", "revoked", "scheduled", "stats"),
    ],
    "list bindings": [""],
    "locks list": [""],
    "locks free": ["nobody --yes"],
    "outbox create": [""],
    "outbox list": ["", "--all"],
    "outbox show": ["{dead}", "{dead} --arguments"],
    "outbox retry": ["{unknown}"],
    "outbox discard": ["{unknown} --yes"],
    "queues": [""],
    "queues peek": ["held", "{queue}"],
    "report": [""],
    "result": ["{done}", "{dead}", "{dead} --traceback"],
    "results": [""],
    "results show": ["{done}", "{dead}"],
    "results forget": ["{unknown} --yes"],
    "schedule create": [""],
    "schedule list": [""],
    "schedule show": ["nightly", "added"],
    "schedule next": ["--hours 48"],
    "schedule health": [""],
    "schedule add": ['odd task=pay type=integer schedule=1 args=["ada","entry-s3cr3t"'],
    "schedule edit": ['added args=["entry-s3cr3t"'],
    "schedule enable": ["nightly"],
    "schedule disable": ["added"],
    "schedule remove": ["nobody"],
    "schedule run": ["nobody"],
    "status": ["", "--healthy"],
    "tasks": ["--all"],
    "tasks show": ["pay"],
    "tasks running": [""],
    "tasks revoke": ["{unknown} --yes"],
    "tasks terminate": ["{unknown} --yes"],
    "view": [""],
    "workers": [""],
}

#: Every other command, and why it needs no masking.
SILENT = {
    "amqp": "a shell for frames of one's own making: it shows a body as it is",
    "beat": "prints what it logs",
    "check": "has a test of its own below: it reads a file",
    "clean": "prints numbers, and names of queues",
    "demo": "prints what its processes print",
    "dev": "prints what its processes print",
    "events": "prints events, which are masked where they are sent",
    "flower": "shows events, which are masked where they are sent",
    "graph bootsteps": "prints names of classes",
    "graph workers": "prints names of workers",
    "logtool debug": "reads a log file, which has no secrets",
    "logtool errors": "reads a log file, which has no secrets",
    "logtool incomplete": "reads a log file, which has no secrets",
    "logtool stats": "reads a log file, which has no secrets",
    "logtool traces": "reads a log file, which has no secrets",
    "migrate": "prints each message as it moves it; SafeContext hides its body",
    "multi": "starts other processes",
    "purge": "prints numbers, and names of queues",
    "queues delete": "prints numbers",
    "queues drop": "prints numbers",
    "queues purge": "prints numbers",
    "relay": "prints what it logs",
    "run": "prints what it logs",
    "schedule export": "is there to be imported again: secrets are not masked, as its help says",
    "schedule import": "prints numbers, and names of entries",
    "shell": "prints what is typed",
    "upgrade settings": "reads a file of settings, and writes it",
    "worker": "prints what it logs",
}


@task(name="pay", headers={"Authorization": "option-s3cr3t"}, password="option-s3cr3t")  # noqa: S106
def pay(request, name, password, iban, result=None, note=None):
    if result is None:
        raise LookupError(f"{OBEYED} {iban} is not in postgresql://shop:dsn-s3cr3t@db/shop")
    return {"token": "returned-s3cr3t", "result": result}


@task(name="pay_later", outbox=False)
def pay_later(request, name, password, iban):
    pass


SCHEDULE = """
[celerybeat:nightly]
task = pay
type = crontab
schedule = 0 3 * * *
args = ["ada-plain", "entry-s3cr3t", "iban-s3cr3t"]
options = {"headers": {"Authorization": "header-s3cr3t"}}
"""


def leaves(group, path=()):
    """Yield the commands that do something, by their whole names."""
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        inner = (*path, name)
        if isinstance(command, click.Group) and name != "amqp":
            if command.invoke_without_command:
                yield " ".join(inner), command
            yield from leaves(command, inner)
        else:
            yield " ".join(inner), command


@pytest.fixture(params=["iban", "iban all"])
def said(request, make_schedule, sqlite, sqlite_url, caplog, start_worker, monkeypatch):
    """Everything that an application with secrets says: its commands, records and events."""
    said = SimpleNamespace(commands={}, events=[], notified=[], records="")
    caplog.set_level(logging.DEBUG)
    caplog.handler.addFilter(TaskFilter())  # as ws-celery gives it to every handler
    log_arguments_of_failures()

    def setup(config):
        config.add_task_deriver(deriver)
        config.add_subscriber(lambda event: said.notified.append(repr(event)), ICeleryEvent)

    app = make_schedule(
        sqlite,
        pay,
        pay_later,
        setup=setup,
        celery=f"result_backend = db+{sqlite_url}\nresult_extended = true\n"
        f"task_send_sent_event = true\nworker_send_task_events = true\n{SCHEDULE}",
        ws_celery__outbox="true",
        ws_celery__log_arguments="true",
        ws_celery__mask_arguments=request.param,
    )
    said.masks_all = "all" in request.param
    ids = fill(app, said, start_worker)
    # The commands are run on this application, which has no file of its own.
    monkeypatch.setattr("ws_celery.cli.application.find_ini", lambda _: "application.ini")
    monkeypatch.setattr("ws_celery.cli.application.load_celery_app", lambda _: app.celery)
    monkeypatch.setenv("WS_CELERY_INI", "application.ini")
    monkeypatch.setenv("COLUMNS", "1000")  # nothing is cut
    group = main_group()
    for name, command in leaves(group):
        for arguments in PRINTS.get(name, ()):
            for options in ([], ["--json"]) if has_json(command) else ([],):
                words = [*name.split(), *arguments.format(**ids).split(" "), *options]
                words = [*filter(None, words), *shortly(command)]
                outcome = CliRunner().invoke(group, words)
                text = f"{outcome.output}{outcome.exception}"
                said.commands.setdefault(name, []).append((words, text))
    said.records = caplog.text
    return said


def deriver(run, info):
    return run


deriver.options = ("password", "headers")


def has_json(command):
    return any("--json" in parameter.opts for parameter in command.params)


def shortly(command):
    """Return options for a command that would wait a second for workers."""
    waits = any("--timeout" in parameter.opts for parameter in command.params)
    return ["--timeout", "0.3"] if waits else []


def fill(app, said, start_worker):
    """Let the application have a dead letter, results, messages and entries; returns their ids."""
    secrets = ("ada-plain", "named-s3cr3t", "iban-s3cr3t")
    held = {"queue": "held", "headers": {"Authorization": "header-s3cr3t"}}
    inspection.add_schedule_entry(
        app.registry,
        "added",
        {"task": "pay", "type": "integer", "schedule": "9000", "args": secrets},
    )
    with app.celery.connection_for_read() as connection:
        receiver = app.celery.events.Receiver(
            connection, handlers={"*": lambda event: said.events.append(json.dumps(event))}
        )
        ready = threading.Event()
        receiver.on_consume_ready = lambda *_, **__: ready.set()
        thread = threading.Thread(target=lambda: receiver.capture(wakeup=False))
        thread.start()
        assert ready.wait(SOON)
        start_worker(app)
        with transaction.manager:
            dead = pay.delay(app.request(), *secrets)
            done = pay.delay(app.request(), *secrets, result="well")
        pay_later.apply_async(secrets, task_id=f"held{OBEYED}", **held)
        waiting = pay_later.apply_async(secrets, countdown=900)
        wait_for(lambda: inspection.outbox_rows(app.registry))
        wait_for(lambda: done.state == "SUCCESS")
        wait_for(lambda: any("task-failed" in each for each in said.events))
        wait_for(lambda: sum("task-received" in each for each in said.events) == 3)
        receiver.should_stop = True
        thread.join(SOON)
    unknown = "00000000-0000-0000-0000-000000000000"
    queue = app.celery.conf.task_default_queue
    return {
        "dead": dead.id, "done": done.id, "waiting": waiting.id, "unknown": unknown, "queue": queue
    }  # fmt: skip


def test_every_command_is_walked_or_has_its_reason():
    names = {name for name, _ in leaves(main_group())}

    assert names == {*PRINTS, *SILENT}
    assert not {*PRINTS} & {*SILENT}


def test_nothing_that_prints_tells_a_secret_or_moves_a_terminal(said):
    secrets = {**SECRETS, **({"any argument": PLAIN} if said.masks_all else {})}
    printed = {
        "a log record": [said.records],
        "an event of Celery": said.events,
        "an event of Pyramid": said.notified,
        **{
            f"`ws-celery {' '.join(words)}`": [text]
            for runs in said.commands.values()
            for words, text in runs
        },
    }
    told = [
        f"{who} tells {kind}"
        for who, texts in printed.items()
        for kind, secret in secrets.items()
        if secret in "\n".join(texts) and not given(who, secret)
    ]

    assert told == []
    plain = {who: _COLOURS.sub("", "\n".join(texts)) for who, texts in printed.items()}
    obeyed = [
        who for who, text in plain.items() if who != "a log record" and printable(text) != text
    ]
    assert obeyed == []
    assert OBEYED not in said.records
    assert printable(OBEYED) in said.records
    assert "LookupError: \\u001b]" in plain["`ws-celery outbox list`"]
    assert printable(OBEYED) in plain["`ws-celery queues peek held`"]
    # And it was not for want of anything to tell.
    assert MASK in said.records
    assert f"postgresql://shop:{MASK}@db/shop" in said.records
    masking = {
        name for name, runs in said.commands.items() if any(MASK in text for _, text in runs)
    }
    assert masking >= {
        *("inspect", "outbox show", "queues peek", "report", "result", "results", "results show"),
        *("schedule show", "tasks running", "tasks show"),
    }
    assert any("task-failed" in each and MASK in each for each in said.events)
    assert any("task-sent" in each and MASK in each for each in said.events)


def given(command, secret):
    """Tell whether a command was given a secret by who has called it."""
    return secret in command


def test_nobody_tells_the_password_of_the_broker_or_arguments_of_the_file(
    site, capsys, monkeypatch
):
    path = site(
        '[celerybeat:nightly]\ntask = known\nargs = ["entry-s3cr3t"]\ntype = integer\n'
        'schedule = 5\n[celerybeat:broken]\nargs = ["entry-s3cr3t"\n',
        broker="memory://me:broker-s3cr3t@host//",
    )
    for command in ("check", "check --json", "report", "beat", "status --healthy --part broker"):
        with pytest.raises(SystemExit):
            main([*command.split(), "--ini", path])
        said = "".join(capsys.readouterr())

        assert said
        assert [secret for secret in SECRETS.values() if secret in said] == [], command


def test_what_nobody_has_handled_is_printed_as_python_does_but_for_its_secrets(site, tmp_path):
    code = 'raise LookupError("postgresql://shop:dsn-s3cr3t@db \\x1b]0;evil")'
    path = site("", code)
    ended = subprocess.run(
        [sys.executable, "-m", "ws_celery", "report", "--ini", path],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )

    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback (most recent call last):")
    assert f"LookupError: postgresql://shop:{MASK}@db \\u001b]0;evil\n" in ended.stderr
    assert "dsn-s3cr3t" not in ended.stderr


def test_introspection_tells_no_argument_of_an_entry(make_config):
    def declare(config):
        config.add_celery_task(pay_later)
        config.add_periodic_task("pay_later", {"schedule": "1h", "args": ["entry-s3cr3t"]})
        config.add_periodic_task("pay_later", "1h", "other", args=["entry-s3cr3t"])

    config = make_config(celery=SCHEDULE)
    declare(config)
    config.commit()
    found = repr(
        [dict(each["introspectable"]) for _, category in config.introspector.categorized()
         for each in category]
    )  # fmt: skip

    assert found.count(MASK) >= 3
    assert "entry-s3cr3t" not in found
    assert "header-s3cr3t" not in found
