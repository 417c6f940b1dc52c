"""What Celery calls back: a worker's child process must not share what its parent opened."""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING, Any

from celery import signals

if TYPE_CHECKING:
    from ws_celery.app import PyramidCelery

__all__ = ("PyramidFixup", "dispose_engines")


class PyramidFixup:
    """Celery's extension point for frameworks; Celery makes one for each app.

    :param app: the Celery app of one Pyramid registry.
    """

    def __init__(self, app: PyramidCelery) -> None:
        self.app = app
        self._pid = os.getpid()
        signals.worker_process_init.connect(self.on_process_init)

    def on_process_init(self, **_: Any) -> None:
        """Let a forked child open database connections of its own."""
        # The solo and thread pools send this signal in the process that loaded the application.
        if os.getpid() != self._pid:
            dispose_engines()


def dispose_engines() -> None:
    """Make every SQLAlchemy engine of this process forget its pooled connections, without closing.

    They are the parent's: two processes that talk over one connection corrupt both conversations,
    and closing one would close it for the parent. Engines are found wherever the application keeps
    them, at module level too.
    """
    module = sys.modules.get("sqlalchemy.engine")
    if module is None:
        return
    for candidate in _objects():
        # type(), not isinstance(): lazy proxies evaluate themselves when asked for __class__.
        if issubclass(type(candidate), module.Engine):
            candidate.dispose(close=False)


def _objects() -> list[Any]:
    """Return all objects, also those that ``gc.freeze()`` hides to share them with children."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    objects = gc.get_objects()
    if frozen:
        gc.freeze()
    return objects
