import pytest
from postbox.models import Letter
from postbox.tasks import file, shout, stamp
from postbox.views import list_letters, post_letter
from pyramid.scripting import prepare


def test_a_posted_letter_is_stamped(testapp, tm, capture):
    sent = capture(tm)
    letter = testapp.post("/letters", {"address": "1 High Street"}).json
    sent.assert_sent("stamp", [letter["id"]], countdown=60)


def test_an_invalid_letter_is_not_stamped(testapp, tm, capture):
    sent = capture(tm)
    testapp.post("/letters", {"address": ""}, status=400)
    sent.assert_not_sent()


def test_several_requests_send(testapp, tm, capture):
    sent = capture(tm)
    for address in ("here", "there"):
        testapp.post("/letters", {"address": address})
    assert testapp.get("/letters").json == ["here", "there"]
    assert sent.names == [stamp.name, stamp.name, shout.name]


def test_what_is_sent_runs_in_the_session_of_the_test(testapp, tm, dbsession, capture):
    sent = capture(tm)
    letter = testapp.post("/letters", {"address": "here"}).json
    url = f"http://example.com/letters/{letter['id']}"
    assert sent.drain() == [url, url]
    assert dbsession.get(Letter, letter["id"]).stamp == url


def test_a_task_runs_by_itself(app_request, dbsession, perform, capture):
    sent = capture(app_request)
    dbsession.add(Letter(id=7, address="here"))
    assert perform(stamp, 7) == "http://example.com/letters/7"
    sent.assert_sent(file, [7])


def test_a_view_is_called_with_the_request_of_the_application(app_request, capture):
    app_request.GET["address"] = "here"
    sent = capture(app_request)
    letter = post_letter(app_request)
    sent.assert_sent(stamp, [letter["id"]])


@pytest.mark.usefixtures("app", "dummy_config")
def test_a_view_is_called_with_a_dummy_request(dummy_request, capture):
    sent = capture(dummy_request)
    list_letters(dummy_request)
    sent.assert_sent("shout", ["listed"])


def test_a_real_worker_runs_what_a_transaction_commits(app, celery_worker):
    with prepare(registry=app.registry) as env, env["request"].tm:
        result = shout.delay("hello")
    assert result.get(timeout=30) == "HELLO"
