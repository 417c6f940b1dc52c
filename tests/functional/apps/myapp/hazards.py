"""Tasks that end the process that runs them; all of them write a row first."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from myapp.models import Run

from ws_celery import task


def write(self, request):
    request.dbsession.add(Run(task=self.name, task_id=self.request.id))
    request.dbsession.flush()


@task(bind=True)
def dies_once(self, request, mark):
    write(self, request)
    if not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)


@task(bind=True)
def dies_always(self, request):
    write(self, request)
    os.kill(os.getpid(), signal.SIGKILL)


@task(bind=True)
def goes_on_for_ever(self, request, mark):
    write(self, request)
    Path(mark).touch()
    threading.Event().wait()


@task(bind=True, time_limit=1)
def never_ends(self, request):
    write(self, request)
    threading.Event().wait()


@task(bind=True)
def is_terminated(self, request, mark):
    """Run until somebody kills the process."""
    write(self, request)
    Path(mark).write_text(self.request.id)
    threading.Event().wait()
