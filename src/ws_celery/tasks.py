"""Tasks whose functions get a request first: how they are called, dispatched and retried."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

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
from ws_celery.signatures import hide_request, positional_names
from ws_celery.worker import Run, run_of

if TYPE_CHECKING:
    from celery.canvas import Signature
    from pyramid.request import Request as PyramidRequest

    from ws_celery.locks import OneInstance

__all__ = (
    "RequestAwareTask",
    "arguments_of_retry",
    "problem_of_request",
)


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

    #: Whether its function gets a request that its messages do not have. Set it where the function
    #: has another name than ``request`` for it, so that ``check`` has no doubt.
    takes_request = True

    #: Whether the outbox keeps what is dispatched, if the application has one.
    outbox = True

    #: Whether a run commits: whether it is one of a TransactionalTask.
    _commits = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hide_request(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run in place if a request is given, else as the worker does, with one of its own."""
        run = run_of(self.request)
        if self.request.called_directly or run.is_running:
            return self._call_in_place(args, kwargs)
        run.is_running = True
        try:
            return self._run_alone(run, args, kwargs)
        except (Ignore, Reject) as error:
            raise _picklable_end(error) from error.__cause__
        except TypeError as error:
            _explain_request(self, error)
            raise

    def _call_in_place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        request, args, kwargs = split_request(args, kwargs)
        if request is None:
            return self._run_for_celery(args, kwargs)
        with calling(request):
            return super().__call__(request, *args, **kwargs)

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
        }
        push_current_task(self)
        self.push_request(args=args, kwargs=kwargs, **context)
        run = run_of(self.request)
        run.is_running = True
        try:
            with failing(None):
                return self._run_alone(run, args, kwargs)
        except TypeError as error:
            _explain_request(self, error)
            raise
        finally:
            self.pop_request()
            pop_current_task()

    def _callers(self) -> Iterator[Context]:
        """Yield the runs for which Celery calls: the one that has failed, that of ``map()``."""
        failed, caller = failed_run(), self.app.current_worker_task
        if failed is not None:
            yield failed
        if caller is not None and (failed is not None or caller.name in _CALLERS):
            yield caller.request

    @cached_property
    def _run_alone(self) -> Callable[[Run, tuple[Any, ...], dict[str, Any]], Any]:
        """What runs the task: with the lock of ``@one_instance``, if it is to have one."""
        rule = rule_of(self)
        return self._run_as_task if rule is None else partial(self._run_with_lock, rule)

    def _run_with_lock(
        self, rule: OneInstance, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Hold the lock until after the transaction has ended."""
        with self.app.locks.hold(self, rule, args, kwargs) as run.lock:
            return self._run_as_task(run, args, kwargs)

    def _run_as_task(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run; with the outbox, what follows takes the place of the run's row."""
        if self.request.is_eager:
            self.app.transactions.watch(transaction.manager, begun=False)
        else:
            self.app.transactions.abort_leftovers(begun=True)
        outbox = self.app.outbox
        unclaimed = run.unclaimed = outbox and outbox.runs.unclaimed(self)
        if unclaimed is not None:
            unclaimed.begin()
        with self._task_request(run) as request:
            result = self.run(request, *args, **kwargs)
        if run.lock is not None:
            run.lock.ensure()
        if unclaimed is not None:
            unclaimed.end(result)
        return result

    @contextmanager
    def _task_request(self, run: Run) -> Iterator[PyramidRequest]:
        """Make the request of a run; abort what is open when it is over, begun or not."""
        app, context = self.app, self.request
        description = description_of(context)
        if description is None and context.is_eager and (caller := calling_request()) is not None:
            description = app.propagation.describe(caller)
        # An eager run must not meet the transaction of its caller, which is not ours to abort.
        with manager_of_its_own() if context.is_eager else nullcontext():
            managers = [transaction.manager]
            try:
                with task_request(app.registry, app.propagation, description or {}) as request:
                    managers.append(getattr(request, "tm", transaction.manager))
                    if run.lock is not None:
                        request.one_instance = run.lock
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
            _explain_request(self, error)
            raise

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
        outbox, context = self.app.outbox, self.request
        if outbox is None or not outbox.runs.has_row(context):
            with immediately():
                return super().retry(args=args, kwargs=kwargs, **options)
        if self._commits and not options.get("throw", True):
            # The run goes on and commits: a dispatch like others, with a row of its own.
            headers = dict(options.pop("headers", None) or context.headers)
            headers.pop(ROW_HEADER, None)
            return super().retry(args=args, kwargs=kwargs, headers=headers, **options)
        held: list[Publication] = []
        try:
            with holding() as held:
                return super().retry(args=args, kwargs=kwargs, **options)
        finally:
            if retry := outbox.runs.retry_of(context, held):
                self._keep_retry(retry)

    def _keep_retry(self, retry: Publication) -> None:
        run = run_of(self.request)
        if run.manager is None:
            self.app.outbox.runs.retry(self.request, [retry])
        else:
            # The row is locked by this transaction: another worker would take the message, find
            # nothing, and the retry would be gone.
            run.retries.append(retry)

    def on_replace(self, sig: Signature) -> Any:
        """Send what takes the place of this run, as in Celery; it takes the place of its row."""
        unclaimed = run_of(self.request).unclaimed
        if unclaimed is None or self.request.is_eager:
            return super().on_replace(sig)
        try:
            with holding() as held:
                return super().on_replace(sig)
        except Ignore:
            unclaimed.hand_over(held)
            raise


def arguments_of_retry(
    task: Task, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None
) -> tuple[Sequence[Any] | None, dict[str, Any] | None]:
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
    names = positional_names(task.run)[1:]  # without the request
    if kwargs is None:
        replaced = names[: len(new_args)]
        kept = {name: value for name, value in old_kwargs.items() if name not in replaced}
        return new_args, kept
    if args is None:
        merged = [new_kwargs.pop(name, value) for name, value in zip(names, old_args, strict=False)]
        return (*merged, *old_args[len(names) :]), new_kwargs
    return new_args, new_kwargs


def _picklable_end(error: Ignore | Reject) -> Exception:
    """Return what the worker's main process can unpickle; an error that it cannot ends its work.

    Celery sees to that for failures, and not for what ends a run otherwise.
    """
    error.args = tuple(map(_picklable, error.args))
    if isinstance(error, Reject):
        error.reason = _picklable(error.reason)
    picklable: Exception = _picklable(error)
    return picklable


def _picklable(value: object) -> Any:
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


def _explain_request(task: Task, error: TypeError) -> None:
    """Raise an error that names the request, if the function of a task does not seem to take it."""
    if problem := problem_of_request(task):
        raise TypeError(f"{error}: {problem}.") from error
