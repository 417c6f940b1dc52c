"""Whether what a loop needs answers, logged once, and how long to wait until it is tried again."""

from __future__ import annotations

from time import monotonic

from ws_celery.masking import logger_of

__all__ = ("BACKOFF", "Service")

log = logger_of(__name__)

#: Seconds until what has failed is tried again: at first, and at most.
BACKOFF = (0.5, 5.0)


class Service:
    """Whether something answers: one line of log for each change, and how long to wait.

    :param owner: who needs it.
    :param name: what it is.
    """

    def __init__(self, owner: str, name: str) -> None:
        self.error: BaseException | None = None
        self._owner = owner
        self._name = name
        self._since = 0.0
        self._wait = BACKOFF[0]

    def works(self) -> None:
        """Note that it answers; log it, if it had failed."""
        if self.error is not None:
            seconds = monotonic() - self._since
            log.warning("%s: the %s is back after %.1f seconds", self._owner, self._name, seconds)
            self.error = None

    def failed(self, error: BaseException) -> float:
        """Note that it has failed; return how many seconds to wait."""
        if self.error is None:
            self._since, self._wait = monotonic(), BACKOFF[0]
            log.error(
                "%s: the %s has failed, and is tried again: %s", self._owner, self._name, error
            )
        else:
            self._wait = min(self._wait * 2, BACKOFF[1])
        self.error = error
        return self._wait
