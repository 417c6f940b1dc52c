"""The broker and the database of a run: servers of its own, since they are killed and emptied."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import redis
import sqlalchemy as sa
from tests.proxy import Proxy
from tests.services import postgres_cluster

from ws_celery.cli import child
from ws_celery.embedded import find_server

__all__ = ("Broker", "Postgres", "Sqlite", "owned")

#: Seconds until a server must answer.
_STARTUP = 30


class Broker:
    """A Redis that keeps nothing on disk: what it holds is lost when it is killed.

    :param folder: for what it keeps after all, while it is restarted.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._kept = folder / "kept.rdb"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self._command = [
            *(find_server() or "redis-server", "--bind", "127.0.0.1", "--port", str(port)),
            *("--save", "", "--appendonly", "no", "--loglevel", "warning"),
            *("--dir", str(folder), "--dbfilename", self._kept.name),
        ]
        self._client = redis.Redis(port=port)
        self._process: subprocess.Popen[bytes] | None = None
        self.proxy = Proxy(lambda: socket.create_connection(("127.0.0.1", port)))
        self.url = f"redis://127.0.0.1:{self.proxy.port}/0"

    def start(self) -> None:
        """Start it, empty."""
        self._process = subprocess.Popen(owned(self._command), stdout=subprocess.DEVNULL)
        _wait(self._client.ping, redis.ConnectionError)

    def kill(self) -> None:
        """Kill it, and with it all that it holds."""
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """Stop it and start it again with all that it holds."""
        self._client.shutdown(save=True)
        self._process.wait()
        self.start()
        self._kept.unlink()

    def empty(self) -> None:
        """Delete all that it holds."""
        self._client.flushall()

    def holds(self, queue: str) -> int:
        """Return how many messages wait in a queue, or are in the hands of workers."""
        return int(self._client.llen(queue)) + int(self._client.hlen("unacked"))

    def deliver_again(self, queue: str) -> int:
        """Put all messages of a queue there once more; return how many there were."""
        messages = self._client.lrange(queue, 0, -1)
        self._client.lpush(queue, *messages)
        return len(messages)


class Postgres:
    """A PostgreSQL of the run's own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        folder.parent.chmod(0o755)  # its server may run as another user
        self._command, url, self._options = postgres_cluster(folder)
        self._process: subprocess.Popen[bytes] | None = None
        path = f"{url.query['host']}/.s.PGSQL.5432"
        self.proxy = Proxy(lambda: _unix_connection(path))
        #: For the application, through the proxy.
        self.url = (
            f"postgresql+psycopg://postgres@127.0.0.1:{self.proxy.port}/postgres"
            "?sslmode=disable&gssencmode=disable&connect_timeout=5"
        )
        self.engine = sa.create_engine(url, pool_pre_ping=True, isolation_level="AUTOCOMMIT")

    def start(self) -> None:
        """Start it, or start it again with the data it has."""
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **self._options
        )
        _wait(lambda: self._execute("SELECT 1"), sa.exc.OperationalError)

    def crash(self) -> None:
        """Stop it as a crash does: without a word to its clients, to be recovered at its start."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(30)

    def disconnect_all(self) -> None:
        """Terminate all connections but this one."""
        self._execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )

    def _execute(self, statement: str) -> bool:
        with self.engine.connect() as connection:
            connection.execute(sa.text(statement))
        return True

    def stop(self) -> None:
        """Stop it for good."""
        self.engine.dispose()
        self._process.send_signal(signal.SIGINT)
        self._process.wait(30)


class Sqlite:
    """A file; it has no server that could fail."""

    proxy = None

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.url = f"sqlite:///{folder}/chaos.sqlite?timeout=20"
        self.engine = sa.create_engine(self.url)

    def start(self) -> None:
        """Let readers and the writer not wait for each other."""
        with self.engine.connect() as connection:
            connection.execute(sa.text("PRAGMA journal_mode=WAL"))

    def stop(self) -> None:
        """Close it."""
        self.engine.dispose()


def _unix_connection(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def owned(command: Sequence[Any]) -> list[Any]:
    """Return the command that runs another one, and does not outlive this process."""
    return [sys.executable, child.__file__, str(os.getpid()), *command]


def _wait(answers: Callable[[], Any], not_yet: type[Exception]) -> None:
    deadline = time.monotonic() + _STARTUP
    while True:
        try:
            answers()
        except not_yet:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return
