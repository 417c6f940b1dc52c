"""What documents of other projects tell people to type, run for real with ``ws-celery``.

Each part follows one document: a site builder's, a catalogue's, a tutorial's with containers, a
messaging framework's. Their commands are spelt as theirs, but for the program's name.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from celery.result import AsyncResult

APPS = Path(__file__).parent / "apps"
QUICK = ("--without-mingle", "--without-gossip", "--concurrency=1")
APP = ("-A", "ws_celery.celery_app")


@pytest.fixture
def site(promised_site):
    return promised_site(celery="    seeded")


@pytest.fixture
def call(run, site):
    """Call a task by its name; returns its id."""

    def call(*arguments):
        ended = run("call", *arguments, "--ini", str(site.ini))
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    return call


def typed(ini, lines, **env):
    """Type lines into ``ws-celery shell``; returns what it shows."""
    shell = subprocess.run(
        [sys.executable, "-m", "ws_celery", "shell", "--python", "--ini", str(ini)],
        input=lines,
        capture_output=True,
        text=True,
        check=True,
        timeout=90,
        env=os.environ | {"PYTHONPATH": str(APPS)} | env,
    )
    assert "Traceback" not in shell.stderr, shell.stderr
    return shell.stdout


# A site builder: worker and beat beside the site, a task on the schedule, looking into the queue


def test_a_scheduled_task_runs_by_worker_and_beat_as_the_site_builder_starts_them(start, site):
    schedule = "\n[celerybeat:update_rates]\ntask = update_rates\ntype = timedelta\n"
    site.ini.write_text(f'{site.ini.read_text()}{schedule}schedule = {{"seconds": 1}}\n')
    worker = start("worker", *APP, "--ini", str(site.ini), "--loglevel=debug", *QUICK)
    worker.says(" ready.")
    beat = start("beat", *APP, "--ini", str(site.ini), "--loglevel=debug")

    beat.says("Sending due task update_rates (update_rates)")
    worker.says("Fetching the rates for promised")
    worker.says("Task update_rates")


def test_what_is_scheduled_and_active_is_shown_and_an_unwanted_queue_is_dropped(
    start, run, site, call, wait_for
):
    name = f"inspected-{os.getpid()}@{site.ini.parent.name}"
    worker = start("worker", *APP, "--ini", str(site.ini), *QUICK, "-l", "info", "-n", name)
    worker.says(" ready.")
    task_id = call("update_rates", "--countdown", "3600")

    def inspect(what):
        options = ("--json", "--timeout", "10", "--destination", name, "--ini", str(site.ini))
        return json.loads(run("inspect", what, *options).stdout or "{}").get(name, [])

    (later,) = wait_for(lambda: inspect("scheduled"), "the task that waits for its time")
    assert later["request"]["id"] == task_id
    assert inspect("active") == []

    worker.process.terminate()
    worker.ends()
    again = start("worker", *APP, "--ini", str(site.ini), "--purge", *QUICK, "-l", "info")
    again.says("Erased 1 message from the queue.")
    again.says(" ready.")


# A catalogue: tasks of extensions, called by name with an id of the caller's


@pytest.fixture
def extension(tmp_path):
    """Install an extension that names the modules of its tasks by an entry point."""
    (tmp_path / "ext_echo.py").write_text(
        "from ws_celery import RequestAwareTask, celery_app\n\n"
        "def task_imports():\n    return ['ext_echo']\n\n"
        "@celery_app.task(name='ext.echo', base=RequestAwareTask)\n"
        "def echo(request, message):\n    print(message)\n"
    )
    info = tmp_path / "ext_echo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ext-echo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ws_celery.tasks]\ntasks = ext_echo:task_imports\n")
    return os.pathsep.join([str(APPS), str(tmp_path)])


def test_an_extensions_task_is_registered_and_called_by_name_with_an_id_of_ones_own(
    start, site, extension
):
    worker = start("run", "--ini", str(site.ini), *QUICK, "-l", "info", PYTHONPATH=extension)
    worker.says(". ext.echo")
    worker.says(" ready.")

    shown = typed(
        site.ini,
        "import uuid\n"
        "own = str(uuid.uuid4())\n"
        "result = app.send_task('ext.echo', args=['Hello' + ' world'], task_id=own)\n"
        "commit()\n"
        "result.get(timeout=60)\n"
        "print('own id:', result.id == own)\n",
        PYTHONPATH=extension,
    )

    assert "own id: True" in shown
    worker.says("Hello world")


def test_a_retry_has_a_countdown_and_a_limit(start, run, site, call, wait_for):
    worker = start("run", "--ini", str(site.ini), *QUICK, "-l", "info")
    task_id = call("shop.echo", "--args", '["at last", 2]')

    worker.says("at last")
    worker.says(f"Task shop.echo[{task_id}] retry: Retry in 0.1s: OSError('not yet')")
    result = ("result", task_id, "--ini", str(site.ini))
    wait_for(lambda: run(*result).stdout.strip() == "2", "the result of the third run")


def test_what_waits_is_viewed_and_cleaned_away(run, site, call):
    ids = [call("shop.echo", "--args", json.dumps([message])) for message in ("one", "two")]

    viewed = run("view", "--json", "--ini", str(site.ini))
    assert [each["id"] for each in json.loads(viewed.stdout)["messages"]] == ids
    cleaned = run("clean", "--force", "--ini", str(site.ini))
    assert "Threw away 2 messages" in cleaned.stdout, cleaned.stderr


# A tutorial with containers: a call from a shell, progress, results in the database


@pytest.fixture
def results_in_a_database(site, tmp_path):
    results = f"db+sqlite:///{tmp_path}/results.sqlite"
    text = re.sub(r"(?m)^result_backend = .*$", f"result_backend = {results}", site.ini.read_text())
    site.ini.write_text(text)
    return site


def test_a_task_is_called_from_a_shell_and_its_result_is_read_from_the_database(
    results_in_a_database, start
):
    ini = results_in_a_database.ini
    start("worker", "--ini", str(ini), *QUICK, "-l", "info").says(" ready.")

    shown = typed(
        ini,
        "from seeded import add\n"
        "result = add.delay(40, 56565)\n"
        "commit()\n"
        "print('sum:', result.get(timeout=60), result.ready(), result.state)\n",
    )
    assert "sum: 56605 True SUCCESS" in shown


def test_the_progress_of_a_task_is_read_while_it_runs(
    results_in_a_database, start, call, celery_app_of, tmp_path, wait_for
):
    seen = tmp_path / "seen"
    ini = results_in_a_database.ini
    start("worker", "--ini", str(ini), *QUICK, "-l", "info").says(" ready.")
    task_id = call("progress", "--args", json.dumps([4, 1, str(seen)]))

    with celery_app_of(results_in_a_database) as app:
        result = AsyncResult(task_id, app=app)
        wait_for(lambda: result.state == "PROGRESS" and result.info["percent"] == 25, "a quarter")
        seen.touch()
        assert result.get(timeout=60) == 4
        assert result.state == "SUCCESS"
        app.backend.ResultSession().bind.dispose()


# A messaging framework: results as they are asked for, and everything in one process


ASKED = """
result = {task}.delay({arguments})
commit()
while not result.ready(): time.sleep(0.05)

if result.successful(): print("result:", result.result)
else: print("failed:", isinstance(result.result, Exception), result.state)

"""


def asked(task, arguments):
    return "import time\n" + ASKED.format(task=task, arguments=arguments)


def test_a_result_is_asked_whether_it_is_ready_and_successful(start, site):
    start("worker", "--ini", str(site.ini), *QUICK, "-l", "info").says(" ready.")

    assert "result: 4" in typed(site.ini, asked("add", "2, 2"))
    assert "failed: True FAILURE" in typed(site.ini, asked("pay", "1"))


def test_a_look_into_the_queue_shows_what_was_called_and_takes_nothing(run, site, call):
    queue = re.search(r"(?m)^task_default_queue = (.*)$", site.ini.read_text())[1]
    task_id = call("add", "--args", "[2, 2]")

    for _ in range(2):
        shown = run("queues", "peek", queue, "--ini", str(site.ini))
        assert shown.returncode == 0, shown.stderr
        assert "add" in shown.stdout
        assert task_id[:8] in shown.stdout


def test_eager_tasks_run_in_place_without_a_broker(promised_site):
    site = promised_site("redis://127.0.0.1:1/0", "    seeded\ntask_always_eager = true")

    assert "result: 4" in typed(site.ini, asked("add", "2, 2"))
    assert "failed: True FAILURE" in typed(site.ini, asked("pay", "1"))


# A toolkit: who holds a lock, for how long still, and freeing it


def test_a_lock_is_listed_with_its_time_left_and_freed_by_hand(
    start, run, site, celery_app_of, tmp_path
):
    worker = start("worker", "--ini", str(site.ini), *QUICK, "-l", "info")
    key, seen = "UpdateIndexTask", tmp_path / "seen"
    with celery_app_of(site) as app:
        sent = app.send_task(key, kwargs={"seen": str(seen)})
    worker.says("The index is being updated")

    (holder,) = [
        each
        for each in json.loads(run("locks", "list", "--json", "--ini", str(site.ini)).stdout)
        if each["id"] == sent.id
    ]
    assert holder["key"] == key
    assert holder["time_left"] > 0
    freed = run("locks", "free", key, "--yes", "--ini", str(site.ini))
    assert freed.returncode == 0, freed.stderr
    seen.touch()
