"""What an interactive shell has at hand: the tasks by name, and a transaction that is open."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import transaction

from ws_celery.app import PyramidCelery, get_celery_app
from ws_celery.interfaces import ICeleryApp

if TYPE_CHECKING:
    from celery import Task
    from pyramid.request import Request

__all__ = ("open_transaction", "setup", "tasks_by_name")


def setup(env: MutableMapping[str, Any]) -> Iterator[None]:
    """Prepare the names of a shell, for ``[pshell] setup = ws_celery.shell.setup``.

    Adds ``celery_app``, the application's tasks by the names of their functions, and what
    :func:`open_transaction` adds. What is there already keeps its name.

    :param env: the names, with the ``request`` that :func:`pyramid.paster.bootstrap` made.
    """
    app = get_celery_app(env["request"])
    for name, value in {**tasks_by_name(app), "celery_app": app}.items():
        env.setdefault(name, value)
    with open_transaction(env):
        yield


def tasks_by_name(app: PyramidCelery) -> dict[str, Task]:
    """Return the application's tasks, Celery's own left out, by the names of their functions."""
    own = (task for task in app.tasks.values() if not task.name.startswith("celery."))
    return {task.__name__: task for task in own}


@contextmanager
def open_transaction(env: MutableMapping[str, Any]) -> Iterator[None]:
    """Keep a transaction of the request open, and let the shell end it.

    Adds ``commit`` and ``abort``, which end the transaction and begin the next one. At the end it
    is aborted; dispatches that are dropped with it are counted on stderr.

    :param env: the names, with a ``request``.
    """
    request = env["request"]
    current = _Transaction(get_celery_app(request), request)
    current.begin()
    env.update(commit=current.commit, abort=current.abort)
    try:
        yield
    finally:
        current.leave()


class _Transaction:
    """The transaction of a shell: one is open at any time."""

    def __init__(self, app: PyramidCelery, request: Request) -> None:
        self._app = app
        self._request = request
        manager = getattr(request, "tm", None)
        self._manager = transaction.manager if manager is None else manager

    def begin(self) -> None:
        # As pyramid_tm marks a request, for add-ons that ask.
        self._request.environ.update({"tm.active": True, "tm.manager": self._manager})
        self._app.transactions.manage(self._manager, self._request)
        self._manager.begin().set_data(ICeleryApp, self._app)  # see current_celery_app()

    def commit(self) -> None:
        """Commit: keep what was changed, and send what was dispatched."""
        self._end(self._manager.commit)

    def abort(self) -> None:
        """Abort: undo what was changed, and drop what was dispatched."""
        self._end(self._manager.abort)

    def leave(self) -> None:
        """Abort, and say on stderr how many dispatches are dropped."""
        dropped = len(self._app.transactions.recorded(self._request))
        self._request.environ["tm.active"] = False
        self._manager.abort()
        if dropped:
            tasks = "1 dispatch is" if dropped == 1 else f"{dropped} dispatches are"
            sys.stderr.write(f"Aborted: {tasks} dropped. commit() would have sent them.\n")

    def _end(self, end: Callable[[], object]) -> None:
        try:
            end()
        except BaseException:
            self._manager.abort()
            raise
        finally:
            self.begin()
