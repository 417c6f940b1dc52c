"""The test kit: what is captured, what is asserted of it, and how it is run."""

from __future__ import annotations

from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any

import pytest
import transaction
from celery import chain, chord, group
from celery.exceptions import Ignore, Reject, Retry
from pyramid import testing
from pyramid.interfaces import IRequest
from pyramid.response import Response
from pyramid.threadlocal import RequestContext, get_current_request
from transaction import TransactionManager
from webtest import TestApp

from ws_celery import RequestAwareTask, get_celery_app, immediately, task
from ws_celery.exceptions import NoCurrentApplication, NotIncluded, TaskNotRegistered
from ws_celery.testing import Capture, capture, perform

pytest_plugins = ["pytester"]


@task
def add(request, a, b=1):
    return a + b


@task
def fail(request):
    raise LookupError("on purpose")


@task(base=RequestAwareTask)
def relay(request, count):
    if count:
        relay.delay(count - 1)
    return count


@task(bind=True, max_retries=1)
def again(self, request):
    if not self.request.retries:
        raise self.retry(countdown=3600)
    return "at last"


@task
def look(request):
    return [request.tm.get().isDoomed(), IRequest.providedBy(request), request.application_url]


@task
def total(request, numbers):
    return sum(numbers)


@task
def note(request):
    request.environ["notes"].append(request.tm)


@task
def end(request, how):
    raise {"ignore": Ignore, "reject": Reject}[how]("on purpose")


def seven():
    return 7


TASKS = (add, fail, relay, again, look, total, note, end)


@pytest.fixture
def app(make_app):
    return make_app(*TASKS, setup=add_views, celery="result_backend = cache+memory://")


def add_views(config: Any) -> None:
    def send(request: Any) -> Response:
        add.delay(int(request.params["a"]))
        if "raise" in request.params:
            raise LookupError("on purpose")
        return Response("sent")

    config.add_route("send", "/send")
    config.add_view(send, route_name="send")


@pytest.fixture
def tm():
    """The manager that Pylons' cookiecutter gives to a test."""
    tm = TransactionManager(explicit=True)
    tm.begin()
    tm.doom()
    yield tm
    tm.abort()


@pytest.fixture
def web(app, tm):
    environ = {"HTTP_HOST": "example.com", "tm.active": True, "tm.manager": tm}
    return TestApp(app.web.app, extra_environ=environ)


# What is captured


def test_a_task_of_a_doomed_transaction_is_captured(web, tm):
    with capture(tm) as sent:
        web.get("/send?a=1")

        assert sent.names == [add.name]
        assert sent[0].args == [1]
        assert sent[0].kwargs == {}
        assert sent[0].options["headers"]["ws_celery"]["url"] == "http://example.com"


def test_several_requests_of_a_test_are_captured_in_their_order(web, tm):
    with capture(tm) as sent:
        web.get("/send?a=1")
        web.get("/send?a=2")

        assert [task.args for task in sent] == [[1], [2]]


def test_what_was_dispatched_before_the_capture_is_captured_too(web, tm):
    web.get("/send?a=1")

    with capture(tm) as sent:
        assert len(sent) == 1


def test_nothing_is_captured_of_a_request_that_raises(web, tm):
    with capture(tm) as sent:
        web.get("/send?a=1")
        with pytest.raises(LookupError):
            web.get("/send?a=2&raise=1")

        assert [task.args for task in sent] == [[1]]


@pytest.mark.parametrize("settings", [{}, {"tm.commit_veto": "pyramid_tm.default_commit_veto"}])
def test_nothing_is_captured_of_a_request_that_pyramid_tm_would_abort(make_app, tm, settings):
    def setup(config: Any) -> None:
        config.add_settings(settings)
        config.add_route("fail", "/fail")
        config.add_view(view, route_name="fail")
        config.add_exception_view(
            lambda _error, _request: Response(status=500), context=LookupError
        )

    def view(request: Any) -> None:
        add.delay(1)
        raise LookupError

    app = make_app(add, setup=setup)
    environ = {"tm.active": True, "tm.manager": tm}
    with capture(tm) as sent:
        TestApp(app.web.app, extra_environ=environ).get("/fail", status=500)

        assert not sent


def test_a_rolled_back_savepoint_takes_its_tasks_along(app, tm):
    with capture(tm) as sent:
        request = app.request(**{"tm.manager": tm})
        add.delay(request, 1)
        savepoint = tm.savepoint()
        add.delay(request, 2)
        savepoint.rollback()

        assert [task.args for task in sent] == [[1]]


def test_an_aborted_transaction_takes_its_tasks_along(app):
    tm = TransactionManager(explicit=True)
    tm.begin()
    with capture(app.registry) as sent:
        add.delay(app.request(**{"tm.manager": tm}), 1)
        assert len(sent) == 1
        tm.abort()

        assert not sent


def test_what_a_commit_sends_is_captured_and_does_not_leave(app):
    with capture(app.registry) as sent:
        app.web.get("/send?a=1")

        assert sent.names == [add.name]
    assert app.names() == []


def test_what_is_sent_at_once_is_captured_and_does_not_leave(app):
    with capture() as sent, RequestContext(app.request()), immediately():
        add.delay(1)
        app.celery.send_task("elsewhere.of_another_program", queue="other")

        assert sent.names == [add.name, "elsewhere.of_another_program"]
    assert app.names() == []


def test_after_the_capture_tasks_are_sent_again(app):
    with capture():
        add.delay(1)
    add.delay(2)

    assert [message.args for message in app.sent()] == [[2]]
    assert not {"publish", "send_task", "producer_or_acquire"} & set(vars(app.celery))


def test_a_plain_celery_task_and_a_canvas_are_captured(app, tm):
    plain = app.celery.task(seven, name="plain", shared=False)
    with capture(tm) as sent, RequestContext(app.request(**{"tm.manager": tm})):
        plain.delay()
        group(add.s(1), add.s(2)).apply_async()
        chain(add.s(1), add.s()).apply_async()

        assert sent.names == ["plain", add.name, add.name, add.name]


def test_events_are_no_tasks(make_app):
    app = make_app(add, celery="task_send_sent_event = true")
    with capture(app.registry) as sent:
        add.delay(1)

        assert sent.names == [add.name]
        assert sent.drain() == [2]
        assert not sent


def test_eager_calls_are_captured_instead_of_run(make_app):
    app = make_app(add, celery="task_always_eager = true")
    with capture(app.registry) as sent:
        add.delay(1)

        assert sent.drain() == [2]
    assert add.delay(1).get() == 2


def test_without_an_application_the_error_says_so():
    with pytest.raises(NoCurrentApplication, match="Pass the request"):
        capture()


def test_a_dummy_request_borrows_the_tasks_of_the_application(app, tm):
    request = testing.DummyRequest(tm=tm)
    with testing.testConfig(request=request) as config:
        with capture(request) as sent:
            add.delay(1)

            sent.assert_sent(add, [1])
            assert perform(add, 2) == 3
        with pytest.raises(NotIncluded):
            get_celery_app(config.registry)


def test_of_two_applications_the_one_of_the_source_is_captured(app, make_app):
    other = make_app(add)
    with pytest.raises(NoCurrentApplication, match="2 applications"):
        capture()
    for source in (app.registry, app.request(), app.web.app):
        with capture(source) as sent:
            add.delay(app.request(), 1)
            add.delay(other.request(), 2)

            assert [task.args for task in sent] == [[1]]
    assert len(other.sent()) == 3


def test_a_capture_inside_a_capture_passes_on_what_it_has_not_run(app, tm):
    with capture(tm) as outer:
        with capture(tm) as inner:
            add.delay(app.request(**{"tm.manager": tm}), 1)
            add.delay(2)
            assert len(inner) == 2

        assert [task.args for task in outer] == [[2], [1]]


# Assertions


def test_a_task_is_asserted_by_task_or_name_and_arguments(app):
    with capture() as sent:
        result = add.delay(1, b=(2, 3))

        for name in (add, add.name, "add"):
            found = sent.assert_sent(name, [1], {"b": (2, 3)})
            assert found.id == result.id
        sent.assert_sent("add")
        sent.assert_not_sent("add", [2])
        sent.assert_not_sent(total)


def test_a_task_is_asserted_by_options(app):
    expires = datetime(2100, 1, 1, tzinfo=timezone.utc)
    options = {"queue": "slow", "priority": 3, "countdown": 60, "headers": {"x": 1}}
    with capture() as sent:
        add.apply_async((1,), expires=expires, **options, routing_key="slow")

        sent.assert_sent("add", expires=expires, **options)
        sent.assert_sent("add", headers={"x": 1})
        assert sent[0].options["eta"] > datetime.now(timezone.utc)
        for wrong in ({"queue": "fast"}, {"countdown": 61}, {"headers": {"x": 2}}):
            sent.assert_not_sent("add", **wrong)


@pytest.mark.parametrize(
    ("option", "value", "other"),
    [
        ("expires", 60, 61),
        ("task_id", "mine", "yours"),
        ("shadow", "Add", "add"),
        ("time_limit", 5, None),
        ("soft_time_limit", 3, 5),
        ("ignore_result", True, False),
        ("headers", {"x": 1}, {"y": 1}),
    ],
)
def test_each_option_that_is_asked_for_is_compared(app, option, value, other):
    with capture() as sent:
        add.apply_async((1,), **{option: value})

        sent.assert_sent("add", **{option: value})
        sent.assert_not_sent("add", **{option: other})
        with pytest.raises(AssertionError):
            sent.assert_not_sent("add", **{option: value})


def test_what_an_option_is_without_being_given_is_compared_too(app):
    with capture() as sent:
        add.delay(1)

        sent.assert_sent("add", ignore_result=False, time_limit=None, expires=None, headers={})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("queu", r"'queu' is not read of a message\. Did you mean queue\? Write one of queue, "),
        ("retry_policy", r"'retry_policy' is not read of a message\. Write one of queue, "),
    ],
)
def test_an_option_that_is_not_compared_is_refused(app, option, message):
    with capture() as sent:
        for ask in (sent.find, sent.assert_sent, sent.assert_not_sent):
            with pytest.raises(TypeError, match=message):
                ask("add", **{option: "slow"})


def test_a_failed_assertion_shows_what_was_captured_instead(app):
    with capture() as sent:
        add.apply_async((1,), {"b": 2}, queue="slow")
        with pytest.raises(AssertionError) as error:
            sent.assert_sent("add", [7], queue="fast")

    assert str(error.value).splitlines() == [
        "add(7) queue='fast' should have been sent once, and was not sent.",
        "Captured:",
        f"  {add.name}(1, b=2) queue='slow'",
    ]


def test_an_assertion_counts(app):
    with capture() as sent:
        for number in range(3):
            add.delay(number)

        assert sent.assert_sent("add", times=3) is not None
        with pytest.raises(AssertionError, match=r"sent once, and was sent 3 times\."):
            sent.assert_sent("add")


def test_an_unknown_name_is_told(app):
    with capture() as sent, pytest.raises(AssertionError) as error:
        sent.assert_sent("ad")

    assert "No task of that name is registered.\nCaptured:\n  nothing" in str(error.value)


def test_that_nothing_at_all_is_sent_is_asserted(app):
    with capture() as sent:
        sent.assert_not_sent()
        add.delay(1)
        with pytest.raises(AssertionError, match=r"No task should .*\n.*\n  .*add\(1\)"):
            sent.assert_not_sent()


# Running


def test_drain_runs_what_a_doomed_transaction_holds_once(web, tm):
    with capture(tm) as sent:
        web.get("/send?a=1")
        web.get("/send?a=2")

        assert sent.drain() == [2, 3]
        assert sent.drain() == []


def test_drain_runs_what_the_runs_send(app):
    with capture() as sent:
        relay.delay(2)

        assert sent.drain() == [2, 1, 0]


def test_drain_has_a_limit(app):
    with capture() as sent:
        relay.delay(100)
        with pytest.raises(AssertionError, match=r"has run 3 tasks(.|\n)*relay\(97\)"):
            sent.drain(limit=3)


def test_drain_raises_what_a_task_raises_and_keeps_the_rest(app):
    with capture() as sent:
        fail.delay()
        add.delay(1)
        with pytest.raises(LookupError, match="on purpose"):
            sent.drain()

        assert sent.drain() == [2]


def test_drain_runs_a_retry_without_waiting(app):
    with capture() as sent:
        again.delay()

        assert sent.drain() == ["at last"]


def test_drain_runs_chains_groups_chords_and_callbacks(app):
    with capture() as sent:
        chain(add.s(1), add.s(), add.s(b=10)).apply_async()
        assert sent.drain() == [2, 3, 13]

        result = chord([add.s(1), add.s(2)], total.s()).apply_async()
        assert sent.drain() == [2, 3, 5]
        assert result.get(timeout=1) == 5

        add.apply_async((1,), link=add.s(5))
        assert sent.drain() == [2, 7]

        group(add.s(1), add.s(2)).apply_async()
        assert sent.drain() == [2, 3]


def test_the_callback_of_a_failure_is_run(app):
    noted = []

    def note_it(*args: Any) -> None:
        noted.append(args)

    app.celery.task(note_it, name="noted", shared=False)
    with capture() as sent:
        fail.apply_async(link_error=app.celery.signature("noted", (1,), immutable=True))
        with pytest.raises(LookupError):
            sent.drain()
        sent.drain()

    assert noted == [(1,)]


def test_a_task_that_is_not_registered_cannot_be_run(app):
    with capture() as sent:
        app.celery.send_task("elsewhere.of_another_program")
        with pytest.raises(TaskNotRegistered, match="of_another_program"):
            sent.drain()


def test_the_result_of_a_run_is_that_of_the_call(app):
    with capture() as sent:
        result = add.delay(1)
        sent.drain()

        assert result.get(timeout=1) == 2


def test_perform_runs_a_task_as_a_worker_does(app, tm):
    with RequestContext(app.request(HTTP_HOST="example.com", **{"tm.manager": tm})) as request:
        assert perform(look) == [False, True, "http://example.com"]
        assert get_current_request() is request
    assert tm.isDoomed()


def test_perform_decodes_the_arguments(app):
    assert perform(add, (1, 2), [3]) == [1, 2, 3]
    with pytest.raises(TypeError):
        perform(add, 1, 2, 3)
    with pytest.raises(Exception, match="serializ"):
        perform(add, object())


def test_perform_leaves_the_transaction_of_the_test_alone(app):
    transaction.begin()
    seen = transaction.get()

    assert perform(add, 1) == 2
    assert transaction.get() is seen


@pytest.mark.parametrize(
    ("signature", "error"),
    [
        (fail, LookupError),
        (again, Retry),
    ],
)
def test_perform_raises_what_the_run_ends_with(app, signature, error):
    with pytest.raises(error):
        perform(signature)


@pytest.mark.parametrize(("how", "error"), [("ignore", Ignore), ("reject", Reject)])
def test_perform_raises_ignore_and_reject(app, how, error):
    with pytest.raises(error):
        perform(end, how)


def test_perform_takes_plain_tasks_and_signatures(app):
    assert perform(app.celery.task(seven, name="seven", shared=False)) == 7
    assert perform(app.celery.tasks[add.name].s(1), 2) == 3


def test_what_a_performed_task_sends_is_captured(app):
    with capture() as sent:
        perform(relay, 1)

        sent.assert_sent("relay", [0])
    perform(relay, 1)
    assert app.names() == []


@pytest.mark.filterwarnings("ignore:Exception raised outside body:RuntimeWarning")
def test_what_follows_a_run_and_cannot_be_sent_is_raised(app):
    with capture() as sent:
        chain(add.s(1), add.s(2, 3, 4)).apply_async()
        with pytest.raises(TypeError, match="argument"):
            sent.drain()


def test_the_requests_of_tasks_get_the_environ_and_a_manager_of_their_own(app, tm):
    flushed = []
    session = SimpleNamespace(flush=lambda: flushed.append(True))
    notes: list[Any] = []
    environ = {"tm.active": True, "tm.manager": tm, "notes": notes, "session": session}
    factory = app.request().__class__
    app.config.set_request_factory(factory)
    app.config.commit()
    with Capture(app.celery, environ) as sent:
        sent.perform(note)
        note.delay()
        sent.drain()

    assert len({*notes, tm}) == 3
    assert flushed == [True, True]
    assert perform(add, 1) == 2


# Fixtures


def test_the_plugin_gives_fixtures_beside_those_of_celery(pytester, write_ini):
    ini = write_ini("[celery]\nbroker_url = memory://\n")
    pytester.makeconftest(
        f"""
        import pytest
        from pyramid.config import Configurator
        from ws_celery import get_celery_app, task

        pytest_plugins = ["ws_celery.testing", "celery.contrib.pytest"]

        @task
        def add(request, a, b):
            return a + b + request.environ.get("more", 0)

        @pytest.fixture
        def app():
            config = Configurator(settings={{"ws_celery.config_uri": {ini!r}}})
            config.include("pyramid_tm")
            config.include("ws_celery")
            config.add_celery_task(add)
            return config.make_wsgi_app()
        """
    )
    pytester.makepyfile(
        """
        import pytest
        from conftest import add
        from ws_celery import get_celery_app

        @pytest.fixture
        def celery_environ():
            return {"more": 10}

        def test_fixtures(app, capture, perform, celery_app, celery_config):
            sent = capture(app)
            assert capture(app.registry) is sent
            add.delay(1, 2)
            assert sent.drain() == [13]
            assert perform(add, 1, 2) == 13
            assert celery_app is not get_celery_app(app)
        """
    )

    pytester.runpytest_subprocess("-p", "no:randomly").assert_outcomes(passed=1)
