"""``%(NAME)s`` and ``${NAME}`` in a value."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from configparser import BasicInterpolation, InterpolationError, RawConfigParser

__all__ = ("expand", "expand_environment")

_VARIABLE = re.compile(r"\$(?P<escape>\$)?\{(?:(?P<name>[^{}:]+)(?::-(?P<default>[^{}]*))?\})?")


def expand(raw: str, scope: Mapping[str, str], key: str) -> str:
    """Return ``raw`` with ``%(NAME)s`` and ``${NAME}`` replaced.

    :raises ValueError: with what is wrong; it does not show the text.
    """
    try:
        text = BasicInterpolation().before_get(_parser(), "", key, raw, dict(scope))
    except InterpolationError as error:
        raise ValueError(_interpolation_problem(error)) from None
    return expand_environment(text)


def _parser() -> RawConfigParser:
    parser = RawConfigParser()
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    return parser


def _interpolation_problem(error: InterpolationError) -> str:
    if reference := getattr(error, "reference", None):
        return (
            f"%({reference})s is not set; set it in [DEFAULT] or with "
            f"--ini-var {reference}=VALUE, and write %% for a percent sign"
        )
    return "a percent sign begins neither %(NAME)s nor %%; write %% for a percent sign"


def expand_environment(text: str) -> str:
    """Return ``text`` with ``${NAME}`` and ``${NAME:-default}`` replaced; ``$${`` means ``${``.

    :raises ValueError: if a variable without a default is not set.
    """

    def replaced(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if match["escape"]:
            return match[0][1:]
        if name is None:
            raise ValueError(
                "${ begins neither ${NAME} nor ${NAME:-DEFAULT}; write $${ for the characters"
            )
        value = None if "\0" in name else os.environ.get(name, default)
        if value is None:
            raise ValueError(
                f"the environment variable {name} is not set; set it, or write "
                f"${{{name}:-DEFAULT}}, or $${{ for the characters themselves"
            )
        return value

    return _VARIABLE.sub(replaced, text)
