"""Installed distributions that bring tasks by an entry point."""

from __future__ import annotations

import sys
import textwrap
import uuid

import pytest

from ws_celery import ConfigurationError, task

TASKS = """
    from ws_celery import task

    @task(name="{name}.one")
    def one(request):
        return 1

    @task(name="{name}.two")
    def two(request):
        return 2
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution with one module of tasks, as pip would write it."""
    monkeypatch.syspath_prepend(tmp_path)
    modules = []

    def install(name, code="def modules():\n    return [__name__]", tasks=TASKS, entry="modules"):
        module = f"plugin_{uuid.uuid4().hex}"
        modules.append(module)
        text = textwrap.dedent(tasks.format(name=name)) + "\n" + textwrap.dedent(code)
        (tmp_path / f"{module}.py").write_text(text)
        info = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[ws_celery.tasks]\nmain = {module}:{entry}\n")
        return module

    yield install
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def start(make_app):
    """Start an application with a value of ``ws_celery.plugins``."""

    def start(plugins=None, *tasks):
        return make_app(*tasks, **({"ws_celery__plugins": plugins} if plugins else {}))

    return start


def brought(app):
    """Names of the tasks of each distribution, as the introspector shows them."""
    found = {}
    for each in app.registry.introspector.get_category("celery tasks", default=()):
        intr = each["introspectable"]
        found.setdefault(intr["plugin"], []).append(intr["name"])
    return found


def test_the_tasks_of_an_installed_distribution_are_registered(install, start):
    install("acme-tasks")
    app = start()

    assert app.celery.tasks["acme-tasks.two"].apply().get() == 2
    assert brought(app) == {"acme-tasks": ["acme-tasks.one", "acme-tasks.two"]}


@pytest.mark.parametrize("code", ["yield __name__", "return (__name__,)", "return {__name__: 1}"])
def test_a_distribution_may_name_its_modules_one_after_the_other(install, start, code):
    install("acme-tasks", f"def modules():\n    {code}")

    assert brought(start()) == {"acme-tasks": ["acme-tasks.one", "acme-tasks.two"]}


@pytest.mark.parametrize(
    ("plugins", "names"),
    [
        ("all", {"acme-tasks", "Other.Tasks"}),
        ("none", set()),
        ("NONE", set()),
        ("acme-tasks", {"acme-tasks"}),
        ("Acme_Tasks\nother-tasks", {"acme-tasks", "Other.Tasks"}),
        (["acme-tasks"], {"acme-tasks"}),
    ],
)
def test_the_setting_says_which_distributions(install, start, plugins, names):
    install("acme-tasks")
    install("Other.Tasks")

    assert set(brought(start(plugins))) == names


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        ("acme-task", r"no distribution .* expected all, none, .* Did you mean acme-tasks\?"),
        ("all, acme-tasks", "has all or none beside other names"),
        ("", "is empty"),
    ],
)
def test_a_setting_that_names_no_distribution_is_refused(install, make_app, plugins, message):
    install("acme-tasks")
    with pytest.raises(ConfigurationError, match=rf"ws_celery\.plugins = .*{message}"):
        make_app(ws_celery__plugins=plugins)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"tasks": "import nothing_of_the_kind"}, "ModuleNotFoundError"),
        ({"entry": "missing"}, "AttributeError"),
        ({"code": "modules = None"}, "TypeError"),
        ({"code": "def modules():\n    raise OSError('full')"}, "OSError: full"),
        ({"code": "def modules():\n    return __name__"}, "expected a list of names"),
        ({"code": "def modules():\n    return [1]"}, "expected a list of names"),
        ({"code": "def modules():\n    yield 1"}, "expected a list of names"),
        ({"code": "def modules():\n    return ['no_such_module']"}, "ModuleNotFoundError"),
    ],
)
def test_a_plugin_that_fails_is_named_with_the_remedy(install, start, broken, reason):
    module = install("acme-tasks", **broken)
    with pytest.raises(ConfigurationError) as error:
        start()

    text = str(error.value)
    assert "The distribution acme-tasks" in text
    assert f"`main = {module}:" in text
    assert reason in text
    assert "set ws_celery.plugins to none" in text


def test_a_plugin_that_fails_can_be_left_out(install, start):
    install("acme-tasks", tasks="import nothing_of_the_kind")

    assert brought(start("none")) == {}


def test_a_task_of_a_plugin_that_has_the_name_of_another_is_refused(install, start):
    install("acme-tasks")

    @task(name="acme-tasks.one")
    def own(request):
        """Do nothing."""

    with pytest.raises(
        ConfigurationError, match=r"plugin acme-tasks: .*own and .*one are both tasks"
    ):
        start("all", own)


def test_the_check_tells_how_many_tasks_a_plugin_has_brought(install, found):
    install("acme-tasks")
    finding = found("")["plugin"]

    assert finding.severity == "note"
    assert "2 tasks come from the installed distribution acme-tasks" in finding.text
