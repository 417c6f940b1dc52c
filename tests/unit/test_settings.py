"""Sections, files, names and places: what the configuration is, and what is wrong with it."""

from __future__ import annotations

import logging
import sys
import textwrap
from datetime import timedelta

import pytest
from celery.schedules import crontab
from kombu import Exchange, Queue

from ws_celery.exceptions import ConfigurationError
from ws_celery.settings import INI_VARIABLES, read_configuration, survey


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
        retry_policy.inner.deep = {"a": null}
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
        "retry_policy": {"timeout": 5.0, "inner": {"deep": {"a": None}}},
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
        ("[celery:broker_transport_options]\nvisibility_timeout = soon", "expected seconds"),
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


@pytest.mark.parametrize("url", ["localhost", "embedded:///tmp/x"])
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
    module = tmp_path / "celeryconfig.py"
    module.write_text(
        "import os\n"
        "from celery.schedules import crontab\n"
        "CELERYD_CONCURRENCY = 3\n"
        "worker_prefetch_multiplier = 2\n"
        "beat_schedule = {'a': {'task': 't', 'schedule': crontab(minute=0)}}\n"
        "def helper(): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    settings = read("USE_CELERYCONFIG = True\nworker_prefetch_multiplier = 1\n").settings
    del sys.modules["celeryconfig"]

    assert settings["worker_concurrency"] == 3
    assert settings["worker_prefetch_multiplier"] == 1
    assert settings["beat_schedule"]["a"]["schedule"] == crontab(minute=0)


def test_a_module_of_celery_that_is_missing_is_told(faults):
    (fault,) = faults("[celery]\nbroker_url = memory://\nuse_celeryconfig = true\n")

    assert "the module celeryconfig cannot be imported (ModuleNotFoundError" in str(fault)
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
