"""Celery's commands and their aliases, as ``ws-celery`` runs them: each with a real worker."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ws_celery.cli.worker import flower
from ws_celery.exceptions import ConfigurationError

QUICK = ("--without-mingle", "--without-gossip", "--concurrency=1")
#: Seconds that a worker may take to answer: other tests run on this machine.
PATIENT = ("--timeout", "10")

SCRIPT = Path(sys.executable).with_name("ws-celery")


@pytest.fixture(scope="module")
def site(promised_site):
    return promised_site()


@pytest.fixture(scope="module")
def name(site):
    return f"test-{os.getpid()}@{site.ini.parent.name}"


@pytest.fixture(scope="module")
def worker(start_once, site, name):
    """A worker that all tests of this module ask."""
    running = start_once("worker", "--ini", str(site.ini), *QUICK, "-l", "info", "-n", name, "-E")
    running.says(" ready.")
    return running


@pytest.fixture
def answers(run, site, worker):
    """Run a command to its successful end; return what it printed."""

    def answers(*arguments, **env):
        ended = run(*arguments, "--ini", str(site.ini), **env)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    return answers


def test_call_and_result(answers, wait_for):
    task_id = answers("call", "note", "--args", '["called", "by hand"]').strip()

    wait_for(lambda: answers("result", task_id).strip() == "by hand", "the result")


def test_status_inspect_and_control_reach_the_worker(answers, name):
    asked = ("--destination", name, *PATIENT)

    assert f"{name}: OK" in answers("status", *asked)
    registered = json.loads(answers("inspect", "registered", "--json", *asked))
    assert {"note", "collide"} <= set(registered[name])
    assert "task events already enabled" in answers("control", "enable_events", *asked)


def test_report_list_and_graph_tell_of_the_application(answers, site):
    assert "task_default_queue" in answers("report")
    assert answers("graph", "workers", "nodes:2").startswith("digraph")


def test_upgrade_rewrites_old_names_of_settings(answers, tmp_path):
    module = tmp_path / "settings.py"
    module.write_text("CELERY_TIMEZONE = 'UTC'\n")

    answers("upgrade", "settings", str(module))
    assert module.read_text().startswith("timezone")


def test_events_are_dumped(start, site, answers, wait_for):
    dump = start("events", "--dump", "--ini", str(site.ini))

    def seen():
        answers("call", "note", "--args", '["event"]')
        return "task received" in dump.text.replace("-", " ")

    wait_for(seen, "the event of a task")


def test_purge_and_clean_drop_what_waits(run, promised_site):
    site = promised_site()
    for command in ("purge", "clean"):
        assert run("call", "note", "--args", '["x"]', "--ini", str(site.ini)).returncode == 0
        purged = run(command, "--force", "--ini", str(site.ini))
        assert "Threw away 1 message" in purged.stdout, purged.stderr


def test_run_is_the_worker(start, promised_site):
    running = start("run", "--ini", str(promised_site().ini), *QUICK, "-l", "info")

    running.says(" ready.")
    running.interrupt()
    running.ends()


# The INI file


@pytest.mark.parametrize(
    "arguments",
    [
        ["worker", "{ini}", *QUICK, "--loglevel=info"],
        ["worker", "{ini}#main", "unused=1", *QUICK, "--loglevel=info"],
        ["worker", "-A", "ws_celery.celery_app", "--ini", "{ini}", "--loglevel=debug"],
    ],
)
def test_a_worker_takes_the_ini_as_pyramids_scripts_do_or_as_options(
    start, promised_site, arguments
):
    ini = str(promised_site().ini)
    running = start(*(word.format(ini=ini) for word in arguments))

    running.says("ready.")


def test_a_beat_takes_the_older_spelling(start, promised_site):
    beat = start(
        "beat", "-A", "ws_celery.celery_app", "--ini", str(promised_site().ini), "--loglevel=debug"
    )

    beat.says("beat: Starting...")
    beat.says("Sending due task note")


def test_variables_of_the_ini_follow_its_name(run, promised_site):
    ini = promised_site().ini
    ini.write_text(ini.read_text().replace("use = call:promised:main", "use = %(application)s"))
    named = run("report", f"{ini}#main", "application=call:promised:main")

    assert named.returncode == 0, named.stderr
    assert "task_default_queue" in named.stdout


def test_the_development_ini_of_the_directory_is_used_and_said(run, promised_site, monkeypatch):
    monkeypatch.chdir(promised_site().ini.parent)
    ended = run("report")

    assert ended.returncode == 0, ended.stderr
    assert "Using ./development.ini" in ended.stderr
    assert "Using" not in ended.stdout


# Processes that start again


@pytest.fixture
def pid_file(tmp_path):
    """Where a worker writes its pid; it is killed at the end of the test."""
    path = tmp_path / "worker.pid"
    yield path
    for file in tmp_path.glob("*.pid"):
        process = psutil.Process(int(file.read_text()))
        for each in [*process.children(recursive=True), process]:
            each.kill()
            each.wait(10)


def said(log: Path, text: str) -> bool:
    return log.is_file() and text in log.read_text()


def test_a_worker_detaches(run, promised_site, tmp_path, pid_file, wait_for):
    log = tmp_path / "worker.log"
    where = ("--pidfile", str(pid_file), "--logfile", str(log))
    ended = run(
        "worker", "--detach", "--ini", str(promised_site().ini), *QUICK, "-l", "info", *where
    )

    assert ended.returncode == 0, ended.stderr
    wait_for(lambda: said(log, " ready."), "the worker")
    process = psutil.Process(int(pid_file.read_text()))
    assert "ws_celery" in process.cmdline()
    process.terminate()
    process.wait(30)
    assert not pid_file.exists()


def test_a_beat_detaches(run, promised_site, tmp_path, pid_file, wait_for):
    log = tmp_path / "beat.log"
    where = ("--pidfile", str(pid_file), "--logfile", str(log))
    ended = run("beat", "--detach", "--ini", str(promised_site().ini), "-l", "info", *where)

    assert ended.returncode == 0, ended.stderr
    wait_for(lambda: said(log, "Sending due task note"), "beat")


def test_multi_starts_and_stops_workers(run, promised_site, tmp_path, pid_file, wait_for):
    ini = str(promised_site().ini)
    nodes = ("1", f"--pidfile={tmp_path}/%n.pid", f"--logfile={tmp_path}/%n.log", "-l", "info")
    started = run("multi", "start", *nodes, *QUICK, "--ini", ini)
    log, pid = tmp_path / "celery1.log", tmp_path / "celery1.pid"

    assert started.returncode == 0, started.stdout + started.stderr
    wait_for(lambda: said(log, " ready."), "the worker")
    stopped = run("multi", "stopwait", *nodes, "--ini", ini)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    wait_for(lambda: not pid.exists(), "its end")


def test_a_worker_starts_again_at_a_hup(start, promised_site, wait_for):
    running = start(
        "worker", "--ini", str(promised_site().ini), *QUICK, "-l", "info", program=(str(SCRIPT),)
    )
    running.says(" ready.")
    os.kill(running.process.pid, signal.SIGHUP)

    wait_for(lambda: running.text.count(" ready.") == 2, "the second start")
    assert running.process.poll() is None


# The shell

SESSION = """\
note.delay("shell", "sent")
commit()
note.delay("shell", "dropped")
print("tasks", "note" in dir(), app.main, request.registry is registry)
"""


def test_a_shell_has_tasks_a_request_and_a_transaction_that_is_aborted_at_the_end(
    site, answers, wait_for
):
    shell = subprocess.run(
        [SCRIPT, "shell", "--python", "--ini", str(site.ini)],
        input=SESSION.replace('"shell"', f'"{site.ini.parent}"'),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent / "apps")},
    )

    assert "tasks True promised True" in shell.stdout
    assert "A transaction is open" in shell.stderr
    assert "Aborted: 1 dispatch is dropped" in shell.stderr

    def notes():
        task_id = answers("call", "notes", "--args", json.dumps([str(site.ini.parent)])).strip()
        return "sent" in answers("result", task_id)

    wait_for(notes, "the task that was sent")


def test_a_shell_that_is_not_installed_is_named(run, site):
    ended = run("shell", "--bpython", "--ini", str(site.ini))

    assert ended.returncode == 2
    assert "bpython is not installed" in ended.stderr


def test_pshell_gets_the_same_by_one_line_of_the_ini(site, tmp_path):
    ini = tmp_path / "pshell.ini"
    ini.write_text(f"{site.ini.read_text()}\n[pshell]\nsetup = ws_celery.shell.setup\n")
    shell = subprocess.run(
        [SCRIPT.with_name("pshell"), "-p", "python", str(ini)],
        input='note.delay("pshell")\nprint("app", celery_app.main)\n',
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent / "apps")},
    )

    assert "app promised" in shell.stdout
    assert "1 dispatch is dropped" in shell.stderr


# Completion and Flower


def complete(*words: str) -> list[str]:
    """What bash is told when TAB is pressed after the last word."""
    env = {
        "_WS_CELERY_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["ws-celery", *words]),
        "COMP_CWORD": str(len(words)),
    }
    ended = subprocess.run(
        [SCRIPT], capture_output=True, text=True, check=True, timeout=60, env=os.environ | env
    )
    return [line.partition(",")[2] for line in ended.stdout.splitlines()]


def test_commands_options_and_their_values_are_completed():
    assert complete("work") == ["worker", "workers"]
    assert complete("outbox", "re") == ["retry"]
    assert "--loglevel" in complete("worker", "--ini", "site.ini", "--lo")
    assert complete("worker", "--in") == ["--include", "--ini", "--ini-var"]
    assert complete("worker", "--pool", "thr") == ["threads"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_how_to_complete(shell):
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("bash, whose version click asks for, is not installed")
    ended = subprocess.run(
        [SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=os.environ | {"_WS_CELERY_COMPLETE": f"{shell}_source"},
    )

    assert "_WS_CELERY_COMPLETE" in ended.stdout


def test_flower_runs(start, site, free_port):
    site = ("--ini", str(site.ini))
    running = start("flower", *site, f"--port={free_port}", "--address=127.0.0.1")

    running.says(f"Visit me at http://127.0.0.1:{free_port}")


def test_without_flower_a_sentence_tells_what_to_install():
    with pytest.raises(ConfigurationError, match="pip install flower"):
        flower.main(["--port=5555"], standalone_mode=False)
