"""Loading an application: once per process, whatever its modules declare at import."""

from __future__ import annotations

import importlib
import io
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from celery import _state, signature
from celery.bin.celery import celery

from ws_celery import celery_app, get_celery_app, task
from ws_celery.applications import load_registry
from ws_celery.cli import COMMANDS, TEXTS, main, main_group
from ws_celery.cli.application import check_schedule, load_celery_app
from ws_celery.exceptions import ConfigurationError, NoCurrentApplication, NotFound
from ws_celery.inspection import schedule_entry

#: What modules of applications do at import with Celery's app, and the tasks that come of it.
PATTERNS = {
    "task": "from ws_celery import celery_app\n@celery_app.task(name='a')\ndef a(request): ...",
    "alias": "from ws_celery import celery_app as c\n@c.task(name='a')\ndef a(request): ...",
    "package": "import ws_celery\n@ws_celery.celery_app.task(name='a')\ndef a(request): ...",
    "base": (
        "from ws_celery import celery_app\n"
        "class Base(celery_app.Task):\n    abstract = True\n    def __call__(self, *args): ...\n"
        "@celery_app.task(name='a', base=Base)\ndef a(): ..."
    ),
    "class": (
        "from ws_celery import celery_app, RequestAwareTask, one_instance, task\n"
        "@task(name='a')\nclass A(RequestAwareTask):\n"
        "    @one_instance(key='A')\n    def run(self, request): ..."
    ),
    "signals": (
        "from ws_celery import celery_app as app\n"
        "@app.task(name='a')\ndef a(request): ...\n"
        "@app.on_after_configure.connect\ndef one(sender, **kwargs): ...\n"
        "@app.on_after_finalize.connect\ndef two(sender, **kwargs): ..."
    ),
    "call later": (
        "from ws_celery import celery_app, task\n@task(name='a')\ndef a(request): ...\n"
        "def view(request):\n    celery_app.send_task('a', task_id='1')"
    ),
}

MAIN = """
    from pyramid.config import Configurator

    count = 0

    def main(global_config, **settings):
        global count
        count += 1
        config = Configurator(settings=settings)
        {order}
        return config.make_wsgi_app()
"""
ORDERS = {
    "include first": "config.include('ws_celery'); config.scan('{tasks}')",
    "scan first": "config.scan('{tasks}'); config.include('ws_celery')",
    "imports": "config.include('ws_celery'); config.configure_celery(imports=['{tasks}'])",
}


@pytest.fixture
def write_site(tmp_path, monkeypatch, write_ini):
    """Write an application whose module of tasks has this text; returns its name and its INI."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(tasks, order="include first"):
        name = f"site_{len(list(tmp_path.iterdir()))}"
        (tmp_path / f"{name}_tasks.py").write_text(textwrap.dedent(tasks))
        text = textwrap.dedent(MAIN).format(order=ORDERS[order].format(tasks=f"{name}_tasks"))
        (tmp_path / f"{name}.py").write_text(text)
        ini = write_ini(
            f"[app:main]\nuse = call:{name}:main\nws_celery.config_uri = %(__file__)s\n"
            "[celery]\nbroker_url = memory://\n"
        )
        # What the commands do, and a process that is started anew.
        monkeypatch.setenv("WS_CELERY_INI", ini)
        return name, ini

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("site_"):
            del sys.modules[name]


def times_loaded(name):
    return importlib.import_module(name).count


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_application_is_loaded_once_whatever_its_modules_declare(write_site, pattern, order):
    name, ini = write_site(PATTERNS[pattern], order)
    app = get_celery_app(load_registry(ini))

    assert times_loaded(name) == 1
    assert "a" in app.tasks


def test_threads_that_need_the_application_of_the_environment_load_it_once(write_site):
    name, _ = write_site(PATTERNS["task"])
    with ThreadPoolExecutor(4) as pool:
        apps = set(pool.map(lambda _: id(celery_app.tasks), range(4)))

    assert times_loaded(name) == 1
    assert len(apps) == 1


@pytest.mark.parametrize("order", ["include first", "scan first"])
@pytest.mark.parametrize("used", ["conf.timezone", "tasks", "send_task"])
def test_a_module_that_needs_the_app_while_it_is_loaded_is_told_so_in_one_sentence(
    write_site, used, order
):
    name, ini = write_site(f"from ws_celery import celery_app\n\ncelery_app.{used}\n", order)

    with pytest.raises(ConfigurationError) as refused:
        load_celery_app(ini)
    assert str(refused.value).startswith(sys.modules[name].__file__.replace(".py", "_tasks.py:3: "))
    assert f"celery_app.{used.partition('.')[0]} is used while" in str(refused.value)
    assert times_loaded(name) == 1


def test_looking_at_celery_app_looks_for_no_application(monkeypatch):
    monkeypatch.setenv("WS_CELERY_INI", "/nowhere.ini")

    assert not hasattr(celery_app, "__venusian_callbacks__")
    assert not hasattr(celery_app, "__wrapped__")


# Celery's signals

IN_A_MODULE = """
    from ws_celery import celery_app, task

    @task(name="add")
    def add(request, x): ...

    @celery_app.{signal}.connect
    def declare(sender, **kwargs):
        sender.add_periodic_task(30.0, add.s(1), name="often")
"""
IN_INCLUDEME = """
    from ws_celery import celery_app, get_celery_app, task

    @task(name="add")
    def add(request, x): ...

    def includeme(config):
        @{found}.{signal}.connect
        def declare(sender, **kwargs):
            sender.add_periodic_task(30.0, add.s(1), name="often")
        config.scan(__name__)
"""
SIGNALS = ["on_after_configure", "on_after_finalize"]


def entry_of(app):
    """Return what `ws-celery schedule` shows of the entry, and what beat takes."""
    shown = schedule_entry(app, "often")
    check_schedule(app)
    of_beat = app.conf.beat_schedule["often"]
    return shown.task, shown.schedule, shown.state, of_beat["task"], of_beat["args"]


EXPECTED = ("add", "every 0:00:30", "on", "add", [1])


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("order", ORDERS)
def test_a_handler_of_a_module_declares_an_entry(write_site, signal, order):
    _, ini = write_site(IN_A_MODULE.format(signal=signal), order)

    assert entry_of(load_celery_app(ini)) == EXPECTED


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("found", ["celery_app", "get_celery_app(config.registry)"])
def test_a_handler_of_an_includeme_declares_an_entry(make_app, write_site, signal, found):
    name, _ = write_site(IN_INCLUDEME.format(signal=signal, found=found))
    app = make_app(setup=lambda config: in_configuration(config, f"{name}_tasks"))

    assert entry_of(app.celery) == EXPECTED


def in_configuration(config, module):
    with config:  # as `with Configurator() as config` does
        config.include(module)


def test_a_handler_declares_entries_of_each_application_that_scans_it(make_app, write_site):
    name, _ = write_site(IN_A_MODULE.format(signal="on_after_finalize"))
    apps = [make_app(setup=lambda config: config.scan(f"{name}_tasks")) for _ in range(2)]

    assert [entry_of(app.celery) for app in apps] == [EXPECTED, EXPECTED]
    with pytest.raises(NotFound, match="no schedule entry"):
        schedule_entry(make_app(add).celery, "often")


def test_what_a_handler_declares_is_checked_as_any_entry_of_code(make_app):
    def declare(sender, **kwargs):
        sender.add_periodic_task(30.0, signature("unknown"), name="often")

    def setup(config):
        get_celery_app(config.registry).on_after_configure.connect(declare)

    with pytest.raises(ConfigurationError, match=r"\[celerybeat:often\].* 'unknown'"):
        check_schedule(make_app(setup=setup).celery)


def test_a_handler_of_any_kind_is_connected(make_app, write_site):
    name, _ = write_site(
        """
        from functools import wraps
        from ws_celery import celery_app

        told = []

        class Listener:
            def tell(self, sender, **kwargs):
                told.append("method")

        def hidden(function):
            return lambda: None

        celery_app.on_after_finalize.connect(Listener().tell)
        celery_app.on_after_finalize.connect(lambda sender, **kwargs: told.append("lambda"))

        @hidden
        @celery_app.on_after_finalize.connect(dispatch_uid="one")
        def declare(sender, **kwargs):
            told.append("decorated")
        """
    )
    make_app(setup=lambda config: config.scan(f"{name}_tasks"))

    assert sorted(sys.modules[f"{name}_tasks"].told) == ["decorated", "lambda", "method"]


def test_a_celery_app_that_is_not_configured_yet_says_so(make_config):
    config = make_config()
    with pytest.raises(ConfigurationError, match=r"before .* committed.* on_after_configure"):
        get_celery_app(config.registry).conf.timezone  # noqa: B018 - asking is the point


# Attributes of tasks without an application


@task(name="add", max_retries=7)
def add(request, x):
    return x


def test_an_attribute_that_no_task_has_is_an_attribute_error(monkeypatch):
    monkeypatch.setenv("WS_CELERY_INI", "/nowhere.ini")  # it is not loaded to find that out

    assert not hasattr(add, "x")
    assert getattr(add, "pytestmark", "none") == "none"
    with pytest.raises(AttributeError, match="the task 'add' has no attribute 'x'"):
        add.x  # noqa: B018 - asking is the point


@pytest.mark.parametrize("name", ["rate_limit", "s", "max_retries"])
def test_an_attribute_that_each_task_has_needs_an_application(name):
    with pytest.raises(NoCurrentApplication, match="'add'"):
        getattr(add, name)


def test_an_attribute_of_the_registered_task_alone_is_found(make_app):
    app = make_app(add, celery="[celeryannotate:add]\nrate_limit = 1/s")
    app.celery.tasks["add"].noted = "here"

    assert (add.noted, add.max_retries, add.rate_limit) == ("here", 7, "1/s")
    assert not hasattr(add, "x")


# Every command


@pytest.fixture
def ws_celery(monkeypatch, tmp_path, capsys):
    """Run ``ws-celery`` in this process; returns its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the shell adds to it
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(_state, "default_app", _state.default_app)
    for variable in ("WS_CELERY_INI", "CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.setenv(variable, "")  # what the command sets is undone with it

    def ws_celery(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return ws_celery


#: A command line for each command that has one which ends by itself.
LINES = {
    "amqp": ["amqp", "--unknown"],
    "beat": ["beat", "--unknown"],
    "call": ["call", "a"],
    "check": ["check"],
    "clean": ["clean", "--force"],
    "control": ["control", "unknown"],
    "events": ["events", "--unknown"],
    "graph": ["graph", "workers", "nodes:1"],
    "inspect": ["inspect", "--list"],
    "list": ["list", "--unknown"],
    "locks": ["locks", "list"],
    "logtool": ["logtool", "--unknown"],
    "migrate": ["migrate"],
    "multi": ["multi", "names", "1"],
    "outbox": ["outbox", "list"],
    "purge": ["purge", "--force"],
    "queues": ["queues", "list"],
    "relay": ["relay", "--unknown"],
    "report": ["report"],
    "result": ["result", "1"],
    "results": ["results", "list"],
    "run": ["run", "--unknown"],
    "schedule": ["schedule", "list"],
    "shell": ["shell", "--python"],
    "status": ["status", "--unknown"],
    "tasks": ["tasks"],
    "upgrade": ["upgrade", "--unknown"],
    "view": ["view"],
    "worker": ["worker", "--unknown"],
    "workers": ["workers", "--unknown"],
}
#: The first two run others, each of which loads the application; Flower would not end.
WITHOUT_LINE = {"demo", "dev", "flower"}


def test_each_command_has_its_line():
    assert set(LINES) | WITHOUT_LINE == set(main_group().list_commands(None))


def test_the_list_of_commands_says_what_each_says_of_itself():
    group = main_group()
    texts = {name: group.get_command(None, name).get_short_help_str(200) for name in COMMANDS}

    assert {**texts, "flower": TEXTS["flower"]} == TEXTS


def test_there_is_each_command_and_option_of_celerys():
    group = main_group()

    assert set(celery.commands) <= set(group.list_commands(None))
    assert {each.name for each in celery.params} <= {each.name for each in group.params}


def test_the_list_of_commands_imports_none():
    program = """
import sys
from ws_celery.cli import main_group
main_group()(["--help"], standalone_mode=False)
print({"celery.bin", "flower", "pyramid.config", "ws_celery.app"} & set(sys.modules))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60
    )

    assert "workers   List the workers that answer." in ended.stdout
    assert ended.stdout.endswith("\nset()\n")


def test_an_option_that_the_application_adds_to_celerys_commands_is_accepted(write_site):
    _, ini = write_site(
        """
        from click import Option
        from celery.signals import user_preload_options
        from ws_celery import celery_app

        @celery_app.on_after_configure.connect
        def add(sender, **kwargs):
            sender.user_options["preload"].add(Option(["--own"]))

        @user_preload_options.connect
        def take(options, **kwargs):
            print("own:", options["own"])
        """
    )
    # In a process of its own, because Celery adds it to its commands for good.
    words = ["report", "--own", "given", "--ini", ini]
    ended = subprocess.run(
        [sys.executable, "-m", "ws_celery", *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(ini).parent)},
    )

    assert ended.returncode == 0, ended.stderr
    assert "own: given" in ended.stdout


@pytest.mark.filterwarnings("ignore:The parameter -d is used more than once")  # by Celery's events
@pytest.mark.parametrize("command", LINES)
def test_each_command_loads_the_application_once(ws_celery, write_site, command):
    name, ini = write_site("\n".join((PATTERNS["base"], PATTERNS["signals"].replace("'a'", "'b'"))))
    code, printed, error = ws_celery(*LINES[command], "--ini", ini)

    assert times_loaded(name) == 1, (code, printed, error)


@pytest.mark.filterwarnings("ignore:The parameter -d is used more than once")  # by Celery's events
@pytest.mark.parametrize("command", sorted({*LINES, *WITHOUT_LINE}))
def test_the_help_of_a_command_loads_no_application(ws_celery, write_site, command):
    _, ini = write_site("raise Exception('loaded')")
    code, printed, _ = ws_celery(command, "--ini", ini, "--help")

    assert code == 0
    assert printed.startswith(f"Usage: ws-celery {command}")


# No other application than the INI's


@pytest.mark.parametrize(
    "line",
    [
        ["--ini", "{ini}", "--workdir", "demo", "report"],
        ["--workdir", "demo", "report", "--ini", "{ini}"],
        ["--workdir=demo", "--ini", "{ini}", "report"],
        ["-b", "memory://check", "report", "{ini}"],
        ["--result-backend", "cache+memory://", "-q", "report", "--ini={ini}"],
        ["-A", "ws_celery.celery_app", "report", "-A", "ws_celery", "{ini}"],
        ["--ini-var", "check=worker", "report", "--ini", "{ini}"],
    ],
)
def test_the_value_of_an_option_is_no_command(ws_celery, write_site, tmp_path, line):
    name, ini = write_site(PATTERNS["task"])
    (tmp_path / "demo").mkdir()
    code, printed, error = ws_celery(*(word.format(ini=ini) for word in line))

    assert code == 0, error
    assert "loader   -> ws_celery.worker.PyramidLoader" in printed
    assert times_loaded(name) == 1


def test_paths_are_meant_from_where_the_command_is_called(ws_celery, write_site, tmp_path):
    _, ini = write_site(PATTERNS["task"])
    (tmp_path / "demo").mkdir()
    code, _, error = ws_celery("--workdir", "demo", "report", "--ini", Path(ini).name)

    assert code == 0, error
    assert Path.cwd() == tmp_path / "demo"


@pytest.mark.parametrize("variable", ["APP", "CELERY_APP", "LOADER", "CONFIG_MODULE"])
def test_no_variable_of_the_environment_names_another_application(
    ws_celery, write_site, monkeypatch, variable
):
    _, ini = write_site(PATTERNS["task"])
    monkeypatch.setenv(variable, "celery.app.default")
    code, printed, error = ws_celery("report", "--ini", ini)

    assert code == 0, error
    assert "loader   -> ws_celery.worker.PyramidLoader" in printed


@pytest.mark.parametrize(
    "line",
    [
        ["-A", "other", "report"],
        ["report", "-A", "other"],
        ["report", "--app=other"],
        ["--config", "other", "report"],
        ["report", "--config", "other"],
        ["--loader=other", "report"],
    ],
)
def test_another_application_is_refused(ws_celery, line):
    code, printed, error = ws_celery(*line)

    assert (code, printed) == (2, "")
    assert "comes from the INI file" in error


def test_a_broker_of_the_command_line_is_the_one_that_is_checked(ws_celery, write_site):
    _, ini = write_site(PATTERNS["task"])
    _, printed, _ = ws_celery("-b", "memory://elsewhere", "check", "--ini", ini)

    assert "memory://elsewhere" in printed


def test_a_command_that_is_to_have_no_application_gets_no_other_one(ws_celery, monkeypatch):
    # As a command would that forgets to say that it needs one.
    monkeypatch.setitem(COMMANDS, "check", COMMANDS["report"])
    monkeypatch.setattr("ws_celery.cli.application.find_ini", lambda _: "x.ini")
    code, printed, error = ws_celery("check")

    assert (code, printed) == (2, "")
    assert "No application is loaded" in error


@pytest.mark.parametrize(
    ("line", "right"),
    [
        (["x.ini", "worker", "-l", "info"], "ws-celery worker -l info --ini x.ini"),
        (["x.ini#shop", "queues", "list"], "ws-celery queues list --ini 'x.ini#shop'"),
        (["x.ini"], "ws-celery worker --ini x.ini"),
    ],
)
def test_an_ini_before_the_command_is_answered_with_the_right_line(ws_celery, line, right):
    code, _, error = ws_celery(*line)

    assert code == 2
    assert (
        f"{line[0]} is no command: the INI file comes after the command. Write `{right}`" in error
    )


# Where settings and modules come from


IN_CODE = """
    from pyramid.config import Configurator

    count = 0

    def main(global_config, **settings):
        global count
        count += 1
        config = Configurator(settings=settings)
        config.include("ws_celery")
        config.configure_celery(broker_url="memory://", imports=["{name}"])
        return config.make_wsgi_app()
"""


@pytest.fixture
def site_in_code(write_ini, write_site, tmp_path):
    """An application whose Celery settings are in code; returns its INI."""
    (tmp_path / "site_in_code.py").write_text(textwrap.dedent(IN_CODE).format(name="site_in_code"))
    return write_ini("[app:main]\nuse = call:site_in_code:main\n")


def test_settings_in_code_are_checked_as_those_of_a_file(ws_celery, site_in_code):
    code, printed, _ = ws_celery("check", "--ini", site_in_code)

    assert code == 0, printed
    assert "memory://" in printed
    assert "0 errors" in printed
    assert times_loaded("site_in_code") == 1


@pytest.mark.parametrize("order", ["include first", "imports"])
def test_no_broker_anywhere_is_an_error_of_check(ws_celery, write_site, order):
    _, ini = write_site(PATTERNS["task"], order)
    text = Path(ini).read_text()
    Path(ini).write_text(text.partition("ws_celery.config_uri")[0])
    code, printed, _ = ws_celery("check", "--ini", ini)

    assert code == 2
    assert printed.count("error: ") == 1
    assert "No broker is configured" in printed


@pytest.mark.parametrize("command", ["tasks", "check", "worker", "beat", "dev"])
def test_an_application_that_is_not_installed_is_answered_with_how_to(
    ws_celery, write_ini, command
):
    ini = write_ini(
        "[app:main]\nuse = call:site_elsewhere:main\n[celery]\n"
        "[server:main]\nlisten = 127.0.0.1:1\n"
    )
    code, printed, error = ws_celery(command, "--ini", ini)

    assert code == 2
    assert "the application cannot be found (No module named 'site_elsewhere')" in printed + error
    assert "`pip install -e .`" in printed + error


def test_a_variable_that_the_server_needs_is_named(ws_celery, write_site):
    _, ini = write_site(PATTERNS["task"])
    with Path(ini).open("a") as file:
        file.write("[server:main]\nlisten = 127.0.0.1:%(http_port)s\n")
    code, _, error = ws_celery("dev", "--ini", ini)

    assert code == 2
    assert "[server:main] listen: %(http_port)s is not set" in error
    assert "--ini-var http_port=VALUE" in error


def test_the_idiom_of_pyramid_celery_is_answered_with_the_remedy(make_app):
    app = make_app(add)

    with pytest.raises(ConfigurationError, match=r"PYRAMID_REGISTRY.*request\.registry"):
        app.celery.conf["PYRAMID_REGISTRY"]
    assert "PYRAMID_REGISTRY" not in app.celery.conf
    with pytest.raises(KeyError):
        app.celery.conf["PYRAMID"]
