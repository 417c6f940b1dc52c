"""``run_command``: only what the INI allows runs, never by a shell, and not for ever."""

from __future__ import annotations

import shlex
import sys

import psutil
import pytest
from pyramid.exceptions import ConfigurationExecutionError

from ws_celery.contrib.commands import CommandFailed, CommandNotAllowed, ProgramError, run_command
from ws_celery.exceptions import ConfigurationError


def python(program):
    return shlex.join([sys.executable, "-c", program])


COMMANDS = f"""
    hello = {python("print('hello')")}
    repeat = {python("import sys; print(sys.argv[1:])")} first ...
    fail = {python("import sys; print('broken'); sys.exit(3)")}
    sleep = sh -c "echo begun; exec sleep 601"
    much = {python("print('x' * 200_000 + 'end')")}
    missing = no-such-program-anywhere
    celery = celery --version
"""


@pytest.fixture
def app(make_app):
    return make_app(
        setup=lambda config: config.include("ws_celery.contrib.commands"),
        ws_celery__commands=COMMANDS,
    )


@pytest.fixture
def run(app):
    def run(*args, **kwargs):
        return app.celery.tasks["run_command"].apply(args, kwargs, throw=True).get()

    return run


def test_output_and_exit_code_are_the_result(run):
    assert run("hello").items() >= {"exit_code": 0, "output": "hello\n"}.items()
    assert run("fail", check=False).items() >= {"exit_code": 3, "output": "broken\n"}.items()


def test_another_exit_code_than_0_is_a_failure(run):
    with pytest.raises(CommandFailed, match="fail ended with exit code 3: broken"):
        run("fail")


def test_a_console_script_beside_this_python_is_found(run):
    assert "5." in run("celery")["output"]


def test_no_shell_sees_the_arguments(run):
    assert run("repeat", "$HOME; ls", "*")["output"] == "['first', '$HOME; ls', '*']\n"


def test_only_the_end_of_a_long_output_is_kept(run):
    output = run("much")["output"]

    assert len(output) == 64 * 1024
    assert output.endswith("end\n")


def test_a_command_that_takes_too_long_is_stopped(run):
    with pytest.raises(ProgramError, match=r"longer than 1 seconds(?s:.*)begun"):
        run("sleep", timeout=1)

    children = psutil.Process().children(recursive=True)
    assert not [each for each in children if "sleep 601" in " ".join(each.cmdline())]


@pytest.mark.parametrize("timeout", [float("nan"), float("inf"), 0, -1, True, "5"])
def test_a_timeout_that_is_no_limit_is_refused_at_the_call_and_in_the_worker(app, run, timeout):
    with pytest.raises(CommandNotAllowed, match="a number of seconds, more than 0"):
        run_command.delay(app.request(), "hello", timeout=timeout)
    with pytest.raises(CommandNotAllowed, match="a number of seconds, more than 0"):
        run("hello", timeout=timeout)


def test_a_timeout_is_not_longer_than_the_settings_allow(make_app):
    app = make_app(run_command, ws_celery__commands=COMMANDS, ws_celery__commands__timeout="1s")

    with pytest.raises(ProgramError, match="longer than 1 seconds"):
        app.celery.tasks["run_command"].apply(("sleep",), {"timeout": 600}, throw=True)


def test_a_program_that_is_missing_is_named(run):
    with pytest.raises(ProgramError, match="no program no-such-program-anywhere"):
        run("missing")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("rm",), "'rm' is not allowed; allowed: celery, fail, hello"),
        (("hello", "--more"), "'hello' takes no more arguments"),
        (("repeat", 1), "have to be texts"),
    ],
)
def test_what_is_not_allowed_is_refused_at_the_call_and_in_the_worker(app, run, arguments, said):
    with pytest.raises(CommandNotAllowed, match=said):
        run_command.delay(app.request(), *arguments)
    with pytest.raises(CommandNotAllowed, match=said):
        run(*arguments)
    assert app.sent() == []


def test_what_is_allowed_is_sent(app):
    run_command.delay(app.request(), "hello")
    run_command.apply_async((app.request(),), {"name": "hello"})

    assert len(app.sent()) == 2


def test_a_call_without_a_name_is_refused_as_celery_does(app):
    with pytest.raises(TypeError, match="name"):
        run_command.delay(app.request())


def test_without_the_setting_nothing_is_allowed(make_app):
    app = make_app(run_command)

    with pytest.raises(CommandNotAllowed, match="allowed: none"):
        run_command.delay(app.request(), "hello")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("update_index", "update_index without a program"),
        ("update_index = ...", "update_index without a program"),
        ("= update_index", "without a name"),
        ("a = one\n    a = two", "has a twice"),
        ("a = it's", "No closing quotation"),
    ],
)
def test_a_wrong_line_of_the_setting_ends_the_start(make_app, text, said):
    with pytest.raises((ConfigurationError, ConfigurationExecutionError), match=said):
        make_app(run_command, ws_celery__commands=text)
