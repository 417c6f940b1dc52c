"""RabbitMQ's own delay of messages: Celery writes it into the routing key, in seconds.

It does so where there are quorum queues. The key counts from the moment of the publish, and a
message that was deferred, or waited in the outbox, is published later than it was called.
"""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import Any

from celery.utils.time import maybe_iso8601
from kombu.transport.native_delayed_delivery import MAX_NUMBER_OF_BITS_TO_USE as BITS

__all__ = ("bare_key", "delay_anew")

#: The exchange that messages with a delay go to.
_EXCHANGE = f"celery_delayed_{BITS - 1}"

_DELAY = re.compile(rf"(?:[01]\.){{{BITS}}}")


def bare_key(routing_key: str) -> str:
    """Return a routing key without the delay that it may have."""
    return _DELAY.sub("", routing_key, count=1)


def delay_anew(options: dict[str, Any]) -> None:
    """Let a message that RabbitMQ delays wait for what is left until its ``eta``.

    :param options: of the publish; what has no delay stays as it is.
    """
    exchange, key = options.get("exchange"), options.get("routing_key")
    eta = (options.get("headers") or {}).get("eta")
    if getattr(exchange, "name", exchange) != _EXCHANGE or not (key and eta):
        return
    # With no delay at all it passes through all levels to its queue.
    delay = f"{max(_seconds_until(eta), 0):0{BITS}b}"
    options["routing_key"] = ".".join((*delay, bare_key(key)))


def _seconds_until(eta: str) -> int:
    time = maybe_iso8601(eta)
    if time.tzinfo is None:
        time = time.replace(tzinfo=timezone.utc)  # as the worker reads it
    return int((time - datetime.now(timezone.utc)).total_seconds())
