"""Tasks whose functions get a request first: how they are called, dispatched and retried."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import transaction
from celery import Task
from celery.app import pop_current_task, push_current_task
from celery.app.task import Context
from celery.exceptions import Ignore, Reject
from celery.result import GroupResult
from celery.utils.serialization import get_pickleable_exception
from transaction.interfaces import NoTransaction

from ws_celery.bulk import apply_async_many
from ws_celery.eager import manager_of_its_own
from ws_celery.locks import rule_of
from ws_celery.recording import ROW_HEADER, Publication, holding, immediately
from ws_celery.request import (
    HEADER,
    calling,
    calling_request,
    description_of,
    failed_run,
    failing,
    split_request,
    task_request,
)
from ws_celery.signatures import hide_request

__all__ = (
    "RequestAwareTask",
    "arguments_of_retry",
    "problem_of_request",
)


def arguments_of_retry(task: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Complete what ``retry()`` was given by what the run was given.

    Celery does this as well, but counts the request among the arguments.

    :param task: the task that runs.
    :param args: positional arguments of the next run; a request among them is left out.
    :param kwargs: keyword arguments of the next run, likewise.
    """
    if args is None and kwargs is None:
        return None, None
    _, new_args, new_kwargs = split_request(args, kwargs)
    old_args, old_kwargs = task.request.args or (), task.request.kwargs or {}
    names = _positional_names(task.run)
    if kwargs is None:
        taken = names[: len(new_args)]
        kept = {name: value for name, value in old_kwargs.items() if name not in taken}
        return new_args, kept
    if args is None:
        merged = [new_kwargs.pop(name, value) for name, value in zip(names, old_args, strict=False)]
        return (*merged, *old_args[len(names) :]), new_kwargs
    return new_args, new_kwargs


def _positional_names(run: Callable[..., Any]) -> list[str]:
    parameters = list(inspect.signature(run).parameters.values())[1:]  # without the request
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


#: Celery's own tasks that call another task like a function.
_CALLERS = ("celery.map", "celery.starmap")

#: What functions call their request.
_NAMES_OF_REQUESTS = ("request", "_request")


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

    #: What a worker makes of its messages.
    Request = "ws_celery.worker:Request"

    #: Whether its function gets a request that its messages do not have; saying so for a task whose
    #: function has another name than ``request`` for it tells that this is meant.
    takes_request = True

    #: Whether the outbox keeps what is dispatched, if the application has one.
    outbox = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hide_request(cls)

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
        try:
            return self._run_alone(args, kwargs)
        except (Ignore, Reject) as error:
            raise _readable(error) from error.__cause__

    def _run_for_celery(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run what Celery calls like a function: a callback for errors, an item of ``map()``."""
        callers = list(self._callers())
        if not callers:
            raise TypeError(
                f"{self.name}() is called like a function, without a request. Pass the request "
                f"first to run it in place, or use .delay() to send it."
            )
        description = next(filter(None, map(description_of, callers)), None)
        context = {
            "headers": {HEADER: description} if description else None,
            "is_eager": callers[0].is_eager,
            "ws_celery_running": True,
        }
        push_current_task(self)
        self.push_request(args=args, kwargs=kwargs, **context)
        try:
            with failing(None):
                return self._run_alone(args, kwargs)
        finally:
            self.pop_request()
            pop_current_task()

    def _callers(self) -> Iterator[Context]:
        """Tell for which runs Celery calls: the one that has failed, that of ``map()``; or none."""
        failed, caller = failed_run(), self.app.current_worker_task
        if failed is not None:
            yield failed
        if caller is not None and (failed is not None or caller.name in _CALLERS):
            yield caller.request

    def _run_alone(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run with the lock of ``@one_instance``, until after the transaction has ended."""
        rule = rule_of(self)
        with _naming_request(self):
            if rule is None:
                return self._run_as_task(args, kwargs)
            with self.app.locks.hold(self, rule, args, kwargs):
                return self._run_as_task(args, kwargs)

    def _run_as_task(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._abandon_leftovers()
        run = self.request.ws_celery_run = self.app.outbox and self.app.outbox.unclaimed(self)
        if run is not None:
            run.begin()
        with self._task_request() as request:
            result = self.run(request, *args, **kwargs)
        self._ensure_lock()
        if run is not None:
            run.end(result)
        return result

    def _ensure_lock(self) -> None:
        """Fail if the lock of ``@one_instance`` is lost, and that is not to be borne."""
        if (held := getattr(self.request, "one_instance", None)) is not None:
            held.ensure()

    def _abandon_leftovers(self) -> None:
        """Abort what something else in this thread has opened and not finished."""
        self.app.transactions.watch(transaction.manager, begun=False)
        if not self.request.is_eager:
            transaction.abort()

    @contextmanager
    def _task_request(self) -> Iterator[Any]:
        """Make the request of a run; abort what is open when it is over, begun or not."""
        description = description_of(self.request)
        caller = calling_request()
        if description is None and self.request.is_eager and caller is not None:
            description = self.app.propagation.describe(caller)
        # An eager run must not meet the transaction of its caller, which is not ours to abort.
        with manager_of_its_own() if self.request.is_eager else nullcontext():
            managers = [transaction.manager]
            try:
                with task_request(
                    self.app.registry, self.app.propagation, description or {}
                ) as request:
                    managers.append(getattr(request, "tm", transaction.manager))
                    if (held := getattr(self.request, "one_instance", None)) is not None:
                        request.one_instance = held
                    yield request
            finally:
                for manager in managers:
                    with suppress(NoTransaction):
                        manager.abort()

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
        try:
            with calling(request):
                return super().apply_async(args, kwargs, *starargs, **options)
        except TypeError as error:
            if (problem := problem_of_request(self)) is None:
                raise
            raise TypeError(f"{error}: {problem}.") from error

    def delay_many(self, calls: Iterable[Sequence[Any]]) -> GroupResult:
        """Dispatch once for each tuple of arguments; see :meth:`apply_async_many`.

        :param calls: the positional arguments of each call: ``[(1,), (2,)]``.
        """
        return self.apply_async_many((args, None) for args in calls)

    def apply_async_many(self, calls: Iterable[tuple[Any, Any]], **options: Any) -> GroupResult:
        """Dispatch once for each of many calls, at a fraction of the cost of as many dispatches.

        Each is deferred, or sent at once, as a dispatch of its own would be. What is sent at once
        leaves in slices of 1000, so that ``calls`` may be a generator without an end in memory.

        :param calls: positional and keyword arguments of each call: ``[((1,), {"y": 2})]``. A
            request among the arguments of the first call is the caller's of all; where later calls
            have one, it has to be the same.
        :param options: of all calls, as :meth:`apply_async` takes them; no ``task_id``.
        :return: the result of a group, in the order of the calls, which makes their results when it
            is asked for them.
        :raises TypeError: if the arguments of a call do not fit; the message has the number of the
            call, counted from 0.
        :raises ArgumentNotSerializable: if a value of a call does not serialise, likewise.

        Calls before the one that raises may have been dispatched: let the transaction abort.
        """
        return apply_async_many(self, calls, options)

    def delay_on_commit(self, *args: Any, **kwargs: Any) -> Any:
        """Do what ``delay`` does: every dispatch waits for the commit. Django's users know it."""
        return self.delay(*args, **kwargs)

    def apply_async_on_commit(self, *args: Any, **options: Any) -> Any:
        """Do what :meth:`apply_async` does: every dispatch waits for the commit."""
        return self.apply_async(*args, **options)

    def apply(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Run here and now, as in Celery; a request among the arguments is left out."""
        _, args, kwargs = split_request(args, kwargs)
        return super().apply(args, kwargs, **options)

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
        args, kwargs = arguments_of_retry(self, args, kwargs)
        row_id = self._row_id()
        if row_id is None:
            with immediately():
                return super().retry(args=args, kwargs=kwargs, **options)
        if self._retries_by_commit(options):
            # A dispatch like others has a row of its own.
            headers = dict(options.pop("headers", None) or self.request.headers)
            headers.pop(ROW_HEADER, None)
            return super().retry(args=args, kwargs=kwargs, headers=headers, **options)
        held: list[Any] = []
        try:
            with holding() as held:
                return super().retry(args=args, kwargs=kwargs, **options)
        finally:
            if retry := self.app.outbox.retry_of(self.request, held):
                self._retry_by_row(retry)

    def on_replace(self, sig: Any) -> Any:
        """Send what takes the place of this run, as in Celery; it takes the place of its row."""
        run = getattr(self.request, "ws_celery_run", None)
        if run is None or self.request.is_eager:
            return super().on_replace(sig)
        try:
            with holding() as held:
                return super().on_replace(sig)
        except Ignore:
            run.hand_over(held)
            raise

    def _row_id(self) -> Any:
        outbox = self.app.outbox
        return None if outbox is None else outbox.row_id_of(self.request)

    def _retry_by_row(self, retry: Publication) -> None:
        """Let the row of the run hold its retry, so that it is sent whatever happens."""
        self.app.outbox.retry(self.request, [retry])

    def _retries_by_commit(self, options: Any) -> bool:  # noqa: ARG002 - for the other class
        """Tell whether a retry is a dispatch like others, because the run goes on and commits."""
        return False


def _readable(error: Ignore | Reject) -> Exception:
    """Return what the worker's main process can unpickle; an error that it cannot ends its work.

    Celery sees to that for failures, and not for what ends a run otherwise.
    """
    error.args = tuple(map(_picklable, error.args))
    if isinstance(error, Reject):
        error.reason = _picklable(error.reason)
    readable: Exception = _picklable(error)
    return readable


def _picklable(value: Any) -> Any:
    return get_pickleable_exception(value) if isinstance(value, Exception) else value


def problem_of_request(task: Task) -> str | None:
    """Return what is doubtful about how a task's function takes its request, if anything is."""
    if not isinstance(task, RequestAwareTask) or _says_that_it_takes_one(type(task)):
        return None
    try:
        parameters = [*inspect.signature(task.run).parameters.values()]
    except (TypeError, ValueError):
        return None  # written in C
    first = parameters[0] if parameters else None
    if first is None or first.kind in (first.KEYWORD_ONLY, first.VAR_KEYWORD):
        found = "has no parameter for it"
        meant = ""
    elif first.kind is first.VAR_POSITIONAL or first.name in _NAMES_OF_REQUESTS:
        return None
    else:
        found = f"has {first.name!r} as its first parameter"
        meant = f" or say @task(takes_request=True), if {first.name!r} is the request;"
    return (
        f"the function of the task {task.name!r} is given a request first, and {found}. Begin its "
        f"parameters with `request`;{meant} or give the task base=celery.Task, without a request"
    )


def _says_that_it_takes_one(cls: type) -> bool:
    own = cls.__mro__[: cls.__mro__.index(RequestAwareTask)]
    return any("takes_request" in vars(each) for each in own)


@contextmanager
def _naming_request(task: Task) -> Iterator[None]:
    """Let a TypeError tell of the request, where the function of the task does not seem to."""
    try:
        yield
    except TypeError as error:
        if (problem := problem_of_request(task)) is None:
            raise
        raise TypeError(f"{error}: {problem}.") from error
