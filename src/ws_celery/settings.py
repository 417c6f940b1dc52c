"""The configuration of one application, from wherever it is written, typed and with its origins.

Nearest first: overrides in code, the file, the files that it includes, ``celeryconfig.py``. The
environment variables that Celery obeys beat all of them.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

import plaster

from ws_celery.converters import Refused, nearest
from ws_celery.exceptions import ConfigurationError, Fault
from ws_celery.faults import Faults, Place, Value
from ws_celery.gather import Renamed
from ws_celery.inifile import Layer, expand_environment, read_layers
from ws_celery.keys import OUR_SETTINGS
from ws_celery.masking import masked
from ws_celery.options import OPTIONS, REMOVED, find_option
from ws_celery.sections import Sections, Setting

__all__ = (
    "INI_VARIABLES",
    "Configuration",
    "Override",
    "celery_settings",
    "ini_variables",
    "read_configuration",
    "survey",
)

log = logging.getLogger(__name__)

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

_REMEDY = (
    "Set broker_url in the [celery] section of the INI file, and in [app:main] "
    "`ws_celery.config_uri = %(__file__)s`, which tells where that section is"
)


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


@dataclass
class Configuration:
    """What was read.

    :param settings: Celery's settings by today's names, typed.
    :param rows: each thing that was read, with its place.
    :param renamed: old spellings that were understood.
    :param overrides: environment variables that beat what is written.
    :param call_options: options of calls by task or glob, from routes.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[Setting] = field(default_factory=list)
    renamed: list[Renamed] = field(default_factory=list)
    overrides: list[Override] = field(default_factory=list)
    call_options: dict[str, dict[str, Any]] = field(default_factory=dict)

    def report(self) -> None:
        """Log, one line each, what somebody who reads the files would not expect."""
        for override in self.overrides:
            log.warning("%s", override)
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
    :param need_broker: whether it is a fault if there is no broker.
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
    layers = layers or [own]
    if app_settings is None:
        app_settings, places = _app_section(own, config_uri)
    else:
        places = _app_places(own, config_uri)
    _app_values(app_settings, places, own, faults)
    layers += _celeryconfig(own, faults)
    if overrides:
        layers.insert(0, _code(overrides))
    written = any("celery" in each.sections for each in layers)
    sections = Sections(layers, faults)
    misspelt = any(fault.nearest == "[celery]" for fault in faults)
    if config_uri and readable and not written and not misspelt:
        faults.append(Fault(f"the section [celery] is missing. {_REMEDY}", config_uri))
    configuration = Configuration(
        sections.settings, sections.rows, sections.renamed, [], sections.call_options
    )
    _obey_environment(configuration, faults)
    if need_broker and not faults and not _has_broker(configuration.settings):
        text = "no broker is configured" if config_uri else "No broker is configured"
        faults.append(Fault(f"{text}. {_REMEDY}", config_uri))
    return configuration, list(ConfigurationError.of(faults).faults)


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


def ini_variables() -> dict[str, str]:
    """Return what ``--ini-var`` said to this process or to the one that started it."""
    return dict(json.loads(os.environ.get(INI_VARIABLES, "{}")))


# --- The application's section ----------------------------------------------------------------


def _section_name(config_uri: str | None) -> str:
    fragment = plaster.parse_uri(config_uri).fragment if config_uri else ""
    return f"app:{fragment or 'main'}"


def _app_section(own: Layer, config_uri: str | None) -> tuple[dict[str, Any], dict[str, Place]]:
    values = own.sections.get(_section_name(config_uri), {})
    ours = {key: value for key, value in values.items() if _is_ours(key)}
    return (
        {key: value.text for key, value in ours.items()},
        {key: value.place for key, value in ours.items()},
    )


def _app_places(own: Layer, config_uri: str | None) -> dict[str, Place]:
    places: dict[str, Place] = {}
    named = own.sections.get(_section_name(config_uri), {})
    others = (values for name, values in own.sections.items() if name.startswith("app:"))
    for values in (named, *others):
        for key, value in values.items():
            places.setdefault(key, value.place)
    return places


def _is_ours(key: str) -> bool:
    return key.startswith(("celery.", "ws_celery."))


def _app_values(
    settings: Mapping[str, Any], places: Mapping[str, Place], own: Layer, faults: Faults
) -> None:
    """Check ``ws_celery.*``; add ``celery.*`` to the layer as if it stood in ``[celery]``."""
    for key, given in settings.items():
        if not _is_ours(key):
            continue
        place = places.get(key) or Place("the application's settings", "app", key)
        try:
            value = expand_environment(given) if isinstance(given, str) else given
        except ValueError as error:
            faults.at(place, str(error))
            continue
        if key.startswith("celery."):
            _add_to_celery(own, key.removeprefix("celery."), Value(value, place), faults)
        elif key in OUR_SETTINGS:
            faults.typed({key: Value(value, place)}, OUR_SETTINGS)
        else:
            close = nearest(key, OUR_SETTINGS)
            faults.at(place, "is no setting of ws_celery", value=value, close=close)


def _add_to_celery(own: Layer, name: str, value: Value, faults: Faults) -> None:
    celery = own.sections.setdefault("celery", {})
    if name in celery:
        first = celery[name].place
        problem = f"[{first.section}] {first.key} at {first} sets it as well; keep one of them"
        faults.at(value.place, problem)
    else:
        celery[name] = value


# --- Code -------------------------------------------------------------------------------------


def _code(overrides: Mapping[str, Any]) -> Layer:
    name = "configure_celery()"
    values = {key: Value(value, Place(name, "code", key)) for key, value in overrides.items()}
    return Layer(name, {"celery": values})


def _celeryconfig(own: Layer, faults: Faults) -> list[Layer]:
    """Return the layer of Celery's own Python module of settings, where the INI asks for it."""
    celery = own.sections.get("celery", {})
    written = next((key for key in celery if key.lower() == "use_celeryconfig"), None)
    if written is None:
        return []
    value = celery.pop(written)
    name = os.environ.get("CELERY_CONFIG_MODULE") or "celeryconfig"
    try:
        wanted = OPTIONS["task_always_eager"].kind.accept(value.text)
        module = importlib.import_module(name) if wanted else None
    except Refused:
        faults.at(value.place, "", value=value.text, expected="true or false")
        return []
    except Exception as error:  # noqa: BLE001  whatever the module does
        problem = f"the module {name} cannot be imported ({type(error).__name__}: {error})"
        faults.at(value.place, problem)
        return []
    return [_module_layer(module)] if module else []


def _module_layer(module: ModuleType) -> Layer:
    file = getattr(module, "__file__", None) or module.__name__
    values = {
        name: Value(value, Place(file, "celeryconfig", name))
        for name, value in vars(module).items()
        if not name.startswith("_") and _is_setting(name, value)
    }
    return Layer(file, {"celery": values})


def _is_setting(name: str, value: object) -> bool:
    # The module's own imports and functions are no settings; a slip in a name is a fault.
    if find_option(name) or name in REMOVED:
        return True
    return not isinstance(value, (ModuleType, FunctionType, type)) and bool(nearest(name, OPTIONS))


# --- The environment --------------------------------------------------------------------------


def _obey_environment(configuration: Configuration, faults: Faults) -> None:
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
        before = len(faults)
        place = Place("environment", "", variable)
        with faults.catching(Value(text, place), OPTIONS[option].kind.expected):
            value = _from_environment(option, text)
        if len(faults) > before:
            continue
        beaten = next((row for row in configuration.rows if row.name == option), None)
        if beaten is None or beaten.value != value:
            configuration.overrides.append(Override(option, variable, text, beaten))
        configuration.settings[option] = value


def _from_environment(option: str, text: str) -> Any:
    if text.startswith("embedded:"):
        raise Refused("embedded: works in the INI file only")
    return OPTIONS[option].kind.accept(text)


def _has_broker(settings: Mapping[str, Any]) -> bool:
    # broker_host and broker_transport are older ways to say it.
    options = ("broker_url", "broker_write_url", "broker_host", "broker_transport")
    return any(settings.get(name) for name in (*options, "task_always_eager"))
