"""Sections, files, names and places: what the configuration is, and what is wrong with it."""

from __future__ import annotations

import logging
import socket
import ssl
import sys
import textwrap
from datetime import datetime, timedelta, timezone

import pytest
from celery.schedules import crontab
from kombu import Exchange, Queue
from kombu.transport.redis import Channel

from ws_celery.exceptions import ConfigurationError
from ws_celery.settings import INI_VARIABLES, read_configuration, survey
from ws_celery.settings.celery_kinds import TRANSPORT_KEYS


@pytest.fixture
def ini(tmp_path):
    """Write an INI file; returns its path."""

    def write(text, name="app.ini"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def read(ini):
    """Read an INI file that has a broker besides what is given."""

    def read(text):
        return read_configuration(ini(f"[celery]\nbroker_url = memory://\n{textwrap.dedent(text)}"))

    return read


@pytest.fixture
def faults(ini):
    """Read an INI file that is wrong; returns the faults."""

    def read(text):
        path = ini(text)
        with pytest.raises(ConfigurationError) as caught:
            read_configuration(path)
        for fault in caught.value.faults:
            assert fault.file == path
        return caught.value.faults

    return read


# Sections


def test_an_option_that_is_a_mapping_has_a_section(read):
    settings = read(
        """
        [celery:broker_transport_options]
        visibility_timeout = 18000
        max_retries = 5
        fanout_prefix = False
        global_keyprefix = 007
        queue_order_strategy = priority
        priority_steps = [0, 3, 6]
        anything = 1.5
        retry_policy.timeout = 5.0
        predefined_queues.inner.deep = {"a": null}
        """
    ).settings

    assert settings["broker_transport_options"] == {
        "visibility_timeout": 18000,
        "max_retries": 5,
        "fanout_prefix": False,
        "global_keyprefix": "007",
        "queue_order_strategy": "priority",
        "priority_steps": [0, 3, 6],
        "anything": 1.5,
        "retry_policy": {"timeout": 5},
        "predefined_queues": {"inner": {"deep": {"a": None}}},
    }
    assert type(settings["broker_transport_options"]["visibility_timeout"]) is int


def test_a_section_may_have_an_old_name(read):
    configuration = read("[celery:CELERY_TASK_PUBLISH_RETRY_POLICY]\nmax_retries = 5\n")

    assert configuration.settings["task_publish_retry_policy"] == {"max_retries": 5}
    assert [(each.old, each.new) for each in configuration.renamed] == [
        ("CELERY_TASK_PUBLISH_RETRY_POLICY", "task_publish_retry_policy")
    ]


def test_routes_have_sections(read):
    configuration = read(
        """
        [celeryroute:myapp.tasks.slow]
        queue = slow
        routing_key = turtle
        priority = 3
        retry_policy = {"max_retries": 1}

        [celeryroute:myapp.reports.*]
        queue = reports
        expires = 1h
        time_limit = 600

        [celeryroute:other.*]
        countdown = 5
        """
    )

    assert configuration.settings["task_routes"] == {
        "myapp.tasks.slow": {
            "queue": "slow",
            "routing_key": "turtle",
            "priority": 3,
            "retry_policy": {"max_retries": 1},
        },
        "myapp.reports.*": {"queue": "reports"},
    }
    assert configuration.call_options == {
        "myapp.reports.*": {"expires": 3600, "time_limit": 600},
        "other.*": {"countdown": 5},
    }


def test_routes_in_sections_come_before_a_router(read):
    settings = read("task_routes = os.path:join\n[celeryroute:a]\nqueue = b\n").settings

    mine, router = settings["task_routes"]
    assert mine == {"a": {"queue": "b"}}
    assert callable(router)


def test_queues_have_sections_and_are_bound_by_their_own_name(read):
    settings = read(
        """
        [celeryqueue:fast]

        [celeryqueue:slow]
        exchange = tortoises
        type = topic
        routing_key = slow.#
        priority = 10
        durable = false
        """
    ).settings

    assert settings["task_queues"] == [
        Queue("fast", Exchange("fast", type="direct"), "fast"),
        Queue(
            "slow",
            Exchange("tortoises", type="topic", durable=False),
            "slow.#",
            max_priority=10,
            durable=False,
        ),
    ]


def test_annotations_have_sections(read):
    settings = read(
        """
        [celeryannotate:myapp.tasks.slow]
        rate_limit = 10/m
        time_limit = 90s
        acks_late = no
        max_retries = none

        [celeryannotate:*]
        ignore_result = true
        """
    ).settings

    assert settings["task_annotations"] == {
        "myapp.tasks.slow": {
            "rate_limit": "10/m",
            "time_limit": 90,
            "acks_late": False,
            "max_retries": None,
        },
        "*": {"ignore_result": True},
    }


def test_a_schedule_entry_has_a_section(read):
    settings = read(
        """
        [celerybeat:night]
        task = myapp.tasks.tidy
        type = crontab
        schedule = 30 2 * * *
        timezone = Europe/Berlin
        args = [1, "two"]
        kwargs = {"deep": true}
        options = {"queue": "slow", "expires": "1h", "priority": 3}

        [celerybeat:often]
        task = myapp.tasks.look
        type = timedelta
        schedule = 90s
        relative = yes
        """
    ).settings

    night, often = (settings["beat_schedule"][name] for name in ("night", "often"))
    assert night["task"] == "myapp.tasks.tidy"
    assert isinstance(night["schedule"], crontab)
    assert night["schedule"].zone == "Europe/Berlin"
    assert (night["args"], night["kwargs"]) == ([1, "two"], {"deep": True})
    assert night["options"] == {"queue": "slow", "expires": 3600, "priority": 3}
    assert "relative" not in night
    assert often["schedule"] == timedelta(seconds=90)
    assert often["relative"] is True


def test_an_entry_may_be_switched_off(read):
    entry = "[celerybeat:x]\ntask = t\ntype = integer\nschedule = 1\nenabled = false\n"

    assert "beat_schedule" not in read(entry).settings


def test_sections_of_others_are_left_alone(read):
    read("[server:main]\nuse = egg:waitress\n[formatter_x]\nformat = %(message)s\n[composite:a]\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[celerybeet:x]\na = 1", "Did you mean [celerybeat:x]?"),
        ("[Celery]\na = 1", "Did you mean [celery]?"),
        ("[celry:broker_transport_options]\na = 1", "Did you mean [celery:broker_transport_opt"),
        ("[celeryroute]\nqueue = a", "the section has no name; expected [celeryroute:TASK]"),
        ("[celery:]\nqueue = a", "the section has no name; expected [celery:OPTION]"),
        ("[celery:worker_concurrency]\na = 1", "worker_concurrency is no mapping"),
        ("[celery:broker_transport_option]\na = 1", "Did you mean broker_transport_options?"),
        ("[celery:broker_transport_options]\na.b = 1\na = 2", "a has keys"),
        ("[celery:broker_transport_options]\na = 2\na.b = 1", "a has a value"),
        ("[celery:broker_transport_options]\na..b = 1", "has an empty key"),
        ("[celery:broker_transport_options]\n. = 1", "has an empty key"),
        ("[celery:broker_transport_options]\nvisibility_timout = 5", "mean visibility_timeout?"),
        ("[celery:broker_transport_options]\nvisibility_timeout.x = 5", "has no keys inside"),
        ("[celery:broker_transport_options]\nSocket_Timout = 5", "Did you mean socket_timeout?"),
        ("[celery:broker_transport_options]\npriority_steps = [0, true]", "type bool"),
        ("[celery:broker_transport_options]\npriority_steps = 3", "a JSON array of whole numbers"),
        ("[celery:broker_transport_options]\nvisibility_timeout = soon", "expected seconds"),
        ("[celery:broker_transport_options]\na = 1\n[celery:BROKER_TRANSPORT_OPTIONS]\nb = 1",
         "as [celery:broker_transport_options] at "),
        ("timezone.x = 1", "timezone is no mapping; it has no keys"),
        ("timezone. = UTC", "timezone is no mapping; it has no keys"),
        ("task_acks_late.x = false", "task_acks_late is no mapping; it has no keys"),
        ('task_routes = {"a": {"que": "slow"}}', "task_routes a que = 'slow': this key is not kno"),
        ('task_routes = [["a", {"expires": "x"}]]', "[celery] task_routes a expires = 'x'"),
        ('task_annotations = {"a": {"rate_limt": "10/m"}}', "Did you mean rate_limit?"),
        ('task_annotations = [{"a.*": {"rate_limit": "10/m"}}]', "a glob does not work here"),
        ("broker_read_url = embedded:///x", "the embedded broker is for broker_url"),
        ("broker_write_url = embedded:///x", "the embedded broker is for broker_url"),
        ("broker_read_url = redis://x, embedded:///x", "stands alone, not among other URLs"),
        ("result_backend = embedded://x", "needs an absolute directory"),
        ("result_backend = embedded:///x", "nobody would start it"),
        ("[celery:broker_transport_options]\nx = yes", 'Did you mean "yes" or true or false?'),
        ("[celery:broker_transport_options]\nx = {1}", "is not JSON"),
        ("[celery:task_publish_retry_policy]\nmax_retrys = 1", "Did you mean max_retries?"),
        ("[celeryroute:x]\nque = a", "Did you mean queue?"),
        ("[celeryroute:x]\n", "the section is empty"),
        ("[celeryroute:a.b?]\nqueue = a", "a glob without * is a task's name"),
        ("[celeryroute:x]\npriority = 256", "from 0 to 255"),
        ("[celeryqueue:x]\ndurable = x", "expected true or false"),
        ("[celeryannotate:a.*]\nrate_limit = 1/s", "a glob does not work here"),
        ("[celeryannotate:a]\nautoretry_for = X", "this key is not known"),
        ("[celerybeat:x]\n", "task is missing; an entry needs task, type and schedule"),
        ("[celerybeat:x]\ntask = t\nschedule = 5", "type is missing; expected one of crontab"),
        ("[celerybeat:x]\ntask = t\ntype = cron\nschedule = 5", "Did you mean crontab?"),
        ("[celerybeat:x]\ntask = t\ntype = integer\nschedule = 5\narg = []", "mean args?"),
        ("[celerybeat:x]\ntask = t\ntype = integer\nschedule = 5\ntimezone = UTC",
         "timezone has no meaning for the type integer, only for crontab"),
        ("[celerybeat:x]\ntask = t\ntype = crontab\nschedule = * * * * *\nrelative = true",
         "relative has no meaning for the type crontab"),
        ("[celerybeat:x]\ntask = t\ntype = integer\nschedule = 5\noptions = {\"que\": 1}",
         "has the unknown key que"),
        ("[celerybeat:x]\ntask = t\ntype = integer\nschedule = 5\nargs = {}", "a JSON array"),
    ],
)  # fmt: skip
def test_a_section_that_is_wrong_is_refused(faults, text, words):
    found = faults(f"[celery]\nbroker_url = memory://\n{text}\n")

    assert words in "\n".join(map(str, found))
    assert all(fault.line and fault.line >= 3 for fault in found)


def test_all_faults_are_shown_with_their_lines(faults):
    found = faults(
        """
        [celery]
        # a comment
        broker_ur = redis://:hunter2@localhost
        imports =
            one.tasks

            two.tasks
        worker_concurrency = many

        [celerybeat:x]
        task = t
        type = crontab
        schedule =
            {"minute": 0,
             "hour": 24}
        """
    )

    assert [(fault.line, fault.section, fault.key) for fault in found] == [
        (3, "celery", "broker_ur"),
        (8, "celery", "worker_concurrency"),
        (13, "celerybeat:x", "schedule"),
    ]
    assert found[0].nearest == "broker_url"
    assert found[0].value == "redis://:********@localhost"
    assert found[1].expected == "a whole number of at least 0, or auto, or none"
    assert len(str(ConfigurationError(*found)).splitlines()) == 3


def test_the_value_of_a_misspelt_secret_is_not_shown(faults):
    (fault,) = faults("[celery]\nredis_pasword = hunter2\n")

    assert "hunter2" not in str(fault)
    assert fault.as_dict()["value"] == "********"


@pytest.mark.parametrize(
    "entry",
    [
        '[celerybeat:x]\nkwargs = ["hunter2"]',
        '[celery]\nbeat_schedule = {"x": {"task": "t", "schedule": 1, "kwargs": ["hunter2"]}}',
    ],
)
def test_arguments_that_are_no_arguments_are_not_shown(faults, entry):
    (fault,) = (fault for fault in faults(f"{entry}\n") if "kwargs" in str(fault.key))

    assert fault.value == "********"
    assert "hunter2" not in str(fault)


def test_a_relative_directory_of_the_embedded_broker_is_refused_where_it_is_written(faults):
    (fault,) = faults("[celery]\nbroker_url = embedded://var\n")

    assert (fault.line, fault.key) == (2, "broker_url")
    assert "needs an absolute directory, such as embedded://%(here)s/var" in str(fault)


@pytest.mark.parametrize("broker", ["embedded:///a, redis://x", '["redis://x", "embedded:///a"]'])
def test_the_embedded_broker_is_not_one_of_several(faults, broker):
    (fault,) = faults(f"[celery]\nbroker_url = {broker}\n")

    assert "stands alone, not among other URLs" in str(fault)


def test_embedded_results_are_where_the_embedded_broker_is(ini, faults):
    text = "[celery]\nbroker_url = embedded:///srv/a\nresult_backend = embedded:///srv/{}\n"
    read_configuration(ini(text.format("a/")))

    (fault,) = faults(text.format("b"))

    assert fault.line == 3
    assert "nobody would start it" in str(fault)


@pytest.mark.parametrize("key", ["celery.timezone.x", "celery.result_backend.foo"])
def test_a_key_of_no_mapping_is_refused_in_the_section_of_the_application_too(faults, key):
    (fault,) = faults(f"[app:main]\n{key} = 4\n[celery]\nbroker_url = memory://\n")

    assert (fault.line, fault.key) == (2, key)
    assert "is no mapping; it has no keys" in str(fault)


def test_one_section_in_two_spellings_names_both_places(faults):
    options = "broker_transport_options"
    (fault,) = faults(
        f"[celery:{options}]\na = 1\n"
        f"[celery]\nbroker_url = memory://\n[celery:{options.upper()}]\nb = 1"
    )

    assert (fault.line, fault.section) == (5, f"celery:{options.upper()}")
    assert f"as [celery:{options}] at " in str(fault)
    assert str(fault).endswith("app.ini:1.")


@pytest.mark.parametrize(
    ("heading", "meant"),
    [
        ("[ celery ]", "[celery]"),
        ("[Celery]", "[celery]"),
        ("[cellery]", "[celery]"),
        ("[celery] ; of [app:main]", "[celery]"),
        ("[ celerybeat:x ]", "[celerybeat:x]"),
        ("[celerybeat: x]", "[celerybeat:x]"),
        ("[celerybeat :x]", "[celerybeat:x]"),
        ("[celery beat:x]", "[celerybeat:x]"),
        ("[celery_beat:x]", "[celerybeat:x]"),
        ("[celerybeats:x]", "[celerybeat:x]"),
        ("[CeleryBeat:x]", "[celerybeat:x]"),
        ("[celerybeat::x]", "[celerybeat:x]"),
        ("[celerybeat.x]", "[celerybeat:x]"),
        ("[celerybeat x]", "[celerybeat:x]"),
        ("[celerybeat=x]", "[celerybeat:x]"),
        ('["celerybeat:x"]', "[celerybeat:x]"),
        ('[celerybeat:"x"]', "[celerybeat:x]"),
        ("[celerybeat:x ; nightly]", "[celerybeat:x]"),
        ("[celeryroute.shop.tasks.slow]", "[celeryroute:shop.tasks.slow]"),
        ("[celery.broker_transport_options]", "[celery:broker_transport_options]"),
        ("[celery_metrics_and_whatever_else]", "[celery]"),
    ],
)
def test_a_section_that_is_nearly_ours_is_refused_with_the_right_spelling(faults, heading, meant):
    (fault,) = faults(f"[DEFAULT]\n{heading}\n[celeryqueue:a]\n[server:main]\nport = 1\n")[-1:]

    assert (fault.line, fault.nearest) == (2, meant)


def test_names_of_sections_may_have_blanks_and_signs(read):
    settings = read("[celeryqueue:a;b#c]\n[celeryqueue:my queue]\n[celeryqueue:a:b]\n").settings

    assert [queue.name for queue in settings["task_queues"]] == ["a;b#c", "my queue", "a:b"]


def test_every_transport_option_of_redis_is_accepted(read):
    keys = Channel.from_transport_options
    body = "\n".join(f"{key} = none" for key in keys if key not in TRANSPORT_KEYS)

    assert "unacked_mutex_expire" in body
    read(f"[celery:broker_transport_options]\nany_key_of_another_transport = 1\n{body}\n")


@pytest.mark.parametrize(
    "routes",
    [
        '{"a": {"queue": "slow", "expires": "1h"}, "b": "fast", "c": {"countdown": 5}}',
        '[["a", {"queue": "slow", "expires": "1h"}], {"b": "fast", "c": {"countdown": 5}}]',
    ],
)
def test_routes_of_an_option_are_read_as_those_of_sections_are(read, routes):
    configuration = read(f"task_routes = {routes}\n")

    assert configuration.call_options == {"a": {"expires": 3600}, "c": {"countdown": 5}}
    assert configuration.settings["task_routes"] in (
        {"a": {"queue": "slow"}, "b": "fast"},
        [("a", {"queue": "slow"}), {"b": "fast"}],
    )


def test_annotations_of_python_may_have_methods():
    def on_failure(*args):
        """Do nothing."""

    given = {"*": {"on_failure": on_failure, "time_limit": "90s"}}
    settings = {"celery.broker_url": "memory://", "celery.task_annotations": given}

    assert read_configuration(None, settings).settings["task_annotations"] == {
        "*": {"on_failure": on_failure, "time_limit": 90}
    }


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', "x"])
def test_broken_variables_of_the_command_line_name_their_variable(read, monkeypatch, text):
    monkeypatch.setenv(INI_VARIABLES, text)

    with pytest.raises(ConfigurationError, match=f"environment: {INI_VARIABLES}"):
        read("")


# The same thing twice


def test_one_option_under_two_names_names_both_places(faults):
    (fault,) = faults("[celery]\nbroker_url = memory://\nBROKER_URL = memory://\n")

    assert (fault.line, fault.key) == (3, "BROKER_URL")
    assert "sets broker_url, which [celery] broker_url at " in str(fault)
    assert "app.ini:2 sets as well" in str(fault)


def test_a_mapping_and_its_section_in_one_file_are_two(faults):
    (fault,) = faults(
        """
        [celery]
        broker_transport_options = {"a": 1}
        [celery:broker_transport_options]
        b = 2
        """
    )

    assert fault.line == 4
    assert "app.ini:2 sets as well" in str(fault)


@pytest.mark.parametrize(
    "text",
    [
        'task_routes = {"a": "x"}\n[celeryroute:a]\nqueue = x',
        'task_annotations = {"a": {}}\n[celeryannotate:a]\nrate_limit = 1/s',
        'beat_schedule = {"a": {"task": "t", "schedule": 1}}\n'
        "[celerybeat:a]\ntask = t\ntype = integer\nschedule = 1",
        "task_queues = a\n[celeryqueue:a]\n",
    ],
)
def test_an_option_and_a_section_for_the_same_name_are_two(faults, text):
    (fault,) = faults(f"[celery]\n{text}\n")

    assert "app.ini:2 has 'a' as well; keep one of them" in str(fault)


def test_a_key_of_the_application_and_the_same_in_celery_are_two(ini):
    path = ini("[app:main]\ncelery.worker_concurrency = 1\n[celery]\nworker_concurrency = 2\n")

    with pytest.raises(ConfigurationError) as caught:
        read_configuration(path, {"celery.worker_concurrency": "1"})

    (fault,) = caught.value.faults
    assert (fault.section, fault.line) == ("app:main", 2)
    assert "app.ini:4 sets it as well" in str(fault)


# The application's section


def test_the_section_of_the_application_has_options_too(ini):
    path = ini(
        """
        [app:main]
        celery.broker_url = ${NOT_SET:-memory://}
        celery.broker_transport_options.visibility_timeout = 5m
        celery.CELERYD_CONCURRENCY = 3
        other = %(unknown)s
        """
    )

    settings = read_configuration(path).settings

    assert settings == {
        "broker_url": "memory://",
        "broker_transport_options": {"visibility_timeout": 300},
        "worker_concurrency": 3,
    }


def test_python_values_are_checked_as_texts_are():
    given = {"celery.broker_url": "memory://", "celery.task_acks_late": True}

    assert read_configuration(None, given).settings["task_acks_late"] is True
    with pytest.raises(ConfigurationError, match="is of the type bool; expected a whole number"):
        read_configuration(None, {**given, "celery.worker_concurrency": True})


def test_a_key_of_a_mapping_may_be_any_value_of_python():
    given = {"celery.broker_url": "memory://", "celery.broker_transport_options.any": True}

    settings = read_configuration(None, given).settings

    assert settings["broker_transport_options"] == {"any": True}


@pytest.mark.parametrize("routes", [5, [None], ["a", "b", 3], [["a", "b", "c"]], {"a": 5}])
def test_routes_of_python_that_are_none_are_refused(routes):
    given = {"celery.broker_url": "memory://", "celery.task_routes": routes}

    with pytest.raises(ConfigurationError, match="task_routes"):
        read_configuration(None, given)


def test_an_unknown_setting_of_ours_is_refused(ini):
    path = ini("[app:main]\nws_celery.config_ur = x\n[celery]\nbroker_url = memory://\n")

    with pytest.raises(ConfigurationError, match=r"Did you mean ws_celery\.config_uri\?"):
        read_configuration(path)


def test_overrides_beat_the_file(ini):
    path = ini("[celery]\nbroker_url = memory://\nworker_concurrency = 2\nimports = a\n")

    configuration = read_configuration(path, {}, {"worker_concurrency": 5, "imports": ["b"]})

    assert configuration.settings["worker_concurrency"] == 5
    assert configuration.settings["imports"] == ("b",)
    (row,) = (row for row in configuration.rows if row.name == "worker_concurrency")
    assert row.place.file == "configure_celery()"


# Files that include others


def test_a_file_shares_and_overrides_another(ini):
    base = """
        [DEFAULT]
        host = base
        [celery]
        broker_url = redis://%(host)s/0
        BROKER_HEARTBEAT = 5
        beat_schedule_filename = %(here)s/beat
        broker_transport_options = {"a": 1, "b": 1}
        [celeryroute:x]
        queue = base
        priority = 1
        [celerybeat:off]
        task = t
        type = integer
        schedule = 1
        [celerybeat:on]
        task = t
        type = integer
        schedule = 1
        """
    ini(base, "base.ini")
    path = ini(
        """
        [DEFAULT]
        host = production
        [celery]
        use = config:base.ini
        broker_heartbeat = 10
        [celery:broker_transport_options]
        b = 2
        [celeryroute:x]
        queue = mine
        [celerybeat:off]
        enabled = false
        """
    )

    configuration = read_configuration(path)

    assert configuration.settings["broker_url"] == "redis://production/0"
    assert configuration.settings["broker_heartbeat"] == 10
    assert configuration.settings["broker_transport_options"] == {"a": 1, "b": 2}
    assert configuration.settings["task_routes"] == {"x": {"queue": "mine", "priority": 1}}
    assert list(configuration.settings["beat_schedule"]) == ["on"]
    (row,) = (row for row in configuration.rows if row.name == "broker_url")
    assert row.place.file.endswith("base.ini")
    assert row.place.line == 4


def test_a_file_gives_an_entry_another_type_of_schedule(ini):
    ini(
        """
        [celery]
        broker_url = memory://
        [celerybeat:a]
        task = t
        type = crontab
        schedule = 0 3 * * *
        timezone = Europe/Berlin
        """,
        "base.ini",
    )

    def read(lines):
        path = ini(f"[celery]\nuse = config:base.ini\n[celerybeat:a]\n{lines}")
        return read_configuration(path)

    interval = read("type = timedelta\nschedule = 1h")
    later = read("schedule = 0 4 * * *")
    same = read("type = crontab\nschedule = 0 5 * * *")

    assert interval.entries["a"] == {"task": "t", "type": "timedelta", "schedule": "1h"}
    assert interval.settings["beat_schedule"]["a"]["schedule"] == timedelta(hours=1)
    for configuration, hour in ((later, 4), (same, 5)):
        schedule = configuration.settings["beat_schedule"]["a"]["schedule"]
        assert (str(schedule.tz), schedule.hour) == ("Europe/Berlin", {hour})
    with pytest.raises(ConfigurationError, match="schedule is missing"):
        read("type = timedelta")


def test_a_circle_of_files_is_named(ini):
    ini("[celery]\nuse = config:app.ini\n", "base.ini")

    path = ini("[celery]\nbroker_url = memory://\nuse = config:base.ini\n")
    with pytest.raises(ConfigurationError) as caught:
        read_configuration(path)

    (fault,) = caught.value.faults
    assert "includes itself (app.ini -> base.ini -> app.ini)" in str(fault)
    assert (fault.line, fault.key, fault.value) == (2, "use", "config:app.ini")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("config:gone.ini", "there is no such file"),
        ("egg:myapp", "expected config:FILE"),
        ("config:", "expected config:FILE"),
    ],
)
def test_a_file_that_cannot_be_included_is_named(faults, value, words):
    (fault,) = faults(f"[celery]\nbroker_url = memory://\nuse = {value}\n")

    assert fault.line == 3
    assert words in str(fault)


# Variables


def test_variables_of_the_file_are_replaced(ini, tmp_path):
    path = ini(
        """
        [DEFAULT]
        host = localhost
        [celery]
        broker_url = redis://%(host)s/0
        beat_schedule_filename = %(here)s/beat
        worker_state_db = %(__file__)s.state
        worker_log_format = %%(message)s
        get task_default_queue = host
        """
    )

    settings = read_configuration(path).settings

    assert settings["broker_url"] == "redis://localhost/0"
    assert settings["beat_schedule_filename"] == f"{tmp_path}/beat"
    assert settings["worker_state_db"] == f"{path}.state"
    assert settings["worker_log_format"] == "%(message)s"
    assert settings["task_default_queue"] == "localhost"


def test_a_directory_with_a_percent_sign_is_a_directory(tmp_path):
    folder = tmp_path / "100%"
    folder.mkdir()
    path = folder / "app.ini"
    path.write_text("[celery]\nbroker_url = memory://\nbeat_schedule_filename = %(here)s/x\n")

    assert read_configuration(str(path)).settings["beat_schedule_filename"] == f"{folder}/x"


def test_variables_of_the_command_line_beat_those_of_the_file(ini, monkeypatch):
    path = ini("[DEFAULT]\nhost = file\n[celery]\nbroker_url = redis://:%(pw)s@%(host)s/0\n")
    monkeypatch.setenv(INI_VARIABLES, '{"host": "command", "pw": "50%off"}')

    assert read_configuration(path).settings["broker_url"] == "redis://:50%off@command/0"


def test_variables_of_the_environment_are_replaced_in_our_sections(ini, monkeypatch):
    monkeypatch.setenv("MY_HOST", "somewhere")
    monkeypatch.delenv("MY_QUEUE", raising=False)
    path = ini(
        """
        [celery]
        broker_url = redis://${MY_HOST}/0
        task_default_queue = ${MY_QUEUE:-fallback}
        worker_state_db = $${MY_HOST}$
        [celeryroute:x]
        queue = ${MY_HOST}
        """
    )

    settings = read_configuration(path).settings

    assert settings["broker_url"] == "redis://somewhere/0"
    assert settings["task_default_queue"] == "fallback"
    assert settings["worker_state_db"] == "${MY_HOST}$"
    assert settings["task_routes"] == {"x": {"queue": "somewhere"}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("${NOT_SET_AT_ALL}", "the environment variable NOT_SET_AT_ALL is not set"),
        ("${NOT_CLOSED", "begins neither ${NAME} nor ${NAME:-DEFAULT}"),
        ("${}", "begins neither"),
        ("%(nothing)s", "%(nothing)s is not set; set it in [DEFAULT] or with --ini-var"),
        ("100%", "write %% for a percent sign"),
        ("%(task_default_queue)s", "write %% for a percent sign"),
    ],
)
def test_a_variable_without_a_value_is_refused(faults, text, words):
    (fault,) = faults(f"[celery]\nbroker_url = memory://\ntask_default_queue = {text}\n")

    assert (fault.line, fault.key) == (3, "task_default_queue")
    assert words in str(fault)


# What the environment beats


@pytest.mark.parametrize("variable", ["BROKER_URL", "CELERY_BROKER_URL"])
def test_a_variable_that_beats_the_file_is_obeyed_and_told(read, monkeypatch, caplog, variable):
    monkeypatch.setenv(variable, "redis://:hunter2@elsewhere/0")

    with caplog.at_level(logging.WARNING):
        configuration = read("")
        configuration.report()

    assert configuration.settings["broker_url"] == "redis://:hunter2@elsewhere/0"
    (message,) = caplog.messages
    assert f"{variable} = redis://:********@elsewhere/0 beats broker_url = memory://" in message
    assert "app.ini:2" in message
    assert "hunter2" not in message


def test_a_variable_is_enough_for_a_broker(monkeypatch):
    monkeypatch.setenv("CELERY_BROKER_URL", "memory://")

    configuration = read_configuration(None, {})

    (override,) = configuration.overrides
    assert str(override) == "environment: CELERY_BROKER_URL = memory:// sets broker_url"


def test_two_variables_that_differ_are_refused(read, monkeypatch):
    monkeypatch.setenv("RESULT_BACKEND", "redis://one")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "redis://two")

    with pytest.raises(ConfigurationError, match="are both set, and differ"):
        read("")


@pytest.mark.parametrize("url", ["localhost", "embedded:///tmp/x", "none"])
def test_a_variable_with_a_bad_value_is_refused(read, monkeypatch, url):
    monkeypatch.setenv("CELERY_BROKER_URL", url)

    with pytest.raises(ConfigurationError, match="environment: CELERY_BROKER_URL"):
        read("")


# Names


def test_old_names_are_told_once(read, caplog):
    configuration = read("CELERYD_CONCURRENCY = 2\nCELERY_IMPORTS = a\n")

    with caplog.at_level(logging.WARNING):
        configuration.report()

    (message,) = caplog.messages
    assert "CELERYD_CONCURRENCY is worker_concurrency, CELERY_IMPORTS is imports" in message


# What is missing


def test_a_missing_section_is_told_with_the_remedy(faults):
    (fault,) = faults("[app:main]\n")

    assert "the section [celery] is missing. Set broker_url in the [celery] section" in str(fault)


def test_a_missing_broker_is_told_with_the_remedy(faults):
    (fault,) = faults("[celery]\nimports = a\n")

    assert "no broker is configured. Set broker_url" in str(fault)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ConfigurationError, match=r"gone\.ini: there is no such file"):
        read_configuration(str(tmp_path / "gone.ini"))


def test_a_file_of_another_kind_is_told(tmp_path):
    with pytest.raises(ConfigurationError, match="expected an INI file"):
        read_configuration(str(tmp_path / "app.toml"))


# Celery's own Python module


def test_the_module_of_celery_is_read_if_the_file_asks_for_it(read, tmp_path, monkeypatch):
    module = tmp_path / "lib" / "celeryconfig.py"
    module.parent.mkdir()
    module.write_text(
        "import os\n"
        "from celery.schedules import crontab\n"
        "CELERYD_CONCURRENCY = 3\n"
        "worker_prefetch_multiplier = 2\n"
        "beat_schedule = {'a': {'task': 't', 'schedule': crontab(minute=0)}}\n"
        "def helper(): pass\n"
    )
    monkeypatch.syspath_prepend(str(module.parent))

    settings = read("USE_CELERYCONFIG = True\nworker_prefetch_multiplier = 1\n").settings
    del sys.modules["celeryconfig"]

    assert settings["worker_concurrency"] == 3
    assert settings["worker_prefetch_multiplier"] == 1
    assert settings["beat_schedule"]["a"]["schedule"] == crontab(minute=0)


def test_the_module_of_celery_is_found_beside_the_file(read, tmp_path):
    (tmp_path / "celeryconfig.py").write_text("worker_concurrency = 3\n")

    configuration = read("use_celeryconfig = true\n")

    place = configuration.place("worker_concurrency")
    assert configuration.settings["worker_concurrency"] == 3
    assert place.file == str(tmp_path / "celeryconfig.py")
    assert "celeryconfig" not in sys.modules


def test_the_module_of_celery_may_have_another_name(read, tmp_path, monkeypatch, caplog):
    (tmp_path / "settings_of_celery.py").write_text("worker_concurrency = 3\n")
    (tmp_path / "others_of_celery.py").write_text("worker_concurrency = 4\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = "use_celeryconfig = true\nCELERY_CONFIG_MODULE = settings_of_celery\n"

    named = read(text)
    monkeypatch.setenv("CELERY_CONFIG_MODULE", "others_of_celery")
    overridden = read(text)
    overridden.report()

    assert named.settings["worker_concurrency"] == 3
    assert overridden.settings["worker_concurrency"] == 4
    assert caplog.messages == [
        "environment: CELERY_CONFIG_MODULE = others_of_celery names the module that is read"
    ]


def test_a_module_of_celery_that_is_not_read_is_told(read, tmp_path, monkeypatch, caplog):
    module = tmp_path / "celeryconfig.py"
    module.write_text("raise SystemExit\n")

    read("").report()
    read("use_celeryconfig = false\n").report()
    monkeypatch.setenv("CELERY_CONFIG_MODULE", "shop.celeryconfig")
    read("").report()

    remedy = "is not read; set use_celeryconfig = true in [celery], or"
    assert caplog.messages == [
        f"{module} {remedy} remove it",
        f"environment: CELERY_CONFIG_MODULE = shop.celeryconfig {remedy} unset it",
    ]


def test_a_module_of_celery_that_is_missing_is_told(faults):
    (fault,) = faults("[celery]\nbroker_url = memory://\nuse_celeryconfig = true\n")

    assert "the module celeryconfig cannot be imported (ModuleNotFoundError" in str(fault)
    assert "; expected celeryconfig.py beside this file, or a module on Python's path" in str(fault)
    assert fault.line == 3


def test_what_could_be_read_is_there_although_something_is_wrong(ini):
    configuration, found = survey(ini("[celery]\nbroker_url = memory://\nx = 1\n"))

    assert configuration.settings == {"broker_url": "memory://"}
    assert len(found) == 1


def test_the_section_of_the_application_is_interpolated_once(ini):
    path = ini("[app:main]\ncelery.task_default_queue = $${A}\n[celery]\nbroker_url = memory://\n")
    settings = {"celery.task_default_queue": "$${A}"}

    assert read_configuration(path).settings["task_default_queue"] == "${A}"
    assert read_configuration(path, settings).settings["task_default_queue"] == "${A}"


# What a mapping has inside


@pytest.mark.parametrize(
    ("option", "text", "lines", "expected"),
    [
        (
            "broker_transport_options",
            '{"visibility_timeout": "43200", "fanout_prefix": "false", "max_connections": 5}',
            "visibility_timeout = 43200\nfanout_prefix = false\nmax_connections = 5",
            {"visibility_timeout": 43200, "fanout_prefix": False, "max_connections": 5},
        ),
        (
            "result_backend_transport_options",
            '{"retry_policy": {"timeout": "5s", "max_retries": null}, "global_keyprefix": "a-"}',
            "retry_policy.timeout = 5s\nretry_policy.max_retries = none\nglobal_keyprefix = a-",
            {"retry_policy": {"timeout": 5, "max_retries": None}, "global_keyprefix": "a-"},
        ),
        (
            "broker_use_ssl",
            '{"cert_reqs": "ssl.CERT_REQUIRED", "ssl_version": "PROTOCOL_TLS_CLIENT"}',
            "cert_reqs = CERT_REQUIRED\nssl_version = ssl.PROTOCOL_TLS_CLIENT",
            {"cert_reqs": ssl.CERT_REQUIRED, "ssl_version": ssl.PROTOCOL_TLS_CLIENT},
        ),
        (
            "redis_backend_use_ssl",
            '{"ssl_cert_reqs": "required", "ssl_check_hostname": "no"}',
            "ssl_cert_reqs = required\nssl_check_hostname = no",
            {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": False},
        ),
        (
            "task_publish_retry_policy",
            '{"max_retries": "3", "interval_step": "0.5"}',
            "max_retries = 3\ninterval_step = 0.5",
            {"max_retries": 3, "interval_step": 0.5},
        ),
        (
            "database_engine_options",
            '{"pool_recycle": "-1", "pool_size": "5", "pool_timeout": "1m", "connect_args": {}}',
            "pool_recycle = -1\npool_size = 5\npool_timeout = 1m\nconnect_args = {}",
            {"pool_recycle": -1, "pool_size": 5, "pool_timeout": 60, "connect_args": {}},
        ),
        (
            "mongodb_backend_settings",
            '{"database": "7", "max_connections": "4", "x": 1}',
            "database = 7\nmax_connections = 4\nx = 1",
            {"database": "7", "max_connections": 4, "x": 1},
        ),
    ],
)
def test_json_and_section_of_a_mapping_are_the_same(read, option, text, lines, expected):
    in_json = read(f"{option} = {text}\n").settings[option]
    in_section = read(f"[celery:{option}]\n{lines}\n").settings[option]

    assert in_json == in_section == expected
    assert repr(in_json) == repr(in_section) == repr(expected)  # the types, too


@pytest.mark.parametrize(
    ("option", "text", "line", "words"),
    [
        ("broker_transport_options", '{"visibilty_timeout": 43200}', "visibilty_timeout = 43200",
         "Did you mean visibility_timeout?"),
        ("broker_transport_options", '{"visibility_timeout": "soon"}', "visibility_timeout = soon",
         "expected seconds, or a period"),
        ("broker_transport_options", '{"socket_keepalive_options": {"TCP_KEEPIDEL": 60}}',
         'socket_keepalive_options = {"TCP_KEEPIDEL": 60}', "Did you mean TCP_KEEPIDLE?"),
        ("broker_transport_options", '{"socket_keepalive_options": 1}',
         "socket_keepalive_options.TCP_KEEPIDLE = 60", "a JSON object"),
        ("result_backend_transport_options", '{"retry_policy": {"timout": 5}}',
         "retry_policy.timout = 5", "Did you mean timeout?"),
        ("result_backend_transport_options", '{"master_nam": "a"}', "master_nam = a",
         "Did you mean master_name?"),
        ("broker_use_ssl", '{"ca_cert": "/a"}', "ca_cert = /a", "Did you mean ca_certs?"),
        ("broker_use_ssl", '{"cert_reqs": "ssl.CERT_REQUIRE"}', "cert_reqs = ssl.CERT_REQUIRE",
         "Did you mean CERT_REQUIRED?"),
        ("redis_backend_use_ssl", '{"ssl_cert_reqs": 7}', "ssl_cert_reqs = 7",
         "one of CERT_NONE, CERT_OPTIONAL, CERT_REQUIRED"),
        ("task_publish_retry_policy", '{"max_retries": "many"}', "max_retries = many",
         "a whole number of at least 0, or none"),
        ("task_publish_retry_policy", '{"errback": "a"}', "errback = a", "not known"),
        ("database_engine_options", '{"pool_sizes": 1}', "pool_sizes = 1", "mean pool_size?"),
        ("database_table_names", '{"tasks": "a"}', "tasks = a", "Did you mean task?"),
    ],
)  # fmt: skip
def test_json_and_section_of_a_mapping_refuse_the_same(faults, option, text, line, words):
    broker = "[celery]\nbroker_url = memory://\n"
    (in_json,) = faults(f"{broker}{option} = {text}\n")
    (in_section,) = faults(f"{broker}[celery:{option}]\n{line}\n")

    assert (in_json.line, in_section.line) == (3, 4)
    for fault in (in_json, in_section):
        said = str(fault).replace("has the unknown key errback", "this key is not known")
        assert words in said


def test_options_of_sockets_are_the_constants_that_redis_takes(read):
    options = read(
        'broker_transport_options = {"socket_keepalive_options": {"TCP_KEEPIDLE": 60}}'
    ).settings["broker_transport_options"]

    assert options == {"socket_keepalive_options": {socket.TCP_KEEPIDLE: 60}}


def test_mappings_of_python_are_checked_likewise():
    policy = {"retry_errors": (TimeoutError,), "max_retries": 1}
    options = {
        "socket_keepalive_options": {socket.TCP_KEEPIDLE: 60},
        "credential_provider": object(),
    }
    settings = read_configuration(
        None,
        overrides={
            "broker_url": "memory://",
            "task_publish_retry_policy": policy,
            "broker_transport_options": options,
            "broker_use_ssl": {"ssl_cert_reqs": None},
        },
    ).settings

    assert settings["task_publish_retry_policy"] == policy
    assert settings["broker_transport_options"] == options
    assert settings["broker_use_ssl"] == {"ssl_cert_reqs": None}
    with pytest.raises(ConfigurationError, match="Did you mean visibility_timeout"):
        read_configuration(
            None,
            overrides={
                "broker_url": "memory://",
                "broker_transport_options": {"visibilty_timeout": 1},
            },
        )


def test_a_time_of_python_that_utc_does_not_have_is_a_fault():
    last = datetime.max.replace(tzinfo=timezone(timedelta(hours=-2)))
    entry = {"task": "t", "schedule": 10.0, "starts_at": last}

    with pytest.raises(ConfigurationError, match="is not within the years 1 to 9999 in UTC"):
        read_configuration(
            None, overrides={"broker_url": "memory://", "beat_schedule": {"a": entry}}
        )


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ('[celeryqueue:a]\nqueue_arguments = {"x-message-ttl": "soon"}', "a whole number"),
        ('[celeryqueue:a]\nqueue_arguments = {"x-queue-tpye": "quorum"}', "mean x-queue-type?"),
        ('[celeryroute:a]\nretry_policy = {"max_retries": "many"}', "a whole number"),
        ('[celerybeat:a]\ntask = t\ntype = integer\nschedule = 1\n'
         'options = {"retry_policy": {"max_retrys": 1}}', "Did you mean max_retries?"),
    ],
)  # fmt: skip
def test_mappings_of_other_sections_are_checked_likewise(faults, section, words):
    (fault,) = faults(f"[celery]\nbroker_url = memory://\n{section}")

    assert words in str(fault)


# What stands around a value


@pytest.mark.parametrize(
    ("section", "line", "meant"),
    [
        ("celery", "broker_url = amqp://h// ; main", "broker_url = amqp://h//"),
        ("celery", "broker_url = amqp://h//\t;main", "broker_url = amqp://h//"),
        ("celery", 'broker_url = "redis://h/0"', "broker_url = redis://h/0"),
        ("celery", "result_backend = db+sqlite:////r.db # x", "result_backend = db+sqlite:////r.db"),
        ("celery", "result_backend = 'redis://h/0'", "result_backend = redis://h/0"),
        ("celery", "database_url = sqlite:///x ; y", "database_url = sqlite:///x"),
        ("celery", "task_default_queue = slow ; slow things", "task_default_queue = slow"),
        ("celery", "task_queues = fast, slow ; two", "task_queues = fast, slow"),
        ("celery", "task_queues = 'fast'", "task_queues = fast"),
        ("celery", 'task_queues = "fast", slow', "fast"),
        ("celery", "imports = shop.tasks # all", "imports = shop.tasks"),
        ("celery", "imports =\n  shop.tasks ; some\n  shop.more", "shop.tasks"),
        ("celery", "task_acks_late = true ; always", "task_acks_late = true"),
        ("celery", 'task_acks_late = "true"', "task_acks_late = true"),
        ("celery", "worker_concurrency = 4 # four", "worker_concurrency = 4"),
        ("celery", "timezone = 'Europe/Berlin'", "timezone = Europe/Berlin"),
        ("celery", "worker_pool = prefork ; x", "worker_pool = prefork"),
        ("celery", 'task_routes = {"a": "b ; c"} ; d', 'task_routes = {"a": "b ; c"}'),
        ("celeryroute:a", "queue = slow ; slow things", "queue = slow"),
        ("celeryroute:a", 'queue = "slow"', "queue = slow"),
        ("celeryqueue:a", "exchange = b #c", "exchange = b"),
        ("celeryannotate:a", "rate_limit = 10/m ; slow", "rate_limit = 10/m"),
        ("celerybeat:a", "task = t ; x\ntype = integer\nschedule = 1", "task = t"),
        ("celerybeat:a", "schedule = 0 3 * * * ; at 3\ntype = crontab\ntask = t",
         "schedule = 0 3 * * *"),
        ("celerybeat:a", 'schedule = {"hours": 1} # x\ntype = timedelta\ntask = t',
         'schedule = {"hours": 1}'),
        ("celery:broker_transport_options", 'client_name = "shop"', "client_name = shop"),
        ("celery:broker_transport_options", 'global_keyprefix = "a-"', "global_keyprefix = a-"),
        ("celery:broker_transport_options", "unknown = 'shop-'", "unknown = shop-"),
        ("celery:broker_transport_options", "unknown = a ; b", "unknown = a"),
        ("celery:broker_transport_options", 'unknown = "a ; b" ; c', 'unknown = "a ; b"'),
        ("app:main", "ws_celery.locks = redis://h/2 ; locks", "ws_celery.locks = redis://h/2"),
        ("app:main", 'ws_celery.dbsession = "db"', "ws_celery.dbsession = db"),
        ("app:main", "celery.timezone = UTC ; x", "celery.timezone = UTC"),
    ],
)  # fmt: skip
def test_comments_behind_a_value_and_quotes_are_refused_with_the_line(faults, section, line, meant):
    broker = "" if line.startswith("broker_url") else "broker_url = memory://\n"
    heading = "" if section == "celery" else f"[{section}]\n"
    (fault,) = faults(f"[celery]\n{broker}{heading}{line}\n")

    assert fault.nearest == meant
    assert fault.problem.startswith(
        ("has a comment behind it", "has quotes around it", 'has "fast"')
    )


@pytest.mark.parametrize("value", ["amqp://u:s3cret@h// ; main", '"amqp://u:s3cret@h//"'])
def test_the_line_as_it_should_be_shows_no_secret(faults, value):
    (fault,) = faults(f"[celery]\nbroker_url = {value}\n")

    assert fault.nearest == "broker_url = amqp://u:********@h//"
    assert "s3cret" not in str(fault)


@pytest.mark.parametrize("option", ["broker_url", "result_backend", "database_url"])
def test_a_url_has_no_blanks(faults, option):
    broker = "" if option == "broker_url" else "broker_url = memory://\n"
    (fault,) = faults(f"[celery]\n{broker}{option} = redis://localhost/my queue\n")

    assert fault.problem == "has a blank, which a URL writes as %20"


def test_signs_that_belong_to_a_value_stay(read, ini):
    configuration = read(
        """
        result_backend = redis://:pa;ss#word@h/0
        redis_password = "half ; a #secret"
        worker_log_format = [%%(levelname)s] %%(message)s # %%(process)d ; x
        task_routes = {"a": {"queue": "b ; c #d"}}
        [celeryroute:shop.*]
        routing_key = #
        [celeryroute:other.*]
        routing_key = shop.#
        queue = a;b#c
        [celeryroute:third]
        queue = #1
        [celerybeat:a]
        task = t
        type = crontab
        schedule = */5 * * * *
        description = "Mails" ; the #1 job, and "more"
        kwargs =
            {"text": "a ; b # c",
             "more": "d ; e"}
        [celery:broker_transport_options]
        unknown = "a ; b"
        password = 'x' #y
        predefined_queues = {"a": {"url": "x ; y"}}
        """
    )

    settings = configuration.settings
    assert settings["result_backend"] == "redis://:pa;ss#word@h/0"
    assert settings["redis_password"] == '"half ; a #secret"'  # noqa: S105 - of nobody
    assert settings["worker_log_format"].endswith("# %(process)d ; x")
    assert settings["task_routes"] == {
        "a": {"queue": "b ; c #d"},
        "shop.*": {"routing_key": "#"},
        "other.*": {"routing_key": "shop.#", "queue": "a;b#c"},
        "third": {"queue": "#1"},
    }
    assert settings["beat_schedule"]["a"]["kwargs"] == {"text": "a ; b # c", "more": "d ; e"}
    assert configuration.entries["a"]["description"] == '"Mails" ; the #1 job, and "more"'
    assert settings["broker_transport_options"] == {
        "unknown": "a ; b",
        "password": "'x' #y",
        "predefined_queues": {"a": {"url": "x ; y"}},
    }
    path = ini("[celery]\nbroker_url = amqp://one; amqp://two;amqp://three\n")
    urls = read_configuration(path).settings["broker_url"]
    assert urls == ["amqp://one", "amqp://two;amqp://three"]


def test_commands_may_have_signs_in_quotes_only(ini, faults):
    text = "[celery]\nbroker_url = memory://\n[app:main]\nws_celery.commands =\n  "
    read_configuration(ini(f"{text}a = sh -c 'one ; two # three'\n  b = find -exec rm '{{}}' ';'"))

    (fault,) = faults(f"{text}a = backup all ; each night")

    assert "has a with ; or # before a word" in str(fault)


@pytest.mark.parametrize(
    ("option", "url", "meant"),
    [
        ("broker_url", "sqlite:///x", "sqla+sqlite:///x"),
        ("broker_url", "postgresql+psycopg://h/x", "sqla+postgresql+psycopg://h/x"),
        ("broker_write_url", "mysql://h/x", "sqla+mysql://h/x"),
        ("result_backend", "sqlite:///x", "db+sqlite:///x"),
        ("result_backend", "postgres://u:s3cret@h/x", "db+postgresql://u:********@h/x"),
        ("result_backend", "mariadb+pymysql://h/x", "db+mariadb+pymysql://h/x"),
    ],
)
def test_the_url_of_a_database_is_answered_with_the_one_that_celery_takes(
    faults, option, url, meant
):
    broker = "" if option == "broker_url" else "broker_url = memory://\n"
    (fault,) = faults(f"[celery]\n{broker}{option} = {url}\n")

    assert (fault.problem, fault.nearest) == ("is the URL of a database", meant)
    assert "s3cret" not in str(fault)
