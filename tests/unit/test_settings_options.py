"""Every option of Celery: one text that is accepted, one that is refused."""

from __future__ import annotations

import logging
import re
import ssl
from datetime import timedelta

import pytest
from celery import Celery
from celery.app.defaults import DEFAULTS, NAMESPACES, flatten
from celery.schedules import crontab
from kombu import Exchange, Queue
from tests.sections import celery_settings

from ws_celery.exceptions import ConfigurationError
from ws_celery.settings.options import KINDS, MISSING, OLD_NAMES, OPTIONS, REMOVED, find_option

#: Text, the Python value that it stands for, and a text that is refused, for each kind by name.
KIND_EXAMPLES = {
    "URL": ("redis://localhost/0", "redis://localhost/0", "localhost"),
    "bool": ("off", False, "maybe"),
    "bool or dict": (
        '{"ssl_cert_reqs": "CERT_REQUIRED"}',
        {"ssl_cert_reqs": ssl.CERT_REQUIRED},
        "perhaps",
    ),
    "bytes": ("a phrase", b"a phrase", "two\nlines"),
    "callable": ("logging:getLogger", logging.getLogger, "logging:get_logger"),
    "class": ("myapp.classes:Special", "myapp.classes:Special", "no class"),
    "compression": ("gzip", "gzip", "gzp"),
    "delivery mode": ("1", 1, "3"),
    "dict": ('{"a": {"b": [1, null]}}', {"a": {"b": [1, None]}}, "[1]"),
    "exchange type": ("Topic", "topic", "tropic"),
    "failover strategy": ("shuffle", "shuffle", "at once"),
    "float": ("1.5", 1.5, "nan"),
    "format": ("%(message)s", "%(message)s", "%(message)"),
    "int": ("7", 7, "7.5"),
    "level": ("info", "INFO", "loud"),
    "list": ("one, two\n three", ["one", "two", "three"], "[1, 2]"),
    "method": ("spawn", "spawn", "forkserver"),
    "queue type": ("quorum", "quorum", "quorate"),
    "rate": ("10/m", "10/m", "10/fortnight"),
    "seconds": ("1h30m", 5400, "later"),
    "serializer": ("json", "json", "jsn"),
    "text": ("some words", "some words", "two\nlines"),
    "timezone": ("Europe/Berlin", "Europe/Berlin", "Europe/Berlni"),
    "transport": ("redis", "redis", "reds"),
    "tuple": ("one.tasks\n  two.tasks,", ("one.tasks", "two.tasks"), "one tasks.py/"),
}

#: The same for options that are unlike the others of their kind.
EXAMPLES = {
    "accept_content": ("json, application/x-yaml", ["json", "application/x-yaml"], "json, jsn"),
    "result_accept_content": ("json", ["json"], "xml"),
    "beat_schedule": (
        '{"backup": {"task": "backup", "schedule": 30},'
        ' "night": {"task": "tidy", "type": "crontab", "schedule": "0 3 * * *"}}',
        {
            "backup": {
                "task": "backup",
                "schedule": timedelta(seconds=30),
                "args": [],
                "kwargs": {},
                "options": {},
            },
            "night": {
                "task": "tidy",
                "schedule": crontab(0, 3),
                "args": [],
                "kwargs": {},
                "options": {},
            },
        },
        '{"backup": {"task": "backup"}}',
    ),
    "broker_url": (
        "amqp://one//\n amqp://two//",
        ["amqp://one//", "amqp://two//"],
        "reds://localhost",
    ),
    "cosmosdbsql_consistency_level": ("eventual", "Eventual", "always"),
    **dict.fromkeys(
        ("database_table_names", "database_table_schemas"),
        ('{"task": "results"}', {"task": "results"}, '{"tasks": "results"}'),
    ),
    "database_url": ("postgresql://localhost/c", "postgresql://localhost/c", "localhost"),
    "result_backend": ("redis://localhost/1", "redis://localhost/1", "reds://localhost/1"),
    "result_backend_max_retries": ("inf", float("inf"), "-1"),
    "result_cache_max": ("-1", -1, "-2"),
    "result_expires": ("none", None, "some day"),
    "task_annotations": (
        '{"*": {"rate_limit": "10/s"}}',
        {"*": {"rate_limit": "10/s"}},
        '{"*": "10/s"}',
    ),
    "task_protocol": ("2", 2, "3"),
    "task_publish_retry_policy": ('{"max_retries": 5}', {"max_retries": 5}, '{"retries": 5}'),
    "task_queues": (
        "fast, slow",
        [Queue(name, Exchange(name), name) for name in ("fast", "slow")],
        '{"fast": {"rooting_key": "x"}}',
    ),
    "task_routes": (
        '[["a.*", {"queue": "a"}], ["b", "c"]]',
        [("a.*", {"queue": "a"}), ("b", "c")],
        '{"a": 1}',
    ),
    "timezone": KIND_EXAMPLES["timezone"],
    "worker_concurrency": ("4", 4, "many"),
    "worker_pool": ("gevent", "gevent", "gevnt"),
}


def examples(name):
    return EXAMPLES.get(name) or KIND_EXAMPLES[OPTIONS[name].name]


def read(**options):
    return celery_settings({"celery": options}, "app.ini")


def test_the_table_has_all_options_of_this_celery():
    assert set(DEFAULTS) | set(MISSING) == set(OPTIONS)


def test_every_type_that_celery_declares_has_a_kind():
    assert {option.type for _, option in flatten(NAMESPACES)} <= set(KINDS)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_each_option_takes_a_text_and_has_the_type_that_celery_wants(name):
    text, expected, _ = examples(name)

    value = read(**{name: text})[name]

    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_each_option_refuses_what_is_of_another_kind(name):
    *_, wrong = examples(name)

    with pytest.raises(ConfigurationError) as caught:
        read(**{name: wrong})

    (fault,) = caught.value.faults
    assert fault.file == "app.ini"
    assert (fault.section, fault.key.partition(" ")[0]) == ("celery", name)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_each_kind_has_an_example_that_it_accepts(name):
    kind = OPTIONS[name]

    kind.accept(kind.example)
    assert kind.expected


def test_the_configuration_from_texts_is_the_one_from_python_values():
    texts = {name: examples(name)[0] for name in OPTIONS}
    values = {name: examples(name)[1] for name in OPTIONS}
    from_texts, from_values = (Celery(set_as_current=False) for _ in range(2))

    from_texts.config_from_object(read(**texts))
    from_values.config_from_object(values)

    for name in OPTIONS:
        assert from_texts.conf[name] == from_values.conf[name], name


def test_none_is_a_value_where_celery_knows_none():
    for name, kind in OPTIONS.items():
        if type(None) in kind.types:
            assert read(**{name: "None"})[name] is None


@pytest.mark.parametrize(
    "name",
    sorted(
        name
        for name, kind in OPTIONS.items()
        if re.search(
            "_(timeout|interval|expires|ttl|time_limit|wait|heartbeat|deadline|sec)$", name
        )
        and kind.name != "bool"
    ),
)
def test_every_time_may_be_a_period(name):
    assert read(**{name: "4s"})[name] == 4


def test_a_time_in_whole_seconds_has_no_fraction():
    with pytest.raises(ConfigurationError, match="whole seconds"):
        read(broker_heartbeat="1.5")


def test_none_is_none_where_there_is_always_a_value():
    with pytest.raises(ConfigurationError, match="true or false"):
        read(task_acks_late="none")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("broker_use_ssl", "true", True),
        ("broker_use_ssl", '{"cert_reqs": "CERT_NONE"}', {"cert_reqs": ssl.CERT_NONE}),
        ("task_routes", "os.path:join", __import__("os").path.join),
        ("task_default_delivery_mode", "Persistent", "persistent"),
        ("task_default_exchange_type", "x-delayed-message", "x-delayed-message"),
        ("task_default_exchange", "", ""),
        ("imports", '["a.tasks"]', ("a.tasks",)),
        ("result_expires", "3600", 3600),
        ("worker_redirect_stdouts_level", "error", "ERROR"),
        ("broker_url", "redis://one/0, redis://two/0", ["redis://one/0", "redis://two/0"]),
        ("broker_url", "confluentkafka://one,two", "confluentkafka://one,two"),
        ("result_backend", "db+sqlite:///x", "db+sqlite:///x"),
        ("result_backend", "disabled", "disabled"),
        ("result_backend", "my.backends:Backend", "my.backends:Backend"),
        ("task_queues", '{"a": {"type": "topic", "routing_key": "a.#", "priority": 9}}',
         [Queue("a", Exchange("a", "topic"), "a.#", max_priority=9)]),
    ],
)  # fmt: skip
def test_an_option_has_more_than_one_form(name, text, expected):
    assert read(**{name: text})[name] == expected


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("imports", "", "is empty"),
        ("imports", "a.tasks a.tasks", "has 'a.tasks' twice"),
        ("broker_url", "", "is empty"),
        ("broker_transport_options", '{"a": 1, "a": 2}', "has the key 'a' twice"),
        ("broker_transport_options", '{"a": NaN}', "NaN is no number"),
        ("broker_transport_options", "[" * 10_000, "is not JSON"),
        ("worker_concurrency", "-1", "at least 0"),
        ("redis_port", "70000", "from 1 to 65535"),
        ("broker_use_ssl", '{"cert_reqs": "CERT_REQUIERD"}', "Did you mean CERT_REQUIRED?"),
        ("task_routes", "myapp.routing:router", "cannot be imported (ModuleNotFoundError"),
        ("task_queues", "[1]", "neither a queue's name nor an object"),
        ("task_queues", '["a", "a"]', "has a queue twice"),
        ("task_serializer", "piclke", "Did you mean pickle?"),
        ("result_backend", "db+postgresql//u:p@h/db", "is no URL"),
    ],
)
def test_what_is_refused_says_why(name, text, words):
    with pytest.raises(ConfigurationError) as caught:
        read(**{name: text})

    assert words in str(caught.value)


# Names


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("BROKER_URL", "broker_url"),
        ("CELERY_BROKER_URL", "broker_url"),
        ("celery_broker_url", "broker_url"),
        ("Broker_Url", "broker_url"),
        ("CELERY_IMPORTS", "imports"),
        ("celery_imports", "imports"),
        ("CELERY_ALWAYS_EAGER", "task_always_eager"),
        ("CELERY_TASK_ALWAYS_EAGER", "task_always_eager"),
        ("TASK_ALWAYS_EAGER", "task_always_eager"),
        ("CELERYBEAT_SCHEDULE", "beat_schedule"),
        ("CELERYD_CONCURRENCY", "worker_concurrency"),
        ("celeryd_concurrency", "worker_concurrency"),
        ("CELERY_ENABLE_UTC", "enable_utc"),
        ("CELERY_TASK_RESULT_EXPIRES", "result_expires"),
        ("CELERY_TIMEZONE", "timezone"),
        ("CELERY_RESULT_BACKEND", "result_backend"),
        ("BROKER_BACKEND", "broker_transport"),
    ],
)
def test_an_old_name_is_understood(old, new):
    assert find_option(old) == new


def test_every_old_name_leads_to_an_option_in_both_cases():
    for old, new in OLD_NAMES.items():
        assert find_option(old) == find_option(old.lower()) == new
        assert new in OPTIONS


@pytest.mark.parametrize("name", sorted(REMOVED))
def test_a_name_that_is_gone_says_what_took_its_place(name):
    assert find_option(name) is None
    with pytest.raises(ConfigurationError, match="no such option any more") as caught:
        read(**{name: "1"})

    assert REMOVED[name] in str(caught.value)
    for word in REMOVED[name].replace(";", "").replace(",", "").split():
        # A signal, and an option that Celery before 5.7 does not have.
        if "_" in word and word not in ("task_failure", "worker_pool_start_method"):
            assert word in OPTIONS, "the advice names an option that exists"
