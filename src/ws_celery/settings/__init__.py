"""The configuration of one application, from wherever it is written, typed and with its origins.

Nearest first: overrides in code, the file, the files that it includes, ``celeryconfig.py``. The
environment variables that Celery obeys beat all of them. The modules, from a file to settings::

    reader          the lines of a file and of those that it includes, each value with its place
    sections        what [celery...] sections say, as Celery's settings; everything wrong at once
    options         what may be set: Celery's table with corrections, keys of sections, our own
    celery_kinds    URLs, serializers, queues, priorities, TLS, code
    kinds           numbers, periods, lists, mappings: kinds that know nothing of Celery
"""

from __future__ import annotations

import importlib
import os
import runpy
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import plaster

from ws_celery.converters import Refused, json_value, nearest
from ws_celery.exceptions import ConfigurationError, Fault
from ws_celery.masking import logger_of, masked
from ws_celery.settings import kinds
from ws_celery.settings.options import (
    OPTIONS,
    OUR_SETTINGS,
    REMOVED,
    WITHOUT_EFFECT,
    find_option,
)
from ws_celery.settings.reader import (
    Faults,
    Layer,
    Place,
    Value,
    expand_environment,
    is_app_key,
    is_for_celery,
    read_layers,
)
from ws_celery.settings.sections import Sections, Setting, read_sections

__all__ = (
    "INI_VARIABLES",
    "WITHOUT_EFFECT",
    "Configuration",
    "Place",
    "Setting",
    "ini_variables",
    "our_setting",
    "read_configuration",
    "survey",
)

log = logger_of(__name__)

#: Environment variable that tells all processes of a command what ``--ini-var`` said, as JSON.
INI_VARIABLES = "WS_CELERY_INI_VARS"


@dataclass
class Configuration(Sections):
    """What was read, wherever it is written.

    :param overrides: what environment variables beat, a sentence each.
    :param files: the files that were read.
    :param notices: what to log of Celery's own module of settings.
    """

    overrides: list[str] = field(default_factory=list)
    files: frozenset[str] = frozenset()
    notices: list[str] = field(default_factory=list)

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
        for line in (*self.overrides, *self.notices):
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
    _merge_app_settings(own, config_uri, app_settings, faults)
    module, notices = _celeryconfig(own, faults)
    code = [_python("configure_celery()", "code", overrides)] if overrides else []
    layers = [*code, *(layers or [own]), *module]
    sections = read_sections(layers, faults)
    files = frozenset(os.path.realpath(layer.file) for layer in layers)
    configuration = Configuration(**vars(sections), files=files, notices=notices)
    if need_broker and config_uri and readable and _lacks_celery(layers, faults):
        faults.append(Fault(f"the section [celery] is missing. {_REMEDY}", config_uri))
    _obey_environment(configuration, faults)
    if not faults:
        _refuse_stray_results(configuration, faults)
    if need_broker and not faults and not _has_broker(configuration.settings):
        text = "no broker is configured" if config_uri else "No broker is configured"
        faults.append(Fault(f"{text}. {_REMEDY}", config_uri))
    return configuration, list(ConfigurationError.of(faults).faults)


_REMEDY = (
    "Set broker_url in the [celery] section of the INI file, and in [app:main] "
    "`ws_celery.config_uri = %(__file__)s`, which tells where that section is"
)


def _refuse_stray_results(configuration: Configuration, faults: Faults) -> None:
    settings, place = configuration.settings, configuration.place("result_backend")
    results, broker = (str(settings.get(name)) for name in ("result_backend", "broker_url"))
    if not place or not results.startswith("embedded://"):
        return
    if os.path.normpath(results) != os.path.normpath(broker):
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


# --- Settings of the application -------------------------------------------------------------


def _merge_app_settings(
    own: Layer, config_uri: str | None, settings: Mapping[str, Any] | None, faults: Faults
) -> None:
    """Check ``ws_celery.*``; add ``celery.*`` to the layer as if it stood in ``[celery]``.

    :param own: the layer of the application's own file.
    :param settings: Pyramid's settings; those of the file's ``[app:...]`` section if not given.
    """
    for key, value in _app_values(own, config_uri, settings, faults).items():
        if key.startswith("celery."):
            _add_to_celery(own, key.removeprefix("celery."), value, faults)
        elif key in OUR_SETTINGS:
            faults.typed({key: value}, OUR_SETTINGS)
        else:
            close = nearest(key, OUR_SETTINGS)
            faults.at(value.place, "is no setting of ws_celery", value=value.text, close=close)


def _app_values(
    own: Layer, config_uri: str | None, settings: Mapping[str, object] | None, faults: Faults
) -> dict[str, Value]:
    fragment = plaster.parse_uri(config_uri).fragment if config_uri else ""
    section = f"app:{fragment or 'main'}"
    # The section of this application first; a setting may also come from another one's.
    names = [section, *(name for name in own.sections if name.startswith("app:"))]
    written = dict(ChainMap(*(own.sections.get(name, {}) for name in names)))
    if settings is None:
        own_values = own.sections.get(section, {})
        return {key: value for key, value in own_values.items() if is_app_key(key)}
    values = {}
    for key, given in settings.items():
        if is_app_key(key):
            elsewhere = Place("the application's settings", "app", key)
            place = written[key].place if key in written else elsewhere
            try:
                values[key] = Value(_expanded(given), place)
            except ValueError as error:
                faults.at(place, str(error))
    return values


def _expanded(given: object) -> object:
    # Pyramid has got them as they are written.
    return expand_environment(given) if isinstance(given, str) else given


def _add_to_celery(own: Layer, name: str, value: Value, faults: Faults) -> None:
    celery = own.sections.setdefault("celery", {})
    if name in celery:
        first = celery[name].place
        problem = f"[{first.section}] {first.key} at {first} sets it as well; keep one of them"
        faults.at(value.place, problem)
    else:
        celery[name] = value


def our_setting(settings: Mapping[str, Any] | None, key: str, default: Any) -> Any:
    """Return a setting ``ws_celery.*``, typed.

    :param default: the value if it is not set.
    :raises ConfigurationError: if it is not what is expected.
    """
    value = (settings or {}).get(key, default)
    kind = OUR_SETTINGS[key]
    try:
        return kind.accept(_expanded(value))
    except ValueError as error:  # of the expansion, or refused
        fault = Fault(str(error), key=key, value=str(value), expected=kind.expected)
        raise ConfigurationError(fault) from None


# --- Settings in Python ----------------------------------------------------------------------


def _python(file: str, section: str, values: Mapping[str, object]) -> Layer:
    """Return the layer of options that Python has, as if they stood in ``[celery]``."""
    places = {key: Place(file, section, key) for key in values}
    celery = {key: Value(value, places[key], literal=True) for key, value in values.items()}
    return Layer(file, {"celery": celery})


def _celeryconfig(own: Layer, faults: Faults) -> tuple[list[Layer], list[str]]:
    """Return the layer of Celery's own Python module of settings, where the INI asks for it.

    It is ``celeryconfig.py`` beside the INI, or a module on Python's path.

    :return: also what to log of a module that is not read, or is another one than the file says.
    """
    celery = own.sections.get("celery", {})
    keys = {key.lower(): key for key in celery}
    variable, beside = os.environ.get(_VARIABLE), Path(own.file).parent / "celeryconfig.py"
    if "use_celeryconfig" not in keys:
        return [], _unread(variable, beside)
    value = celery.pop(keys["use_celeryconfig"])
    named = celery.pop(keys.get("celery_config_module", ""), None)
    name = variable or (named and str(named.text)) or "celeryconfig"
    notices = (
        [f"environment: {_VARIABLE} = {name} names the module that is read"] if variable else []
    )
    try:
        return ([_read(name, beside)], notices) if value.typed(kinds.boolean) else ([], [])
    except Refused as error:
        faults.at(value.place, str(error), value=value.text, expected=kinds.boolean.expected)
    except Exception as error:  # noqa: BLE001  whatever the module does
        problem = f"the module {name} cannot be imported ({type(error).__name__}: {error})"
        expected = "celeryconfig.py beside this file, or a module on Python's path"
        faults.at(value.place, problem, expected=expected)
    return [], []


#: Celery's variable for the name of the module.
_VARIABLE = "CELERY_CONFIG_MODULE"


def _unread(variable: str | None, beside: Path) -> list[str]:
    remedy = "set use_celeryconfig = true in [celery], or"
    if variable:
        return [f"environment: {_VARIABLE} = {variable} is not read; {remedy} unset it"]
    return [f"{beside} is not read; {remedy} remove it"] if beside.is_file() else []


def _read(name: str, beside: Path) -> Layer:
    if name == "celeryconfig" and beside.is_file():
        file, names = str(beside), runpy.run_path(str(beside))
    else:
        module = importlib.import_module(name)
        file, names = getattr(module, "__file__", None) or name, vars(module)
    public = {name: value for name, value in names.items() if not name.startswith("_")}
    values = {name: value for name, value in public.items() if _is_setting(name, value)}
    return _python(file, "celeryconfig", values)


def _is_setting(name: str, value: object) -> bool:
    # The module's own imports and functions are no settings; a slip in a name is a fault.
    if find_option(name) or name in REMOVED:
        return True
    return not isinstance(value, (ModuleType, FunctionType, type)) and bool(nearest(name, OPTIONS))


# --- Environment -----------------------------------------------------------------------------


#: Environment variables that beat the option, as Celery has it. Those without ``CELERY_`` are
#: options of Celery's commands, which would then talk to another broker than the web does: all
#: processes obey them.
_VARIABLES = {
    "broker_url": ("BROKER_URL", "CELERY_BROKER_URL"),
    "broker_read_url": ("CELERY_BROKER_READ_URL",),
    "broker_write_url": ("CELERY_BROKER_WRITE_URL",),
    "result_backend": ("RESULT_BACKEND", "CELERY_RESULT_BACKEND"),
}


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


def _obey_environment(configuration: Configuration, faults: Faults) -> None:
    """Put the values of variables into the settings; keep those that change something."""
    for option, variables in _VARIABLES.items():
        given = {name: text for name in variables if (text := os.environ.get(name, ""))}
        if len(set(given.values())) > 1:
            problem = f"{' and '.join(given)} are both set, and differ; unset one of them"
            faults.append(Fault(problem, "environment", key=option))
            continue
        for variable, text in list(given.items())[:1]:
            value = Value(text, Place("environment", "", variable))
            with faults.catching(value, OPTIONS[option].expected.removesuffix(", or none")):
                _override(configuration, option, value)


def _override(configuration: Configuration, option: str, value: Value) -> None:
    typed = value.typed(OPTIONS[option])
    if typed is None:
        raise Refused
    if str(typed).startswith("embedded:"):
        raise Refused("embedded: works in the INI file only")
    configuration.settings[option] = typed
    beaten = next((row for row in configuration.rows if row.name == option), None)
    said = f"environment: {value.place.key} = {masked(option, value.text)}"
    if beaten is None:
        configuration.overrides.append(f"{said} sets {option}")
    elif beaten.value != typed:
        before = f"{option} = {masked(option, beaten.value)} ({beaten.place})"
        configuration.overrides.append(f"{said} beats {before}")
