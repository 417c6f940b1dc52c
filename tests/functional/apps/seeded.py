"""Tasks as documents for beginners have them; :mod:`promised` scans this module by its INI file."""

from __future__ import annotations

import threading
from pathlib import Path

from celery import current_task
from celery.utils.log import get_task_logger

from ws_celery import RequestAwareTask, TransactionalTask, celery_app, one_instance, task

logger = get_task_logger(__name__)


@celery_app.task(name="update_rates", base=TransactionalTask)
def update_rates(request):
    """Log, as a periodic task does."""
    logger.info("Fetching the rates for %s", request.registry.package_name)


@celery_app.task(name="shop.echo", bind=True, base=RequestAwareTask)
def echo(self, request, message, fail=0):
    """Print, after some errors that pass."""
    if self.request.retries < fail:
        raise self.retry(exc=OSError("not yet"), countdown=0.1, max_retries=10)
    print(message)  # noqa: T201 - the worker's console shows it
    return self.request.retries


@task(name="add")
def add(request, x, y):
    """Add two numbers."""
    return x + y


@task(name="progress", base=RequestAwareTask)
def progress(request, steps, at, seen):
    """Tell how far it is, and wait at one step until the file ``seen`` is there."""
    for step in range(steps):
        current_task.update_state(state="PROGRESS", meta={"percent": 100 * step // steps})
        if step == at:
            wait_for_file(Path(seen))
    return steps


def wait_for_file(path):
    """Wait until a test has seen enough."""
    for _ in range(6000):
        if path.exists():
            return
        threading.Event().wait(0.01)


@task(name="UpdateIndexTask")
class UpdateIndexTask(RequestAwareTask):
    """Update an index, one run at a time, until the file ``seen`` is there."""

    @one_instance(key="UpdateIndexTask")
    def run(self, request, **kwargs):
        """Hold the lock while a test looks at it."""
        logger.warning("The index is being updated")
        wait_for_file(Path(kwargs["seen"]))


@task(name="pay", base=RequestAwareTask)
def pay(request, amount, password=None):
    """Fail, with something in hand that nobody may read."""
    raise LookupError("no such account")
