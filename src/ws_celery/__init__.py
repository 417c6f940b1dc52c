"""Celery, native in Pyramid: tasks are written like views and sent when the transaction commits."""

from __future__ import annotations

from ws_celery.app import get_celery_app
from ws_celery.config import includeme
from ws_celery.declaration import celery_app, task
from ws_celery.dispatch import immediately
from ws_celery.exceptions import ConfigurationError, WsCeleryError
from ws_celery.tasks import RequestAwareTask, TransactionalTask

__all__ = (
    "ConfigurationError",
    "RequestAwareTask",
    "TransactionalTask",
    "WsCeleryError",
    "celery_app",
    "get_celery_app",
    "immediately",
    "includeme",
    "task",
)
