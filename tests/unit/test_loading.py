"""Loading an application: once per process, whatever its modules declare at import."""

from __future__ import annotations

import importlib
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
from celery import signature

from ws_celery import celery_app, get_celery_app, task
from ws_celery.applications import load_registry
from ws_celery.cli.application import check_schedule, load_celery_app
from ws_celery.exceptions import ConfigurationError, NoCurrentApplication, NoSuchEntry
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
    with pytest.raises(NoSuchEntry):
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
