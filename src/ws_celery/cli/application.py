"""From an INI file to its Celery app, its logging in force."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import plaster
from celery import signals

from ws_celery.app import PyramidCelery
from ws_celery.applications import INI_VARIABLE, get_celery_app, load_registry
from ws_celery.beat.sources import check_sources, install
from ws_celery.checks import explain
from ws_celery.cli.tables import echo
from ws_celery.exceptions import ConfigurationError
from ws_celery.logs import log_arguments_of_failures, set_up_logging
from ws_celery.settings import our_setting

__all__ = ("READY_VARIABLE", "check_schedule", "explaining", "find_ini", "load_celery_app")

#: Environment variable that names a file which the worker makes when it takes tasks.
READY_VARIABLE = "WS_CELERY_READY_FILE"

#: What a checkout has, and its commands use when no file is named.
_DEVELOPMENT_INI = "development.ini"


def find_ini(ini: str | None) -> str:
    """Return the INI file to work with.

    It is the one given, else that of the environment variable ``WS_CELERY_INI``, else
    ``development.ini`` of the current directory, which it says on stderr.

    :raises ConfigurationError: if there is none, or it does not exist.
    """
    config_uri = ini or os.environ.get(INI_VARIABLE) or _development_ini()
    if not config_uri:
        raise ConfigurationError(
            f"No INI file. Give it with --ini FILE, or by the environment variable {INI_VARIABLE}; "
            f"{_DEVELOPMENT_INI} of the current directory would be used, but there is none."
        )
    if not _is_file(config_uri):
        raise ConfigurationError(f"{config_uri}: there is no such file. Give its path with --ini.")
    # Absolute, because children may be started in another directory.
    return config_uri if "://" in config_uri else str(Path(config_uri).absolute())


def _development_ini() -> str | None:
    if not Path(_DEVELOPMENT_INI).is_file():
        return None
    echo(f"Using ./{_DEVELOPMENT_INI}; --ini names another file.", err=True)
    # For what asks next, and for children that start anew.
    os.environ[INI_VARIABLE] = path = str(Path(_DEVELOPMENT_INI).absolute())
    return path


def _is_file(config_uri: str) -> bool:
    try:
        return Path(plaster.parse_uri(config_uri).path).is_file()
    except plaster.InvalidURI:
        return False  # a name without a suffix


def load_celery_app(config_uri: str) -> PyramidCelery:
    """Load the application of an INI file, with the INI's logging, and return its Celery app.

    :raises WsCeleryError: whatever is wrong with the configuration, in one sentence.
    """
    with explaining(config_uri):
        set_up_logging(config_uri)
        app = get_celery_app(load_registry(config_uri))
        if our_setting(app.registry.settings, "ws_celery.log_arguments", default=False):
            log_arguments_of_failures()
    app.set_default()
    if ready_file := os.environ.get(READY_VARIABLE):
        signals.worker_ready.connect(lambda **_: Path(ready_file).touch(), weak=False)
    return app


@contextmanager
def explaining(config_uri: str) -> Iterator[None]:
    """Let what is wrong with an INI file be one sentence; errors of the application are its own.

    :raises WsCeleryError: the sentence.
    """
    try:
        yield
    except Exception as error:
        explained = explain(error, config_uri)
        if explained is None:
            raise
        raise explained from None


def check_schedule(app: PyramidCelery) -> None:
    """Make sure that what code and INI say of the schedule can be run, and let Celery have it.

    :raises ConfigurationError: with all that cannot.
    """
    app.finalize()  # its handlers may declare entries
    check_sources(app)
    install(app)
