"""A channel of kombu's to Redis, on which a publish costs less."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

__all__ = ("PartlyRefused", "connect", "lighten")


class PartlyRefused(Exception):
    """A Redis has refused some of the commands that it was sent together, and obeyed others."""


def connect(channel: Any) -> None:
    """Connect a channel to Redis, also if the server has hung up: nothing was sent until then.

    Channels to other brokers are left alone.

    :raises Exception: if the server does not answer.
    """
    if hasattr(channel, "conn_or_acquire"):
        with channel.conn_or_acquire() as client:
            pool = client.connection_pool
            try:
                connection = pool.get_connection()
            except TypeError:  # redis-py before 5.3, with Celery 5.5, asks for a command
                connection = pool.get_connection("_")
            pool.release(connection)


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

    def execute(self) -> None:
        """Send all; what is refused is an error.

        :raises PartlyRefused: if not all was refused.
        """
        self._push()
        answers = self._pipeline.execute(raise_on_error=False)
        if errors := [answer for answer in answers if isinstance(answer, Exception)]:
            if len(errors) < len(answers):
                raise PartlyRefused(f"{len(errors)} of {len(answers)} commands: {errors[0]}")
            raise errors[0]

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
