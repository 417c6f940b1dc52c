"""Trace context arrives, with the real instrumentations of OpenTelemetry and Sentry."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.trace import SpanKind, StatusCode
from pyramid.response import Response
from tests.waiting import SOON

from ws_celery import task

ROOT = Path(__file__).parents[2]


class Spans(SpanProcessor):
    """Keeps the spans that have ended."""

    def __init__(self):
        self._ended = []
        self._changed = threading.Condition()

    def on_end(self, span):
        with self._changed:
            self._ended.append(span)
            self._changed.notify_all()

    def named(self, name):
        """Wait for the span of this name."""
        with self._changed:
            assert self._changed.wait_for(lambda: name in self.names(), SOON), self.names()
            return next(span for span in self._ended if span.name == name)

    def names(self):
        return [span.name for span in self._ended]


@pytest.fixture
def spans():
    """Switch OpenTelemetry's instrumentation on, for this test."""
    spans, provider = Spans(), TracerProvider()
    provider.add_span_processor(spans)
    instrumentor = CeleryInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    spans.tracer = provider.get_tracer("test")
    try:
        yield spans
    finally:
        instrumentor.uninstrument()
        provider.shutdown()


@task(name="traced")
def traced(request):
    pass


@task(name="outer")
def outer(request):
    traced.delay()


@pytest.fixture
def visit(make_app, redis_url, spans):
    """Make an application with a view that dispatches; returns the app, and a way to visit it."""

    def view(request):
        with spans.tracer.start_as_current_span("web"):
            request.celery_app.tasks[request.params["task"]].delay()
            assert trace.get_current_span().name == "web"
        if "fail" in request.params:
            request.tm.doom()
        return Response("done")

    def setup(config):
        config.add_route("home", "/")
        config.add_view(view, route_name="home")

    app = make_app(traced, outer, setup=setup, broker=redis_url)
    return app, lambda **params: app.web.get("/", params)


def test_the_run_of_a_deferred_task_is_the_child_of_its_dispatch(visit, spans, start_worker):
    app, get = visit
    get(task="traced")
    start_worker(app)
    run, sent, web = map(spans.named, ("run/traced", "apply_async/traced", "web"))

    assert (sent.kind, run.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert run.parent.span_id == sent.context.span_id
    assert sent.parent.span_id == web.context.span_id
    assert sent.status.status_code is StatusCode.UNSET
    assert run.context.trace_id == web.context.trace_id


def test_a_task_of_a_task_belongs_to_the_same_trace(visit, spans, start_worker):
    app, get = visit
    get(task="outer")
    start_worker(app)
    inner, sent, run = map(spans.named, ("run/traced", "apply_async/traced", "run/outer"))

    assert inner.parent.span_id == sent.context.span_id
    assert sent.parent.span_id == run.context.span_id


def test_a_transaction_that_aborts_leaves_no_span_open(visit, spans):
    app, get = visit
    get(task="traced", fail="1")

    assert spans.names() == ["apply_async/traced", "web"]
    assert trace.get_current_span() is trace.INVALID_SPAN
    assert app.sent() == []


#: Sentry patches Celery for good, hence a process of its own; it prints its transactions.
SENTRY = """
import json, sys, threading
import sentry_sdk
from pyramid.config import Configurator
from pyramid.response import Response
from sentry_sdk.integrations.celery import CeleryIntegration
from sentry_sdk.integrations.pyramid import PyramidIntegration
from sentry_sdk.transport import Transport
from webtest import TestApp
from tests.integration.conftest import _worker
from tests.waiting import SOON
from ws_celery import get_celery_app, task

told, ended = [], threading.Event()

class Memory(Transport):
    def capture_envelope(self, envelope):
        told.extend(item.payload.json for item in envelope.items if item.type == "transaction")
        if any(transaction["transaction"] == "traced" for transaction in told):
            ended.set()

@task(name="traced")
def traced(request):
    pass

@task(name="second_try", bind=True)
def second_try(self, request):
    if not self.request.retries:
        raise self.retry(countdown=0)
    traced.delay()

def view(request):
    request.celery_app.tasks[request.params["task"]].delay()
    if "fail" in request.params:
        request.tm.doom()
    return Response("done")

def main(broker, queue, ini):
    with open(ini, "w") as file:
        file.write(f"[celery]\\nbroker_url = {broker}\\ntask_default_queue = {queue}\\n")
    with Configurator(settings={"ws_celery.config_uri": ini}) as config:
        config.include("pyramid_tm")
        config.include("ws_celery")
        config.add_celery_task(traced)
        config.add_celery_task(second_try)
        config.add_route("home", "/")
        config.add_view(view, route_name="home")
    web = TestApp(config.make_wsgi_app())
    web.get("/", {"task": "second_try"})
    web.get("/", {"task": "traced", "fail": "1"})
    app = get_celery_app(config.registry)
    with _worker(app):
        assert ended.wait(SOON)
    with app.connection_for_write() as connection:
        connection.default_channel.queue_delete(queue)
    app.close()
    print(json.dumps(told))

sentry_sdk.init(
    "http://key@localhost/1",
    transport=Memory,
    traces_sample_rate=1.0,
    integrations=[CeleryIntegration(), PyramidIntegration()],
)
main(*sys.argv[1:])
"""


def test_sentry_sees_one_trace_from_the_view_to_the_task_of_a_retried_task(redis_url, tmp_path):
    queue = f"test-{uuid.uuid4().hex}"
    process = subprocess.run(
        [sys.executable, "-c", SENTRY, redis_url, queue, str(tmp_path / "celery.ini")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    web, aborted, first, second, last = json.loads(process.stdout.splitlines()[-1])

    assert [each["transaction"] for each in (first, second, last)] == [
        "second_try",
        "second_try",
        "traced",
    ]
    for cause, effect in ((web, first), (first, second), (second, last)):
        assert context(effect)["parent_span_id"] in dispatches(cause)
        assert context(effect)["trace_id"] == context(cause)["trace_id"]
    assert {span["op"] for span in aborted["spans"]} == {"queue.submit.celery"}


def context(transaction):
    return transaction["contexts"]["trace"]


def dispatches(transaction):
    """Return the ids of the spans in which a transaction has dispatched."""
    return {span["span_id"] for span in transaction["spans"] if span["op"] == "queue.submit.celery"}
