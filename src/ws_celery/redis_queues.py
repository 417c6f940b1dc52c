"""Queues of Redis as kombu keeps them: one list for each step of priority, and one hash of unacked.

Everything goes through the client of kombu's channel, so that nothing here imports redis.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ("RedisQueues", "headers_in")

#: How many messages are taken, or read, in one step.
BATCH = 1000


class RedisQueues:
    """The queues of one kombu channel.

    A message is pushed at the head of its list and popped at the tail; lists of a higher priority,
    which is the lower number, are popped first.

    :param channel: of kombu's transport ``redis``.
    """

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._client = channel.client

    def lengths(self, queue: str) -> dict[int, int]:
        """Return how many messages wait in a queue, by their step of priority."""
        steps = self._channel.priority_steps
        with self._client.pipeline(transaction=False) as pipe:
            for key in self._keys("LLEN", queue):
                pipe.llen(key)
            return dict(zip(steps, pipe.execute(), strict=True))

    def next(self, queue: str, limit: int) -> list[bytes]:
        """Return the messages that are taken next, as they are, and leave them there."""
        found: list[bytes] = []
        for key in self._keys("LRANGE", queue):
            if left := limit - len(found):
                found += reversed(self._client.lrange(key, -left, -1))
        return found

    def oldest(self, queue: str) -> list[bytes]:
        """Return the message of each priority that has waited longest."""
        with self._client.pipeline(transaction=False) as pipe:
            for key in self._keys("LINDEX", queue):
                pipe.lindex(key, -1)
            return [raw for raw in pipe.execute() if raw is not None]

    def take(self, queue: str) -> Iterator[list[bytes]]:
        """Take what waits in a queue, in batches; what comes meanwhile may stay."""
        for step, length in self.lengths(queue).items():
            name = self._channel._q_for_pri(queue, step)
            for _ in range(0, length, BATCH):
                yield self._take(name)

    def _take(self, name: str) -> list[bytes]:
        # One transaction: a worker that pops at the same time gets other messages.
        with self._client.pipeline() as pipe:
            pipe.lrange(self._key("LRANGE", name), -BATCH, -1)
            pipe.ltrim(self._key("LTRIM", name), 0, -BATCH - 1)
            taken: list[bytes] = pipe.execute()[0]
        return taken

    def unacked(self, most: int) -> list[tuple[str, str]] | None:
        """Return exchange and routing key of each message that a worker has in hand.

        :param most: of how many; beyond, reading them all would take too long.
        :return: ``None`` if there are more.
        """
        name = self._channel.unacked_key
        if self._client.hlen(self._key("HLEN", name)) > most:
            return None
        return [tuple(json.loads(raw)[1:]) for raw in self._client.hvals(self._key("HVALS", name))]

    def _keys(self, command: str, queue: str) -> list[str]:
        channel = self._channel
        names = [channel._q_for_pri(queue, step) for step in channel.priority_steps]
        return [self._key(command, name) for name in names]

    def _key(self, command: str, name: str) -> str:
        # With a global_keyprefix, kombu's client prefixes the keys of those commands only that
        # kombu itself uses.
        prefixed = getattr(self._client, "PREFIXED_SIMPLE_COMMANDS", ())
        return name if command in prefixed else f"{self._channel.global_keyprefix}{name}"


def headers_in(raw: Any) -> Mapping[str, Any]:
    """Return the headers of a message as it lies in a queue; none if it is not kombu's."""
    try:
        headers = json.loads(raw)["headers"]
    except (KeyError, TypeError, ValueError):
        return {}
    return headers if isinstance(headers, Mapping) else {}
