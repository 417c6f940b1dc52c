"""What ``config.include("ws_celery")`` makes of an INI file."""

from __future__ import annotations

from datetime import timedelta

import pytest
from celery.schedules import crontab
from pyramid.config import Configurator
from tests.sections import celery_settings

from ws_celery.exceptions import ConfigurationError
from ws_celery.schedules import parse_schedule


def included(**settings):
    """Return the Celery app of an application with these settings."""
    config = Configurator(settings=settings)
    config.include("ws_celery")
    return config.make_celery_app()


def read(text):
    """Return Celery's settings from the lines of ``[celery]``."""
    pairs = (line.partition("=") for line in text.strip().split("\n"))
    return celery_settings({"celery": {key.strip(): text for key, _, text in pairs}}, "app.ini")


def schedule(**entry):
    """Return the schedule of one ``[celerybeat:entry]`` section."""
    section = {"task": "add", **entry}
    return celery_settings({"celerybeat:entry": section}, "app.ini")["beat_schedule"]["entry"]


# Where the sections are


def test_settings_come_from_the_file_that_config_uri_names(write_ini):
    ini = write_ini("[celery]\nbroker_url = memory://\ntask_time_limit = 5")

    assert included(**{"ws_celery.config_uri": ini}).conf.task_time_limit == 5


def test_a_file_may_use_its_own_place(write_ini):
    ini = write_ini("[celery]\nbroker_url = memory://\nbeat_schedule_filename = %(here)s/beat")

    app = included(**{"ws_celery.config_uri": ini})

    assert app.conf.beat_schedule_filename == f"{ini.rpartition('/')[0]}/beat"


def test_no_broker_says_what_to_set():
    with pytest.raises(ConfigurationError, match=r"No broker .* broker_url in the \[celer"):
        included()


def test_no_broker_in_a_file_names_the_file(write_ini):
    ini = write_ini("[celery]\n")
    with pytest.raises(ConfigurationError, match=f"{ini}: no broker is configured"):
        included(**{"ws_celery.config_uri": ini})


def test_a_missing_section_names_the_file_and_the_section(write_ini):
    ini = write_ini("[app:main]\n")
    with pytest.raises(ConfigurationError, match=rf"{ini}: the section \[celery\] is mis"):
        included(**{"ws_celery.config_uri": ini})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"gone\.ini.*there is no such file"):
        included(**{"ws_celery.config_uri": f"{tmp_path}/gone.ini"})


def test_a_broker_of_the_environment_is_enough(monkeypatch):
    monkeypatch.setenv("CELERY_BROKER_URL", "memory://")

    assert included().connection_for_write().transport_cls == "memory"


def test_eager_execution_needs_no_broker(write_ini):
    ini = write_ini("[celery]\ntask_always_eager = true")

    assert included(**{"ws_celery.config_uri": ini}).eager is not None


# Types of the settings


@pytest.mark.parametrize("text", ["false", "no", "off", "0"])
def test_a_word_for_false_is_false(text):
    assert read(f"task_acks_late = {text}")["task_acks_late"] is False


def test_a_word_that_is_neither_true_nor_false_is_refused():
    with pytest.raises(ConfigurationError, match=r"app\.ini: \[celery\] task_acks_late = 'maybe'"):
        read("task_acks_late = maybe")


def test_a_list_has_its_items_on_lines():
    settings = celery_settings({"celery": {"imports": "\n  one.tasks\n  two.tasks"}}, "app.ini")

    assert settings["imports"] == ("one.tasks", "two.tasks")


def test_a_mapping_is_json():
    settings = read('result_backend_transport_options = {"master_name": "main"}')

    assert settings["result_backend_transport_options"] == {"master_name": "main"}


def test_a_mapping_may_have_a_section_of_its_own():
    section = {"celery:broker_transport_options": {"visibility_timeout": "3600"}}

    assert celery_settings(section, "app.ini")["broker_transport_options"] == {
        "visibility_timeout": 3600
    }


def test_a_route_has_a_section_of_its_own():
    settings = celery_settings({"celeryroute:slow": {"queue": "slow"}}, "app.ini")

    assert settings["task_routes"] == {"slow": {"queue": "slow"}}


def test_an_unknown_key_is_refused_with_a_suggestion():
    with pytest.raises(
        ConfigurationError, match=r"app\.ini: \[celery\] broker_ur = .* is no .*mean broker_url\?"
    ):
        read("broker_ur = redis://")


def test_other_sections_are_left_alone():
    assert celery_settings({"app:main": {"use": "egg:app"}}, "app.ini") == {}


# Schedules


def test_a_schedule_may_be_a_crontab():
    entry = schedule(type="crontab", schedule='{"minute": "*/15"}')

    assert entry["schedule"] == crontab(minute="*/15")


def test_a_schedule_may_be_a_period():
    assert schedule(type="timedelta", schedule='{"hours": 24}')["schedule"] == timedelta(days=1)


def test_a_schedule_may_be_a_number_of_seconds():
    assert schedule(type="integer", schedule="30")["schedule"] == timedelta(seconds=30)


def test_an_entry_carries_its_arguments():
    entry = schedule(type="integer", schedule="30", args="[1]", kwargs='{"y": 2}')

    assert (entry["task"], entry["args"], entry["kwargs"]) == ("add", [1], {"y": 2})


def test_a_schedule_that_is_wrong_names_file_section_and_key():
    with pytest.raises(ConfigurationError, match=r"app\.ini: \[celerybeat:entry\] schedule = 'no'"):
        schedule(type="integer", schedule="no")


def test_an_entry_without_a_schedule_says_what_is_missing():
    with pytest.raises(ConfigurationError, match=r"\[celerybeat:entry\] schedule is missing"):
        schedule(type="integer")


@pytest.mark.parametrize(
    ("kind", "text"),
    [("crontab", '{"second": 1}'), ("crontab", "[]"), ("timedelta", '{"hours": 0}')],
)
def test_a_schedule_that_makes_no_sense_is_refused(kind, text):
    with pytest.raises(ValueError, match=r"second|object|longer than zero"):
        parse_schedule(kind, text)
