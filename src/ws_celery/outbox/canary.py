"""Telling whether the broker has lost its data: a message in a queue of its own that nobody takes.

A server that was emptied or came back without its data does not say so. Its queues are gone, and
so is the canary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kombu import Connection, Producer

from ws_celery.exceptions import BrokerUnavailable
from ws_celery.masking import masked_text

__all__ = ("Canary",)

_NOT_FOUND = "404"

#: How many there may be: several relays lay one each.
_ENOUGH = 2

#: Transports that answer a passive declaration truthfully and at once. Others only estimate how
#: many messages there are.
_TRUTHFUL = ("amqp", "redis")


class Canary:
    """A message whose absence tells that a broker has lost its data.

    It has a connection of its own, bounded in time as those of the publisher.

    :param app: the Celery app whose broker it is.
    :param name: of the queue; applications that share a broker need one each.
    """

    def __init__(self, app: Any, name: str) -> None:
        self.name = name
        self._app = app
        self._connection: Connection | None = None

    def lives(self) -> bool:
        """Tell whether the message is there; with a broker that cannot tell, whether it answers.

        :raises BrokerUnavailable: if it does not.
        """
        with self._opened() as connection:
            truthful = connection.transport.driver_type in _TRUTHFUL
            return not truthful or self.length(self.name) > 0

    def length(self, queue: str) -> int:
        """Return how many messages wait in a queue: 0 if there is none, or nobody can tell.

        :raises BrokerUnavailable: if the broker does not answer.
        """
        with self._opened() as connection:
            if connection.transport.driver_type not in _TRUTHFUL:
                return 0
            try:
                return int(connection.default_channel.queue_declare(queue, passive=True)[1])
            except connection.channel_errors as error:
                if str(getattr(error, "reply_code", "")) != _NOT_FOUND:
                    raise
                self.close()  # RabbitMQ has closed the channel
                return 0

    def declare_all(self) -> None:
        """Declare the application's queues anew; see ``Publisher``.

        :raises BrokerUnavailable: if the broker does not answer.
        """
        self.close()
        with self._opened():
            self._app.publisher.declare_all()

    def lay(self) -> None:
        """Put a message into the queue; an older one may go.

        :raises BrokerUnavailable: if the broker does not answer, or does not take it.
        """
        with self._opened() as connection:
            channel = connection.default_channel
            channel.queue_declare(self.name, durable=True, auto_delete=False)
            Producer(channel).publish("ws_celery", routing_key=self.name, delivery_mode=2)
            # Answered when what was sent before has arrived. Never empty: another relay may look.
            if channel.queue_declare(self.name, passive=True)[1] > _ENOUGH:
                channel.basic_get(self.name, no_ack=True)

    def replace(self) -> None:
        """Put another message into the queue: a broker that answers may still take none.

        :raises BrokerUnavailable: if it takes none; or the old one is lost, which is to be seen.
        """
        if not self.lives():
            raise BrokerUnavailable("The broker has lost its data.")
        self.lay()

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.collect()
            self._connection = None

    @contextmanager
    def _opened(self) -> Iterator[Connection]:
        try:
            if self._connection is None:
                self._connection = self._app.publisher.connect()
            yield self._connection
        except BrokerUnavailable:
            raise
        except Exception as error:
            self.close()
            said = masked_text(f"{type(error).__name__}: {error}")
            raise BrokerUnavailable(f"The broker does not answer: {said}") from error
