"""Sections to typed settings, each with the place where it is written.

From a file to a configuration::

    configuration     all sources of one application, the nearest first: read_configuration, survey
    application       what is no INI file: [app:...], celeryconfig.py, overrides in code
    environment       variables that beat what is configured
    sections          layers to Celery's settings; everything wrong is collected
    gathering         which key of which layer says what; the same thing twice is a fault
    entries queues    one [celerybeat:NAME]; one [celeryqueue:NAME]
    layers            the sections of a file and of those that it includes
    inifile           the lines of one file
    interpolation     %(NAME)s and ${NAME}

What is accepted::

    keys              what may stand in the other sections
    names             today's names of options, old ones, those that are gone
    options           Celery's table of options, with corrections
    broker_kinds      URLs, serializers, queues, priorities, TLS
    code_kinds        functions, classes, routers
    command_kinds     programs that a task may run
    kinds             numbers, periods, lists, mappings: kinds that know nothing of Celery
    faults            where a value is written, and what is wrong there

``pyproject.toml`` has the order in which they import each other.
"""

from __future__ import annotations

from ws_celery.settings.configuration import (
    INI_VARIABLES,
    Configuration,
    celery_settings,
    ini_variables,
    our_setting,
    read_configuration,
    survey,
)
from ws_celery.settings.kinds import Place
from ws_celery.settings.options import WITHOUT_EFFECT
from ws_celery.settings.sections import Setting

__all__ = (
    "INI_VARIABLES",
    "WITHOUT_EFFECT",
    "Configuration",
    "Place",
    "Setting",
    "celery_settings",
    "ini_variables",
    "our_setting",
    "read_configuration",
    "survey",
)
