"""Task classes whose functions get a request first, and what a run of them does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

import transaction
from celery import Task
from celery.exceptions import Ignore
from celery.utils.functional import head_from_fun
from transaction.interfaces import NoTransaction

from ws_celery.arguments import naming_the_argument
from ws_celery.dispatch import RecordingProducer, immediately, raising_interruptions
from ws_celery.eager import DeferredResult
from ws_celery.exceptions import ConfigurationError
from ws_celery.request import (
    HEADER,
    calling,
    calling_request,
    describe,
    split_request,
    task_request,
)

__all__ = ("RequestAwareTask", "TransactionalTask", "retry_attempts")

#: What defers the eager call that is being made, if a transaction is open.
_recorder: ContextVar[RecordingProducer | None] = ContextVar("ws_celery_recorder", default=None)

#: Celery's own tasks that call another task like a function.
_CALLERS = ("celery.map", "celery.starmap")


class RequestAwareTask(Task):
    """A task whose function gets a request of its own, and no transaction.

    ``f(request, ...)``; with ``bind=True`` ``f(self, request, ...)``; as a class
    ``run(self, request, ...)``. The request is made for the run by the application's request
    factory, so that its properties and methods are there, and URLs begin as those of the request
    that dispatched the task. It is Pyramid's current request during the run.

    Callers may pass their own request first, or as ``request=``: it says which application and
    which transaction the call belongs to, and does not travel. Calling the task like a function
    with a request runs it in place, in the caller's transaction.

    Nothing is committed for you: whoever begins a transaction here finishes it.
    """

    abstract = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__header__" in cls.__dict__:
            check = cls.__header__
        elif "run" in cls.__dict__:
            check = head_from_fun(cls.run, bound=True)
        else:
            return
        # Celery checks a call's arguments against this header; the request is not among them.
        cls.__header__ = staticmethod(partial(check, None))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run in place if a request is given, else as the worker does, with one of its own."""
        request, args, kwargs = split_request(args, kwargs)
        if request is not None:
            with calling(request):
                return super().__call__(request, *args, **kwargs)
        context = self.request
        if context.called_directly or getattr(context, "ws_celery_running", False):
            return self._run_for_celery(args, kwargs)
        context.ws_celery_running = True
        return self._run_as_task(args, kwargs)

    def _run_for_celery(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an item of ``map()``, ``starmap()`` or ``chunks()``: Celery calls a function."""
        caller = self.app.current_worker_task
        if caller is None or caller.name not in _CALLERS:
            raise TypeError(
                f"{self.name}() is called like a function, without a request. Pass the request "
                f"first to run it in place, or use .delay() to send it."
            )
        headers = caller.request.headers
        self.push_request(args=args, kwargs=kwargs, headers=headers, ws_celery_running=True)
        try:
            return self._run_as_task(args, kwargs)
        finally:
            self.pop_request()

    def _run_as_task(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._abandon_leftovers()
        with self._task_request() as request:
            return self.run(request, *args, **kwargs)

    def _abandon_leftovers(self) -> None:
        """Abort what an earlier run in this thread has begun and not finished."""
        transactions = self.app.transactions
        transactions.watch(transaction.manager, begun=False)
        if not self.request.is_eager and transactions.begun(transaction.manager) is not None:
            transaction.abort()

    def _task_request(self) -> Any:
        description = (self.request.headers or {}).get(HEADER)
        caller = calling_request()
        if description is None and self.request.is_eager and caller is not None:
            description = describe(caller)
        return task_request(self.app.registry, description or {})

    def apply_async(
        self, args: Any = None, kwargs: Any = None, *starargs: Any, **options: Any
    ) -> Any:
        """Dispatch: as in Celery, deferred while the caller's transaction is open.

        :return: the ``AsyncResult`` with the id that the task will have.
        :raises TypeError: at once, if the arguments do not fit the function.
        :raises ArgumentNotSerializable: at once, if a value does not serialise; it is an
            :exc:`kombu.exceptions.EncodeError`.
        """
        request, args, kwargs = split_request(args, kwargs)
        with calling(request), self._deferring_eager(args, kwargs, options):
            return super().apply_async(args, kwargs, *starargs, **options)

    def delay_on_commit(self, *args: Any, **kwargs: Any) -> Any:
        """Do what ``delay`` does: every dispatch waits for the commit. Django's users know it."""
        return self.delay(*args, **kwargs)

    def apply_async_on_commit(self, *args: Any, **options: Any) -> Any:
        """Do what :meth:`apply_async` does: every dispatch waits for the commit."""
        return self.apply_async(*args, **options)

    @contextmanager
    def _deferring_eager(self, args: Any, kwargs: Any, options: dict[str, Any]) -> Iterator[None]:
        """Let the ``apply()`` in which an eager ``apply_async()`` ends wait for the commit."""
        if not self.app.conf.task_always_eager or options.get("producer"):
            yield
            return
        token = _recorder.set(self.app.transactions.recorder(self.app, calling_request()))
        serializer = options.get("serializer") or self.serializer
        try:
            with naming_the_argument(self.name, args, kwargs, serializer):
                yield
        finally:
            _recorder.reset(token)

    def apply(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Run here and now, as in Celery; see :meth:`apply_async` for ``task_always_eager``."""
        _, args, kwargs = split_request(args, kwargs)
        recorder, caller = _recorder.get(), calling_request()
        token = _recorder.set(None)  # what the task itself applies is not meant
        try:
            if recorder is None:
                return super().apply(args, kwargs, **options)
        finally:
            _recorder.reset(token)
        if caller is not None:
            options["headers"] = {HEADER: describe(caller), **(options.get("headers") or {})}
        result = DeferredResult(options["task_id"], self.name)
        return recorder.defer(partial(super().apply, args, kwargs, **options), result)

    def signature(
        self, args: Any = None, kwargs: Any = None, *starargs: Any, **options: Any
    ) -> Any:
        """Make a signature, as in Celery; a request among the arguments is left out."""
        _, args, kwargs = split_request(args, kwargs)
        return super().signature(args, kwargs, *starargs, **options)

    def retry(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Send the task again and end this run, as in Celery.

        The message leaves at once: the transaction of this run aborts, and a message deferred to it
        would be lost with it.
        """
        args, kwargs = self._arguments_of_retry(args, kwargs)
        with immediately():
            return super().retry(args=args, kwargs=kwargs, **options)

    def _arguments_of_retry(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Complete what ``retry()`` was given by what the run was given.

        Celery does this as well, but counts the request among the arguments.
        """
        if args is None and kwargs is None:
            return None, None
        _, new_args, new_kwargs = split_request(args, kwargs)
        old_args, old_kwargs = self.request.args or (), self.request.kwargs or {}
        names = _positional_names(self.run)
        if kwargs is None:
            taken = names[: len(new_args)]
            kept = {name: value for name, value in old_kwargs.items() if name not in taken}
            return new_args, kept
        if args is None:
            merged = [
                new_kwargs.pop(name, value) for name, value in zip(names, old_args, strict=False)
            ]
            return (*merged, *old_args[len(names) :]), new_kwargs
        return new_args, new_kwargs


def _positional_names(run: Callable[..., Any]) -> list[str]:
    parameters = list(inspect.signature(run).parameters.values())[1:]  # without the request
    return [
        parameter.name
        for parameter in parameters
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]


class TransactionalTask(RequestAwareTask):
    """A task that is one transaction: returns, and it commits; raises, and it aborts.

    The transaction manager is the one pyramid_tm would use (``request.tm``), so that
    ``request.dbsession`` works as in a view. A conflict with another transaction (what the data
    managers call retryable: serialization failures, deadlocks) is tried again in place, with a new
    request, up to the setting ``retry.attempts`` (3) in all; then by Celery's retry, as the options
    ``max_retries`` and ``default_retry_delay`` say.

    Tasks dispatched by the function leave when it has committed. ``self.retry()`` aborts and is
    sent; ``self.replace()`` and ``raise Ignore()`` commit; ``raise Reject()`` and a doomed
    transaction abort. A worker that dies in the middle of a run loses the task; with ``acks_late``
    it is delivered again, and may then run twice.
    """

    abstract = True

    def _run_as_task(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._abandon_leftovers()
        attempts_left = retry_attempts(self.app.registry.settings)
        while True:
            attempts_left -= 1
            with raising_interruptions(), self._task_request() as request:
                manager = self._begin(request)
                self.request.ws_celery_manager = manager if attempts_left else None
                try:
                    return self._run_and_commit(manager, request, args, kwargs)
                except Ignore:
                    raise
                except BaseException as error:
                    conflict = _is_conflict(manager, error)
                    _deactivate(request)
                    manager.abort()
                    if not conflict:
                        raise
                    if not attempts_left:
                        self.request.ws_celery_manager = None
                        raise self.retry(exc=error) from error

    def retry(self, *args: Any, exc: Any = None, **options: Any) -> Any:
        """Send the task again and end this run; see :meth:`RequestAwareTask.retry`.

        A conflict as its reason is tried again in place first: ``autoretry_for=(Exception,)``
        catches it before the transaction can.
        """
        manager = getattr(self.request, "ws_celery_manager", None)
        if manager is not None and exc is not None and _is_conflict(manager, exc):
            raise exc
        return super().retry(*args, exc=exc, **options)

    def _begin(self, request: Any) -> Any:
        manager = getattr(request, "tm", None)
        if manager is None:
            manager = transaction.manager
        if self.app.transactions.begun(manager) is not None:
            # Eager execution inside the caller's transaction, which is not ours to abort.
            manager = request.tm = transaction.TransactionManager(explicit=True)
        # As pyramid_tm marks a request, for add-ons that ask.
        request.environ.update({"tm.active": True, "tm.manager": manager})
        manager.begin()
        return manager

    def _run_and_commit(
        self, manager: Any, request: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            result = self.run(request, *args, **kwargs)
        except Ignore:
            _finish(manager, request)
            raise
        _finish(manager, request)
        return result


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


def _finish(manager: Any, request: Any) -> None:
    doomed = manager.isDoomed()
    _deactivate(request)
    if doomed:
        manager.abort()
    else:
        manager.commit()


def _deactivate(request: Any) -> None:
    for key in ("tm.active", "tm.manager"):
        request.environ.pop(key, None)


def _is_conflict(manager: Any, error: BaseException) -> bool:
    # Asked before the abort, which makes the transaction forget its data managers.
    try:
        return isinstance(error, Exception) and manager.get().isRetryableError(error)
    except NoTransaction:
        return False
