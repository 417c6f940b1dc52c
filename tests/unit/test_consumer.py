"""When a worker's consumer on Redis acknowledges."""

from __future__ import annotations

import os

import pytest
from kombu.asynchronous import Hub

from ws_celery.worker import _AfterNextPoll


def test_nothing_stays_open_if_the_last_acknowledgement_fails():
    hub = Hub()
    after = _AfterNextPoll(hub)
    ends = after._pipe

    def acknowledge():
        raise ConnectionError("the broker is gone")

    after(acknowledge)
    assert ends[1] in hub.writers
    with pytest.raises(ConnectionError):
        after.close()

    assert ends[1] not in hub.writers
    for end in ends:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(end)
    hub.close()
