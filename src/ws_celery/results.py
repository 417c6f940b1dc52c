"""Results of what is deferred, or skipped: nobody is to wait for one that does not come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from celery.backends.base import Backend
from celery.result import ResultBase
from kombu import Message

from ws_celery.events import SKIPPED
from ws_celery.exceptions import NotRunYet
from ws_celery.request import calling_request

if TYPE_CHECKING:
    from ws_celery.app import PyramidCelery

__all__ = ("end_waits",)


def end_waits(app: PyramidCelery, backend: Backend) -> None:
    """Let a result backend wait for no result that does not come.

    Its methods are wrapped in place: a backend is a class of Celery's, of another package's, or of
    the application's own.
    """
    waits = _Waits(app, backend)
    backend.wait_for_pending = waits.around(backend.wait_for_pending)
    backend.iter_native = waits.around(backend.iter_native)


class _Waits:
    """Ends the waiting for a result that does not come.

    :param app: the Celery app.
    :param backend: the backend that is waited with; each thread has its own.
    """

    def __init__(self, app: PyramidCelery, backend: Backend) -> None:
        self._app = app
        self._backend = backend
        self._consumer = getattr(backend, "result_consumer", None)
        self._skipped: dict[str, Any] = {}
        self._awaited: set[str] = set()
        if self._consumer is not None:
            self._on_state_change = self._consumer.on_state_change
            self._consumer.on_state_change = self.on_state_change

    def around(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``wait``, which waits for a result, so that it raises ``NotRunYet``."""

        def wait_for_result(
            result: ResultBase,
            *args: Any,
            on_interval: Callable[[], None] | None = None,
            **how: Any,
        ) -> Any:
            self._refuse_recorded(set(_ids(result)))
            # A chord with a skipped part has an end: its body fails.
            awaited = set(_ids(result, parts_of_chords=False))

            def look() -> None:
                if self._consumer is None:  # it is not notified of states
                    self._look_for_skipped(awaited)
                self._refuse_skipped(awaited)
                if on_interval:
                    on_interval()

            self._awaited = awaited
            if self._consumer is not None and hasattr(self._backend, "get_many"):
                self._look_for_skipped(awaited)
                self._refuse_skipped(awaited)
            return wait(result, *args, on_interval=look, **how)

        return wait_for_result

    def on_state_change(self, meta: Mapping[str, Any], message: Message) -> None:
        """Remember a run that was skipped, where the backend is notified of states."""
        if meta["status"] == SKIPPED and meta["task_id"] in self._awaited:
            self._skipped[meta["task_id"]] = meta["result"]
        self._on_state_change(meta, message)

    def _refuse_recorded(self, awaited: set[str]) -> None:
        for publication in self._app.transactions.recorded(calling_request()):
            if publication.task_id in awaited:
                raise NotRunYet(str(publication.task_id), NotRunYet.DEFERRED)

    def _look_for_skipped(self, awaited: set[str]) -> None:
        if hasattr(self._backend, "get_many"):
            only = {"interval": 0, "max_iterations": 1, "READY_STATES": {SKIPPED}}
            metas = [meta for _, meta in self._backend.get_many(set(awaited), **only)]
        else:
            metas = [self._backend.get_task_meta(task_id) for task_id in awaited]
        self._skipped.update(
            (meta["task_id"], meta["result"]) for meta in metas if meta["status"] == SKIPPED
        )

    def _refuse_skipped(self, awaited: set[str]) -> None:
        for task_id in awaited & self._skipped.keys():
            said = self._skipped.pop(task_id)
            reason = said.get("reason", said) if isinstance(said, Mapping) else said
            raise NotRunYet(task_id, f"It was skipped: {reason}. {NotRunYet.SKIPPED}")


def _ids(result: ResultBase | None, *, parts_of_chords: bool = True) -> Iterator[str]:
    """Yield the ids of the tasks that have to run before a result is there, and its own."""
    wanted = True
    while result is not None:
        results = getattr(result, "results", None)
        for each in results or () if wanted else ():
            yield from _ids(each, parts_of_chords=parts_of_chords)
        if results is None:
            yield result.id
        result, wanted = result.parent, parts_of_chords
