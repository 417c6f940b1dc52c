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
    ],
)
def test_a_password_in_a_text_is_masked(text):
    assert "hunter2" not in masked_text(text)
    assert MASK in masked_text(text)


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
    ],
)
def test_an_option_with_a_secret_name_is_a_secret(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name", ["task_default_routing_key", "redis_socket_keepalive", "cassandra_keyspace"]
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
