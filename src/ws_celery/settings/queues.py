"""Queues, from ``task_queues`` and from the keys of a ``[celeryqueue:NAME]``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kombu import Exchange, Queue

from ws_celery.converters import Refused
from ws_celery.settings.keys import QUEUE_KEYS, accept_keys

__all__ = ("given_queues", "make_queue")


def given_queues(given: Any) -> list[Queue]:
    """Return the queues of ``task_queues``.

    :raises Refused: if something there is no queue, or is there twice.
    """
    if isinstance(given, Mapping):
        given = [{"name": name, **_mapping(options)} for name, options in given.items()]
    queues = [_given_queue(each) for each in given]
    names = [queue.name for queue in queues]
    if len(set(names)) < len(names):
        raise Refused("has a queue twice")
    return queues


def _mapping(options: Any) -> Mapping[str, Any]:
    if not isinstance(options, Mapping):
        raise Refused("has a queue whose options are no object")
    return options


def _given_queue(given: Any) -> Queue:
    if isinstance(given, Queue):
        return given
    if isinstance(given, str) and given:
        return make_queue(given, {})
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise Refused("has an item that is neither a queue's name nor an object with one")
    options = {key: value for key, value in given.items() if key != "name"}
    return make_queue(given["name"], accept_keys(options, QUEUE_KEYS))


def make_queue(name: str, keys: Mapping[str, Any]) -> Queue:
    """Return a queue; where exchange and routing key are not given, they are the queue's own.

    Celery's own default would bind it to the default exchange with the default routing key: it
    would take part of what is meant for the default queue.
    """
    options = dict(keys)
    exchange = Exchange(
        options.pop("exchange", name),
        type=options.pop("type", "direct"),
        durable=options.get("durable", True),
    )
    if "priority" in options:
        options["max_priority"] = options.pop("priority")
    return Queue(name, exchange, options.pop("routing_key", name), **options)
