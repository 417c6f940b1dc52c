"""The configuration of one application, from wherever it is written, typed and with its origins.

Nearest first: overrides in code, the file, the files that it includes, ``celeryconfig.py``. The
environment variables that Celery obeys beat all of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import plaster

from ws_celery.exceptions import ConfigurationError, Fault
from ws_celery.masking import logger_of
from ws_celery.settings.application import celeryconfig, code, merge_app_settings
from ws_celery.settings.environment import Override, ini_variables, obey_environment
from ws_celery.settings.faults import Faults, Place, Value
from ws_celery.settings.gathering import Renamed, is_for_celery
from ws_celery.settings.layers import Layer, read_layers
from ws_celery.settings.sections import Sections, Setting

__all__ = ("Configuration", "celery_settings", "read_configuration", "survey")

log = logger_of(__name__)

_REMEDY = (
    "Set broker_url in the [celery] section of the INI file, and in [app:main] "
    "`ws_celery.config_uri = %(__file__)s`, which tells where that section is"
)


@dataclass
class Configuration:
    """What was read.

    :param settings: Celery's settings by today's names, typed.
    :param rows: each thing that was read, with its place.
    :param renamed: old spellings that were understood.
    :param overrides: environment variables that beat what is written.
    :param call_options: options of calls by task or glob, from routes.
    :param entries: the schedule's entries by name, as they are written.
    :param entries_of_code: those that ``beat_schedule`` has in Python.
    :param files: the files that were read.
    :param told: what to tell of Celery's own module of settings.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[Setting] = field(default_factory=list)
    renamed: list[Renamed] = field(default_factory=list)
    overrides: list[Override] = field(default_factory=list)
    call_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    entries_of_code: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: frozenset[str] = frozenset()
    told: list[str] = field(default_factory=list)

    def refuse_unread(self, config_uri: str) -> None:
        """Make sure that the ``[celery...]`` sections of a file are among what was read.

        :param config_uri: the file that a process of the application was started with.
        :raises ConfigurationError: if they are not: nothing would come of them.
        """
        if os.path.realpath(plaster.parse_uri(config_uri).path) in self.files:
            return
        layers, _ = read_layers(config_uri, ini_variables())
        sections = layers[0].sections if layers else ()
        section = next(filter(is_for_celery, sections), None)
        if section is not None:
            problem = "is not read, as ws_celery.config_uri does not name this file"
            remedy = "`ws_celery.config_uri = %(__file__)s` in the section of the application"
            raise ConfigurationError(layers[0].heading(section).fault(problem, expected=remedy))

    def place(self, option: str) -> Place | None:
        """Return where an option, or the first of its keys, is written."""
        return next((row.place for row in self.rows if row.belongs_to(option)), None)

    def report(self) -> None:
        """Log, one line each, what somebody who reads the files would not expect."""
        for line in (*self.overrides, *self.told):
            log.warning("%s", line)
        if self.renamed:
            names = dict.fromkeys(f"{each.old} is {each.new}" for each in self.renamed)
            log.warning("old names of settings, which still work: %s", ", ".join(names))


def read_configuration(
    config_uri: str | None,
    app_settings: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    need_broker: bool = True,
) -> Configuration:
    """Return the configuration of an application.

    :param config_uri: what plaster takes; ``None`` where there is no file.
    :param app_settings: Pyramid's settings, for ``celery.*`` and ``ws_celery.*``; those of the
        file's ``[app:...]`` section if not given.
    :param overrides: options from code, by name; they beat what is in files.
    :param need_broker: whether it is a fault if there is no broker, or no section [celery].
    :raises ConfigurationError: with all that is wrong.
    """
    configuration, faults = survey(config_uri, app_settings, overrides, need_broker=need_broker)
    if faults:
        raise ConfigurationError.of(faults)
    return configuration


def survey(
    config_uri: str | None,
    app_settings: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    need_broker: bool = True,
) -> tuple[Configuration, list[Fault]]:
    """Return what could be read, and all that is wrong; see :func:`read_configuration`."""
    layers, faults = read_layers(config_uri, ini_variables()) if config_uri else ([], Faults())
    readable = not faults
    own = layers[0] if layers else Layer(config_uri or "")
    merge_app_settings(own, config_uri, app_settings, faults)
    module, told = celeryconfig(own, faults)
    layers = [*code(overrides), *(layers or [own]), *module]
    sections = Sections(layers, faults)
    if need_broker and config_uri and readable and _lacks_celery(layers, faults):
        faults.append(Fault(f"the section [celery] is missing. {_REMEDY}", config_uri))
    settings = sections.settings
    changed = obey_environment(settings, sections.rows, faults)
    if not faults:
        _refuse_stray_results(settings, sections.rows, faults)
    if need_broker and not faults and not _has_broker(settings):
        text = "no broker is configured" if config_uri else "No broker is configured"
        faults.append(Fault(f"{text}. {_REMEDY}", config_uri))
    configuration = Configuration(
        settings,
        sections.rows,
        sections.renamed,
        changed,
        sections.call_options,
        sections.entries,
        sections.entries_of_code,
        frozenset(os.path.realpath(layer.file) for layer in layers),
        told,
    )
    return configuration, list(ConfigurationError.of(faults).faults)


def _refuse_stray_results(settings: Mapping[str, Any], rows: list[Setting], faults: Faults) -> None:
    results, broker = (str(settings.get(name)) for name in ("result_backend", "broker_url"))
    if results.startswith("embedded://") and os.path.normpath(results) != os.path.normpath(broker):
        place = next(row.place for row in rows if row.name == "result_backend")
        problem = (
            "nobody would start it: an embedded result backend is part of an embedded broker; give "
            "broker_url the same directory"
        )
        faults.at(place, problem, value=results)


def _lacks_celery(layers: list[Layer], faults: Faults) -> bool:
    misspelt = any(fault.nearest == "[celery]" for fault in faults)
    return not misspelt and not any("celery" in each.sections for each in layers)


def _has_broker(settings: Mapping[str, Any]) -> bool:
    # broker_host and broker_transport are older ways to say it.
    options = ("broker_url", "broker_write_url", "broker_host", "broker_transport")
    return any(settings.get(name) for name in (*options, "task_always_eager"))


def celery_settings(sections: Mapping[str, Mapping[str, str]], source: str) -> dict[str, Any]:
    """Return Celery's settings from sections that something else has read.

    :param sections: all sections; those that are not ours are left alone.
    :param source: name of the file, for messages.
    :raises ConfigurationError: with all that is wrong.
    """
    layer = Layer(source)
    for section, values in sections.items():
        layer.sections[section] = {
            key: Value(text.strip(), Place(source, section, key)) for key, text in values.items()
        }
    faults = Faults()
    settings = Sections([layer], faults).settings
    if faults:
        raise ConfigurationError.of(faults)
    return settings
