"""What Celery, its add-ons and ``inspect`` see of a task: its function without the request."""

from __future__ import annotations

import inspect
import typing
from functools import partial, wraps
from types import SimpleNamespace

import celery
import pytest
from celery.utils.functional import arity_greater
from kombu.exceptions import EncodeError

from ws_celery import RequestAwareTask, TransactionalTask, task

CELERY = tuple(map(int, celery.__version__.split(".")[:2]))


class Application:
    """Stands for the class of a request in an annotation."""


def variadic(function):
    @wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


def plain(request: Application, number: int, *, name: str = "none") -> str:
    """Tell what it has got."""
    return f"{number} {name}"


def bound(self, request: Application, number: int, *, name: str = "none") -> str:
    return f"{self.name} {number} {name}"


FUNCTIONS = {
    "plain": (plain, {}),
    "bound": (bound, {"bind": True}),
    "one instance": (plain, {"one_instance": True}),
    "decorated": (variadic(plain), {}),
    "tried again": (plain, {"autoretry_for": (LookupError,)}),
}


@pytest.fixture
def make(make_app):
    """Register a task of these functions; return Celery's task and what ``@task`` has left."""

    def make(function, **options):
        declared = task(name="t", **options)(function)
        return make_app(declared).celery.tasks["t"], declared

    return make


@pytest.mark.parametrize("base", [RequestAwareTask, TransactionalTask])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_the_signature_of_a_task_is_how_it_is_called(make, kind, base):
    function, options = FUNCTIONS[kind]
    for seen in make(function, base=base, **options):
        assert str(inspect.signature(seen)) == "(number: 'int', *, name: 'str' = 'none') -> 'str'"
        assert str(inspect.signature(seen.__wrapped__)) == str(inspect.signature(seen))


@pytest.mark.skipif(CELERY < (5, 6), reason="Celery keeps no annotations before 5.6")
@pytest.mark.parametrize("kind", ["plain", "bound"])
def test_the_annotations_of_a_task_are_those_of_its_call(make, kind):
    function, options = FUNCTIONS[kind]
    registered, _ = make(function, **options)

    assert typing.get_type_hints(registered) == {"number": int, "name": str, "return": str}
    assert "request" in function.__annotations__  # its own are untouched


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_task_is_found_in_its_source(make, kind):
    function, options = FUNCTIONS[kind]
    expected = inspect.getsource(inspect.unwrap(function))

    assert [inspect.getsource(seen) for seen in make(function, **options)] == [expected] * 2


def test_what_is_wrapped_is_called_with_a_request_as_before(make):
    request = SimpleNamespace()

    assert [seen.__wrapped__(request, 3) for seen in make(plain)] == ["3 none"] * 2


def test_the_arguments_of_a_call_are_counted_without_the_request(make):
    registered, _ = make(plain)

    with pytest.raises(TypeError, match="takes 1 positional argument but 2 were given"):
        registered.delay(1, 2)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'number'"):
        registered.delay()


def test_any_arguments_are_any_arguments(make):
    def anything(*args, **kwargs):
        return args

    registered, declared = make(anything)

    assert registered.apply((1, 2)).get()[1:] == (1, 2)
    assert arity_greater(registered.__header__, 1)
    assert str(inspect.signature(declared)) == "(*args, **kwargs)"


def with_error(request, failed, exc, traceback):
    """Take what Celery documents."""


def with_anything(request, *args):
    """Take anything."""


def with_id(request, task_id, *, name=None):
    """Take the id."""


def with_task(self, request, task_id):
    """Take the id, as Celery sends it to a bound task."""


@pytest.mark.parametrize(
    ("function", "options", "gets_error"),
    [
        (with_error, {}, True),
        (with_anything, {}, True),
        (with_id, {}, False),
        (with_task, {"bind": True}, False),
    ],
)
def test_celery_tells_how_a_callback_for_errors_is_called(make, function, options, gets_error):
    header = make(function, **options)[0].__header__

    assert (not isinstance(header, partial) and bool(arity_greater(header, 1))) is gets_error


def test_a_class_is_sent_the_id_as_a_class_of_celerys_own(make):
    class Callback(RequestAwareTask):
        def run(self, request, failed, exc, traceback):
            """Celery has no header for the function of a class."""

    assert isinstance(make(Callback)[0].__header__, partial)


def test_what_task_leaves_is_a_task(make):
    registered, declared = make(plain, base=RequestAwareTask)

    assert isinstance(declared, celery.Task)
    assert isinstance(declared, RequestAwareTask)
    assert not isinstance(declared, TransactionalTask)
    assert isinstance(registered, celery.Task)


@pytest.mark.parametrize("kind", ["plain", "bound"])
def test_autodoc_shows_a_task_as_it_is_called(make, kind):
    documenter = pytest.importorskip("celery.contrib.sphinx").TaskDocumenter
    function, options = FUNCTIONS[kind]
    for seen in make(function, **options):
        assert documenter.can_document_member(seen, "t", False, None)
        shown = SimpleNamespace(object=seen, modname=__name__)
        assert documenter.format_args(shown) == (
            "(number: 'int', *, name: 'str' = 'none') -> 'str'"
        )
        assert documenter.check_module(shown)


# pydantic


pydantic = pytest.importorskip("pydantic")


class Parcel(pydantic.BaseModel):
    number: int
    to: str = "nobody"


def send(request, parcel: Parcel, other: Parcel | None = None) -> Parcel:
    assert isinstance(parcel, Parcel)
    return Parcel(number=parcel.number + 1, to=other.to if other else parcel.to)


def send_bound(self, request, parcel: Parcel, other: Parcel | None = None) -> Parcel:
    return send(request, parcel, other)


PYDANTIC = [(send, {"pydantic": True}), (send_bound, {"pydantic": True, "bind": True})]


@pytest.mark.skipif(CELERY < (5, 6), reason="Celery reads no annotations that are text before 5.6")
@pytest.mark.parametrize(("function", "options"), PYDANTIC)
def test_a_run_gets_models_and_returns_json(make, function, options):
    registered, _ = make(function, **options)

    assert registered.apply(({"number": 1},), {"other": {"number": 2, "to": "ada"}}).get() == {
        "number": 2,
        "to": "ada",
    }


@pytest.mark.skipif(CELERY < (5, 7), reason="Celery takes no models before 5.7")
@pytest.mark.parametrize(("function", "options"), PYDANTIC)
def test_a_call_takes_models(make_app, function, options):
    declared = task(name="t", **options)(function)
    app = make_app(declared)
    request = app.request()
    declared.delay(Parcel(number=1))
    declared.delay(request, Parcel(number=1), other=Parcel(number=2))
    declared.delay(parcel=Parcel(number=1), request=request)
    declared.delay_many([(Parcel(number=1),), (Parcel(number=2), {"number": 3})])
    declared.delay({"number": 1})
    one = {"number": 1, "to": "nobody"}
    two = {"number": 2, "to": "nobody"}

    assert [(message.args, message.kwargs) for message in app.sent()] == [
        ([one], {}),
        ([one], {"other": two}),
        ([], {"parcel": one}),
        ([one], {}),
        ([two, {"number": 3}], {}),
        ([{"number": 1}], {}),
    ]


def test_a_model_that_the_function_does_not_ask_for_fails_at_the_call(make):
    registered, _ = make(plain, pydantic=True)
    with pytest.raises(EncodeError):
        registered.delay(Parcel(number=1))
