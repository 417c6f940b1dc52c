"""Secrets do not appear where values are printed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ws_celery.masking import MASK, is_secret, masked, masked_text


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
