"""Tasks that are one transaction: what a run of them does, and when it is tried again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import transaction
from celery.exceptions import Ignore
from transaction.interfaces import NoTransaction

from ws_celery.exceptions import Abandoned, ConfigurationError
from ws_celery.interfaces import ICeleryApp
from ws_celery.recording import Publication, holding, immediate
from ws_celery.tasks import RequestAwareTask
from ws_celery.transactions import raising_interruptions

__all__ = (
    "TransactionalTask",
    "is_conflict",
    "retry_attempts",
)

#: Errors by number, by the package of the driver that raises them. Each means "try again".
_NUMBERS = dict.fromkeys(("pymysql", "MySQLdb", "mysql", "mariadb", "asyncmy"), (1020, 1205, 1213))


def is_conflict(manager: Any, error: BaseException) -> bool:
    """Tell whether the transaction that raised ``error`` may succeed when it is run again.

    :param manager: the transaction's manager. Ask before the abort, which makes the transaction
        forget its data managers.
    """
    if not isinstance(error, Exception):
        return False
    return _is_known_to(manager, error) or _is_marked(error) or _is_of_driver(error)


def _is_known_to(manager: Any, error: Exception) -> bool:
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

    #: When the run claims its row in the outbox: ``"early"``, as it begins, or ``"late"``, just
    #: before the commit, so that a long task does not hold a lock while it runs.
    acknowledge = "early"

    @classmethod
    def bind(cls, app: Any) -> Any:
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

    def _abandon_leftovers(self) -> None:
        super()._abandon_leftovers()
        if self.request.is_eager and self.app.transactions.begun(transaction.manager) is None:
            transaction.abort()  # a session of the thread that had joined would not commit

    def _run_as_task(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._abandon_leftovers()
        attempts_left = retry_attempts(self.app.registry.settings)
        claim = self.app.outbox and self.app.outbox.claim(self)
        while True:
            attempts_left -= 1
            with raising_interruptions(), self._task_request() as request:
                manager = self._begin(request, claim)
                self.request.update(
                    ws_celery_manager=manager,
                    ws_celery_attempts=attempts_left,
                    ws_celery_replacement=[],
                )
                try:
                    return self._run_and_commit(manager, request, args, kwargs, claim)
                except BaseException as error:
                    if isinstance(error, Ignore) and not isinstance(error, Abandoned):
                        raise  # it has committed
                    conflict = is_conflict(manager, error)
                    cut_off = claim is not None and claim.is_cut_off(error)
                    if claim is not None and claim.has_committed:
                        conflict = cut_off = False  # a run in place would have its effect again
                    self._abort(manager, request)
                    retries = self._take_retries()
                    if not (conflict or cut_off):
                        self._send_retries(retries)
                        raise
                    if not attempts_left:
                        raise (claim.leave() if cut_off else self.retry(exc=error)) from error

    def retry(self, *args: Any, exc: Any = None, **options: Any) -> Any:
        """Send the task again and end this run; see :meth:`RequestAwareTask.retry`.

        A conflict as its reason is tried again in place first: ``autoretry_for=(Exception,)``
        catches it before the transaction can.
        """
        context = self.request
        manager = getattr(context, "ws_celery_manager", None)
        if manager and context.ws_celery_attempts and exc and is_conflict(manager, exc):
            raise exc
        return super().retry(*args, exc=exc, **options)

    def on_replace(self, sig: Any) -> Any:
        """Dispatch what takes the place of this run, as in Celery, when the run ends.

        A savepoint that is rolled back does not drop it, nor does a transaction that is doomed.
        """
        context = self.request
        alone = getattr(context, "ws_celery_manager", None) is None
        if alone or context.is_eager or immediate.get():
            return super().on_replace(sig)
        with holding() as held:
            try:
                return super().on_replace(sig)
            except Ignore:
                context.ws_celery_replacement += held
                raise

    def _retry_by_row(self, retry: Publication) -> None:
        if getattr(self.request, "ws_celery_manager", None) is None:
            super()._retry_by_row(retry)
        else:
            # The row is locked by this transaction: another worker would take the message, find
            # nothing, and the retry would be gone.
            self.request.__dict__.setdefault("ws_celery_retries", []).append(retry)

    def _take_retries(self) -> list[Publication]:
        """Return what the function has asked for: one retry, or more if it has caught them."""
        retries: list[Publication] = self.request.__dict__.pop("ws_celery_retries", [])
        return retries

    def _send_retries(self, retries: list[Publication]) -> None:
        if retries:
            self.app.outbox.retry(self.request, retries)

    def _retries_by_commit(self, options: Any) -> bool:
        return not options.get("throw", True)

    def _abort(self, manager: Any, request: Any) -> None:
        _deactivate(request)
        with suppress(NoTransaction):  # the function has ended it
            manager.abort()
        self.request.ws_celery_manager = None

    def _begin(self, request: Any, claim: Any) -> Any:
        manager = getattr(request, "tm", None)
        if manager is None:
            manager = transaction.manager
        if self.app.transactions.begun(manager) is not None:
            # Eager execution inside the caller's transaction, which is not ours to abort.
            manager = request.tm = transaction.TransactionManager(explicit=True)
        # As pyramid_tm marks a request, for add-ons that ask.
        request.environ.update({"tm.active": True, "tm.manager": manager})
        self.app.transactions.manage(manager, request, claim)
        manager.begin().set_data(ICeleryApp, self.app)  # see current_celery_app()
        return manager

    def _run_and_commit(
        self,
        manager: Any,
        request: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        claim: Any,
    ) -> Any:
        if claim is not None:
            claim.begin(request, manager.get())
        try:
            result = self.run(request, *args, **kwargs)
        except Ignore:
            self._finish(manager, request, claim)
            raise
        self._finish(manager, request, claim, lambda: claim.follow_up(result))
        return result

    def _finish(
        self,
        manager: Any,
        request: Any,
        claim: Any,
        follow_up: Callable[[], None] | None = None,
    ) -> None:
        """Commit, or abort what is doomed; what follows the run commits with the claim."""
        self._ensure_lock()
        retries, replacement = self._take_retries(), self.request.ws_celery_replacement
        if _is_ended(manager):
            self._begin(request, claim)
        if not manager.isDoomed():
            # A function that has caught the Retry goes on: another dispatch of this commit.
            self._commit(manager, request, claim, [*retries, *replacement], follow_up)
            return
        _deactivate(request)
        manager.abort()
        if retries:
            self._send_retries(retries)
            claim = None  # its row is theirs
        if replacement or (claim is not None and follow_up is not None):
            # Without its effect, but once: what follows it is a dispatch.
            manager = self._begin(request, claim)
            self._commit(manager, request, claim, replacement, follow_up)

    def _commit(
        self,
        manager: Any,
        request: Any,
        claim: Any,
        publications: list[Publication],
        follow_up: Callable[[], None] | None,
    ) -> None:
        self._dispatch(request, publications)
        if claim is not None:
            if follow_up is not None:
                follow_up()
            claim.end(manager.get())
        _deactivate(request)
        manager.commit()
        if claim is not None:
            claim.close()

    def _dispatch(self, request: Any, publications: list[Publication]) -> None:
        recorder = self.app.transactions.recorder(request) if publications else None
        if recorder is not None:
            recorder.record(publications)
        elif publications:  # inside of immediately()
            self.app.publish(publications)


def retry_attempts(settings: Any) -> int:
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


def _is_ended(manager: Any) -> bool:
    """Tell whether the function has ended the transaction of an explicit manager, and no more."""
    try:
        manager.get()
    except NoTransaction:
        return True
    return False


def _deactivate(request: Any) -> None:
    for key in ("tm.active", "tm.manager"):
        request.environ.pop(key, None)
