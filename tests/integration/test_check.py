"""``ws-celery check`` asks brokers that answer."""

from __future__ import annotations

import pytest


def test_a_redis_that_answers_has_no_finding(found, redis_url):
    assert found("", broker=redis_url) == {}


def test_a_rabbitmq_that_answers_has_no_finding(found, rabbitmq_url):
    assert found("task_time_limit = 2h\n", broker=rabbitmq_url) == {}


@pytest.mark.parametrize(
    "text",
    [
        "task_time_limit = 2h",
        "[celeryannotate:known]\ntime_limit = 2h",
        "[celeryroute:known]\ncountdown = 2h",
        '[celerybeat:a]\ntask = known\ntype = integer\nschedule = 1\noptions = {"countdown": 7200}',
    ],
)
def test_a_time_longer_than_the_visibility_timeout_is_a_warning(found, redis_url, text):
    finding = found(text, broker=redis_url)["visibility-timeout"]

    assert finding.severity == "warning"
    assert "visibility_timeout is 3600 seconds, and " in finding.text
    assert "is 7200" in finding.text
