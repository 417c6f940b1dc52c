"""Environment variables: those that beat what is configured, and that of ``--ini-var``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ws_celery.converters import Refused, json_value
from ws_celery.exceptions import ConfigurationError, Fault
from ws_celery.masking import masked
from ws_celery.settings.faults import Faults, Place, Value
from ws_celery.settings.options import OPTIONS
from ws_celery.settings.sections import Setting

__all__ = ("INI_VARIABLES", "Override", "ini_variables", "obey_environment")

#: Environment variable that tells all processes of a command what ``--ini-var`` said, as JSON.
INI_VARIABLES = "WS_CELERY_INI_VARS"

#: Environment variables that beat the option, as Celery has it. Those without ``CELERY_`` are
#: options of Celery's commands, which would then talk to another broker than the web does: all
#: processes obey them.
_VARIABLES = {
    "broker_url": ("BROKER_URL", "CELERY_BROKER_URL"),
    "broker_read_url": ("CELERY_BROKER_READ_URL",),
    "broker_write_url": ("CELERY_BROKER_WRITE_URL",),
    "result_backend": ("RESULT_BACKEND", "CELERY_RESULT_BACKEND"),
}


@dataclass(frozen=True)
class Override:
    """An environment variable that beats the configuration.

    :param option: the option.
    :param variable: name of the variable.
    :param value: its value.
    :param beaten: what is configured, if anything is.
    """

    option: str
    variable: str
    value: str
    beaten: Setting | None

    def __str__(self) -> str:
        said = f"environment: {self.variable} = {masked(self.option, self.value)}"
        if self.beaten is None:
            return f"{said} sets {self.option}"
        value = masked(self.option, self.beaten.value)
        return f"{said} beats {self.option} = {value} ({self.beaten.place})"


def ini_variables() -> dict[str, str]:
    """Return what ``--ini-var`` said to this process or to the one that started it.

    :raises ConfigurationError: if the variable holds something else.
    """
    try:
        variables = json_value(os.environ.get(INI_VARIABLES) or "{}")
    except Refused as error:
        raise _broken_variables(str(error)) from None
    if not isinstance(variables, dict) or not all(isinstance(v, str) for v in variables.values()):
        raise _broken_variables("is no JSON object of texts")
    return variables


def _broken_variables(problem: str) -> ConfigurationError:
    remedy = "a JSON object of texts; unset it, and use --ini-var"
    return ConfigurationError(Fault(problem, "environment", key=INI_VARIABLES, expected=remedy))


def obey_environment(
    settings: dict[str, Any], rows: list[Setting], faults: Faults
) -> list[Override]:
    """Put the values of variables into ``settings``; return those that change something."""
    overrides = []
    for option, variables in _VARIABLES.items():
        given = {name: text for name in variables if (text := os.environ.get(name, ""))}
        if not given:
            continue
        if len(set(given.values())) > 1:
            places = " and ".join(given)
            problem = f"{places} are both set, and differ; unset one of them"
            faults.append(Fault(problem, "environment", key=option))
            continue
        variable, text = next(iter(given.items()))
        place = Place("environment", "", variable)
        with faults.catching(Value(text, place), OPTIONS[option].kind.expected):
            settings[option] = value = _from_environment(option, Value(text, place))
            beaten = next((row for row in rows if row.name == option), None)
            if beaten is None or beaten.value != value:
                overrides.append(Override(option, variable, text, beaten))
    return overrides


def _from_environment(option: str, value: Value) -> Any:
    if str(value.text).startswith("embedded:"):
        raise Refused("embedded: works in the INI file only")
    return value.typed(OPTIONS[option].kind)
