"""INI files that people have: examples in the manner of other integrations load as they are."""

from __future__ import annotations

import textwrap
from datetime import timedelta

import pytest
from celery import Celery
from celery.schedules import crontab

from ws_celery.settings import read_configuration, survey


@pytest.fixture
def read(tmp_path):
    def read(text):
        path = tmp_path / "app.ini"
        path.write_text(textwrap.dedent(text))
        return read_configuration(str(path)).settings

    return read


def typed(value):
    """Return the value with the type of everything inside."""
    if isinstance(value, dict):
        return {key: typed(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [typed(inner) for inner in value]
    return type(value), value


@pytest.mark.parametrize(
    ("broker", "imports", "options"),
    [
        ("broker_url", "imports", "broker_transport_options"),
        ("BROKER_URL", "CELERY_IMPORTS", "BROKER_TRANSPORT_OPTIONS"),
        ("CELERY_BROKER_URL", "celery_imports", "celery_broker_transport_options"),
    ],
)
def test_the_first_example_of_pyramid_celery(read, broker, imports, options):
    settings = read(
        f"""
        [celery]
        {broker} = redis://localhost:1337/0
        {imports} = app1.tasks
                  app2.tasks

        [celery:{options}]
        visibility_timeout = 18000
        max_retries = 5

        [celerybeat:task1]
        task = app1.tasks.Task1
        type = crontab
        schedule = {{"minute": 0}}
        """
    )

    entry = settings.pop("beat_schedule")["task1"]
    assert typed(settings) == typed(
        {
            "broker_url": "redis://localhost:1337/0",
            "imports": ("app1.tasks", "app2.tasks"),
            "broker_transport_options": {"visibility_timeout": 18000, "max_retries": 5},
        }
    )
    assert isinstance(entry["schedule"], crontab)
    assert entry["schedule"] == crontab(minute=0)


def test_the_schedules_of_pyramid_celery(read):
    schedule = read(
        """
        [celery]
        broker_url = redis://localhost

        [celerybeat:task1]
        task = app1.tasks.Task1
        type = crontab
        schedule = {"minute": 0}

        [celerybeat:task2]
        task = app1.tasks.Task2
        type = timedelta
        schedule = {"seconds": 30}
        args = [16, 16]

        [celerybeat:task3]
        task = app2.tasks.Task1
        type = crontab
        schedule = {"hour": 0, "minute": 0}
        kwargs = {"boom": "shaka"}

        [celerybeat:task4]
        task = myapp.tasks.Task4
        type = integer
        schedule = 30
        """
    )["beat_schedule"]

    assert [entry["task"] for entry in schedule.values()] == [
        *("app1.tasks.Task1", "app1.tasks.Task2", "app2.tasks.Task1", "myapp.tasks.Task4")
    ]
    assert [entry["schedule"] for entry in schedule.values()] == [
        *(crontab(minute=0), timedelta(seconds=30)),
        *(crontab(minute=0, hour=0), timedelta(seconds=30)),
    ]
    assert schedule["task2"]["args"] == [16, 16]
    assert schedule["task3"]["kwargs"] == {"boom": "shaka"}


def test_the_routes_of_pyramid_celery(read):
    settings = read(
        """
        [celery]
        broker_url = redis://localhost

        [celeryroute:otherapp.tasks.Task3]
        queue = slow_tasks
        routing_key = turtle

        [celeryroute:myapp.tasks.Task1]
        queue = fast_tasks
        """
    )

    assert settings["task_routes"] == {
        "otherapp.tasks.Task3": {"queue": "slow_tasks", "routing_key": "turtle"},
        "myapp.tasks.Task1": {"queue": "fast_tasks"},
    }


def test_the_loggers_of_pyramid_celery(read):
    settings = read(
        """
        [celery]
        BROKER_URL = redis://localhost
        CELERYD_HIJACK_ROOT_LOGGER=True

        [logger_celery]
        level = INFO
        handlers =
        qualname = celery

        [logger_celery_worker_job]
        level = ERROR
        handlers =
        qualname = celery.worker.job
        propagate = 1
        """
    )

    assert settings["worker_hijack_root_logger"] is True


def test_the_schedule_of_websauna(read):
    settings = read(
        """
        [celery]
        BROKER_URL = redis://localhost:6379/3
        CELERY_IMPORTS =
            websauna.system.devop.tasks
            trees.tasks

        [celerybeat:backup]
        task = backup
        type = timedelta
        schedule = {"hours": 24}

        [celerybeat:update_conversion_rates]
        task = update_conversion_rates
        type = timedelta
        schedule = {"hours": 1}
        """
    )

    assert typed(settings["imports"]) == typed(("websauna.system.devop.tasks", "trees.tasks"))
    assert [(e["task"], typed(e["schedule"])) for e in settings["beat_schedule"].values()] == [
        ("backup", typed(timedelta(hours=24))),
        ("update_conversion_rates", typed(timedelta(hours=1))),
    ]


def test_old_options_in_upper_case_have_the_types_that_celery_wants(read):
    settings = read(
        """
        [celery]
        BROKER_URL = redis://localhost:6379/15
        CELERY_RESULT_BACKEND = redis://localhost:6379/15
        CELERY_ALWAYS_EAGER = false
        CELERY_ACKS_LATE = False
        CELERY_ACCEPT_CONTENT = json
        CELERY_TASK_RESULT_EXPIRES = 3600
        CELERY_DEFAULT_RATE_LIMIT = 10/m
        CELERYD_CONCURRENCY = 2
        CELERYD_TASK_TIME_LIMIT = 90.5
        CELERYD_TASK_LOG_FORMAT = %%(task_name)s: %%(message)s
        CELERY_TIMEZONE = Europe/Helsinki
        CELERYBEAT_SCHEDULE = {"tick": {"task": "tick", "schedule": 1.5}}
        CELERY_ROUTES = {"slow": {"queue": "slow"}}
        CELERY_SEND_EVENTS = yes
        """
    )

    app = Celery(set_as_current=False)
    app.config_from_object(settings)

    assert app.conf.task_always_eager is app.conf.task_acks_late is False
    assert app.conf.accept_content == ["json"]
    assert app.conf.result_expires == 3600
    assert app.conf.task_default_rate_limit == "10/m"
    assert app.conf.worker_concurrency == 2
    assert app.conf.task_time_limit == 90.5
    assert app.conf.worker_task_log_format == "%(task_name)s: %(message)s"
    assert str(app.timezone) == "Europe/Helsinki"
    assert app.conf.beat_schedule["tick"]["schedule"] == timedelta(seconds=1.5)
    assert app.amqp.router.route({}, "slow")["queue"].name == "slow"
    assert app.conf.worker_send_task_events is True


def test_an_old_file_loads_when_its_lines_are_as_the_faults_say(tmp_path):
    path = tmp_path / "app.ini"
    lines = textwrap.dedent(
        """
        [ celery ]
        BROKER_URL = "redis://localhost:6379/3" ; messages
        CELERY_RESULT_BACKEND = postgres://localhost/results
        CELERY_IMPORTS = shop.tasks # all of them
        CELERYD_CONCURRENCY = "2"

        [celery.broker_transport_options]
        visibility_timeout = 18000 ; five hours
        global_keyprefix = 'shop-'

        [celerybeat: backup]
        task = shop.tasks.backup ; nightly
        type = crontab
        schedule = {"hour": 3, "minute": "0"} ; "0", not 0

        [celeryroute.shop.tasks.slow]
        queue = slow ; the slow ones
        """
    ).splitlines()

    for _ in range(4):  # what is inside of a section is read when its name is right
        path.write_text("\n".join(lines))
        configuration, faults = survey(str(path), need_broker=False)
        for fault in faults:
            whole = fault.nearest.startswith("[") or " = " in fault.nearest
            said = fault.nearest if whole else f"{fault.key} = {fault.nearest}"
            lines[fault.line - 1] = said

    assert not faults
    assert configuration.settings["broker_url"] == "redis://localhost:6379/3"
    assert configuration.settings["result_backend"] == "db+postgresql://localhost/results"
    assert configuration.settings["imports"] == ("shop.tasks",)
    assert configuration.settings["worker_concurrency"] == 2
    assert configuration.settings["broker_transport_options"] == {
        "visibility_timeout": 18000,
        "global_keyprefix": "shop-",
    }
    assert configuration.settings["task_routes"] == {"shop.tasks.slow": {"queue": "slow"}}
    assert configuration.entries["backup"]["task"] == "shop.tasks.backup"
    assert configuration.settings["beat_schedule"]["backup"]["schedule"] == crontab(0, 3)
