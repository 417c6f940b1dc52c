"""The sequence of what would be sent: questions, assertions, and running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import Context as Variables
from typing import TYPE_CHECKING, Any

from celery.exceptions import Ignore, Retry
from kombu.serialization import dumps, loads

from ws_celery.recording import Publication, immediately
from ws_celery.testing.captured import (
    CapturedTask,
    check_options,
    described,
    read,
    run_as_worker,
    task_name,
)
from ws_celery.testing.interception import Interception

if TYPE_CHECKING:
    from celery import Task
    from celery.canvas import Signature

    from ws_celery.app import PyramidCelery

__all__ = ("Capture",)


_TIMES = {0: "not sent", 1: "sent once", 2: "sent twice"}


class Capture(Sequence[CapturedTask]):
    """What one application would send, as a sequence of :class:`CapturedTask`.

    It is alive: a task disappears when its transaction aborts or its savepoint is rolled back.
    Made by :func:`capture`. Ends with :meth:`close`, or at the end of ``with``.

    A test that begins the transaction itself (``tm.active`` in the environ, as Pylons' cookiecutter
    has it) has switched pyramid_tm off. What pyramid_tm would have dropped is dropped here:
    the tasks of a request that raises, or whose response is vetoed.

    :param app: the Celery app of the application.
    :param environ: WSGI environ of the requests of the tasks that are run.
    """

    def __init__(self, app: PyramidCelery, environ: Mapping[str, Any] | None = None) -> None:
        self.app = app
        self._interception = Interception(app, environ)

    # What there is

    def __getitem__(self, index: Any) -> Any:
        kept = self._interception
        return [read(found, kept.countdown(found)) for found in kept.publications()][index]

    def __len__(self) -> int:
        return len(self._interception.publications())

    def __repr__(self) -> str:
        return "\n".join(["Captured:", *(f"  {task}" for task in self or ["nothing"])])

    @property
    def names(self) -> list[str]:
        """Names of the tasks, in the order of dispatch within each transaction."""
        return [task.name for task in self]

    def find(
        self,
        task: Task | str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[CapturedTask]:
        """Return the captured tasks that a call would have sent.

        :param task: a task, its name, or the last part of its name.
        :param args: positional arguments; if not given, any.
        :param kwargs: keyword arguments; if not given, any.
        :param options: options of ``apply_async`` that :attr:`CapturedTask.options` has. Of
            ``headers`` the given ones are compared.
        :raises TypeError: if an option is another one.
        """
        check_options(options)
        name = task_name(task)
        wanted = {"args": None if args is None else list(args), "kwargs": kwargs}
        # As they will arrive: a tuple inside is a list then.
        content_type, encoding, text = dumps(wanted, serializer=self.app.conf.task_serializer)
        wanted = loads(text, content_type, encoding, accept={content_type})
        return [
            found
            for found in self
            if name in (found.name, found.name.rpartition(".")[2])
            and wanted["args"] in (None, found.args)
            and wanted["kwargs"] in (None, found.kwargs)
            and all(found.agrees(option, value) for option, value in options.items())
        ]

    # Assertions

    def assert_sent(
        self,
        task: Task | str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        times: int = 1,
        **options: Any,
    ) -> CapturedTask | None:
        """Assert that such a task is sent, once or ``times`` times; what is sent besides is free.

        :param times: how often.
        :return: the first such task.
        :raises AssertionError: otherwise; the message shows what was captured.

        The other parameters are those of :meth:`find`.
        """
        __tracebackhide__ = True
        found = self.find(task, args, kwargs, **options)
        if len(found) != times:
            call = described(task_name(task), args, kwargs, options)
            raise AssertionError(
                f"{call} should have been {_times(times)}, and was {_times(len(found))}."
                f"{self._hint(task_name(task))}\n{self!r}"
            )
        return found[0] if found else None

    def assert_not_sent(
        self,
        task: Task | str | None = None,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Assert that no such task is sent, or without arguments that no task is.

        The parameters are those of :meth:`find`.

        :raises AssertionError: otherwise; the message shows what was captured.
        """
        __tracebackhide__ = True
        if task is not None:
            self.assert_sent(task, args, kwargs, times=0, **options)
        elif self:
            raise AssertionError(f"No task should have been sent.\n{self!r}")

    def _hint(self, name: str) -> str:
        known = any(name in (full, full.rpartition(".")[2]) for full in self.app.tasks)
        return "" if known else " No task of that name is registered."

    # Running

    def drain(self, *, limit: int = 1000) -> list[Any]:
        """Run what would be sent, as workers would, and what the runs send in turn.

        Each message is decoded as it is, and has a request and a transaction of its own.
        Callbacks, the next tasks of chains, bodies of chords and retries follow; nothing waits for
        its ``eta``. Nothing is left of what was captured.

        :param limit: how many runs there may be: a task that sends itself has no end.
        :return: what the runs have returned, in their order. A run that ended with ``Retry`` or
            ``Ignore`` has returned nothing.
        :raises Exception: what a task raises; what was not run yet stays captured.
        :raises TaskNotRegistered: if a task is another program's.
        :raises AssertionError: if there are more runs than ``limit``.
        """
        results = []
        for _ in range(limit):
            publication = self._interception.take()
            if publication is None:
                break
            # Both have sent what follows, or wanted nothing to follow.
            with suppress(Retry, Ignore):
                results.append(self._run(publication))
        if self:
            raise AssertionError(f"drain() has run {limit} tasks, and more are to run.\n{self!r}")
        return results

    def perform(self, task: Task | Signature, *args: Any, **kwargs: Any) -> Any:
        """Run one task as a worker would; what it sends is captured.

        :param task: a task, or a signature of one.
        :return: what the task returns.
        :raises Exception: what the task raises, ``Retry``, ``Ignore`` and ``Reject`` too.
        """
        with immediately():
            result = task.apply_async(args, kwargs)
        return self._run(self._interception.take_sent(result.id))

    def _run(self, publication: Publication) -> Any:
        # An empty context, as in a worker: no calling request, no immediately().
        return Variables().run(run_as_worker, self.app, publication, self._interception.environ)

    # Its life

    def look_at(self, source: Any) -> None:
        """Include what the current transaction of a request or manager has recorded already."""
        self._interception.look_at(source)

    def until_closed(self, callback: Callable[..., object], *args: object) -> None:
        """Call ``callback`` when the capture ends."""
        self._interception.until_closed(callback, *args)

    def close(self) -> None:
        """End the capture: what is dispatched from now on is sent.

        What this one has kept is passed on to the capture around it, or dropped. What is recorded
        in a transaction that is still open is the transaction's.
        """
        self._interception.close()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _times(count: int) -> str:
    return _TIMES.get(count, f"sent {count} times")
