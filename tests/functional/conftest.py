"""Real programs in real processes: sites to run, and processes that are awaited and stopped."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.waiting import wait_for

APPS = Path(__file__).parent / "apps"
#: Their tests are theirs: a test of ours runs them.
collect_ignore = ["apps"]
WS_CELERY = (sys.executable, "-m", "ws_celery")


@dataclass
class Running:
    """A program that a test has started, and all that it prints."""

    process: subprocess.Popen[str]
    site: Any = None
    output: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self.process.stdout as lines:
            self.output.extend(lines)

    @property
    def text(self) -> str:
        return "".join(self.output)

    def says(self, text: str, timeout: float = 60.0) -> None:
        """Wait until it has printed ``text``; fail if it ends without."""

        def said() -> bool:
            ended = not self._reader.is_alive()  # asked first: all of its output is there then
            if ended and text not in self.text:
                pytest.fail(f"it ended without saying {text!r}:\n{self.text}")
            return text in self.text

        wait_for(said, f"the output {text!r}", timeout)

    def family(self) -> list[psutil.Process]:
        """Return the process and everything below it."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def interrupt(self) -> None:
        """Do as Ctrl-C in its terminal does: SIGINT to the whole foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def ends(self, timeout: float = 60.0) -> int:
        code = self.process.wait(timeout)
        self._reader.join(5)  # a child that survives may hold the pipe
        return code


@dataclass
class Site:
    """An application with its INI file, and HTTP requests against it."""

    ini: Path
    port: int = 0

    def http(self, method: str, path: str, **form: str) -> tuple[int, Any]:
        """Return status and JSON of a request, redirects followed."""
        data = urllib.parse.urlencode(form).encode() or None
        url = urllib.parse.urljoin(f"http://127.0.0.1:{self.port}/", path)
        request = urllib.request.Request(  # noqa: S310 - our own server
            url, data, {"Accept": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                status, body = error.code, error.read().decode(errors="replace")
        try:
            return status, json.loads(body)
        except ValueError:
            return status, body

    def get(self, path: str) -> Any:
        return self.http("GET", path)[1]


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def site_at() -> Callable[[int], Site]:
    """A site that runs already, on this port."""
    return lambda port: Site(Path(), port)


@pytest.fixture
def make_site(tmp_path: Path, free_port: int) -> Callable[..., Site]:
    """Write the INI file of the application ``myapp``."""

    def make(database: str, broker: str) -> Site:
        text = (APPS / "myapp.ini").read_text()
        ini = tmp_path / "development.ini"
        queue = f"test-{uuid.uuid4()}"  # services are shared
        ini.write_text(text.format(database=database, broker=broker, port=free_port, queue=queue))
        return Site(ini, free_port)

    return make


@pytest.fixture(scope="session")
def promised_site(
    postgres_url: str, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Site]:
    """Write the INI file of the application ``promised``, with a queue of its own."""

    def make(broker: str = redis_url, celery: str = "", explicit: bool = True) -> Site:
        ini = tmp_path_factory.mktemp("promised") / "development.ini"
        text = (APPS / "promised.ini").read_text()
        if not explicit:
            text = text.replace("tm.manager_hook = pyramid_tm.explicit_manager\n", "")
        queue = f"test-{uuid.uuid4()}"  # services are shared
        services = {"database": postgres_url, "broker": broker, "results": redis_url}
        ini.write_text(text.format(queue=queue, celery=celery, **services))
        return Site(ini)

    return make


@contextmanager
def starting() -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def run(*arguments: str, program: tuple[str, ...] = WS_CELERY, **env: str) -> Running:
        process = subprocess.Popen(
            [*program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=environment(**env),
        )
        started.append(Running(process))
        return started[-1]

    try:
        yield run
    finally:
        for running in reversed(started):
            stop(running)


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Start ``ws-celery`` with arguments, in a process group of its own; stopped at the end."""
    with starting() as run:
        yield run


@pytest.fixture(scope="module")
def start_once() -> Iterator[Callable[..., Running]]:
    """Do as ``start`` does, for all tests of a module."""
    with starting() as run:
        yield run


@pytest.fixture
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``ws-celery`` with arguments to its end."""

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*WS_CELERY, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env=environment(**env),
        )

    return run


def environment(**changes: str) -> dict[str, str]:
    ours = ("CELERY_", "WS_CELERY_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    fixed = {"COLUMNS": "120", "PYTHONPATH": str(APPS), "PYTHONUNBUFFERED": "1"}
    return {**inherited, **fixed, **changes}


def stop(running: Running) -> None:
    if running.process.poll() is not None:
        return
    family = running.family()
    running.process.terminate()
    with suppress(subprocess.TimeoutExpired):
        running.process.wait(20)
    for process in family:
        if process.is_running():
            process.kill()
    running.process.wait()


@pytest.fixture(name="wait_for")
def wait_for_fixture() -> Callable[..., Any]:
    """Wait until a condition is true."""
    return wait_for


@pytest.fixture
def embedded_url(tmp_path: Path) -> Iterator[str]:
    """URL of an embedded broker that runs."""
    from ws_celery.embedded import SCHEME, EmbeddedBroker

    broker = EmbeddedBroker(tmp_path / "broker")
    process = subprocess.Popen(broker.command())
    try:
        wait_for(broker.is_running, "the start of the broker")
        yield f"{SCHEME}{broker.directory}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def sockets_end_with_their_test() -> Iterator[None]:
    """Close what Celery leaves to the garbage collector, which warns of each: result backends'."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def celery_app_of() -> Callable[[Site], Any]:
    """The Celery app of a site, loaded into this process without its application."""
    from pyramid.registry import Registry

    from ws_celery.app import PyramidCelery
    from ws_celery.config import read_file
    from ws_celery.embedded import resolve
    from ws_celery.locks import Locks

    @contextmanager
    def load(site: Site) -> Iterator[Any]:
        with PyramidCelery(Registry()) as app:
            app.locks = Locks(app)
            app.configure(resolve(read_file(str(site.ini))))
            yield app

    return load
