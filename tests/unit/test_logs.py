"""The fields of log records, and what of a failure is told."""

from __future__ import annotations

import logging
from collections import namedtuple

import pytest

from ws_celery import task
from ws_celery.logs import TaskFilter, TaskFormatter, log_arguments_of_failures

FORMAT = "%(task_name)s %(task_id)s %(message)s"


def record(message="hello", level=logging.INFO, **extra):
    made = logging.LogRecord("shop", level, __file__, 1, message, (), None)
    made.__dict__.update(extra)
    return made


def formatted(*args, **extra):
    return TaskFormatter(FORMAT).format(record(*args, **extra))


@task(name="write_line")
def write_line(request):
    return formatted("inside")


def test_a_record_tells_the_task_that_runs(make_app):
    app = make_app(write_line)
    run = app.celery.tasks["write_line"].apply(task_id="7")

    assert run.get() == "write_line 7 inside"


def test_a_record_outside_of_any_task_has_dashes():
    assert formatted() == "- - hello"


def test_celerys_own_record_tells_its_task():
    assert formatted(data={"id": "8", "name": "shop.send"}) == "shop.send 8 hello"


def test_a_filter_lets_all_pass_and_keeps_what_is_there():
    kept = record(task_name="shop.send", task_id="9")

    assert TaskFilter().filter(kept)
    assert kept.task_id == "9"


@pytest.fixture
def trace():
    logger = logging.getLogger("celery.app.trace")
    before = logger.filters[:]
    log_arguments_of_failures()
    log_arguments_of_failures()
    yield logger
    logger.filters[:] = before


@task(name="pay", bind=True)
def pay(self, request, amount, password, iban=None, note=None):
    if note == "hidden":
        self.request.argsrepr = "('(hidden by the caller)',)"
    raise LookupError(note or "no such customer")


@pytest.fixture
def failure(trace, make_app, caplog):
    """Let the task fail; returns what the log tells of its arguments."""

    def failure(*args, mask="", **kwargs):
        settings = {"ws_celery__mask_arguments": mask} if mask else {}
        app = make_app(pay, **settings)
        app.celery.tasks["pay"].apply(args, kwargs)
        assert caplog.text.count("Arguments:") == 1
        (line,) = [each for each in caplog.text.splitlines() if "Arguments:" in each]
        return line.partition("Arguments: ")[2]

    return failure


def test_a_failure_tells_its_arguments_once_and_masked_by_their_names(failure):
    shown = failure("100%", "hunter2", None, {"token": ["hunter3", "hunter 4"], "b": 1})

    assert shown == "('100%', '********', None, {'token': ********, 'b': 1}) {}"


def test_a_failure_does_not_tell_what_the_settings_hide(failure):
    shown = failure(1, "hunter2", "DE7", note={"iban": "DE8"}, mask="iban")

    assert shown == "(1, '********', '********') {'note': {'iban': '********'}}"


def test_a_failure_tells_no_argument_if_the_settings_hide_all(failure):
    shown = failure(1, password="hunter2", mask="all")  # noqa: S106

    assert shown == "('********',) {'password': ********}"


def test_what_a_caller_tells_instead_is_not_put_in_the_clear(failure):
    shown = failure(1, "hunter2", "DE7", note="hidden")

    assert shown == "******** {'note': 'hidden'}"


def test_a_failure_is_logged_though_an_argument_cannot_be_looked_into(failure):
    class Odd(dict):
        def items(self):
            raise LookupError("no such thing")

    assert failure(1, "hunter2", Odd()) == "(1, '********', '********') {}"


def test_an_error_tells_no_secret_though_another_argument_cannot_be_looked_into(failure, caplog):
    class Odd(dict):
        def items(self):
            raise LookupError("no such thing")

    caplog.handler.addFilter(TaskFilter())
    failure(Odd(), "hunter2", note="cannot pay with hunter2")

    assert "LookupError: cannot pay with ********" in caplog.text
    assert "hunter2" not in caplog.text


def test_a_failure_tells_a_tuple_with_names(failure):
    Card = namedtuple("Card", "name number")

    assert failure(1, "hunter2", Card("me", 5)) == "(1, '********', ('me', 5)) {}"


def test_a_record_of_a_run_that_is_not_known_tells_no_argument(trace, caplog):
    data = {"id": "7", "args": "('hunter2',)", "kwargs": "{}"}
    trace.error("Task %(id)s raised", data, extra={"data": data})
    trace.info("Task %(id)s succeeded", data, extra={"data": data})

    assert "Task 7 raised Arguments: ********" in caplog.text
    assert caplog.text.count("Arguments:") == 1
    assert "hunter2" not in caplog.text
