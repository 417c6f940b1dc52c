"""What ``ws-celery`` takes from its arguments: no word of a command's own is lost."""

from __future__ import annotations

import click
import pytest

from ws_celery.cli.arguments import Options, take_ini_uri

GROUP = click.Group(
    "outbox",
    commands={
        "list": click.Command("list"),
        "show": click.Command("show", params=[click.Argument(["name"])]),
    },
)
COMMANDS = {"worker": click.Command("worker"), "call": click.Command("call"), "outbox": GROUP}


def take(*arguments, ini=None, ini_vars=None):
    options = Options(ini, dict(ini_vars or {}))
    return take_ini_uri(options, list(arguments), COMMANDS), options


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["worker", "a.ini#shop", "-l", "info"], ["worker", "-l", "info"]),
        (["call", "a.ini#shop", "task"], ["call", "task"]),
        (["outbox", "list", "a.ini#shop", "--all"], ["outbox", "list", "--all"]),
        (["-q", "worker", "a.ini#shop"], ["-q", "worker"]),
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
        ["a.ini", "worker"],
        [],
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
