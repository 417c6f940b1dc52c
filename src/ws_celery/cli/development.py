"""``ws-celery dev`` and ``ws-celery demo``: everything an application needs, as one command."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import click
import hupper
import plaster
from paste.deploy.loadwsgi import ConfigLoader

from ws_celery.app import get_celery_app
from ws_celery.applications import INI_VARIABLE, load_registry
from ws_celery.cli import main
from ws_celery.cli.application import READY_VARIABLE, explaining, find_ini
from ws_celery.cli.child import die_with_parent
from ws_celery.cli.worker import LAST_RUNS_VARIABLE
from ws_celery.embedded import SCHEME, EmbeddedBroker
from ws_celery.exceptions import ConfigurationError
from ws_celery.settings import Configuration, ini_variables, read_configuration

__all__ = (
    "Processes",
    "Program",
    "demo",
    "dev",
)

_CHILD = Path(__file__).with_name("child.py")
_COLOURS = ("cyan", "green", "yellow", "magenta", "blue")
_TICK = 0.1


@dataclass(frozen=True)
class Program:
    """One program of several.

    :param name: short; it stands before each line of output.
    :param command: program and arguments.
    :param ready: tells whether the program serves; the next one is started when it does.
    :param stop_signal: asks it to finish what it is doing.
    :param hint: where to look if it ends by itself.
    """

    name: str
    command: Sequence[str]
    ready: Callable[[], bool] = lambda: True
    stop_signal: int = signal.SIGTERM
    hint: str = ""


class Processes:
    """Runs programs until one of them ends or somebody interrupts.

    Each is a session of its own, so that the terminal's Ctrl-C reaches only this process, which
    asks the main process of each to stop, in reverse order, and waits: a worker finishes the tasks
    it runs while its broker is still there. A second Ctrl-C kills. If this process is killed, the
    kernel kills them (Linux).

    :param programs: in the order of their start.
    :param on_ready: called when all are ready.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._programs = programs
        self._on_ready = on_ready
        self._width = max(len(program.name) for program in programs)
        self._selector = selectors.DefaultSelector()
        self._running: list[tuple[Program, subprocess.Popen[bytes]]] = []
        self._interrupts = 0

    def run(self) -> int:
        """Run the programs; return 0 after an interrupt, else what the one that ended returned."""
        previous = {
            signum: signal.signal(signum, self._interrupt)
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            code = self._start() or self._watch()
            self._stop()
        finally:
            self._kill()
            for signum, handler in previous.items():
                signal.signal(signum, handler)
        return code

    def _interrupt(self, _signum: int, _frame: FrameType | None) -> None:
        self._interrupts += 1

    def _start(self) -> int:
        for program in self._programs:
            self._spawn(program)
            while not (self._interrupts or program.ready()):
                if code := self._pump():
                    return code
        if not self._interrupts:
            self._on_ready()
        return 0

    def _watch(self) -> int:
        while not self._interrupts:
            if code := self._pump():
                return code
        return 0

    def _spawn(self, program: Program) -> None:
        reading, writing = os.pipe()
        process = subprocess.Popen(  # noqa: S603 - the commands are ours
            [sys.executable, str(_CHILD), str(os.getpid()), *program.command],
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=writing,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        os.close(writing)
        colour = _COLOURS[len(self._running) % len(_COLOURS)]
        prefix = click.style(f"{program.name:{self._width}} | ", fg=colour)
        self._running.append((program, process))
        self._selector.register(reading, selectors.EVENT_READ, _Lines(prefix))

    def _pump(self) -> int:
        """Pass on what the programs print; return an exit code if one of them has ended."""
        self._pass_on(_TICK)
        for program, process in self._running:
            if process.poll() is not None:
                self._pass_on(0)
                code = process.returncode
                self._say(f"{program.name} ended with exit code {code}; stopping. {program.hint}")
                return code if code > 0 else 1
        return 0

    def _pass_on(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            data = os.read(key.fd, 65536)
            if not data:
                self._selector.unregister(key.fd)
                os.close(key.fd)
            for line in key.data.feed(data):
                click.echo(line)

    def _stop(self) -> None:
        patience = self._interrupts  # before the sentence that invites to another one
        if patience:
            self._say("Stopping; running tasks finish first. Ctrl-C again kills.")
        for program, process in reversed(self._running):
            if process.poll() is None:
                process.send_signal(program.stop_signal)
            while process.poll() is None and self._interrupts <= patience:
                self._pass_on(_TICK)
        self._pass_on(0)

    def _kill(self) -> None:
        for _, process in self._running:
            if process.poll() is None:
                process.kill()
            process.wait()
        for key in list(self._selector.get_map().values()):
            os.close(key.fd)
        self._selector.close()

    def _say(self, message: str) -> None:
        click.secho(message, bold=True)


class _Lines:
    """Puts a prefix before each complete line of what it is fed."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Return the complete lines; no data means the end, which completes the last one."""
        *complete, self._rest = (self._rest + data).split(b"\n")
        if not data and self._rest:
            complete, self._rest = [self._rest], b""
        return [self._prefix + line.decode(errors="replace") for line in complete]


#: Seconds that a reload waits for running tasks before it kills.
_RELOAD_PATIENCE = 60.0

#: pserve as its console script runs it: without the current directory among the places of modules.
_PSERVE = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    "from pyramid.scripts.pserve import main; sys.exit(main())"
)

_DEMO_INI = Path(__file__).parent.parent / "demo" / "demo.ini"
_DEMO_LISTEN = "listen = 127.0.0.1:6543"


@click.command
@click.option("--reload", is_flag=True, help="Restart everything when code or the INI changes.")
def dev(reload: bool) -> None:
    """Run web server, worker and beat, and the embedded broker if it is configured.

    Their output comes together on this terminal. Ctrl-C stops them in order and lets running
    tasks finish; a second one kills.
    """
    config_uri = find_ini(None)
    if reload:
        if not hupper.is_active():
            hupper.start_reloader(f"{__name__}.reloaded", shutdown_interval=_RELOAD_PATIENCE)
        _watch_code(config_uri)
    sys.exit(_run(config_uri))


@click.command
@click.option("--port", type=click.IntRange(1, 65535), default=6543, show_default=True)
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the demonstration's data in this directory. [default: a temporary one]",
)
def demo(port: int, data: Path | None) -> None:
    """Run the demonstration application with a worker, beat and an embedded broker."""
    missing = [name for name in ("sqlalchemy", "waitress", "redis") if not find_spec(name)]
    if missing:
        raise ConfigurationError(
            f"The demo needs {', '.join(missing)}: pip install 'ws-celery[demo]'."
        )
    with _directory(data) as directory:
        ini = directory / _DEMO_INI.name
        text = _DEMO_INI.read_text(encoding="utf-8")
        ini.write_text(text.replace(_DEMO_LISTEN, f"listen = 127.0.0.1:{port}"), encoding="utf-8")
        os.environ[INI_VARIABLE] = str(ini)
        code = _run(str(ini))
    sys.exit(code)


def reloaded() -> None:
    """Run ``ws-celery`` again, with the arguments of the process that watches it."""
    # The watching process may be killed; nothing may go on without it.
    die_with_parent(signal.SIGTERM)
    main()


def _run(config_uri: str) -> int:
    broker = list(_broker_program(config_uri))  # first, because it reads the file and can explain
    host, port = _address(config_uri)
    if _accepts(host, port):
        raise ConfigurationError(
            f"Port {port} of {host} is in use. Stop what listens there, or choose another: "
            "`listen` in [server:main], or --port of the demo."
        )
    message = f"Open http://{host}:{port}/ - Ctrl-C stops everything."
    with tempfile.TemporaryDirectory(prefix="ws-celery-dev-") as directory:
        worker_ready = Path(directory, "worker-ready")
        os.environ[READY_VARIABLE] = str(worker_ready)
        os.environ[LAST_RUNS_VARIABLE] = str(_file_of_last_runs(config_uri))
        programs = [
            *broker,
            # What is wrong with the configuration is said once, by the worker, which comes first.
            _program("worker", config_uri, "--without-mingle", ready=worker_ready.exists),
            _program("beat", config_uri),
            Program(
                "web",
                (sys.executable, "-c", _PSERVE, config_uri, *_variables()),
                ready=lambda: _accepts(host, port),
                stop_signal=signal.SIGINT,  # what pserve takes for a wish to finish
            ),
        ]
        return Processes(programs, lambda: click.secho(message, bold=True)).run()


def _file_of_last_runs(config_uri: str) -> Path:
    """Return where beat remembers its last runs: not in the project, and kept by a reload."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache, "ws-celery", sha256(config_uri.encode()).hexdigest()[:16])
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "celerybeat-schedule"


def _variables() -> list[str]:
    return [f"{name}={value}" for name, value in ini_variables().items()]


def _program(command: str, config_uri: str, *options: str, **attributes: Any) -> Program:
    arguments = ("-m", "ws_celery", command, "--ini", config_uri, *options)
    return Program(command, (sys.executable, *arguments), **attributes)


def _broker_program(config_uri: str) -> Iterator[Program]:
    broker = _embedded_broker(config_uri)
    if broker is not None:
        hint = f"See {broker.log}."
        yield Program("broker", broker.command(), broker.is_running, hint=hint)


def _embedded_broker(config_uri: str) -> EmbeddedBroker | None:
    url = _broker_url(config_uri)
    if not isinstance(url, str) or not url.startswith(SCHEME):
        return None
    broker = EmbeddedBroker.from_url(url)
    if broker.is_running():
        raise ConfigurationError(
            f"The embedded broker in {broker.directory} is running already. "
            "Stop the other `ws-celery dev`, or give this one another directory."
        )
    return broker


def _broker_url(config_uri: str) -> Any:
    configuration: Configuration | None = read_configuration(config_uri, need_broker=False)
    if configuration is not None and "broker_url" not in configuration.settings:
        with explaining(config_uri):  # only the application knows: it may be set in code
            configuration = get_celery_app(load_registry(config_uri)).configuration
    return configuration and configuration.settings.get("broker_url")


def _address(config_uri: str) -> tuple[str, int]:
    # As pserve reads it: here [DEFAULT] beats what the command line says.
    loader = ConfigLoader(plaster.parse_uri(config_uri).path)
    loader.update_defaults(ini_variables(), overwrite=False)
    if not loader.parser.has_section("server:main"):
        raise ConfigurationError(
            f"{config_uri}: the section [server:main] is missing; it says where the web server "
            "listens. With waitress: `use = egg:waitress#main` and `listen = 127.0.0.1:6543`."
        )
    with explaining(config_uri):
        settings = dict(loader.parser.items("server:main"))
    if "listen" in settings:
        host, _, port = settings["listen"].partition(" ")[0].rpartition(":")
    else:
        host, port = settings.get("host", ""), settings.get("port", "8080")
    if not port.isdigit():
        raise ConfigurationError(f"{config_uri}: [server:main] has no port, but {port!r}.")
    wildcard = host in ("", "*", "0.0.0.0", "[::]")  # noqa: S104 - recognised, not bound
    return "127.0.0.1" if wildcard else host.strip("[]"), int(port)


def _accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def _watch_code(config_uri: str) -> None:
    hupper.get_reloader().watch_files([plaster.parse_uri(config_uri).path])
    # Imports the application, so that its modules are watched too.
    with explaining(config_uri):
        load_registry(config_uri)


@contextmanager
def _directory(given: Path | None) -> Iterator[Path]:
    if given is not None:
        try:
            given.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"--data {given}: {error.strerror}.") from error
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="ws-celery-demo-") as name:
        yield Path(name)
