"""Waiting for edits: at once where PostgreSQL tells of them, else until it is time to look."""

from __future__ import annotations

import selectors
import time
from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from ws_celery.masking import logger_of

if TYPE_CHECKING:
    from ws_celery.beat.store import Store

__all__ = ("Listener",)

log = logger_of(__name__)


class Listener:
    """Listens to NOTIFY, on a connection of its own.

    :param store: the schedule in the database.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._connection: Any = None
        self._driver: Any = None

    def open(self) -> None:
        """Begin to listen, unless it does; nothing happens where the database cannot tell."""
        engine = self._store.engine
        if self._connection is not None or engine.dialect.name != "postgresql":
            return
        connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        driver = connection.connection.driver_connection
        if not hasattr(driver, "fileno"):
            connection.close()  # a driver whose socket cannot be waited for
            return
        connection.execute(text(f'LISTEN "{self._store.channel}"'))
        self._connection, self._driver = connection, driver

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until an edit; return whether there was one."""
        if self._connection is None:
            time.sleep(seconds)
            return False
        try:
            with selectors.DefaultSelector() as selector:  # select() takes no descriptor above 1023
                selector.register(self._driver.fileno(), selectors.EVENT_READ)
                ready = selector.select(seconds)
            if ready:
                self._connection.execute(text("SELECT 1"))  # takes what has come off the socket
        except Exception as error:  # noqa: BLE001  whatever a driver raises: it is opened anew
            log.debug("Listening has ended: %s", error)
            self.close()
            return True
        return bool(ready)

    def close(self) -> None:
        """Stop listening."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()  # it listens: not for the pool
            connection.close()
