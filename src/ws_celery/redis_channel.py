"""A channel of kombu's to Redis, on which a publish costs less."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

__all__ = ("lighten",)


def lighten(channel: Any) -> None:
    """Let ``channel`` keep one client, and push what is published together by one command.

    kombu makes a client of redis-py for each publish, which costs more than all the rest of it, and
    adds a command to the pipeline for each message. Nothing else changes: the messages arrive in
    their order, and the client takes its connections from the same pool. Channels to other brokers
    are left alone.

    :param channel: on which no two threads publish at a time.
    """
    if not hasattr(channel, "conn_or_acquire"):
        return
    with channel.conn_or_acquire() as kept:
        channel.conn_or_acquire = lambda client=None: nullcontext(client or kept)
    if hasattr(channel, "create_publish_batch"):  # kombu 5.7
        create_batch = channel.create_publish_batch

        def create_publish_batch(max_size: int) -> Any:
            batch = create_batch(max_size)
            batch.pipeline = _Pushes(batch.pipeline)
            return batch

        channel.create_publish_batch = create_publish_batch


class _Pushes:
    """A pipeline in which what is pushed onto one list, one after the other, is one command.

    :param pipeline: redis-py's.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._key: Any = None
        self._values: list[Any] = []

    def lpush(self, key: Any, *values: Any) -> None:
        if key != self._key:
            self._push()
            self._key = key
        self._values += values

    def reset(self) -> None:
        self._values = []
        self._pipeline.reset()

    def __getattr__(self, name: str) -> Any:
        # Any other command, and the execution: what was pushed comes first.
        self._push()
        return getattr(self._pipeline, name)

    def _push(self) -> None:
        if self._values:
            self._pipeline.lpush(self._key, *self._values)
            self._values = []
