"""A console command or Pyramid script as a task; the INI says which ones may run.

Switched on by ``imports = ws_celery.contrib.commands`` or ``config.include`` of this module.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ws_celery.contrib.programs import run_program
from ws_celery.declaration import task
from ws_celery.exceptions import WsCeleryError
from ws_celery.request import split_request
from ws_celery.settings import our_setting
from ws_celery.tasks import RequestAwareTask

__all__ = ("CommandFailed", "CommandNotAllowed", "includeme", "run_command")

#: The last word of a command in the INI that lets a call add arguments.
_MORE = "..."

#: Seconds that a command may take.
_TIMEOUT = 3600.0


def includeme(config: Any) -> None:
    """Register the task ``run_command``."""
    config.scan(__name__)


class CommandNotAllowed(WsCeleryError):
    """A command is called that the INI does not allow, or not with these arguments."""


class CommandFailed(WsCeleryError):
    """A command has ended with another exit code than 0."""

    def __init__(self, name: str, exit_code: int, output: str) -> None:
        super().__init__(f"The command {name} ended with exit code {exit_code}: {output.strip()}")


class _CommandTask(RequestAwareTask):
    abstract = True

    def apply_async(
        self, args: Any = None, kwargs: Any = None, *starargs: Any, **options: Any
    ) -> Any:
        """Dispatch, if the command is allowed.

        :raises CommandNotAllowed: at once, if it is not.
        """
        _, given, named = split_request(args, kwargs)
        if given or "name" in named:  # else the arguments do not fit, which Celery says
            name = given[0] if given else named["name"]
            allowed_command(self.app.registry.settings, name, given[1:])
        if named.get("timeout") is not None:
            _seconds(named["timeout"])
        return super().apply_async(args, kwargs, *starargs, **options)


@task(name="run_command", base=_CommandTask)
def run_command(
    request: Any, name: str, *arguments: str, timeout: float | None = None, check: bool = True
) -> dict[str, Any]:
    """Run a command of ``ws_celery.commands``, without a shell.

    A worker that is ended with the task kills it; a worker that is killed may leave it running.

    :param name: its name in the setting.
    :param arguments: added to it, where its line ends in ``...``.
    :param timeout: seconds; at most the setting ``ws_celery.commands.timeout``, which it is if not
        given.
    :param check: whether another exit code than 0 is a failure of the task.
    :return: ``exit_code``, ``output`` (the last 64 KiB of what it printed) and ``seconds``.
    :raises CommandNotAllowed: if the settings of the worker do not allow it, or ``timeout`` is no
        number above 0.
    :raises CommandFailed: if it has failed.
    """
    settings = request.registry.settings
    words = allowed_command(settings, name, arguments)
    longest = our_setting(settings, "ws_celery.commands.timeout", default=_TIMEOUT)
    allowed = longest if timeout is None else min(_seconds(timeout), longest)
    begun = time.monotonic()
    ended = run_program(words, allowed)
    if check and ended.exit_code != 0:
        raise CommandFailed(name, ended.exit_code, ended.output)
    seconds = round(time.monotonic() - begun, 3)
    return {"exit_code": ended.exit_code, "output": ended.output, "seconds": seconds}


def _seconds(timeout: Any) -> float:
    # NaN is neither more nor less than any limit: it would be none.
    is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not is_number or not math.isfinite(timeout) or timeout <= 0:
        raise CommandNotAllowed(
            f"The timeout of a command has to be a number of seconds, more than 0, not {timeout!r}."
        )
    return float(timeout)


def allowed_command(
    settings: Mapping[str, Any], name: str, arguments: Sequence[str]
) -> tuple[str, ...]:
    """Return program and arguments of an allowed command.

    :raises CommandNotAllowed: if the settings do not allow it.
    """
    commands = our_setting(settings, "ws_celery.commands", default={})
    if name not in commands:
        known = ", ".join(sorted(commands)) or "none"
        raise CommandNotAllowed(
            f"The command {name!r} is not allowed; allowed: {known}. Add a line "
            f"`{name} = program argument` to the setting ws_celery.commands."
        )
    words: tuple[str, ...] = commands[name]
    more = words[-1] == _MORE
    if arguments and not more:
        raise CommandNotAllowed(
            f"The command {name!r} takes no more arguments. To allow them, let its line in "
            f"ws_celery.commands end in {_MORE}"
        )
    if not all(isinstance(each, str) for each in arguments):
        raise CommandNotAllowed(f"The arguments of the command {name!r} have to be texts.")
    return (*words[:-1], *arguments) if more else words
