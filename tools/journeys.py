"""How far a reader has to walk: the modules of ours on the way of a dispatch, a run and a tick.

Run by ``make house``; ``--route`` prints the way itself. Counted, by ``sys.setprofile`` and when
all is warm: calls, functions, modules, and how often the way turns to another module. Broker and
database are the embedded ones of the demo.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import zope.sqlalchemy
from celery.app.trace import build_tracer
from celery.worker.request import Request
from kombu import Connection
from pyramid.config import Configurator
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from webtest import TestApp

import ws_celery
from ws_celery import get_celery_app, task
from ws_celery.app import PyramidCelery
from ws_celery.beat import Scheduler
from ws_celery.embedded import EmbeddedBroker

HERE = f"{Path(ws_celery.__file__).parent}/"
#: Seconds in which a tick has to be due, and a broker to answer.
PATIENCE = 10

Steps = list[tuple[str, str]]


@task(name="send_review")
def send_review(request: Any, number: int) -> int:
    """Do nothing: the way there is what counts."""
    return number


def make_site(
    broker: EmbeddedBroker, folder: Path, **settings: str
) -> tuple[TestApp, PyramidCelery]:
    """Make an application whose view at ``/`` dispatches once."""
    config = Configurator(settings={"celery.broker_url": broker.url(0), **settings})
    config.include("pyramid_tm")
    config.include("ws_celery")
    engine = create_engine(f"sqlite:///{folder}/{len(settings)}.sqlite")

    def dbsession(request: Any) -> Session:
        session = Session(engine)
        zope.sqlalchemy.register(session, transaction_manager=request.tm)
        return session

    def view(request: Any) -> Any:
        send_review.delay(1)
        return request.response

    config.add_request_method(dbsession, reify=True)
    config.add_route("dispatch", "/")
    config.add_view(view, route_name="dispatch")
    config.add_celery_task(send_review)
    if "ws_celery.beat" in settings:
        config.add_periodic_task(send_review, 1.0, name="each second", args=[1])
    web = TestApp(config.make_wsgi_app())
    app = get_celery_app(web.app.registry)
    if app.outbox:
        app.outbox.create_table()
    app.finalize()
    return web, app


def walked(function: Callable[[], Any]) -> Steps:
    """Call a function; return each function of ours that was entered, with its module."""
    steps: Steps = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(HERE):
            steps.append((code.co_filename.removeprefix(HERE), code.co_name))

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return steps


def report(title: str, steps: Steps) -> None:
    """Print a line for one journey."""
    route = [module for module, _ in groupby(module for module, _ in steps)]
    print(
        f"{title:30} calls {len(steps):4}  functions {len(set(steps)):4}  "
        f"modules {len(set(route)):3}  changes {len(route) - 1:3}"
    )
    if "--route" in sys.argv:
        print("   ", " > ".join(route))


def dispatch(web: TestApp) -> Steps:
    """Follow a request that dispatches once."""
    for _ in range(2):
        web.get("/")
    return walked(lambda: web.get("/"))


def run(app: PyramidCelery, web: TestApp) -> Steps:
    """Follow a run in a worker."""
    steps: Steps = []
    for _ in range(3):
        web.get("/")
        with app.connection() as connection:
            message = connection.default_channel.basic_get("celery", no_ack=True)
        received = Request(message, app=app)
        tracer = build_tracer(received.type, app.tasks[received.type], app=app)
        call = received.id, received.args, received.kwargs
        steps = walked(lambda: tracer(*call, request=received.request_dict))
    return steps


def tick(app: PyramidCelery) -> Steps:
    """Follow a tick of beat that sends something."""
    app.schedule.create_table()
    scheduler = Scheduler(app, lazy=True)
    scheduler.setup_schedule()
    for _ in range(6):
        scheduler.tick()
    end = time.monotonic() + PATIENCE
    with app.connection() as connection:
        queue = app.amqp.queues["celery"](connection.default_channel)
        while time.monotonic() < end:
            queue.purge()
            steps = walked(scheduler.tick)
            if queue.get(no_ack=True):
                return steps
    sys.exit(f"no tick was due in {PATIENCE} s")


@contextmanager
def running_broker(folder: Path) -> Iterator[EmbeddedBroker]:
    """Run an embedded broker."""
    broker = EmbeddedBroker(folder / "broker")
    process = subprocess.Popen(broker.command())
    try:
        with Connection(broker.url(0)) as connection:
            connection.ensure_connection(max_retries=100, interval_start=0.1, interval_max=0.1)
        yield broker
    finally:
        process.terminate()
        process.wait(PATIENCE)


def main() -> None:
    """Print all journeys."""
    outbox = {"ws_celery.outbox": "true"}
    with tempfile.TemporaryDirectory() as name, running_broker(Path(name)) as broker:
        folder = Path(name)
        web, _ = make_site(broker, folder)
        report("dispatch", dispatch(web))
        web, app = make_site(broker, folder, **outbox)
        report("dispatch, outbox", dispatch(web))
        with app.connection() as connection:
            connection.default_channel.queue_purge("celery")
        report("run, outbox", run(app, web))
        _, app = make_site(broker, folder, **outbox, **{"ws_celery.beat": "true"})
        report("tick of beat, outbox", tick(app))


if __name__ == "__main__":
    main()
