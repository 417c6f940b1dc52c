"""A run without a transaction: it may be made twice, and its chain goes on once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy.exc import OperationalError

from ws_celery.dispatch import Publication, holding
from ws_celery.exceptions import WsCeleryError
from ws_celery.masking import logger_of
from ws_celery.outbox.run import Run

__all__ = ("Unclaimed",)

log = logger_of(__name__)


class Unclaimed(Run):
    """A run of a RequestAwareTask.

    Its row is only looked at before it. What follows it is written in the transaction that deletes
    the row, so that a crash cannot cut its chain, nor a second run double it.
    """

    def begin(self) -> None:
        """Look whether the row is there; if nobody can tell, the task is run.

        :raises Duplicate: if it is not.
        :raises ForeignMessage: if it is not, and the message is another outbox's.
        """
        rows = self._outbox.rows
        try:
            with self._outbox.begin() as connection:
                if self._task.request.expires is not None:
                    rows.forget_expiry(connection, self._row_id)
                there = rows.is_there(connection, self._row_id)
                if not there:
                    self._outbox.look(connection)
        except self._outbox.errors as error:
            log.warning("%s is run without a look at its row: %s", self.name, error)
            return
        if not there:
            raise self.without_row("has run, or is a dead letter")

    def end(self, result: Any) -> None:
        """Dispatch the callbacks and the rest of the chain, if there are any.

        Otherwise the row stays until the result is stored, which may count for a chord.

        :param result: what the function has returned.
        :raises Duplicate: if the row is gone: another run has ended, or somebody has given it up.
        :raises ForeignMessage: if it was in another outbox all the time.
        :raises CutOff: if the database is not there; the task is run again.
        """
        context = self._task.request
        if context.callbacks or context.chain:
            with holding() as held:
                self.follow_up(result)
            self.hand_over(held)

    def hand_over(self, publications: Sequence[Publication]) -> None:
        """Let the rows of these messages take the place of the run's, and send them.

        :raises Duplicate: as :meth:`end` does.
        :raises CutOff: likewise.
        """
        if not self._replace_row(publications):
            raise self.without_row("has run elsewhere, or was given up")
        self.close()
        self._outbox.app.publish(publications)

    def _replace_row(self, publications: Sequence[Publication]) -> bool:
        settled = getattr(self._task.request, "ws_celery_settled", False)  # it is a retry's
        rows = self._outbox.rows
        try:
            with self._outbox.begin() as connection:
                if not settled and not rows.delete(connection, [self._row_id]):
                    self._outbox.look(connection)
                    return False
                self._outbox.keep(connection, publications)
        except self._outbox.errors as error:
            if isinstance(error, (WsCeleryError, OperationalError)) or self.is_cut_off(error):
                raise self.leave() from error
            raise
        return True
