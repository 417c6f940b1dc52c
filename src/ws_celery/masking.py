"""What is printed has no secrets, and nothing that a terminal obeys; imports nothing of ours.

Masking fails closed: where a text cannot be told apart, too much is hidden rather than too little.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, TypeAlias

__all__ = (
    "MASK",
    "SafeRecords",
    "is_secret",
    "logger_of",
    "masked",
    "masked_text",
    "printable",
    "without_arguments",
)

MASK = "********"

#: Words in a name that make its value a secret. ``routing_key`` is the one kind of key that is not.
_HIDDEN_NAMES = (
    r"pass|pwd|secret|token|credential|signature|api_?key|account_?key|private_?key"
    r"|(?<!routing)_key(?:\b|_)|\bkey(?:\b|_)|authorization|(?:\b|_)(?:auth|pw)\b|dsn|cookie"
)
_SECRET_NAME = re.compile(_HIDDEN_NAMES, re.IGNORECASE)

#: Words in a name whose value is a URL, or may have one inside.
_URL_NAME = re.compile(r"ur[il]|broker|backend|server|host|proxy", re.IGNORECASE)

#: Where one URL of several begins; one in the middle of a password does not count.
_URL_START = re.compile(r"(?:^|(?<=[\s\"',;\[=]))(?=[A-Za-z][\w+.-]*://)")
_AUTHORITY = re.compile(r"([A-Za-z][\w+.-]{0,50}://)(.*)@", re.DOTALL)  # {0,50}: in linear time

#: The name of ``password=...`` and ``"password": ...``, up to its value; the JSON may be inside of
#: a JSON, its quotes escaped.
_NAMED = re.compile(
    rf"""(?:{_HIDDEN_NAMES})[\w.-]{{0,200}}(?P<quote>\\{{0,32}}["'])?\s*[:=]\s*""", re.IGNORECASE
)
_IN_QUERY = re.compile(r"[?&][\w.%-]*\Z")

#: Where a value ends that has no end of its own; in a query, in a dictionary, and elsewhere.
_QUERY_VALUE = re.compile(r"[^\s&]*")
_LITERAL = re.compile(r"(?:None|null|[Tt]rue|[Ff]alse|-?\d[\w.+-]*)(?=\s*[,\]})])")
_REST = re.compile(r"[^;\r\n]*")

#: Begin and end of values that have both; ``b'...'`` has a prefix, and so have ``UUID('...')`` and
#: ``Decimal('...')`` in a dictionary.
_PREFIX = re.compile(r"[brufBRUF]{1,2}(?=\\{0,32}[\"'])")
_CALL = re.compile(r"[A-Za-z_][\w.]*(?=\()")
_QUOTE = re.compile(r"\\{0,32}[\"']")
_IN_BRACKETS = re.compile(r"\\{0,32}[\"']|[\[\](){}]")
_PEM = re.compile(r"-----BEGIN.*?(?:-----END[^-]*-----|\Z)", re.DOTALL)
_OPENING, _CLOSING = "[({", "])}"
_AFTER = re.compile(r"[\s,;&)\]}>\"'`.:\\]|\Z")
_SIGNED = re.compile(r"([?&;](?:sig|code)=)[^&;#\s]*", re.IGNORECASE)

#: What a terminal obeys or nobody sees: control characters, marks that turn the direction of text,
#: separators of lines, halves of characters.
_NOT_PRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)

#: Arguments in what Celery logs of a message that it cannot read or whose task it does not know; at
#: DEBUG also of what a pool runs, and of the schedule.
_ARGUMENTS = re.compile(
    r"(body(?: was)?:\s+)(?s:.*)(?= \(\d+b\))"
    r"|(TaskPool: Apply .*? \(args:)(?s:.*)(?=\)$)"
    r"|^(<\w+: .*?\().*(?=\) <)",
    re.MULTILINE,
)

#: The arguments of a log record.
_Arguments: TypeAlias = "tuple[object, ...] | Mapping[str, object] | None"

#: Whose log records are made safe; what an application logs is its own.
_LOGGERS = ("ws_celery", "celery", "kombu")


@lru_cache(maxsize=1024)  # the names of arguments, at each call
def is_secret(name: str) -> bool:
    """Return whether the value of an option or key of this name has to be hidden."""
    return bool(_SECRET_NAME.search(name))


def masked(name: str, value: Any) -> Any:
    """Return ``value`` with its secrets replaced, for printing.

    :param name: the option or key that has the value; a secret one hides the value as a whole, and
        all that is inside of it.
    :param value: text, or what JSON can hold; anything else is returned as it is.
    """
    if isinstance(value, Mapping):
        return {key: masked(f"{name} {key}", inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        inside = [masked(name, inner) for inner in value]
        return inside if isinstance(value, list) else tuple(inside)  # one with names may want more
    if is_secret(name) and not isinstance(value, bool) and value not in (None, ""):
        return MASK
    if isinstance(value, str):
        return masked_text(_without_broken_urls(value) if _URL_NAME.search(name) else value)
    return value


def without_arguments(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a call with its arguments hidden, for who cannot know their names."""
    return {key: MASK if key in ("args", "kwargs") else value for key, value in fields.items()}


def masked_text(text: str) -> str:
    """Return ``text`` without passwords: in URLs, query and connection strings, JSON and Python.

    Where the value of a secret name has no visible end, all that follows on its line is hidden.
    """
    if ":" not in text and "=" not in text:
        return text  # most values, and all that follows needs one of them
    urls = _URL_START.split(text)
    # Up to the last @: a password may contain one.
    text = "".join(_AUTHORITY.sub(_masked_authority, part, count=1) for part in urls)
    text = _SIGNED.sub(rf"\g<1>{MASK}", text)
    return "".join(_without_values(text))


def _without_values(text: str) -> Iterator[str]:
    place = 0
    while named := _NAMED.search(text, place):
        start = named.end()
        yield text[place:start]
        place = _end_of_value(text, named)
        if place > start:
            yield MASK
    yield text[place:]


def _end_of_value(text: str, named: re.Match[str]) -> int:
    start = named.end()
    if text.startswith(MASK, start) and _AFTER.match(text, start + len(MASK)):
        return start + len(MASK)  # masked before
    if pem := _PEM.match(text, start):
        return pem.end()
    in_dictionary = named["quote"] is not None
    prefix = _PREFIX.match(text, start) or (in_dictionary and _CALL.match(text, start))
    end = _end_of_enclosed(text, prefix.end() if prefix else start)
    if end is not None and _AFTER.match(text, end):
        return end
    if in_dictionary and (literal := _LITERAL.match(text, start)):
        return literal.end()
    in_query = _IN_QUERY.search(text[max(named.start() - 100, 0) : named.start()])
    # Passwords may have blanks: who hides a word only shows what follows it.
    found = (_QUERY_VALUE if in_query else _REST).match(text, end or start)
    return found.end() if found else start


def _end_of_enclosed(text: str, start: int) -> int | None:
    """Return where what begins with a quote or a bracket ends; without an end, that of the text."""
    if quote := _QUOTE.match(text, start):
        return _end_of_quoted(text, quote)
    if not text.startswith(tuple(_OPENING), start):
        return None
    depth, place = 0, start
    while found := _IN_BRACKETS.search(text, place):
        if found[0] in _CLOSING:
            depth -= 1
        elif found[0] in _OPENING:
            depth += 1
        place = found.end() if found[0] in _OPENING + _CLOSING else _end_of_quoted(text, found)
        if not depth:
            return place
    return len(text)


def _end_of_quoted(text: str, quote: re.Match[str]) -> int:
    # The same quote, as often escaped.
    found = re.compile(rf"(?<!\\){re.escape(quote[0])}").search(text, quote.end())
    return found.end() if found else len(text)


def _without_broken_urls(text: str) -> str:
    # Where the scheme has a slip, nobody can tell where the password begins.
    parts = _URL_START.split(text)
    return "".join(
        part if "@" not in part or _AUTHORITY.match(part) else f"{MASK}@{part.rpartition('@')[2]}"
        for part in parts
    )


def _masked_authority(match: re.Match[str]) -> str:
    scheme, user_info = match.groups()
    user, colon, _ = user_info.partition(":")
    return f"{scheme}{user}:{MASK}@" if colon else f"{scheme}{MASK}@"


def printable(text: str, *, lines: bool = True) -> str:
    """Return ``text`` with all that is not to reach a terminal written as JSON escapes it.

    :param lines: whether ends of lines and tabs are left as they are.
    """

    def escaped(match: re.Match[str]) -> str:
        if lines and match[0] in "\n\t":
            return match[0]
        return "\\u007f" if match[0] == "\x7f" else json.dumps(match[0])[1:-1]

    return _NOT_PRINTABLE.sub(escaped, text)


class SafeRecords(logging.Filter):
    """Lets all log records pass; those of ws_celery, Celery and kombu without secrets and escapes.

    Values stay on their line, and what came with a message that nobody can read is not shown.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Change what is not safe; always returns ``True``."""
        if record.name.partition(".")[0] in _LOGGERS:
            text = record.getMessage()
            record.args = _on_one_line(record.args)
            safe = printable(masked_text(_ARGUMENTS.sub(_without_arguments, record.getMessage())))
            if safe != text:
                record.msg, record.args = safe, None
            if record.exc_info and record.exc_text is None:
                record.exc_text = logging.Formatter().formatException(record.exc_info)
            if record.exc_text:  # formatters print it, if it is there
                record.exc_text = printable(masked_text(record.exc_text))
            if isinstance(data := getattr(record, "data", None), Mapping):
                record.data = {
                    key: printable(masked_text(value)) if isinstance(value, str) else value
                    for key, value in data.items()
                }
        return True


def _without_arguments(match: re.Match[str]) -> str:
    return f"{match[match.lastindex or 0]}{MASK}"


def _on_one_line(args: _Arguments) -> _Arguments:
    """Return the arguments of a record, whose texts could look like other records."""
    if isinstance(args, Mapping):
        return {key: _line(value) for key, value in args.items()}
    return args and tuple(map(_line, args))


def _line(value: object) -> object:
    return printable(value, lines=False) if isinstance(value, str) else value


def logger_of(name: str) -> logging.Logger:
    """Return the logger of a module of ours, whose records are safe in every process."""
    logger = logging.getLogger(name)
    if not any(isinstance(each, SafeRecords) for each in logger.filters):
        logger.addFilter(SafeRecords())
    return logger
