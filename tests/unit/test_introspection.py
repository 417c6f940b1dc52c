"""What Pyramid's introspector shows of tasks, and of what belongs to them."""

from __future__ import annotations

import sys

import pytest

from ws_celery import TransactionalTask, task


@task(name="shop.send", max_retries=5, flavour="hot")
def send(request, x):
    return x


@task(name="shop.idle")
def idle(request):
    """Do nothing."""


def spiced(run, info):
    """Do nothing."""
    return run


spiced.options = ("flavour",)

CELERY = """
[celeryroute:shop.send]
queue = slow

[celeryroute:shop.*]
priority = 1

[celeryroute:other]
queue = slow

[celerybeat:nightly]
task = shop.send
type = integer
schedule = 10
"""


@pytest.fixture
def introspector(make_app):
    def setup(config):
        config.add_task_deriver(spiced, name="spice")

    return make_app(send, idle, setup=setup, celery=CELERY).registry.introspector


def related(introspector, category, discriminator):
    found = introspector.related(introspector.get(category, discriminator))
    return {(intr.category_name, intr.discriminator) for intr in found}


def test_a_task_shows_what_it_was_declared_with(introspector):
    shown = introspector.get("celery tasks", "shop.send")

    assert shown.type_name == "celery task"
    assert shown["task"] is send
    assert shown["name"] == "shop.send"
    assert shown["target"] == f"{__name__}.send"
    assert shown["base"] is TransactionalTask
    assert shown["options"] == {"name": "shop.send", "max_retries": 5, "flavour": "hot"}
    assert (shown["origin"], shown["plugin"]) == ("config.add_celery_task", None)


def test_a_task_is_related_to_its_derivers_routes_and_schedule_entries(introspector):
    assert related(introspector, "celery tasks", "shop.send") == {
        ("celery task derivers", "spice"),
        ("celery routes", "shop.send"),
        ("celery routes", "shop.*"),
        ("celery schedule entries", "nightly"),
    }
    assert related(introspector, "celery tasks", "shop.idle") == {
        ("celery task derivers", "spice"),
        ("celery routes", "shop.*"),
    }


@pytest.mark.parametrize(
    ("category", "discriminator", "names"),
    [
        ("celery routes", "shop.*", {"shop.send", "shop.idle"}),
        ("celery routes", "other", set()),
        ("celery schedule entries", "nightly", {"shop.send"}),
        ("celery task derivers", "spice", {"shop.send", "shop.idle"}),
    ],
)
def test_what_belongs_to_tasks_is_related_to_them(introspector, category, discriminator, names):
    found = related(introspector, category, discriminator)

    assert found == {("celery tasks", name) for name in names}


def test_a_deriver_shows_its_place(introspector):
    shown = introspector.get("celery task derivers", "spice")

    assert shown["deriver"] is spiced
    assert [str(each) for each in (*shown["under"], *shown["over"])] == ["INGRESS", "TASK"]


def test_a_route_and_a_schedule_entry_show_where_they_are_written(introspector):
    for category, name in (
        ("celery routes", "shop.send"),
        ("celery schedule entries", "nightly"),
    ):
        shown = introspector.get(category, name)
        assert shown["file"].endswith(".ini")
        assert shown["line"] > 1
        assert name in shown["section"]


@pytest.mark.parametrize("way", ["config.scan", "imports"])
def test_a_task_shows_how_it_was_found(make_app, tmp_path, monkeypatch, way):
    module = f"found_by_{way.replace('.', '_')}"
    (tmp_path / f"{module}.py").write_text(
        "from ws_celery import task\n\n@task(name='t')\ndef t(request):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = (
        {"celery": f"imports = {module}"}
        if way == "imports"
        else {"setup": lambda config: config.scan(module)}
    )
    app = make_app(**options)
    sys.modules.pop(module)

    assert app.registry.introspector.get("celery tasks", "t")["origin"] == way
