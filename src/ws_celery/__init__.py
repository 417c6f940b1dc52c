"""Celery, native in Pyramid: tasks are written like views and sent when the transaction commits."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from ws_celery.app import get_celery_app
    from ws_celery.config import includeme
    from ws_celery.declaration import celery_app, task
    from ws_celery.exceptions import ConfigurationError, WsCeleryError
    from ws_celery.locks import one_instance
    from ws_celery.recording import immediately
    from ws_celery.tasks import RequestAwareTask
    from ws_celery.transactional import TransactionalTask
else:
    # Imported at first use: the console script is in this package, and has to let gevent patch the
    # standard library before anything else is imported.
    _MODULES = {
        "ConfigurationError": "exceptions",
        "RequestAwareTask": "tasks",
        "TransactionalTask": "transactional",
        "WsCeleryError": "exceptions",
        "celery_app": "declaration",
        "get_celery_app": "app",
        "immediately": "recording",
        "includeme": "config",
        "one_instance": "locks",
        "task": "declaration",
    }

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


__all__ = (
    "ConfigurationError",
    "RequestAwareTask",
    "TransactionalTask",
    "WsCeleryError",
    "celery_app",
    "get_celery_app",
    "immediately",
    "includeme",
    "one_instance",
    "task",
)
