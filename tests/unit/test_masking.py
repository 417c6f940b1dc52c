"""Secrets do not appear where values are printed."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
from celery import Celery
from celery.beat import ScheduleEntry
from celery.concurrency import solo
from celery.schedules import schedule
from celery.worker.consumer.consumer import INVALID_TASK_ERROR, UNKNOWN_TASK_ERROR, dump_body
from hypothesis import given
from hypothesis import strategies as st

from ws_celery.masking import (
    MASK,
    SafeRecords,
    is_secret,
    logger_of,
    masked,
    masked_text,
    printable,
)


@pytest.mark.parametrize(
    "text",
    [
        "redis://:hunter2@localhost/0",
        "redis://user:hunter2@localhost:6379/0",
        "redis://:hunter2@one/0;redis://:hunter2@two/0",
        "redis://:hunter2@one/0, redis://:hunter2@two/0",
        "amqp://guest:hun@ter;2hunter2@localhost//",
        "sentinel://:hunter2@one:26379;two:26379/0",
        "token-only://hunter2@host",
        "db+postgresql://me:hunter2@localhost/celery",
        "postgresql://localhost/celery?user=me&password=hunter2&sslmode=require",
        "azureblockblob://AccountName=me;AccountKey=hunter2==;EndpointSuffix=core",
        "https://me.blob.example/?sv=1&sig=hunter2&se=2",
        '{"url": "redis://:hunter2@localhost/0"}',
        '{"password": "hunter2"}',
        '{"password": "hunter2',
        "{'secret_key': 'hunter2'}",
        "api_key: hunter2",
        "Authorization: Bearer hunter2",
    ],
)
def test_a_password_in_a_text_is_masked(text):
    assert "hunter2" not in masked_text(text)
    assert MASK in masked_text(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("{'passwords': ['one', 'second one'], 'n': 1}", f"{{'passwords': {MASK}, 'n': 1}}"),
        ("{'token': {'x': ['y', '}']}, 'n': 1}", f"{{'token': {MASK}, 'n': 1}}"),
        ("{'token': ['x', 'y z", f"{{'token': {MASK}"),
        ("{'token': b'abc def', 'n': 1}", f"{{'token': {MASK}, 'n': 1}}"),
        ("{'token': UUID('a b'), 'n': 1}", f"{{'token': {MASK}, 'n': 1}}"),
        ("{'token': 5, 'n': 1}", f"{{'token': {MASK}, 'n': 1}}"),
        ("{'token': <Card 1 2>, 'n': 1}", f"{{'token': {MASK}"),
        (r"['{\'token\': [\'a b\', \']c\']}', 7]", rf"['{{\'token\': {MASK}}}', 7]"),
        (r'"{\"password\": \"a b\"}"', rf'"{{\"password\": {MASK}}}"'),
        (r"'{\'token\': b\'a ;b\', \'n\': 1}'", rf"'{{\'token\': {MASK}, \'n\': 1}}'"),
        ("Password=a bcd;Db=1", f"Password={MASK};Db=1"),
        ("Password=a&bcd;Db=1", f"Password={MASK};Db=1"),
        ("Password='a'b c;Db=1", f"Password={MASK};Db=1"),
        ("password: a b c\nnext", f"password: {MASK}\nnext"),
        ("?password=abc&a=1 is wrong", f"?password={MASK}&a=1 is wrong"),
        (
            "private_key: -----BEGIN KEY-----\nabc\n-----END KEY-----\nnext",
            f"private_key: {MASK}\nnext",
        ),
    ],
)
def test_the_whole_value_of_a_secret_name_is_hidden(text, shown):
    assert masked_text(text) == shown
    assert masked_text(shown) == shown


_HARD = st.text(st.sampled_from("""a \\"']})&;=,\n"""), max_size=4)
_TEXTS = _HARD.map(lambda text: f"SECRET{text}SECRET")
_VALUES = st.recursive(
    st.one_of(_TEXTS, _TEXTS.map(str.encode)),
    lambda inner: st.one_of(st.lists(inner), inner.map(lambda value: {"b c": value})),
    max_leaves=4,
)


@given(_VALUES, st.sampled_from([repr, lambda value: repr(repr(value))]), st.integers(1, 200))
def test_no_part_of_a_value_of_a_secret_name_is_shown_whatever_it_is(value, shown, length):
    text = shown({"first": "a", "password": value, "last": 1})

    assert "SECRET" not in masked_text(text)
    assert "SECRET" not in masked_text(text[:length])


def test_a_long_text_is_masked():
    text = "a1" * 100_000 + "password" * 10_000 + "token=[" * 10_000

    assert masked_text(text).endswith(f"token={MASK}")


def test_what_is_no_secret_stays():
    url = "redis://me:hunter2@localhost:6379/0?ssl_cert_reqs=required"

    assert masked_text(url) == f"redis://me:{MASK}@localhost:6379/0?ssl_cert_reqs=required"
    assert masked_text("routing_key=turtle") == "routing_key=turtle"


@pytest.mark.parametrize(
    "name",
    [
        "redis_password",
        "broker_password",
        "security_key",
        "security_key_password",
        "s3_secret_access_key",
        "s3_access_key_id",
        "CELERY_REDIS_PASSWORD",
        "token",
        "API_KEY",
        "Authorization",
        "Set-Cookie",
        "pw",
        "auth",
        "dsn",
    ],
)
def test_an_option_with_a_secret_name_is_a_secret(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name", ["task_default_routing_key", "redis_socket_keepalive", "cassandra_keyspace", "author"]
)
def test_an_option_whose_name_only_looks_like_it_is_none(name):
    assert not is_secret(name)


def test_secrets_inside_of_mappings_and_lists_are_masked():
    value = {"kwargs": {"password": "a", "port": 1}, "urls": ["redis://:b@c"], "empty": None}

    assert masked("broker_transport_options", value) == {
        "kwargs": {"password": MASK, "port": 1},
        "urls": [f"redis://:{MASK}@c"],
        "empty": None,
    }


@given(
    st.sampled_from(["redis", "amqp", "db+postgresql", "sentinel", "x"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1),
)
def test_no_password_of_a_url_is_shown_whatever_it_contains(scheme, password):
    shown = masked_text(f"{scheme}://user:SECRET{password}SECRET@host/0")

    assert "SECRET" not in shown


@pytest.mark.parametrize(
    "url",
    [
        "redis:/:hunter2@localhost/0",
        "redis//:hunter2@localhost/0",
        "user:hunter2@localhost/0",
        "db+postgresql//u:hunter2@localhost/0",
        "u:hunter2://x@localhost/0",
        "redis:/:hunter2@one/0, redis://:hunter2@localhost/0",
        "redis://:hunter2@one/0, redis:/:hunter2@localhost/0",
    ],
)
@pytest.mark.parametrize("name", ["broker_url", "result_backend", "CELERY_BROKER_URL"])
def test_a_url_with_a_slip_in_its_scheme_is_masked_all_the_same(name, url):
    shown = masked(name, url)

    assert "hunter2" not in shown
    assert shown.endswith(f"{MASK}@localhost/0")


def test_what_is_inside_of_a_secret_is_a_secret():
    assert masked("credentials", {"user": "a", "more": ["b", 1, 0, True, None]}) == {
        "user": MASK,
        "more": [MASK, MASK, MASK, True, None],
    }


def test_a_number_under_a_secret_name_is_a_secret():
    assert masked("redis_password", 1) == MASK
    assert masked("redis_password", 0) == MASK


def test_what_is_inside_of_headers_and_connection_arguments_is_masked():
    value = {"headers": {"Authorization": "Bearer x"}, "connect_args": {"pw": "x", "host": "h"}}

    assert masked("database_engine_options", value) == {
        "headers": {"Authorization": MASK},
        "connect_args": {"pw": MASK, "host": "h"},
    }


_WORDS = "Grüße, 世界 \N{FAMILY}\u200d\N{WOMAN} مرحبا"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", r"\u001b[2J"),
        ("\x9b2J", r"\u009b2J"),
        ("a\rb\x7f\0", r"a\rb\u007f\u0000"),
        ("gpj\u202e.exe", r"gpj\u202e.exe"),
        ("\u2066\u2069\u200f\ufeff\u2028", r"\u2066\u2069\u200f\ufeff\u2028"),
        ("half \ud83d", r"half \ud83d"),
        ("tag \U000e0041", r"tag \udb40\udc41"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        (_WORDS, _WORDS),
    ],
)
def test_what_a_terminal_would_obey_is_shown_instead(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


def test_a_value_that_has_one_line_stays_on_it():
    assert printable("sent\nERROR", lines=False) == r"sent\nERROR"


@given(st.text())
def test_json_says_the_same_when_it_is_made_printable(text):
    assert json.loads(printable(json.dumps([text], ensure_ascii=False))) == [text]


@pytest.fixture
def logged(caplog):
    """Log as a module of ours; returns what a handler writes."""

    def log(message, *args, error=None):
        trace = error and (type(error), error, None)
        logger_of("ws_celery.somewhere").error(message, *args, exc_info=trace)
        (record,) = caplog.records
        return logging.Formatter("%(message)s").format(record)

    return log


def test_a_record_of_ours_tells_no_password_and_stays_on_its_line(logged):
    said = logged("%s: %s", "queue\n\x1b[2J", "postgresql://me:hunter2@h/d")

    assert said == rf"queue\n\u001b[2J: postgresql://me:{MASK}@h/d"


def test_the_traceback_of_a_record_of_ours_tells_no_password(logged):
    first, last = logged("It failed", error=OSError("redis://:hunter2@h \x1b[2J")).splitlines()

    assert first == "It failed"
    assert last == rf"OSError: redis://:{MASK}@h \u001b[2J"


def test_a_record_that_is_safe_is_left_as_it_is(logged, caplog):
    assert logged("%d%% of %s", 5, "it") == "5% of it"
    assert (caplog.records[0].msg, caplog.records[0].args) == ("%d%% of %s", (5, "it"))


def test_a_record_of_the_application_is_its_own():
    record = logging.makeLogRecord({"name": "shop", "msg": "token: %s", "args": ("\x1b[1m",)})

    assert SafeRecords().filter(record)
    assert record.getMessage() == "token: \x1b[1m"


@pytest.mark.parametrize(
    ("template", "others"),
    [(UNKNOWN_TASK_ERROR, ("'x'", {"id": "7"}, {})), (INVALID_TASK_ERROR, ("it is none",))],
)
def test_the_arguments_in_a_message_that_celery_cannot_read_are_not_told(template, others):
    text = b'[["hunter2"], {}, {}]'
    body = dump_body(SimpleNamespace(body=text), text)
    record = logging.makeLogRecord(
        {
            "name": "celery.worker.consumer.consumer",
            "msg": template,
            "args": (others[0], body, *others[1:]),
        }
    )

    assert "hunter2" in record.getMessage()
    assert SafeRecords().filter(record)
    assert f"message body was:\n{MASK} (21b)" in record.getMessage()
    assert "hunter2" not in record.getMessage()


def test_the_arguments_that_celery_tells_at_the_level_debug_are_not_told(caplog):
    caplog.set_level(logging.DEBUG)
    caplog.handler.addFilter(SafeRecords())
    app = Celery("shop", set_as_current=False)
    pool = solo.TaskPool(1, app=app)
    pool.start()
    pool.apply_async(print, ("pay", '[["hunter2"]]'), {"end": "."}, callback=lambda _: None)
    logging.getLogger("celery.beat").debug(
        "Current schedule:\n%r\nends",
        ScheduleEntry("nightly", "pay", schedule=schedule(5), args=("hunter2",), app=app),
    )

    assert caplog.text.count(MASK) == 2
    assert f"(args:{MASK})" in caplog.text
    assert f"<ScheduleEntry: nightly pay({MASK}) <freq: 5.00 seconds>" in caplog.text
    assert "hunter2" not in caplog.text


def test_the_fields_of_a_record_of_celery_tell_no_password():
    data = {"id": "7", "exc": "OSError('redis://:hunter2@h')", "eta": None}
    record = logging.makeLogRecord({"name": "celery.app.trace", "msg": "failed", "data": data})

    assert SafeRecords().filter(record)
    assert record.data == {"id": "7", "exc": f"OSError('redis://:{MASK}@h')", "eta": None}
