"""Tasks that are one transaction: what a run of them does, and when it is tried again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from celery.exceptions import Ignore
from transaction.interfaces import NoTransaction

from ws_celery.exceptions import Abandoned, ConfigurationError
from ws_celery.recording import Publication, holding, immediate
from ws_celery.tasks import RequestAwareTask
from ws_celery.transactions import raising_interruptions
from ws_celery.worker import Run, run_of

if TYPE_CHECKING:
    from celery.canvas import Signature
    from pyramid.request import Request
    from transaction import TransactionManager

    from ws_celery.app import PyramidCelery

__all__ = (
    "TransactionalTask",
    "is_conflict",
    "retry_attempts",
)


class TransactionalTask(RequestAwareTask):
    """A task that is one transaction: returns, and it commits; raises, and it aborts.

    The transaction manager is the one pyramid_tm would use (``request.tm``), so that
    ``request.dbsession`` works as in a view. A conflict with another transaction (what the data
    managers call retryable: serialization failures, deadlocks) is tried again in place, with a new
    request, up to the setting ``retry.attempts`` (3) in all; then by Celery's retry, as the options
    ``max_retries`` and ``default_retry_delay`` say.

    Tasks dispatched by the function leave when it has committed. ``self.retry()`` aborts and is
    sent; ``self.replace()`` and ``raise Ignore()`` commit; ``raise Reject()`` and a doomed
    transaction abort; what ``self.replace()`` puts in the place of a doomed run is sent. A worker
    that dies in the middle of a run loses the task; with ``acks_late`` it is delivered again, and
    may then run twice. With the outbox it runs again, and commits once.
    """

    abstract = True

    _commits = True

    #: When the run claims its row in the outbox: ``"early"``, as it begins, or ``"late"``, just
    #: before the commit, so that a long task does not hold a lock while it runs.
    acknowledge = "early"

    @classmethod
    def bind(cls, app: PyramidCelery) -> Any:
        """Make this the task's class in ``app``; Celery calls it.

        :raises ConfigurationError: if ``acknowledge`` is not ``"early"`` or ``"late"``.
        """
        if app.outbox is not None:
            app.outbox.set_defaults(cls)
        bound = super().bind(app)
        if cls.acknowledge not in ("early", "late"):
            raise ConfigurationError(
                f"The task {cls.name!r} has acknowledge = {cls.acknowledge!r}. "
                'Write "early" or "late".'
            )
        return bound

    def _run_as_task(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Begin, claim, run, follow up, claim if it is late, commit; on an error try again."""
        app = self.app
        run.attempts_left = retry_attempts(app.registry.settings)
        claim = run.claim = app.outbox and app.outbox.runs.claim(self)
        app.transactions.abort_leftovers(begun=not self.request.is_eager)
        while True:
            run.attempts_left -= 1
            with raising_interruptions(), self._task_request(run) as request:
                run.manager = app.transactions.begin(request, claim)
                try:
                    if claim is not None:
                        claim.begin(request, run.manager.get())
                    try:
                        result = self.run(request, *args, **kwargs)
                    except Ignore:
                        self._commit(run, request)
                        raise
                    self._commit(run, request, claim and partial(claim.follow_up, result))
                except BaseException as error:
                    if _has_committed(error) or not self._abort(run, request, error):
                        raise
                else:
                    return result

    def _commit(
        self, run: Run, request: Request, follow_up: Callable[[], None] | None = None
    ) -> None:
        """Commit, or abort what is doomed; what follows the run commits with the claim."""
        if run.lock is not None:
            run.lock.ensure()
        if _is_ended(run.manager):
            self._begin_again(run, request)
        if run.manager.isDoomed():
            if self._abort_doomed(run, request):
                follow_up = None  # the row is the retry's
            if not (run.replacement or follow_up):
                return
            # Without its effect, but once: what follows it is a dispatch.
            self._begin_again(run, request)
        # A function that has caught the Retry goes on: another dispatch of this commit.
        if publications := [*run.retries, *run.replacement]:
            run.retries.clear()
            self._dispatch(request, publications)
        if run.claim is not None:
            if follow_up is not None:
                follow_up()
            run.claim.end(run.manager.get())
        self.app.transactions.release(request)
        run.manager.commit()
        if run.claim is not None:
            # Not before: a run whose commit fails is tried again, with its callbacks and its chain.
            run.is_settled = True
            self.request.callbacks = self.request.chain = None

    def _begin_again(self, run: Run, request: Request) -> None:
        run.manager = self.app.transactions.begin(request, run.claim)

    def _dispatch(self, request: Request, publications: list[Publication]) -> None:
        recorder = self.app.transactions.recorder(request)
        if recorder is not None:
            recorder.record(publications)
        else:  # inside of immediately()
            self.app.publish(publications)

    def _abort_doomed(self, run: Run, request: Request) -> bool:
        """Abort; return whether a retry has the row then."""
        self.app.transactions.release(request)
        run.manager.abort()
        if not run.retries:
            return False
        self._send_retries(run)
        run.claim = None
        return True

    def _abort(self, run: Run, request: Request, error: BaseException) -> bool:
        """Abort; return whether the run is to be made again in place.

        :raises Retry: if it would be, once too often: Celery is to make it again.
        :raises Abandoned: likewise, if the database is not there; the relay sends its row again.
        """
        claim, manager = run.claim, run.manager
        conflict = is_conflict(manager, error)
        cut_off = claim is not None and claim.is_cut_off(error)
        if claim is not None and claim.has_committed:
            conflict = cut_off = False  # a run in place would have its effect again
        self.app.transactions.release(request)
        with suppress(NoTransaction):  # the function has ended it
            manager.abort()
        run.manager = None
        if not (conflict or cut_off):
            self._send_retries(run)
            return False
        run.retries.clear()
        run.replacement.clear()
        if not run.attempts_left:
            raise (claim.leave() if claim and cut_off else self.retry(exc=error)) from error
        return True

    def _send_retries(self, run: Run) -> None:
        """Send what the function has asked for: one retry, or more if it has caught them."""
        if run.retries:
            retries, run.retries = run.retries, []
            self.app.outbox.runs.retry(self.request, retries)

    def retry(self, *args: Any, exc: BaseException | None = None, **options: Any) -> Any:
        """Send the task again and end this run; see :meth:`RequestAwareTask.retry`.

        A conflict as its reason is tried again in place first: ``autoretry_for=(Exception,)``
        catches it before the transaction can.
        """
        run = run_of(self.request)
        if run.manager and run.attempts_left and exc and is_conflict(run.manager, exc):
            raise exc
        return super().retry(*args, exc=exc, **options)

    def on_replace(self, sig: Signature) -> Any:
        """Dispatch what takes the place of this run, as in Celery, when the run ends.

        A savepoint that is rolled back does not drop it, nor does a transaction that is doomed.
        """
        run = run_of(self.request)
        if run.manager is None or self.request.is_eager or immediate.get():
            return super().on_replace(sig)
        with holding() as held:
            try:
                return super().on_replace(sig)
            except Ignore:
                run.replacement += held
                raise


def _has_committed(error: BaseException) -> bool:
    """Return whether a run that raises this has committed, as with Celery's ``Ignore``."""
    return isinstance(error, Ignore) and not isinstance(error, Abandoned)


def _is_ended(manager: TransactionManager) -> bool:
    """Return whether the function has ended the transaction of an explicit manager, and no more."""
    try:
        manager.get()
    except NoTransaction:
        return True
    return False


def retry_attempts(settings: Mapping[str, Any]) -> int:
    """Return how often a task is run in place: ``retry.attempts``, as of pyramid_retry.

    :raises ConfigurationError: if it is not a positive number.
    """
    value = settings.get("retry.attempts", 3)
    with suppress(TypeError, ValueError):
        if int(value) > 0:
            return int(value)
    raise ConfigurationError(
        f"retry.attempts = {value!r} is not a number of attempts. Write 1 or more, such as 3."
    )


#: Errors by number, by the package of the driver that raises them. Each means "try again".
_NUMBERS = dict.fromkeys(("pymysql", "MySQLdb", "mysql", "mariadb", "asyncmy"), (1020, 1205, 1213))


def is_conflict(manager: TransactionManager, error: BaseException) -> bool:
    """Return whether the transaction that raised ``error`` may succeed when it is run again.

    :param manager: the transaction's manager. Ask before the abort, which makes the transaction
        forget its data managers.
    """
    if not isinstance(error, Exception):
        return False
    return _is_known_to(manager, error) or _is_marked(error) or _is_of_driver(error)


def _is_known_to(manager: TransactionManager, error: Exception) -> bool:
    try:
        return bool(manager.get().isRetryableError(error))
    except NoTransaction:
        return False


def _is_marked(error: Exception) -> bool:
    pyramid_retry = sys.modules.get("pyramid_retry")
    return pyramid_retry is not None and pyramid_retry.IRetryableError.providedBy(error)


def _is_of_driver(error: Exception) -> bool:
    original = getattr(error, "orig", None) or error  # SQLAlchemy wraps it
    sqlite3 = sys.modules.get("sqlite3")
    if sqlite3 is not None and isinstance(original, sqlite3.OperationalError):
        return str(original).endswith(" is locked")
    package = type(original).__module__.partition(".")[0]
    known = _NUMBERS.get(package, ())
    # MariaDB's own driver has the number in an attribute only.
    return any(number in known for number in (getattr(original, "errno", None), *original.args[:1]))
