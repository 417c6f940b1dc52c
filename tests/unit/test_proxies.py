"""Which application a task belongs to, and how tasks are found and registered."""

from __future__ import annotations

import gc
import pickle
import sys
import textwrap
import uuid
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import transaction
from pyramid.config import Configurator, global_registries
from pyramid.exceptions import ConfigurationConflictError
from pyramid.interfaces import IIntrospectable
from pyramid.response import Response
from pyramid.threadlocal import RequestContext

from ws_celery import RequestAwareTask, TransactionalTask, celery_app, get_celery_app, task
from ws_celery.exceptions import (
    ConfigurationError,
    NoCurrentApplication,
    NotIncluded,
    TaskNotRegistered,
)

EXPLICIT = {"tm__manager_hook": "pyramid_tm.explicit_manager"}


@task(name="add")
def add(request, x):
    return x


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Write a module of tasks that can be imported during the test; returns its name."""
    monkeypatch.syspath_prepend(tmp_path)
    written = []

    def write(text):
        name = f"tasks_{uuid.uuid4().hex}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        written.append(name)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)


TASKS = """
    from ws_celery import TransactionalTask, celery_app, task

    @task
    def plain(request, x):
        return x

    @task(bind=True)
    def bound(self, request, x):
        return self.name, x

    @task
    class Class(TransactionalTask):
        def run(self, request, x):
            return self.name, x

    @celery_app.task(name="by-the-app")
    def by_the_app(request, x):
        return x
"""


def own_tasks(app):
    return {name.rpartition(".")[2] for name in app.celery.tasks if "celery." not in name}


# Finding the application


def test_a_task_belongs_to_the_application_of_the_request_that_is_passed(make_app):
    first, second = make_app(add), make_app(add)
    add.delay(first.request(), 1)

    assert (first.names(), second.names()) == (["add"], [])


def test_a_task_belongs_to_the_application_of_the_current_request(make_app):
    first, second = make_app(add), make_app(add)
    with RequestContext(first.request()):
        add.delay(1)

    assert (first.names(), second.names()) == (["add"], [])


def test_the_request_that_is_passed_beats_the_current_one(make_app):
    first, second = make_app(add), make_app(add)
    with RequestContext(first.request()):
        add.delay(second.request(), 1)

    assert (first.names(), second.names()) == ([], ["add"])


def test_a_task_belongs_to_the_application_that_the_transaction_was_begun_for(make_app):
    def view(request):
        with ThreadPoolExecutor(1, initializer=share, initargs=(request.tm,)) as thread:
            thread.submit(add.delay, 1).result()
            assert first.names() == []
        return Response("done")

    def share(manager):
        transaction.manager.manager = manager

    def setup(config):
        config.add_route("home", "/")
        config.add_view(view, route_name="home")

    first, second = make_app(add, setup=setup, **EXPLICIT), make_app(add)
    first.web.get("/")

    assert (first.names(), second.names()) == (["add"], [])


def test_a_task_belongs_to_the_application_whose_task_has_begun_the_transaction(make_app):
    @task(name="outer")
    def outer(request):
        second.config.begin()  # no request is current any more, and another registry is
        add.delay(1)
        second.config.end()

    first, second = make_app(add, outer), make_app(add)
    first.celery.tasks["outer"].apply().get()

    assert (first.names(), second.names()) == (["add"], [])


def test_a_transaction_that_is_over_tells_nothing_any_more(make_app):
    @task(name="outer")
    def outer(request):
        "Do nothing."

    first, _ = make_app(add, outer), make_app(add)
    first.celery.tasks["outer"].apply().get()

    with pytest.raises(NoCurrentApplication, match="2 applications"):
        add.delay(1)


def test_a_task_belongs_to_the_application_of_the_current_registry(make_app):
    first, second = make_app(add), make_app(add)
    first.config.begin()
    add.delay(1)
    first.config.end()

    assert (first.names(), second.names()) == (["add"], [])


def test_a_task_belongs_to_the_only_application_of_the_process(make_app):
    app = make_app(add)
    add.delay(1)

    assert app.names() == ["add"]


def test_a_task_that_belongs_to_no_application_says_so():
    with pytest.raises(NoCurrentApplication, match=r"'add' .* no Pyramid application .* request"):
        add.delay(1)


def test_the_variable_that_names_an_application_is_told_where_none_is_loaded(make_app):
    with pytest.raises(NoCurrentApplication, match=r"name the INI file by .* WS_CELERY_INI"):
        celery_app.conf  # noqa: B018 - what `celery -A ws_celery.celery_app` does

    apps = make_app(add), make_app(add)  # where it would not help
    with pytest.raises(NoCurrentApplication) as raised:
        celery_app.conf  # noqa: B018
    assert len(apps) == 2
    assert "WS_CELERY_INI" not in str(raised.value)


def test_a_task_that_may_belong_to_two_applications_says_so(make_app):
    apps = make_app(add), make_app(add)
    with pytest.raises(NoCurrentApplication, match=r"'add' .* 2 applications .* request"):
        add.delay(1)

    assert [app.names() for app in apps] == [[], []]


@pytest.fixture
def ini_of_an_application(write_ini, write_module):
    """The INI file of an application that is not loaded yet."""
    module = write_module(
        """
        from pyramid.config import Configurator

        def main(global_config, **settings):
            config = Configurator(settings=settings)
            config.include("ws_celery")
            return config.make_wsgi_app()
        """
    )
    return write_ini(
        f"""
        [app:main]
        use = call:{module}:main
        ws_celery.config_uri = %(__file__)s

        [celery]
        broker_url = memory://
        task_time_limit = 17
        """
    )


def test_a_process_started_anew_loads_the_application_its_environment_names(
    ini_of_an_application, monkeypatch
):
    monkeypatch.setenv("WS_CELERY_INI", ini_of_an_application)

    assert celery_app.conf.task_time_limit == 17


def test_an_application_that_is_loaded_beats_the_one_of_the_environment(
    ini_of_an_application, monkeypatch, make_app
):
    monkeypatch.setenv("WS_CELERY_INI", ini_of_an_application)
    app = make_app()

    assert celery_app.conf is app.celery.conf


def test_an_application_that_does_not_include_us_says_what_to_do():
    with pytest.raises(NotIncluded, match=r"pyramid\.includes = ws_celery"):
        get_celery_app(Configurator().registry)


def test_the_celery_app_is_found_by_registry_and_by_request(make_app):
    app = make_app()

    assert get_celery_app(app.registry) is get_celery_app(app.request()) is app.celery


def test_a_request_has_the_celery_app(make_app):
    app = make_app()

    assert app.request().celery_app is app.celery


def test_celery_app_is_the_app_of_the_current_request(make_app):
    first, _ = make_app(), make_app()
    with RequestContext(first.request()):
        assert celery_app.conf is first.celery.conf


def test_a_celery_app_in_another_process_is_the_one_of_its_application(make_app):
    app = make_app()

    assert pickle.loads(pickle.dumps(app.celery)) is app.celery  # noqa: S301 - our own


# Two applications


def test_two_applications_keep_their_settings_apart(make_app):
    first = make_app(celery="task_time_limit = 5")
    second = make_app(celery="task_time_limit = 6")

    assert (first.celery.conf.task_time_limit, second.celery.conf.task_time_limit) == (5, 6)


def test_two_applications_keep_their_tasks_apart(make_app):
    first, second = make_app(add), make_app()

    assert "add" in first.celery.tasks
    assert "add" not in second.celery.tasks


def test_two_applications_have_tasks_of_their_own_of_one_module(make_app, write_module):
    module = write_module(TASKS)
    apps = [make_app(setup=lambda config: config.scan(module)) for _ in range(2)]
    by_app = [app.celery.tasks["by-the-app"] for app in apps]

    assert [registered.app for registered in by_app] == [app.celery for app in apps]


def test_a_class_serves_two_applications(make_app, write_module):
    module = write_module(TASKS)
    apps = [make_app(setup=lambda config: config.scan(module)) for _ in range(2)]
    registered = [app.celery.tasks[f"{module}.Class"] for app in apps]

    assert [each.app for each in registered] == [app.celery for app in apps]


def test_an_application_nobody_uses_any_more_is_forgotten(make_config):
    config = make_config()
    config.add_celery_task(add)
    app = weakref.ref(config.make_celery_app())
    add.delay(app().registry and _request_of(config), 1)
    del config
    gc.collect()

    assert app() is None


def _request_of(config):
    from pyramid.request import Request

    request = Request.blank("/")
    request.registry = config.registry
    return request


# Registration


@pytest.fixture(params=["scan", "imports", "both"])
def app_of(request, make_app):
    """Make the application of a module that is scanned, listed under ``imports``, or both."""

    def app_of(module):
        imports = "" if request.param == "scan" else f"imports =\n    {module}"
        setup = None if request.param == "imports" else lambda config: config.scan(module)
        return make_app(celery=imports, setup=setup)

    return app_of


def test_all_tasks_of_a_module_are_registered(app_of, write_module):
    assert own_tasks(app_of(write_module(TASKS))) == {"plain", "bound", "Class", "by-the-app"}


@pytest.mark.parametrize(
    ("name", "expected"), [("plain", 1), ("bound", ("bound", 1)), ("Class", ("Class", 1))]
)
def test_each_kind_of_task_runs(make_app, write_module, name, expected):
    module = write_module(TASKS)
    app = make_app(setup=lambda config: config.scan(module))
    result = app.celery.tasks[f"{module}.{name}"].apply((1,)).get()

    assert str(result) == str(expected).replace(f"'{name}'", f"'{module}.{name}'")


def test_a_task_is_transactional_unless_its_base_says_otherwise(make_app):
    @task(name="aware", base=RequestAwareTask)
    def aware(request):
        """Do nothing."""

    app = make_app(add, aware)

    assert isinstance(app.celery.tasks["add"], TransactionalTask)
    assert not isinstance(app.celery.tasks["aware"], TransactionalTask)


def test_options_of_celery_reach_the_task(make_app):
    @task(name="options", max_retries=7, acks_late=True)
    def with_options(request):
        """Do nothing."""

    registered = make_app(with_options).celery.tasks["options"]

    assert (registered.max_retries, registered.acks_late) == (7, True)


def test_options_of_celery_reach_a_class(make_app):
    @task(name="options", max_retries=7)
    class WithOptions(TransactionalTask):
        def run(self, request):
            """Do nothing."""

    assert make_app(WithOptions).celery.tasks["options"].max_retries == 7


def test_a_function_is_registered_by_the_directive(make_app):
    def plain(request, x):
        return x

    app = make_app(setup=lambda config: config.add_celery_task(plain, name="plain"))

    assert app.celery.tasks["plain"].apply((1,)).get() == 1


def test_two_tasks_of_one_name_conflict(make_config):
    @task(name="add")
    def another(request):
        """Do nothing."""

    config = make_config()
    config.add_celery_task(add)
    config.add_celery_task(another)

    with pytest.raises(ConfigurationConflictError, match="celery task"):
        config.commit()


def test_two_scanned_tasks_of_one_name_are_told_with_their_places(make_config, write_module):
    module = write_module(
        """
        from ws_celery import task

        @task(name="mail")
        def one(request):
            pass

        @task(name="mail")
        def two(request):
            pass
        """
    )
    config = make_config()
    config.scan(module)

    with pytest.raises(ConfigurationConflictError) as caught:
        config.commit()

    file = sys.modules[module].__file__
    said = [line.strip() for line in str(caught.value).splitlines()[2:]]
    assert said == [
        f"Line 4 of file {file}:",
        f"{module}.one is a task called 'mail'. Give it another name.",
        f"Line 8 of file {file}:",
        f"{module}.two is a task called 'mail'. Give it another name.",
    ]


def test_imports_do_not_disturb_overridden_actions_of_pyramid(make_app, write_module):
    def predicate(config):
        config.add_view_predicate("anything", object)

    def override(config):
        config.include(predicate)
        predicate(config)

    app = make_app(celery=f"imports = {write_module(TASKS)}", setup=override)

    assert own_tasks(app) == {"plain", "bound", "Class", "by-the-app"}


def test_the_scan_may_come_before_the_include(write_ini, write_module):
    ini = write_ini("[celery]\nbroker_url = memory://")
    config = Configurator(settings={"ws_celery.config_uri": ini})

    config.scan(write_module(TASKS))
    config.include("ws_celery")

    tasks = config.make_celery_app().tasks
    assert "by-the-app" in tasks
    global_registries.remove(config.registry)


def test_a_task_of_imports_conflicts_with_another_one_of_its_name(make_config, write_module):
    module = write_module(
        """
        from ws_celery import task

        @task(name="add")
        def another(request):
            '''Do nothing.'''
        """
    )
    config = make_config(celery=f"imports = {module}")
    config.add_celery_task(add)

    with pytest.raises(ConfigurationError, match=r"imports: .*add.* and .*another"):
        config.commit()


def test_a_task_imported_by_another_module_does_not_conflict(make_app, write_module):
    module = write_module(TASKS)
    importing = write_module(f"from {module} import plain")

    def scan_both(config):
        config.scan(module)
        config.scan(importing)

    assert "plain" in own_tasks(make_app(setup=scan_both))


def test_a_module_of_imports_that_is_missing_is_named(make_config):
    config = make_config(celery="imports = nowhere.tasks")

    with pytest.raises(ConfigurationError, match=r"\[celery\] imports: .*nowhere"):
        config.make_celery_app()


def test_a_task_that_is_not_registered_says_what_to_do(make_app):
    app = make_app()
    with pytest.raises(TaskNotRegistered, match=r"'add' is not registered\. .*config\.scan\(\)"):
        add.delay(app.request(), 1)


def test_tasks_can_be_seen_in_the_introspection(make_app):
    app = make_app(add)
    (introspectable,) = (
        entry["introspectable"] for entry in app.registry.introspector.get_category("celery tasks")
    )

    assert IIntrospectable.providedBy(introspectable)
    assert (introspectable.discriminator, introspectable["task"]) == ("add", add)


def test_make_celery_app_needs_no_wsgi_application(make_config):
    config = make_config()
    config.add_celery_task(add)

    assert "add" in config.make_celery_app().tasks


def test_an_application_without_a_wsgi_application_is_found(make_config):
    config = make_config()
    config.add_celery_task(add)
    app = config.make_celery_app()

    assert add.app is app


def test_the_order_of_includes_does_not_matter(write_ini):
    config = Configurator()
    config.include("ws_celery")
    config.add_settings(
        {"ws_celery.config_uri": write_ini("[celery]\nbroker_url = memory://\ntask_time_limit = 5")}
    )

    assert config.make_celery_app().conf.task_time_limit == 5


# What a decorated function looks like


def test_a_task_looks_like_its_function():
    @task
    def documented(request):
        """Say so."""

    assert (documented.__name__, documented.__doc__) == ("documented", "Say so.")
    assert documented.name == f"{__name__}.documented"


def test_a_task_can_be_shown_without_an_application():
    assert repr(add) == "<task add>"


def test_inspecting_a_task_loads_no_application():
    assert not hasattr(add, "__unknown__")


def test_a_task_has_the_attributes_of_the_registered_one(make_app):
    app = make_app(add)

    assert add.app is app.celery
