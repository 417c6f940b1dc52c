"""The application that README shows does what README says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from typing import Any

import pytest
from tests.waiting import SOON, wait_for


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def site(shown_site, free_port, tmp_path):
    """Address of the application of README, run by the command of README."""
    ini = shown_site({"listen = 127.0.0.1:6543": f"listen = 127.0.0.1:{free_port}"})
    environ = {name: value for name, value in os.environ.items() if "CELERY_" not in name}
    output = tmp_path / "output"
    with output.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "ws_celery", "dev", "--ini", ini.name],
            cwd=tmp_path,
            env={**environ, "PYTHONPATH": "."},
            stdout=stream,
            stderr=stream,
        )
    try:
        wait_for(lambda: process.poll() is not None or "Ctrl-C stops" in output.read_text())
        assert process.poll() is None, output.read_text()
        yield f"http://127.0.0.1:{free_port}"
    finally:
        process.terminate()
        assert process.wait(SOON) == 0


def fetch(url: str, data: bytes | None = None) -> Any:
    with urllib.request.urlopen(url, data, timeout=SOON) as response:  # noqa: S310 - our own server
        return json.load(response)


def test_the_application_of_readme_stores_and_a_worker_runs_its_task(site):
    delivery = fetch(f"{site}/deliveries", b"address=1+High+Street")

    url = f"{site}/reviews/{delivery['id']}"
    review = wait_for(lambda: (review := fetch(url))["review_url"] and review)
    assert review == {"address": "1 High Street", "review_url": url}


def test_the_task_of_readme_runs_in_a_transaction_that_commits(site_request):
    from myapp.models import Delivery
    from myapp.tasks import send_review

    send_review.apply((1,)).get()

    with site_request.tm:
        delivery = site_request.dbsession.get(Delivery, 1)
        assert delivery.review_url == "http://localhost/reviews/1"


def test_the_view_of_readme_sends_when_its_transaction_commits(site_request, sent):
    from myapp.views import deliver

    site_request.POST["address"] = "1 High Street"
    with site_request.tm:
        deliver(site_request)
        assert sent() == []

    assert sent() == ["myapp.tasks.send_review"]


def test_the_view_of_readme_sends_nothing_if_its_transaction_aborts(site_request, sent):
    from myapp.views import deliver

    site_request.POST["address"] = "1 High Street"
    site_request.tm.begin()
    deliver(site_request)
    site_request.tm.abort()

    assert sent() == []
