"""What else travels from a request to its tasks: locale, request id, user, an application's own."""

from __future__ import annotations

from uuid import UUID

import pytest
import transaction
from kombu.exceptions import EncodeError
from pyramid.exceptions import ConfigurationConflictError, ConfigurationError
from pyramid.request import Request
from pyramid.response import Response
from zope.interface.verify import verifyObject

from ws_celery import task
from ws_celery.interfaces import IRequestPropagator
from ws_celery.request import HEADER, PROPAGATORS


@task(name="tell")
def tell(request, attribute, *_):
    value = request
    for name in attribute.split("."):
        value = getattr(value, name)
    return value


@task(name="pass_on")
def pass_on(request):
    tell.delay("locale_name")


class Policy:
    """The id is in a cookie, as far as the web is concerned."""

    def authenticated_userid(self, request):
        return request.cookies.get("userid")

    def identity(self, request):
        return {"id": request.remote_user} if request.remote_user else None


@pytest.fixture
def make(make_app):
    def make(setup=None, **settings):
        return make_app(tell, pass_on, setup=setup, **settings)

    return make


def negotiating(config):
    config.set_locale_negotiator(lambda request: request.cookies.get("lang"))


def with_policy(config):
    config.set_security_policy(Policy())


def with_tenant(config):
    config.add_request_propagator(
        "tenant",
        lambda request: request.headers.get("X-Tenant"),
        lambda request, value: request.headers.__setitem__("X-Tenant", value),
    )


def header(app):
    """Take the only message; return its header, or None."""
    (message,) = app.sent()
    return message.headers.get(HEADER)


def run(app, message):
    """Run a message as a worker does; return the result of the task."""
    headers = {HEADER: message.headers[HEADER]} if HEADER in message.headers else None
    return app.celery.tasks[message.task].apply(message.args, headers=headers).get()


def told(app, attribute, **environ):
    """Call a task on behalf of a request; return what the task's request tells."""
    tell.delay(app.request(**environ), attribute)
    (message,) = app.sent()
    return run(app, message)


# Locale


def test_the_task_has_the_locale_of_its_caller(make):
    assert told(make(negotiating), "locale_name", HTTP_COOKIE="lang=de") == "de"


def test_it_translates_as_its_caller_does(make):
    app = make(negotiating)

    assert told(app, "localizer.locale_name", HTTP_COOKIE="lang=pt_BR") == "pt_BR"


def test_a_locale_that_changes_is_that_of_the_call(make):
    app = make(negotiating)
    request = app.request(HTTP_COOKIE="lang=de")
    for locale in (None, "fr"):
        if locale:
            request.locale_name = locale
        tell.delay(request, "locale_name")

    assert [run(app, message) for message in app.sent()] == ["de", "fr"]


def test_the_locale_is_negotiated_once_in_a_request(make):
    asked = []
    app = make(lambda config: config.set_locale_negotiator(lambda _: asked.append(1) or "de"))
    request = app.request()
    tell.delay(request, "locale_name")
    tell.delay(request, "locale_name")

    assert len(asked) == 1
    assert request.locale_name == "de"


def test_no_locale_is_asked_for_where_nothing_depends_on_it(make):
    app = make()
    request = app.request()
    tell.delay(request, "url")

    assert header(app) is None
    assert "locale_name" not in vars(request)


def test_a_locale_that_the_view_has_asked_for_travels(make):
    app = make()
    request = app.request(QUERY_STRING="_LOCALE_=fr")
    assert request.locale_name == "fr"
    tell.delay(request, "locale_name")

    assert header(app) == {"locale": "fr"}


def test_translations_make_a_locale_travel(make, tmp_path):
    app = make(lambda config: config.add_translation_dirs(str(tmp_path)))

    assert told(app, "locale_name", QUERY_STRING="_LOCALE_=fr") == "fr"


@pytest.mark.parametrize("reify", [True, False])
def test_a_locale_of_the_applications_own_travels(make, reify):
    def locale(request):
        return request.headers.get("X-Lang", "en")

    def setup(config):
        config.add_request_method(locale, "locale_name", property=True, reify=reify)

    assert told(make(setup), "locale_name", HTTP_X_LANG="it") == "it"


def test_a_locale_that_cannot_be_negotiated_stops_no_dispatch_and_is_logged(make, caplog):
    def negotiate(request):
        raise LookupError("no such cookie")

    app = make(lambda config: config.set_locale_negotiator(negotiate))
    tell.delay(app.request(HTTP_X_REQUEST_ID="42"), "url")

    assert header(app) == {"request_id": "42"}
    (record,) = caplog.records
    assert record.getMessage() == "The locale of the request cannot be told, and does not travel"
    assert record.exc_info[0] is LookupError


def test_a_locale_that_is_no_text_does_not_travel(make):
    app = make(lambda config: config.set_locale_negotiator(lambda _: object()))
    tell.delay(app.request(), "url")

    assert header(app) is None


# Request id


@pytest.mark.parametrize("key", ["HTTP_X_REQUEST_ID", "REQUEST_ID"])
def test_the_task_has_the_request_id_of_its_caller(make, key):
    app = make()

    assert told(app, "id", **{key: "4f1c"}) == "4f1c"
    assert told(app, "environ", **{key: "4f1c"})["HTTP_X_REQUEST_ID"] == "4f1c"


def test_an_id_of_the_applications_own_travels(make):
    number = UUID(int=7)

    def setup(config):
        config.add_request_method(lambda _request: number, "id", reify=True)

    assert told(make(setup), "id", HTTP_X_REQUEST_ID="other") == str(number)


def test_an_id_that_cannot_be_set_is_read_from_the_header(make):
    class Numbered(Request):
        @property
        def id(self):
            return self.headers.get("X-Request-ID")

    app = make(lambda config: config.set_request_factory(Numbered))
    request = Numbered.blank("/", headers={"X-Request-ID": "4f1c"})
    request.registry = app.registry
    tell.delay(request, "id")
    (message,) = app.sent()

    assert run(app, message) == "4f1c"


def test_a_request_without_an_id_is_given_none(make):
    app = make()
    tell.delay(app.request(), "url")

    assert header(app) is None


def test_an_endless_request_id_is_cut(make):
    assert len(told(make(), "id", HTTP_X_REQUEST_ID="x" * 5000)) == 200


# User


def test_the_user_stays_at_home_unless_asked_for(make):
    app = make(with_policy)

    assert told(app, "authenticated_userid", HTTP_COOKIE="userid=kim") is None
    tell.delay(app.request(HTTP_COOKIE="userid=kim"), "url")
    assert header(app) is None


def test_the_task_acts_for_the_user_of_its_caller_if_asked_for(make):
    app = make(with_policy, ws_celery__propagate="user")

    assert told(app, "authenticated_userid", HTTP_COOKIE="userid=kim") == "kim"
    assert told(app, "is_authenticated", HTTP_COOKIE="userid=kim") is True
    assert told(app, "identity", HTTP_COOKIE="userid=kim") == {"id": "kim"}


def test_without_a_user_the_task_has_none(make):
    app = make(with_policy, ws_celery__propagate="user")

    assert told(app, "authenticated_userid") is None


def test_a_worker_that_does_not_ask_for_the_user_believes_no_message(make):
    app = make(with_policy)
    result = app.celery.tasks["tell"].apply(
        ("authenticated_userid",), headers={HEADER: {"user": "root"}}
    )

    assert result.get() is None


# An application's own


def test_an_application_adds_what_travels(make):
    app = make(with_tenant, ws_celery__propagate="tenant")

    assert told(app, "headers", HTTP_X_TENANT="blue")["X-Tenant"] == "blue"


def test_what_is_not_in_the_setting_does_not_travel(make):
    app = make(with_tenant)
    tell.delay(app.request(HTTP_X_TENANT="blue"), "url")

    assert header(app) is None


def test_an_application_may_take_the_place_of_a_name(make):
    def setup(config):
        config.add_request_propagator(
            "request_id", lambda _request: "mine", "tests.unit.test_propagation:note"
        )

    assert told(make(setup), "noted") == "mine"


def note(request, value):
    request.noted = value


def test_a_captured_value_is_frozen_at_the_call(make):
    basket = ["apple"]

    def setup(config):
        config.add_request_propagator("basket", lambda _request: basket, note)

    app = make(setup, ws_celery__propagate="basket")
    with transaction.manager:
        tell.delay(app.request(), "noted")
        basket.append("pear")

    assert header(app) == {"basket": ["apple"]}


@pytest.mark.parametrize("value", [object(), {"x": {1, 2}}, float("nan"), [2**63]])
def test_a_captured_value_that_no_header_can_carry_fails_at_the_call(make, value):
    def setup(config):
        config.add_request_propagator("odd", lambda _request: value, note)

    app = make(setup, ws_celery__propagate="odd")

    with pytest.raises(EncodeError, match=r"'odd' has captured is no JSON value .*capture\(\)"):
        tell.delay(app.request(), "url")


@pytest.mark.parametrize("name", ["url", "two words", "", "a,b"])
def test_a_name_that_cannot_travel_is_refused(make, name):
    with pytest.raises(ConfigurationError, match="expected a name of letters"):
        make(lambda config: config.add_request_propagator(name, note, note))


def test_two_of_one_name_are_a_conflict(make):
    def setup(config):
        config.include(with_tenant)
        config.include(lambda config: config.add_request_propagator("tenant", note, note))

    with pytest.raises(ConfigurationConflictError):
        make(setup)


def test_what_an_application_adds_can_be_inspected(make):
    app = make(with_tenant)
    introspectable = app.config.introspector.get("request propagators", "tenant")

    assert verifyObject(IRequestPropagator, introspectable["propagator"])
    assert all(verifyObject(IRequestPropagator, each) for each in PROPAGATORS.values())


# The setting


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("locael", r"unknown propagator 'locael'.*locale, request_id or user.*mean locale\?"),
        ("locale user locale", r"has 'locale' twice"),
        (7, "expected names of what travels"),
    ],
)
def test_a_wrong_name_ends_the_start(make, value, message):
    with pytest.raises(ConfigurationError, match=message):
        make(ws_celery__propagate=value)


def test_an_empty_setting_lets_nothing_but_the_url_travel(make):
    app = make(negotiating, ws_celery__propagate="")
    tell.delay(app.request(HTTP_HOST="shop.example.com", HTTP_X_REQUEST_ID="4f1c"), "url")

    assert header(app) == {"url": "http://shop.example.com"}


# On the way


def test_a_task_called_by_a_task_has_the_same(make):
    app = make(negotiating, ws_celery__propagate="locale, request_id")
    pass_on.delay(app.request(HTTP_COOKIE="lang=de", HTTP_X_REQUEST_ID="4f1c"))
    (first,) = app.sent()
    run(app, first)

    assert header(app) == {"locale": "de", "request_id": "4f1c"}


def test_a_user_reaches_the_task_of_a_task(make):
    app = make(with_policy, ws_celery__propagate="user")
    pass_on.delay(app.request(HTTP_COOKIE="userid=kim"))
    (first,) = app.sent()
    run(app, first)

    assert header(app) == {"user": "kim"}


def test_an_eager_task_has_what_travels(make):
    app = make(with_policy, celery="task_always_eager = true", ws_celery__propagate="user")
    caller = app.request(HTTP_COOKIE="userid=kim")

    assert tell.delay(caller, "authenticated_userid").get() == "kim"
    with transaction.manager:
        result = tell.delay(caller, "authenticated_userid")
    assert result.get() == "kim"


# Without a calling request


def home(config):
    config.add_route("home", "/home")


@task(name="link")
def link(request):
    return request.route_url("home")


def test_base_url_is_for_tasks_that_no_web_request_has_dispatched(make_app):
    app = make_app(link, setup=home, ws_celery__base_url="https://shop.example.com/shop/")
    link.delay()
    link.delay(app.request())  # as a script's: nobody said where it is
    link.delay(app.request(HTTP_HOST="other.example.com"))

    assert [run(app, message) for message in app.sent()] == [
        "https://shop.example.com/shop/home",
        "https://shop.example.com/shop/home",
        "http://other.example.com/home",
    ]


@pytest.mark.parametrize(
    "host", ["a b:xx", "a:xx", "[::1", "a?b", "a#b", "", ":80", "me@a", "a\nb", "[::1]x"]
)
def test_base_url_is_for_tasks_of_a_request_whose_host_is_none(make_app, host):
    app = make_app(link, setup=home, ws_celery__base_url="https://shop.example.com")
    link.delay(app.request(HTTP_HOST=host))
    (message,) = app.sent()

    assert run(app, message) == "https://shop.example.com/home"


@pytest.mark.parametrize("host", ["a.example", "a_b:8080", "[::1]:6543", "127.0.0.1", "é.example"])
def test_the_host_of_a_request_travels(make_app, host):
    app = make_app(link, setup=home)
    link.delay(app.request(HTTP_HOST=host, SCRIPT_NAME="/my shop"))
    (message,) = app.sent()

    assert run(app, message) == f"http://{host}/my%20shop/home"


PINNED = {
    "ws_celery__base_url": "https://shop.example.com/shop",
    "ws_celery__base_url__pin": "true",
}


def test_a_pinned_base_url_is_for_tasks_whatever_host_a_client_names(make_app):
    def view(request):
        link.delay()
        return Response(request.route_url("home"))

    def setup(config):
        home(config)
        config.add_view(view, route_name="home")

    app = make_app(link, setup=setup, **PINNED)
    assert app.web.get("/home", headers={"Host": "evil.example"}).text == "http://evil.example/home"
    (message,) = app.sent()

    assert "url" not in message.headers.get(HEADER, {})
    assert run(app, message) == "https://shop.example.com/shop/home"


def test_a_worker_with_a_pinned_base_url_believes_no_message(make_app):
    app = make_app(link, setup=home, **PINNED)
    link.apply_async(headers={HEADER: {"url": "http://evil.example", "locale": "de"}})
    (message,) = app.sent()

    assert run(app, message) == "https://shop.example.com/shop/home"


def test_a_base_url_is_pinned_only_where_that_is_asked_for(make_app):
    app = make_app(link, setup=home, **{**PINNED, "ws_celery__base_url__pin": "false"})
    link.delay(app.request(HTTP_HOST="branch.example.com"))
    (message,) = app.sent()

    assert run(app, message) == "http://branch.example.com/home"


def test_nothing_to_pin_ends_the_start(make):
    with pytest.raises(
        ConfigurationError, match=r"base_url\.pin.* no URL .*expected ws_celery\.base_url"
    ):
        make(ws_celery__base_url__pin="true")


def test_base_url_may_come_from_the_environment(make, monkeypatch):
    monkeypatch.setenv("SHOP_URL", "https://shop.example.com")

    assert told(make(ws_celery__base_url="${SHOP_URL}"), "application_url") == (
        "https://shop.example.com"
    )


@pytest.mark.parametrize(
    "url",
    [
        "shop.example.com",
        "ftp://shop.example.com",
        "https://",
        "https://shop.example.com/?a=b",
        "https://shop.example.com/#top",
        "https://kim@shop.example.com",
        "https://shop.example.com:port",
        "https://[::1",
        "https://shop example.com",
        "",
    ],
)
def test_a_base_url_that_is_none_ends_the_start(make, url):
    with pytest.raises(ConfigurationError, match=r"ws_celery.base_url.*begins with http://"):
        make(ws_celery__base_url=url)


def test_a_view_passes_everything_on(make):
    def view(request):
        tell.delay("url")
        return Response("done")

    def setup(config):
        negotiating(config)
        with_policy(config)
        with_tenant(config)
        config.add_route("home", "/")
        config.add_view(view, route_name="home")

    app = make(setup, ws_celery__propagate="locale request_id user tenant")
    cookies = "lang=de; userid=kim"
    environ = {"HTTP_HOST": "shop.example.com", "HTTP_COOKIE": cookies, "REQUEST_ID": "4f1c"}
    app.web.get("/", headers={"X-Tenant": "blue"}, extra_environ=environ)

    assert header(app) == {
        "url": "http://shop.example.com",
        "locale": "de",
        "request_id": "4f1c",
        "user": "kim",
        "tenant": "blue",
    }
