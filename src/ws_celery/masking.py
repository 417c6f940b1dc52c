"""Secrets do not appear where values are printed; imports nothing of ours.

Masking fails closed: where a text cannot be told apart, too much is hidden rather than too little.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ("MASK", "is_secret", "masked", "masked_text")

MASK = "********"

#: Words in a name that make its value a secret. ``routing_key`` is the one kind of key that is not.
_HIDDEN_NAMES = (
    r"pass|pwd|secret|token|credential|signature|api_?key|account_?key|private_?key"
    r"|(?<!routing)_key(?:\b|_)|\bkey(?:\b|_)"
)
_SECRET_NAME = re.compile(_HIDDEN_NAMES, re.IGNORECASE)

#: Where one URL of several begins; one in the middle of a password does not count.
_URL_START = re.compile(r"(?:^|(?<=[\s\"',;\[=]))(?=[A-Za-z][\w+.-]*://)")
_AUTHORITY = re.compile(r"([A-Za-z][\w+.-]*://)(.*)@", re.DOTALL)

#: ``password=...`` of query strings and connection strings, ``"password": ...`` of JSON, whole or
#: broken.
_ASSIGNMENT = re.compile(
    rf"""([\w.-]*(?:{_HIDDEN_NAMES})[\w.-]*["']?\s*[:=]\s*)("(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?|[^\s;&]+)""",
    re.IGNORECASE,
)
_SIGNED = re.compile(r"([?&;](?:sig|code)=)[^&;#\s]*", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Tell whether the value of an option or key of this name has to be hidden."""
    return bool(_SECRET_NAME.search(name))


def masked(name: str, value: Any) -> Any:
    """Return ``value`` with its secrets replaced, for printing.

    :param name: the option or key that has the value; a secret one hides the value as a whole.
    :param value: text, or what JSON can hold; anything else is returned as it is.
    """
    if isinstance(value, Mapping):
        return {key: masked(str(key), inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([masked(name, inner) for inner in value])
    if is_secret(name) and value not in (None, "", True, False):
        return MASK
    if isinstance(value, str):
        return masked_text(value)
    return value


def masked_text(text: str) -> str:
    """Return ``text`` without passwords: in URLs of any scheme, query strings and JSON."""
    text = "".join(_masked_url(part) for part in _URL_START.split(text))
    text = _SIGNED.sub(rf"\g<1>{MASK}", text)
    return _ASSIGNMENT.sub(rf"\g<1>{MASK}", text)


def _masked_url(text: str) -> str:
    # Up to the last @: a password may contain one.
    return _AUTHORITY.sub(_masked_authority, text, count=1)


def _masked_authority(match: re.Match[str]) -> str:
    scheme, user_info = match.groups()
    user, colon, _ = user_info.partition(":")
    return f"{scheme}{user}:{MASK}@" if colon else f"{scheme}{MASK}@"
