from __future__ import annotations

import os
import time
from pathlib import Path

import sqlalchemy as sa
from myapp.models import Delivery, Run

from ws_celery import RequestAwareTask, TransactionalTask, task


@task(base=TransactionalTask)
def send_review(request, delivery_id):
    delivery = request.dbsession.get(Delivery, delivery_id)
    delivery.review_url = request.route_url("review", id=delivery_id)
    delivery.pid = os.getpid()


@task(bind=True)
def record(self, request):
    request.dbsession.add(Run(task=self.name, task_id=self.request.id))


@task(name="backup", bind=True)
def backup(self, request):
    request.dbsession.add(Run(task=self.name, task_id=self.request.id))


@task
def record_and_fail(request):
    request.dbsession.add(Run(task="record_and_fail", task_id="none"))
    request.dbsession.flush()
    raise RuntimeError("after the row was written")


@task(base=RequestAwareTask)
def backend_pid(request):
    """Tell which database connection and which process this run has."""
    with request.tm:
        return [os.getpid(), request.dbsession.scalar(sa.text("select pg_backend_pid()"))]


@task(base=RequestAwareTask)
def slow(request, started, finished, seconds):
    Path(started).touch()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.05)
    Path(finished).touch()
