"""The kind of ``ws_celery.commands``: which programs a task may run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from ws_celery.converters import Refused
from ws_celery.settings.kinds import Kind

__all__ = ("COMMANDS",)

_NAME = re.compile(r"[A-Za-z_][\w.-]*")


def _lines(text: str) -> dict[str, str]:
    commands: dict[str, str] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, command = (part.strip() for part in line.partition("="))
        if name in commands:
            raise Refused(f"has {name} twice")
        commands[name] = command
    return commands


def _split(commands: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    found = {}
    for name, command in commands.items():
        if not _NAME.fullmatch(name):
            raise Refused(f"has a line without a name, or the name {name!r}")
        try:
            found[name] = tuple(shlex.split(command))
            words = shlex.split(command, posix=False)
        except ValueError as error:
            raise Refused(f"has {name}: {error}") from None
        if any(word.startswith((";", "#")) for word in words):
            raise Refused(
                f"has {name} with ; or # before a word, which needs quotes or its own line"
            )
        if not found[name] or found[name][0] == "...":
            raise Refused(f"has {name} without a program")
    return found


#: By line, so that a program has its own spaces and commas.
COMMANDS = Kind(
    "commands",
    "a line `name = program argument ...` for each command; the last word ... lets a call add more",
    "update_index = update_index site.ini ...",
    _lines,
    (dict,),
    _split,
    prose=True,
)
