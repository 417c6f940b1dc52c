"""Derivers: what wraps the functions of tasks, and the options that they bring."""

from __future__ import annotations

import celery
import pytest
import transaction
from pyramid.exceptions import (
    ConfigurationConflictError,
    ConfigurationExecutionError,
    CyclicDependencyError,
)
from pyramid.threadlocal import get_current_request
from transaction.interfaces import TransientError
from zope.interface.verify import verifyClass, verifyObject

from ws_celery import ConfigurationError, RequestAwareTask, TransactionalTask, task
from ws_celery.derivers import INGRESS, TASK, TaskDeriverInfo
from ws_celery.interfaces import ITaskDeriverInfo


@pytest.fixture
def log():
    """What derivers and tasks have done, in order."""
    return []


@pytest.fixture
def noting(log):
    """Make a deriver that notes when it begins and ends."""

    def make(name):
        def deriver(run, info):
            def derived(request, *args, **kwargs):
                log.append(f"{name} begins")
                result = run(request, *args, **kwargs)
                log.append(f"{name} ends")
                return result

            return derived

        deriver.__name__ = name
        return deriver

    return make


@task(name="add")
def add(request, x, y=0):
    return x + y


@task(name="bound", bind=True)
def bound(self, request, x, y=0):
    return self.name, x + y


@task(name="aware", base=RequestAwareTask)
def aware(request, x, y=0):
    return x + y


@task
class Class(TransactionalTask):
    name = "class"
    flavour = "sweet"

    def run(self, request, x, y=0):
        return self.name, x + y


def nothing(request):
    """Do nothing."""


def deriving(*derivers, **places):
    def setup(config):
        for deriver in derivers:
            config.add_task_deriver(deriver, **places.get(deriver.__name__, {}))

    return setup


def doubled(run, info):
    """A deriver that doubles the first argument."""
    return lambda request, x, *args, **kwargs: run(request, 2 * x, *args, **kwargs)


# Runs


@pytest.mark.parametrize(
    ("declared", "result"),
    [(add, 7), (aware, 7), (bound, ("bound", 7)), (Class, ("class", 7))],
    ids=["function", "without transaction", "bound", "class"],
)
def test_a_run_goes_through_the_derivers(make_app, declared, result):
    app = make_app(declared, setup=deriving(doubled))

    assert app.celery.tasks[declared.name].apply((3,), {"y": 1}).get() == result


@pytest.mark.parametrize("declared", [add, aware, bound, Class])
def test_arguments_are_checked_against_the_function(make_app, declared):
    app = make_app(declared, setup=deriving(doubled))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        declared.delay(y=1)
    with pytest.raises(TypeError, match=r"too many|takes from"):
        declared.delay(1, 2, 3)
    declared.delay(1, 2)

    assert len(app.names()) == 1


def test_a_call_in_place_goes_through_the_derivers(make_app):
    app = make_app(add, setup=deriving(doubled))

    assert add(app.request(), 3, y=1) == 7


def test_derivers_run_in_the_request_and_transaction_of_each_try(make_app):
    seen = []

    def deriver(run, info):
        def derived(request):
            assert get_current_request() is request
            seen.append((request, request.tm.get()))
            if len(seen) < 3:
                raise TransientError
            return run(request)

        return derived

    @task(name="short")
    def short(request):
        return "done"

    explicit = {"tm__manager_hook": "pyramid_tm.explicit_manager"}
    app = make_app(short, setup=deriving(deriver), **explicit)

    assert app.celery.tasks["short"].apply().get() == "done"
    requests, transactions = zip(*seen, strict=True)
    assert len(set(map(id, requests))) == len(set(map(id, transactions))) == 3


def test_what_a_deriver_raises_aborts_and_what_it_dispatches_is_dropped(make_app):
    def deriver(run, info):
        def derived(request, *args):
            add.delay(1)
            run(request, *args)
            raise LookupError("no such thing")

        return derived

    app = make_app(add, setup=deriving(deriver))
    result = app.celery.tasks["add"].apply((1,))

    assert result.state == "FAILURE"
    assert app.names() == []


def test_derivers_are_inside_of_autoretry(make_app, log):
    def deriver(run, info):
        def derived(request):
            try:
                return run(request)
            except LookupError as error:
                log.append(str(error))
                raise

        return derived

    @task(name="flaky", autoretry_for=(LookupError,), max_retries=1, retry_backoff=1)
    def flaky(request):
        raise LookupError("no such thing")

    make_app(flaky, setup=deriving(deriver)).celery.tasks["flaky"].apply()

    assert log == ["no such thing"] * 2


def test_a_retry_knows_the_names_of_the_arguments(make_app):
    @task(name="again", bind=True)
    def again(self, request, x, y=0):
        return x + y if y else self.retry(kwargs={"y": 5})

    app = make_app(again, setup=deriving(doubled))

    # 1 is doubled in each of both runs, and travels as it was given.
    assert app.celery.tasks["again"].apply((1,)).get() == 7


def test_a_task_without_a_request_is_left_alone(make_app):
    @task(name="plain", base=celery.Task)
    def plain(x):
        return x

    app = make_app(plain, setup=deriving(doubled))

    assert app.celery.tasks["plain"].apply((3,)).get() == 3


def test_two_applications_derive_for_themselves(make_app):
    first, second = make_app(add, setup=deriving(doubled)), make_app(add)

    assert [app.celery.tasks["add"].apply((3,)).get() for app in (first, second)] == [6, 3]


def test_a_task_is_derived_once(make_app, log):
    def deriver(run, info):
        log.append(info.name)
        return run

    app = make_app(add, setup=deriving(deriver))
    for _ in range(2):
        app.celery.tasks["add"].apply((1,))

    assert log == ["add"]


# Order


def order(make_app, log, setup):
    make_app(add, setup=setup).celery.tasks["add"].apply((1,))
    return [entry.split()[0] for entry in log if entry.endswith("begins")]


def test_of_two_derivers_the_one_added_later_is_outside(make_app, log, noting):
    assert order(make_app, log, deriving(noting("a"), noting("b"))) == ["b", "a"]


@pytest.mark.parametrize(
    "places", [{"b": {"under": "a"}}, {"a": {"over": "b"}}, {"b": {"under": ("a", "missing")}}]
)
def test_under_and_over_say_who_is_outside(make_app, log, noting, places):
    assert order(make_app, log, deriving(noting("a"), noting("b"), **places)) == ["a", "b"]


def test_the_ends_can_be_named(make_app, log, noting):
    places = {"a": {"under": INGRESS, "over": "b"}, "b": {"over": TASK}}

    assert order(make_app, log, deriving(noting("a"), noting("b"), **places)) == ["a", "b"]


def test_derivers_may_be_added_after_tasks(make_app, log, noting):
    # make_app registers tasks before it calls setup
    assert order(make_app, log, deriving(noting("a"))) == ["a"]


@pytest.mark.parametrize(
    "place", [{"over": INGRESS}, {"under": TASK}, {"name": INGRESS}, {"name": TASK}]
)
def test_nothing_is_beyond_the_ends(make_config, place):
    with pytest.raises(ConfigurationError, match="under INGRESS and over TASK"):
        make_config().add_task_deriver(doubled, **place)


@pytest.mark.parametrize("side", ["under", "over"])
def test_a_place_beside_no_deriver_is_refused(make_app, noting, side):
    places = {"b": {side: "ab"}}
    with pytest.raises(ConfigurationExecutionError, match=rf"'b' is to be {side} 'ab'.*mean abc\?"):
        make_app(add, setup=deriving(noting("abc"), noting("b"), **places))


def test_a_circle_of_derivers_is_refused(make_app, noting):
    places = {"a": {"under": "b"}, "b": {"under": "a"}}
    with pytest.raises((ConfigurationExecutionError, CyclicDependencyError), match="cycle"):
        make_app(add, setup=deriving(noting("a"), noting("b"), **places))


def test_two_derivers_of_one_name_are_a_conflict(make_app, noting):
    def setup(config):
        config.add_task_deriver(noting("a"), name="x")
        config.add_task_deriver(noting("b"), name="x")

    with pytest.raises(ConfigurationConflictError, match="celery task deriver"):
        make_app(add, setup=setup)


def test_a_deriver_that_returns_nothing_says_so(make_app):
    def forgetful(run, info):
        pass

    with pytest.raises(ConfigurationExecutionError, match=r"'forgetful' has returned None .*'add'"):
        make_app(add, setup=deriving(forgetful))


def test_a_deriver_can_be_named_by_its_dotted_name(make_app, monkeypatch):
    monkeypatch.setattr(celery, "doubled_for_test", doubled, raising=False)
    app = make_app(
        add, setup=lambda config: config.add_task_deriver("celery.doubled_for_test", name="d")
    )

    assert app.celery.tasks["add"].apply((3,)).get() == 6


# What a deriver is told


@pytest.fixture
def infos():
    return {}


@pytest.fixture
def flavoured(infos):
    """A deriver with an option of its own."""

    def flavoured(run, info):
        infos[info.name] = info
        return run

    flavoured.options = ("flavour",)
    return flavoured


def test_a_deriver_is_told_of_the_task_and_its_options(make_app, flavoured, infos):
    def spiced(request):
        """Do nothing."""

    declared = task(name="spiced", flavour="hot", bind=False, max_retries=7)(spiced)
    app = make_app(declared, setup=deriving(flavoured))
    info = infos["spiced"]

    assert verifyClass(ITaskDeriverInfo, TaskDeriverInfo, tentative=True)
    assert verifyObject(ITaskDeriverInfo, info)
    assert info.task is app.celery.tasks["spiced"]
    assert info.original_task is spiced
    assert info.registry is app.registry
    assert info.settings is app.registry.settings
    assert info.options == {"name": "spiced", "flavour": "hot", "bind": False, "max_retries": 7}


def test_an_option_may_be_an_attribute_of_the_class(make_app, flavoured, infos):
    class Sour(TransactionalTask):
        abstract = True
        flavour = "sour"

    based = task(name="based", base=Sour)(nothing)
    make_app(Class, based, add, setup=deriving(flavoured))

    assert infos["class"].options["flavour"] == "sweet"
    assert infos["based"].options["flavour"] == "sour"
    assert "flavour" not in infos["add"].options


# Options that nobody reads


def declare(**options):
    return task(name="odd", **options)(nothing)


@pytest.mark.parametrize(
    ("option", "meant"),
    [("time_limits", "time_limit"), ("max_retry", "max_retries"), ("flavor", None)],
)
def test_an_option_that_nobody_reads_is_refused(make_app, option, meant):
    with pytest.raises(ConfigurationExecutionError) as error:
        make_app(declare(**{option: 1}))

    assert f"the task 'odd' has the unknown option '{option}'" in str(error.value)
    assert ("Did you mean" in str(error.value)) == bool(meant)
    assert not meant or f"Did you mean {meant}?" in str(error.value)


def test_the_option_of_a_deriver_is_suggested(make_app, flavoured):
    with pytest.raises(ConfigurationExecutionError, match="Did you mean flavour"):
        make_app(declare(flavor="hot"), setup=deriving(flavoured))


@pytest.mark.filterwarnings("ignore:.*task attribute is deprecated")
@pytest.mark.parametrize(
    "options",
    [
        {"autoretry_for": (LookupError,), "retry_backoff": True, "retry_jitter": False},
        {"compression": "gzip", "serializer": "json", "rate_limit": "1/s"},
        {"typing": False, "throws": (LookupError,), "Strategy": celery.Task.Strategy},
        {"on_failure": lambda *_: None},
    ],
)
def test_options_that_celery_reads_are_fine(make_app, options):
    app = make_app(declare(**options))

    assert "odd" in app.celery.tasks


def test_an_option_that_the_base_class_has_is_fine(make_app):
    class Base(TransactionalTask):
        abstract = True
        mine = None

    app = make_app(declare(base=Base, mine=5))

    assert app.celery.tasks["odd"].mine == 5


def test_the_option_of_a_deriver_is_refused_where_no_deriver_is_applied(make_app, flavoured):
    with pytest.raises(ConfigurationExecutionError, match="unknown option 'flavour'"):
        make_app(declare(base=celery.Task, flavour="hot"), setup=deriving(flavoured))


@pytest.mark.parametrize("base", [celery.Task, RequestAwareTask, TransactionalTask])
def test_a_task_of_each_class_may_opt_out_of_the_outbox(make_app, base):
    app = make_app(declare(base=base, outbox=False))

    assert app.celery.tasks["odd"].outbox is False


def test_opting_out_of_the_outbox_is_yes_or_no(make_app):
    with pytest.raises(ConfigurationExecutionError, match="has outbox = 'false'"):
        make_app(declare(outbox="false"))


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (TransactionalTask, 'acknowledge = \'lat\'. Write "early" or "late"'),
        (RequestAwareTask, "unknown option 'acknowledge'"),
    ],
)
def test_a_slip_in_acknowledge_is_refused_with_an_outbox_or_without(make_app, base, said):
    with pytest.raises(ConfigurationExecutionError, match=said):
        make_app(declare(base=base, acknowledge="lat"))


@pytest.mark.parametrize("option", ["bind", "base"])
def test_a_class_takes_no_options_of_functions(make_app, option):
    class Odd(TransactionalTask):
        def run(self, request):
            """Do nothing."""

    with pytest.raises(ConfigurationExecutionError, match=f"unknown option '{option}'"):
        make_app(task(name="odd", **{option: True})(Odd))


def test_a_savepoint_of_a_deriver_drops_what_the_function_dispatched(make_app):
    def trial(run, info):
        def derived(request, *args):
            savepoint = transaction.savepoint(optimistic=True)
            run(request, *args)
            savepoint.rollback()

        return derived

    @task(name="outer")
    def outer(request):
        add.delay(1)

    app = make_app(outer, add, setup=deriving(trial))
    app.celery.tasks["outer"].apply(throw=True)

    assert app.names() == []


def _plain(address, subject=None):
    return address


def _aware(request):
    pass


def _bound(self, _request):
    pass


def _empty():
    pass


class SaysSo(TransactionalTask):
    """A base of an application whose functions call their request otherwise."""

    abstract = True
    takes_request = True


class Positional(TransactionalTask):
    name = "remind"

    def run(self, *args):
        return args


def test_a_function_whose_first_parameter_is_no_request_is_told_with_the_remedy(make_app, caplog):
    make_app(task(name="remind")(_plain))

    (line,) = [each for each in caplog.messages if "remind" in each]
    assert line == (
        "the function of the task 'remind' is given a request first, and has 'address' as its "
        "first parameter. Begin its parameters with `request`; or say @task(takes_request=True), "
        "if 'address' is the request; or give the task base=celery.Task, without a request."
    )


@pytest.mark.parametrize(
    "declared",
    [
        task(name="remind", takes_request=True)(_plain),
        task(name="remind", base=SaysSo)(_plain),
        task(name="remind", base=celery.Task)(_plain),
        task(name="remind", autoretry_for=(LookupError,))(_aware),
        task(name="remind", bind=True)(_bound),
        task(Positional),
    ],
)
def test_a_function_that_takes_its_request_or_says_what_it_takes_is_no_surprise(
    make_app, caplog, declared
):
    make_app(declared)

    assert [each for each in caplog.messages if "remind" in each] == []


def test_a_task_with_a_request_cannot_say_that_it_takes_none(make_app):
    with pytest.raises(ConfigurationExecutionError, match="has takes_request = False"):
        make_app(task(name="remind", takes_request=False)(_plain))


def test_an_error_of_arguments_names_the_request_that_is_missing(make_app):
    app = make_app(task(name="remind")(_plain), task(name="fail")(_empty), add)
    remind, fail = app.celery.tasks["remind"], app.celery.tasks["fail"]

    with pytest.raises(TypeError, match="is given a request first, and has 'address' as"):
        remind.delay("a", "b", "c")
    with pytest.raises(TypeError, match="is given a request first, and has no parameter for it"):
        fail.apply(throw=True)
    with pytest.raises(TypeError) as raised:
        app.celery.tasks["add"].delay()
    assert "given a request" not in str(raised.value)
