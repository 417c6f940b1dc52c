"""What ``ws-celery`` takes from its arguments: no word of a command's own is lost."""

from __future__ import annotations

import click
import pytest

from ws_celery.cli import main_group
from ws_celery.cli.options import Options, options_given, take_ini_uri

GROUP = click.Group(
    "outbox",
    commands={
        "list": click.Command("list"),
        "show": click.Command("show", params=[click.Argument(["name"])]),
    },
)
COMMANDS = {"worker": click.Command("worker"), "call": click.Command("call"), "outbox": GROUP}


def take(*arguments, ini=None, ini_vars=None):
    """Take the INI out of a command line that begins with the command."""
    options = Options(ini, dict(ini_vars or {}))
    command, *rest = arguments
    return [command, *take_ini_uri(options, COMMANDS[command], rest)], options


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["worker", "a.ini#shop", "-l", "info"], ["worker", "-l", "info"]),
        (["call", "a.ini#shop", "task"], ["call", "task"]),
        (["outbox", "list", "a.ini#shop", "--all"], ["outbox", "list", "--all"]),
        (["worker", "-A", "ws_celery", "a.ini#shop"], ["worker", "-A", "ws_celery"]),
        (["worker", "--ini-var=a=b", "a.ini#shop"], ["worker", "--ini-var=a=b"]),
    ],
)
def test_an_ini_after_the_command_is_taken(arguments, left):
    rest, options = take(*arguments)

    assert rest == left
    assert options.ini == "a.ini#shop"


@pytest.mark.parametrize(
    "arguments",
    [
        ["call", "task", "a.ini"],
        ["call", "shop.tasks.ini_file"],
        ["outbox", "show", "a.ini"],
        ["outbox"],
        ["worker", "--logfile", "a.ini"],
        ["worker"],
        ["worker", "-l", "info", "a.ini"],
    ],
)
def test_other_words_are_left_alone(arguments):
    rest, options = take(*arguments)

    assert rest == arguments
    assert options.ini is None


def test_variables_follow_the_file_and_ini_var_beats_them():
    rest, options = take(
        "call", "a.ini", "port=1", "host=b=c", "task", "kwargs=2", ini_vars={"port": "2"}
    )

    assert rest == ["call", "task", "kwargs=2"]
    assert options.ini_vars == {"port": "2", "host": "b=c"}


def test_with_an_option_for_the_file_nothing_is_taken():
    rest, options = take("call", "a.ini", ini="b.ini")

    assert rest == ["call", "a.ini"]
    assert options.ini == "b.ini"


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (["worker", "-P", "gevent", "-B"], {"pool": "gevent", "beat": True}),
        (["worker", "-n", "--beat", "-l", "check"], {"hostname": "--beat", "loglevel": "check"}),
        (["worker", "--own", "x", "--ini", "a.ini"], {"ini": "a.ini"}),
        (["shell", "-B"], {"bpython": True}),
        (["call", "task", "--", "--ini", "a.ini"], {}),
        (["outbox", "list", "--ini=a.ini", "--all"], {"ini": "a.ini", "which": "all"}),
        (["queues", "peek", "--help"], {"help": True}),
    ],
)
def test_only_what_click_takes_for_an_option_is_one(arguments, given):
    command, *rest = arguments
    found = options_given(main_group().get_command(None, command), rest)

    assert {name: value for name, value in found.items() if name in given} == given
    assert ("ini" in found) == ("ini" in given)
