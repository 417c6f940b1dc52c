"""Configuration as a part of a Pyramid application's."""

from __future__ import annotations

import re
from datetime import timedelta
from functools import partialmethod

import pytest
from celery.beat import PersistentScheduler
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationConflictError, ConfigurationExecutionError

from ws_celery import ConfigurationError, get_celery_app, task
from ws_celery.beat.store import Store
from ws_celery.config import make_celery_app
from ws_celery.outbox import Outbox


@pytest.fixture
def ini(tmp_path):
    def write(text, name="app.ini"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def committed():
    """Commit a configuration; its Celery app is closed with the test."""
    apps = []

    def commit(config):
        config.commit()
        apps.append(get_celery_app(config.registry))
        return apps[-1]

    yield commit
    for app in apps:
        app.close()


def test_the_file_may_be_named_in_code(ini, committed):
    config = Configurator()
    config.include("ws_celery")
    config.configure_celery(ini("[celery]\nbroker_url = memory://\nworker_concurrency = 2\n"))

    assert committed(config).conf.worker_concurrency == 2


def test_code_beats_the_file(ini, committed):
    config = Configurator()
    config.include("ws_celery")
    path = ini("[celery]\nbroker_url = memory://\nworker_concurrency = 2\n")
    config.configure_celery(path, worker_concurrency=5, CELERY_ALWAYS_EAGER=True)

    app = committed(config)

    assert (app.conf.worker_concurrency, app.eager is not None) == (5, True)


def test_code_alone_is_enough(committed):
    config = Configurator()
    config.include("ws_celery")
    config.configure_celery(broker_url="memory://")

    assert committed(config).conf.broker_url == "memory://"


def test_settings_may_be_added_after_the_include(committed):
    config = Configurator()
    config.include("ws_celery")
    config.add_settings({"celery.broker_url": "memory://", "celery.task_time_limit": "1m"})

    assert committed(config).conf.task_time_limit == 60


def test_an_unknown_option_in_code_is_refused():
    config = Configurator()
    config.include("ws_celery")
    config.configure_celery(broker_url="memory://", worker_concurency=5)

    with pytest.raises(ConfigurationError, match="Did you mean worker_concurrency"):
        config.commit()


def test_two_calls_are_a_conflict():
    config = Configurator()
    config.include("ws_celery")
    config.configure_celery(broker_url="memory://")
    config.configure_celery(broker_url="redis://")

    with pytest.raises(ConfigurationConflictError, match="celery configuration"):
        config.commit()


def test_the_application_beats_what_it_includes(committed):
    def framework(config):
        config.include("ws_celery")
        config.configure_celery(broker_url="redis://")

    config = Configurator()
    config.include(framework)
    config.configure_celery(broker_url="memory://")

    assert committed(config).conf.broker_url == "memory://"


def test_the_setting_and_the_directive_may_name_the_same_file(ini, committed):
    path = ini("[celery]\nbroker_url = memory://\n")
    config = Configurator(settings={"ws_celery.config_uri": path})
    config.include("ws_celery")
    config.configure_celery(f"{path}#main")

    assert committed(config).conf.broker_url == "memory://"


def test_the_setting_and_the_directive_may_not_name_different_files(ini):
    path = ini("[celery]\nbroker_url = memory://\n")
    config = Configurator(settings={"ws_celery.config_uri": path})
    config.include("ws_celery")
    config.configure_celery(ini("[celery]\nbroker_url = memory://\n", "other.ini"))

    with pytest.raises(ConfigurationError, match="name different files"):
        config.commit()


def test_what_was_read_can_be_introspected(ini, committed):
    path = ini(
        "[celery]\nbroker_url = redis://:hunter2@localhost\n"
        "[celeryroute:x]\nqueue = a\n[celeryqueue:a]\n"
        "[celeryannotate:x]\nrate_limit = 1/s\n"
        "[celerybeat:tick]\ntask = tick\ntype = integer\nschedule = 1\n"
    )
    config = Configurator(settings={"ws_celery.config_uri": path})
    config.include("ws_celery")
    committed(config)

    def found(category):
        return [each["introspectable"] for each in config.introspector.get_category(category)]

    (broker,) = found("celery settings")
    assert (broker.title, broker["value"]) == ("broker_url", "redis://:********@localhost")
    assert (broker["file"], broker["line"], broker["section"]) == (path, 2, "celery")
    assert [each["value"] for each in found("celery routes")] == [{"queue": "a"}]
    assert [each.title for each in found("celery queues")] == ["a"]
    assert [each.title for each in found("celery annotations")] == ["x"]
    assert [each.title for each in found("celery schedule entries")] == ["tick"]


def test_two_applications_keep_apart(ini, committed):
    apps = []
    for number in (1, 2):
        path = ini(
            f"[celery]\nbroker_url = memory://\nworker_concurrency = {number}\n", f"{number}.ini"
        )
        config = Configurator(settings={"ws_celery.config_uri": path})
        config.include("ws_celery")
        apps.append(committed(config))

    assert [app.conf.worker_concurrency for app in apps] == [1, 2]
    assert apps[0].configuration.rows != apps[1].configuration.rows


def test_a_module_that_cannot_be_imported_names_file_and_line(ini):
    path = ini("[celery]\nbroker_url = memory://\nimports =\n  nowhere.tasks\n")
    config = Configurator(settings={"ws_celery.config_uri": path})
    config.include("ws_celery")

    with pytest.raises(ConfigurationError, match=r"app\.ini:3: \[celery\] imports: "):
        config.commit()


def test_a_route_has_options_that_celery_does_not_take_from_routes(ini, committed):
    path = ini(
        "[celery]\nbroker_url = memory://\n"
        "[celeryroute:sent.*]\nqueue = there\nexpires = 1m\ntime_limit = 5\n"
        "[celeryroute:sent.exactly]\nqueue = there\nexpires = 2m\n"
    )
    config = Configurator(settings={"ws_celery.config_uri": path})
    config.include("ws_celery")
    config.add_celery_task(task(_nothing, name="sent.task"))
    app = committed(config)

    app.tasks["sent.task"].apply_async()
    app.send_task("sent.exactly")
    app.send_task("sent.other", expires=10)

    headers = [_take(app).headers for _ in range(3)]
    assert [header["task"] for header in headers] == ["sent.task", "sent.exactly", "sent.other"]
    assert [header["timelimit"][0] for header in headers] == [5, None, 5]
    assert [message["expires"] is not None for message in headers] == [True] * 3


def test_beat_runs_the_schedule_and_keeps_it_in_its_file(ini, committed, tmp_path):
    path = ini(
        "[celery]\nbroker_url = memory://\n[celeryroute:tick]\nqueue = there\n"
        "[celerybeat:zoned]\ntask = tick\ntype = crontab\nschedule = * * * * *\n"
        "timezone = Asia/Tokyo\n"
        "[celerybeat:often]\ntask = tick\ntype = number\nschedule = 0.001\n"
    )
    config = Configurator(settings={"ws_celery.config_uri": path})
    config.include("ws_celery")
    app = committed(config)

    for _ in range(2):
        scheduler = PersistentScheduler(app, schedule_filename=str(tmp_path / "beat"))
        zoned, often = (scheduler.schedule[name] for name in ("zoned", "often"))
        assert (zoned.schedule.zone, zoned.last_run_at.utcoffset()) == (
            *("Asia/Tokyo", timedelta(hours=9)),
        )
        zoned.last_run_at -= timedelta(minutes=2)
        assert zoned.is_due().is_due
        assert often.is_due().next < 1
        scheduler.apply_entry(zoned)
        scheduler.close()
        assert _take(app).headers["task"] == "tick"


def _nothing(request):
    """Do nothing."""


def _take(app):
    with app.connection_for_read() as connection:
        return connection.default_channel.basic_get("there", no_ack=True)


def test_settings_of_ours_take_variables_of_the_environment(make_config, committed, monkeypatch):
    monkeypatch.setenv("PATIENCE", "3")
    settings = {
        "ws_celery__publish_timeout": "${PATIENCE}",
        "ws_celery__dbsession": "${SESSION:-db}",
    }
    app = committed(make_config(**settings))

    assert app.publisher.timeout == 3
    assert app.session_attribute == "db"


# Parts that are switched on by their include or their setting


@pytest.mark.parametrize("part", ["ws_celery.outbox", "ws_celery.beat"])
@pytest.mark.parametrize("ways", ["add_settings", "include", "include add_settings"])
def test_a_part_is_switched_on_by_each_way_and_once(make_app, monkeypatch, part, ways):
    made = []

    def keep(self, make, *args, **options):
        made.append(self)
        make(self, *args, **options)

    for each in (Outbox, Store):
        monkeypatch.setattr(each, "__init__", partialmethod(keep, each.__init__))

    def setup(config):
        for way in ways.split():
            getattr(config, way)({part: "true"} if way == "add_settings" else part)

    app = make_app(setup=setup)

    assert made == [each for each in (app.celery.outbox, app.celery.schedule) if each]
    assert len(made) == 1


@pytest.mark.parametrize("part", ["outbox", "beat"])
def test_a_part_that_is_switched_off_after_the_include_is_off(make_app, part):
    def setup(config):
        config.add_settings({f"ws_celery.{part}": "false"})

    app = make_app(setup=setup, **{f"ws_celery__{part}": "true"})

    assert app.celery.outbox is app.celery.schedule is None


def _committed(config):
    config.commit()


@pytest.mark.parametrize("finish", [_committed, Configurator.make_wsgi_app, make_celery_app])
def test_an_error_of_the_configuration_arrives_as_it_is(make_config, finish):
    config = make_config(celery="worker_concurency = 4")

    with pytest.raises(ConfigurationError) as error:
        finish(config)

    assert re.match(r"\S+\.ini:4: \[celery\] worker_concurency = '4': is no", str(error.value))


def test_an_error_of_a_task_arrives_as_it_is_from_make_celery_app(make_config):
    @task(name="wrong", flavour="mint")
    def wrong(request):
        pass

    config = make_config()
    config.add_celery_task(wrong)

    with pytest.raises(ConfigurationError) as error:
        config.make_celery_app()

    assert str(error.value).startswith("the task 'wrong' has the unknown option 'flavour'")


def test_an_error_of_the_applications_own_is_wrapped_as_in_pyramid(make_config):
    def fail():
        raise LookupError("nowhere")

    config = make_config()
    config.action("mine", fail)

    with pytest.raises(ConfigurationExecutionError, match="nowhere"):
        config.make_celery_app()
