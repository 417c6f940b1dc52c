"""What ``ws-celery`` takes from the command line before Celery sees it."""

from __future__ import annotations

from dataclasses import dataclass

from ws_celery.exceptions import ConfigurationError

__all__ = ("Options", "take_options")

#: Spellings of ``-A`` that name the application of the INI, which is the only one there is.
_OUR_APP = ("ws_celery", "ws_celery.celery_app", "ws_celery:celery_app")


@dataclass
class Options:
    """The options that are ours in every command.

    :param ini: value of ``--ini``, or ``None``.
    """

    ini: str | None = None


def take_options(arguments: list[str]) -> tuple[Options, list[str]]:
    """Take ``--ini`` and ``-A`` out of the arguments, wherever they stand before a ``--``.

    :return: the options, and the arguments that are left.
    :raises ConfigurationError: if one has no value, or ``-A`` names another app than the INI's.
    """
    options, rest = Options(), []
    words = iter(arguments)
    for word in words:
        if word == "--":
            rest += [word, *words]
            break
        name, glued, value = _split(word)
        if name not in ("--ini", "--app", "-A"):
            rest.append(word)
            continue
        text = value if glued else next(words, None)
        if not text:
            raise ConfigurationError(f"{name} needs a value.")
        if name == "--ini":
            options.ini = text
        elif text not in _OUR_APP:
            raise ConfigurationError(
                f"{name} {text}: the application comes from the INI file. "
                f"Leave {name} out, or write {name} {_OUR_APP[1]}."
            )
    return options, rest


def _split(word: str) -> tuple[str, bool, str]:
    if word.startswith("-A") and len(word) > 2:
        return "-A", True, word[2:].removeprefix("=")
    name, equals, value = word.partition("=")
    return name, bool(equals), value
