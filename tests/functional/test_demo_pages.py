"""The demonstration application, as HTTP shows it: pages, JSON, bad input; and in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
import uuid
from datetime import datetime, timedelta, timezone
from pathlib import Path

import plaster
import pytest
from pyramid.config import global_registries
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from webtest import TestApp

import ws_celery.demo
from ws_celery import get_celery_app

ROOT = Path(__file__).parents[2]
INI = Path(ws_celery.demo.__file__).with_name("demo.ini")
JSON = {"Accept": "application/json"}
HTML = {"Accept": "text/html"}
ORDER = {"email": "ada@example.com", "item": "A teapot"}
NASTY = "<script>alert('$title & \"co\"')</script>"


@pytest.fixture
def load_demo(tmp_path, monkeypatch):
    """Load the demo from its own INI file, with changes."""
    for name in ("BROKER_URL", "RESULT_BACKEND", "CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    loaded = []

    def load(path=INI, **changes):
        text = path.read_text()
        for key, value in changes.items():
            text, count = re.subn(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
            assert count == 1, key
        ini = tmp_path / "demo.ini"
        ini.write_text(text)
        wsgi_app = plaster.get_loader(str(ini), protocols=["wsgi"]).get_wsgi_app()
        loaded.append(wsgi_app.registry)
        return TestApp(wsgi_app)

    yield load
    for registry in loaded:
        global_registries.remove(registry)
        get_celery_app(registry).close()
        registry["engine"].dispose()


@pytest.fixture
def web(load_demo, redis_url):
    """The demo on a real broker, with a queue of its own; no worker runs."""
    queue = f"test-{uuid.uuid4().hex}"
    web = load_demo(
        broker_url=f"{redis_url}\ntask_default_queue = {queue}", result_backend=redis_url
    )
    yield web
    with get_celery_app(web.app.registry).connection_for_write() as connection:
        connection.default_channel.queue_delete(queue)


@pytest.fixture
def web_without_broker(load_demo):
    """The demo on the embedded broker of its INI file, which nobody has started."""
    return load_demo()


def celery_of(web):
    return get_celery_app(web.app.registry)


def sent(web):
    """Take the messages off the queue; return the ids of their tasks."""
    app = celery_of(web)
    with app.connection_for_read() as connection:
        queue = app.amqp.queues[app.conf.task_default_queue](connection.default_channel)
        queue.declare()
        messages = iter(lambda: queue.get(no_ack=True), None)
        return [message.headers["id"] for message in messages]


def run_task(web, name, *args, task_id="a-task-id"):
    """Run a task as a worker would, in this process."""
    task = celery_of(web).tasks[f"ws_celery.demo.tasks.{name}"]
    return task.apply(args, task_id=task_id, throw=True).get()


def test_both_ini_files_are_the_same():
    assert (ROOT / "development.ini").read_bytes() == INI.read_bytes()


def test_an_order_is_stored_and_its_task_sent(web):
    answer = web.post("/orders", ORDER, headers=JSON, status=303)
    assert urllib.parse.urlsplit(answer.location).path == "/orders/1"

    order = web.get("/orders/1", headers=JSON).json
    assert {key: order[key] for key in ("id", "email", "item", "status", "receipt")} == {
        "id": 1,
        **ORDER,
        "status": "waiting",
        "receipt": None,
    }
    assert order["web_pid"] == os.getpid()
    assert sent(web) == [order["task_id"]]


def test_an_order_may_be_a_json_object(web):
    web.post_json("/orders", ORDER, headers=JSON, status=303)

    assert web.get("/orders/1", headers=JSON).json["item"] == "A teapot"


def test_the_receipt_has_a_link_that_opens(web):
    web.post("/orders", ORDER, status=303)
    waiting = web.get("/orders/1", headers=HTML)
    assert waiting.headers["Refresh"] == "1"

    run_task(web, "write_receipt", 1)

    order = web.get("/orders/1", headers=JSON).json
    assert order["status"] == "done"
    assert order["receipt"]["pid"] == os.getpid()
    assert order["receipt"]["url"] == "http://localhost/orders/1/receipt"
    done = web.get("/orders/1", headers=HTML)
    assert "Refresh" not in done.headers
    page = done.click("Open the receipt")
    assert "Receipt 1" in page
    assert "A teapot" in page
    assert web.get("/orders/1/receipt", headers=JSON).json == order["receipt"]


def test_a_receipt_is_written_once_though_its_message_comes_twice(web):
    web.post("/orders", ORDER, status=303)
    run_task(web, "write_receipt", 1, task_id="the-same")
    receipt = web.get("/orders/1", headers=JSON).json["receipt"]

    run_task(web, "write_receipt", 1, task_id="the-same")

    assert web.get("/orders/1", headers=JSON).json["receipt"] == receipt


def test_there_is_no_receipt_before_a_worker_has_written_it(web):
    web.post("/orders", ORDER, status=303)

    answer = web.get("/orders/1/receipt", headers=JSON, status=404)

    assert answer.json == {"error": "Order 1 has no receipt yet: a worker writes it."}


@pytest.mark.parametrize("post", ["post", "post_json"])
def test_the_task_of_an_order_whose_request_fails_is_never_sent(web, post):
    answer = getattr(web, post)("/orders", {**ORDER, "fail": "1"}, headers=JSON, status=500)

    assert "rolled back" in answer.json["error"]
    assert sent(web) == []
    web.get("/orders/1", headers=JSON, status=404)
    home = web.get("/", headers=JSON).json
    assert home["orders"] == []
    (failed,) = home["failed_orders"]
    assert failed["task_id"] == answer.json["task_id"]
    assert failed["runs"] == 0
    assert failed["web_pid"] == os.getpid()


def test_the_failing_order_has_a_page_that_can_be_read(web):
    page = web.post("/orders", {**ORDER, "fail": "1"}, headers=HTML, status=500)

    assert "This request failed" in page
    assert web.get("/", headers=JSON).json["failed_orders"][0]["task_id"] in page


def test_the_front_page_lists_what_happened_newest_first(web):
    for item in ("first", "second"):
        web.post("/orders", {**ORDER, "item": item}, status=303)
    run_task(web, "write_receipt", 1, task_id="receipt-1")
    run_task(web, "write_receipt", 2, task_id="receipt-2")
    run_task(web, "tick", task_id="tick-1")

    home = web.get("/", headers=JSON).json

    assert home["web_pid"] == os.getpid()
    assert [order["item"] for order in home["orders"]] == ["second", "first"]
    assert [run["id"] for run in home["tasks_run"]] == ["receipt-2", "receipt-1"]
    assert {run["task"] for run in home["tasks_run"]} == {"ws_celery.demo.tasks.write_receipt"}
    assert [tick["id"] for tick in home["ticks"]] == ["tick-1"]
    for run in (*home["tasks_run"], *home["ticks"]):
        assert run["pid"] == os.getpid()
        written = datetime.fromisoformat(run["time"])
        assert abs(datetime.now(timezone.utc) - written) < timedelta(minutes=1)


@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")  # Celery's
def test_a_report_tells_its_progress(web, monkeypatch):
    monkeypatch.setattr("ws_celery.demo.tasks.REPORT_PAUSE", 0)
    answer = web.post("/reports", headers=JSON, status=303)
    path = urllib.parse.urlsplit(answer.location).path
    assert path == "/reports/1"
    report = web.get(path, headers=JSON).json
    assert (report["state"], report["percent"], report["pid"]) == ("PENDING", 0, None)
    assert sent(web) == [report["task_id"]]

    backend = celery_of(web).backend
    backend.store_result(report["task_id"], {"percent": 40, "pid": 7}, "PROGRESS")
    assert web.get(path, headers=JSON).json == {
        **report,
        "state": "PROGRESS",
        "percent": 40,
        "pid": 7,
    }
    page = web.get(path, headers=HTML)
    assert 'value="40"' in page
    assert page.headers["Refresh"] == "1"

    backend.store_result(
        report["task_id"], run_task(web, "write_report", task_id=report["task_id"]), "SUCCESS"
    )
    report = web.get(path, headers=JSON).json
    assert (report["state"], report["percent"], report["pid"]) == ("SUCCESS", 100, os.getpid())
    assert "Refresh" not in web.get(path, headers=HTML).headers
    assert web.get("/", headers=JSON).json["reports"][0]["url"] == path


def test_a_tick_forgets_all_runs_but_the_newest(web, monkeypatch):
    from ws_celery.demo.models import TaskRun

    monkeypatch.setattr("ws_celery.demo.tasks.RUNS_KEPT", 3)
    web.post("/orders", ORDER, status=303)
    for number in range(5):
        run_task(web, "write_receipt", 1, task_id=f"receipt-{number}")

    for number in range(5):
        run_task(web, "tick", task_id=f"tick-{number}")

    home = web.get("/", headers=JSON).json
    assert [run["id"] for run in home["ticks"]] == ["tick-4", "tick-3", "tick-2"]
    assert [run["id"] for run in home["tasks_run"]] == ["receipt-4", "receipt-3", "receipt-2"]
    with Session(web.app.registry["engine"]) as session:
        assert session.scalar(select(func.count(TaskRun.id))) == 6


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"email": ""}, "The e-mail address is missing: write it as text."),
        ({"email": "nobody"}, "This is not an e-mail address: it has to look like ada@"),
        ({"email": "a b@example.com"}, "This is not an e-mail address"),
        ({"email": "a@" + "x" * 300}, "The e-mail address is too long: 254 characters are"),
        ({"item": "  "}, "The item is missing: write it as text."),
        ({"item": "x" * 101}, "The item is too long: 100 characters are the most."),
        ({"item": "two\nlines"}, "The item has characters that cannot be shown"),
    ],
)
@pytest.mark.parametrize("post", ["post", "post_json"])
def test_bad_input_is_refused_with_a_sentence(web, post, changes, sentence):
    answer = getattr(web, post)("/orders", {**ORDER, **changes}, headers=JSON, status=400)
    assert answer.json["error"].startswith(sentence)
    page = getattr(web, post)("/orders", {**ORDER, **changes}, headers=HTML, status=400)
    assert sentence in page

    assert sent(web) == []
    assert web.get("/", headers=JSON).json["orders"] == []


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b'["email", "item"]', "application/json"),
        (b'{"email": "\xff"}', "application/json"),
        (b"[" * 5_000, "application/json"),
        (b"{}", "application/json; charset=unheard-of"),
        (b'{"email": 1, "item": null}', "application/json"),
        (b'{"email": "a@b", "item": "\\ud800"}', "application/json"),
        (b"email=a@b", "text/plain"),
        (b"", ""),
    ],
)
def test_what_is_neither_a_form_nor_json_is_refused(web, body, content_type):
    answer = web.post("/orders", body, headers={**JSON, "Content-Type": content_type}, status=400)

    assert answer.json["error"].endswith(".")


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("/orders/1", "There is no order 1."),
        ("/orders/0/receipt", "There is no order 0."),
        ("/orders/999999999999999", "There is no order 999999999999999."),
        ("/reports/1", "There is no report 1."),
        ("/orders/99999999999999999999", "There is no page at this address."),
        ("/orders/one", "There is no page at this address."),
        ("/nothing here", "There is no page at this address."),
    ],
)
def test_what_does_not_exist_is_not_found(web, path, sentence):
    assert web.get(path, headers=JSON, status=404).json == {"error": sentence}
    assert sentence in web.get(path, headers=HTML, status=404)


def test_what_a_user_typed_is_escaped(web):
    web.post("/orders", {"email": "<b>@example.com", "item": NASTY}, status=303)
    run_task(web, "write_receipt", 1)

    for path in ("/orders/1", "/orders/1/receipt"):
        page = web.get(path, headers=HTML)
        assert "<script>alert" not in page
        assert "&lt;script&gt;alert(&#x27;$title &amp; &quot;co&quot;&#x27;)" in page.text
        assert "&lt;b&gt;@example.com" in page.text
    assert web.get("/", headers=JSON).json["orders"][0]["item"] == NASTY


def test_whoever_says_nothing_about_formats_gets_a_page(web):
    page = web.get("/")

    assert page.content_type == "text/html"
    for name in ("demo.css", "demo.js", "icon.svg"):
        assert f"/static/{name}" in page
        web.get(f"/static/{name}", status=200)


@pytest.mark.parametrize("path", ["/orders", "/reports"])
def test_the_addresses_of_the_forms_lead_home(web, path):
    assert urllib.parse.urlsplit(web.get(path, status=303).location).path == "/"


def test_the_ini_for_tests_needs_no_server(load_demo):
    web = load_demo(ROOT / "test.ini")

    order = web.post("/orders", ORDER, headers=JSON).follow(headers=JSON).json

    assert order["status"] == "waiting"


def test_an_order_is_taken_though_the_broker_is_down(web_without_broker):
    web = web_without_broker

    web.post("/orders", ORDER, headers=JSON, status=303)

    assert web.get("/orders/1", headers=JSON).json["status"] == "waiting"


def test_a_report_says_that_the_result_backend_is_down(web_without_broker):
    web = web_without_broker
    web.post("/reports", headers=JSON, status=303)

    answer = web.get("/reports/1", headers=JSON, status=503)

    assert answer.json == {"error": "The result backend does not answer."}
    assert answer.json["error"] in web.get("/reports/1", headers=HTML, status=503)


WRITER = """
import sys, plaster, webtest
web = webtest.TestApp(plaster.get_loader(sys.argv[1], protocols=["wsgi"]).get_wsgi_app())
for number in range(10):
    web.post("/orders", {"email": "a@b", "item": str(number), "fail": "1"}, status=500)
    web.get("/", headers={"Accept": "application/json"})
"""


def test_many_processes_start_and_write_at_the_same_moment(tmp_path):
    ini = tmp_path / "demo.ini"
    ini.write_bytes(INI.read_bytes())
    command = [sys.executable, "-W", "ignore", "-c", WRITER, str(ini)]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]

    for writer in writers:
        _, errors = writer.communicate(timeout=100)
        assert (writer.returncode, errors) == (0, "")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_orders_receipts_and_ticks(start, free_port, tmp_path, wait_for):
    demo = start("demo", "--port", str(free_port), "--data", str(tmp_path / "data"))
    demo.says("http://127.0.0.1")
    address = f"http://127.0.0.1:{free_port}"
    wait_for(lambda: answers(address), "the web server answering")
    ask(f"{address}/orders", email="ada@example.com", item=NASTY)
    wait_for(lambda: ask(address)["orders"][0]["receipt"] and ask(address)["ticks"], "the work")

    page = browse(address, tmp_path / "browser")

    assert f'href="{address}/orders/1/receipt"' in page
    assert "&lt;script&gt;alert(" in page
    assert re.search(r'class="pid beat">beat \d+<', page)
    assert re.search(r'class="pid worker">worker \d+<', page)
    assert re.search(r'id="trouble"[^>]* hidden', page)


def ask(url, **form):
    request = urllib.request.Request(  # noqa: S310 - our own server
        url, urllib.parse.urlencode(form).encode() or None, JSON
    )
    with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310
        return json.load(response)


def answers(url):
    try:
        return ask(url)
    except OSError:
        return False


def browse(url, profile):
    """Return the page as it is after its script has run for a while."""
    options = (f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--dump-dom")
    return subprocess.run(
        [CHROMIUM, *QUIET, *options, url], capture_output=True, text=True, check=True, timeout=60
    ).stdout
