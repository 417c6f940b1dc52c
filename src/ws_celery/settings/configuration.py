"""The configuration of one application, from wherever it is written, typed and with its origins.

Nearest first: overrides in code, the file, the files that it includes, ``celeryconfig.py``. The
environment variables that Celery obeys beat all of them.
"""

from __future__ import annotations

import importlib
import os
import runpy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import plaster

from ws_celery.converters import Refused, json_value, nearest
from ws_celery.exceptions import ConfigurationError, Fault
from ws_celery.masking import logger_of, masked
from ws_celery.settings.gathering import Renamed, is_for_celery
from ws_celery.settings.keys import OUR_SETTINGS
from ws_celery.settings.kinds import BOOL, Faults, Place, Value
from ws_celery.settings.options import OPTIONS, REMOVED, find_option
from ws_celery.settings.reader import Layer, expand_environment, is_app_key, read_layers
from ws_celery.settings.sections import Sections, Setting

__all__ = (
    "INI_VARIABLES",
    "Configuration",
    "Override",
    "celery_settings",
    "celeryconfig",
    "code",
    "ini_variables",
    "merge_app_settings",
    "obey_environment",
    "our_setting",
    "read_configuration",
    "survey",
)

log = logger_of(__name__)

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


def merge_app_settings(
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


def our_setting(settings: Mapping[str, Any] | None, key: str, default: Any) -> Any:
    """Return a setting ``ws_celery.*``, typed.

    :param default: the value if it is not set.
    :raises ConfigurationError: if it is not what is expected.
    """
    value = (settings or {}).get(key, default)
    try:
        return OUR_SETTINGS[key].accept(
            expand_environment(value) if isinstance(value, str) else value
        )
    except (Refused, ValueError) as error:
        expected = OUR_SETTINGS[key].expected
        raise ConfigurationError(
            Fault(str(error), key=key, value=str(value), expected=expected)
        ) from None


def _app_values(
    own: Layer, config_uri: str | None, settings: Mapping[str, Any] | None, faults: Faults
) -> dict[str, Value]:
    section = _section_name(config_uri)
    if settings is None:
        return {k: value for k, value in own.sections.get(section, {}).items() if is_app_key(k)}
    values = {}
    places = _places(own, section)
    for key, given in settings.items():
        if not is_app_key(key):
            continue
        place = places.get(key) or Place("the application's settings", "app", key)
        try:
            # Pyramid has got them as they are written.
            text = expand_environment(given) if isinstance(given, str) else given
            values[key] = Value(text, place)
        except ValueError as error:
            faults.at(place, str(error))
    return values


def _section_name(config_uri: str | None) -> str:
    fragment = plaster.parse_uri(config_uri).fragment if config_uri else ""
    return f"app:{fragment or 'main'}"


def _places(own: Layer, section: str) -> dict[str, Place]:
    # The section of this application first; a setting may also come from another one's.
    names = (section, *(name for name in own.sections if name.startswith("app:")))
    places: dict[str, Place] = {}
    for name in names:
        for key, value in own.sections.get(name, {}).items():
            places.setdefault(key, value.place)
    return places


def _add_to_celery(own: Layer, name: str, value: Value, faults: Faults) -> None:
    celery = own.sections.setdefault("celery", {})
    if name in celery:
        first = celery[name].place
        problem = f"[{first.section}] {first.key} at {first} sets it as well; keep one of them"
        faults.at(value.place, problem)
    else:
        celery[name] = value


def code(overrides: Mapping[str, Any] | None) -> list[Layer]:
    """Return the layer of options that are set in code, if there are any."""
    if not overrides:
        return []
    name = "configure_celery()"
    values = {
        key: Value(value, Place(name, "code", key), literal=True)
        for key, value in overrides.items()
    }
    return [Layer(name, {"celery": values})]


def celeryconfig(own: Layer, faults: Faults) -> tuple[list[Layer], list[str]]:
    """Return the layer of Celery's own Python module of settings, where the INI asks for it.

    It is ``celeryconfig.py`` beside the INI, or a module on Python's path.

    :return: also what to tell of a module that is not read, or is another one than the file says.
    """
    celery = own.sections.get("celery", {})
    keys = {key.lower(): key for key in celery}
    variable, beside = os.environ.get(_VARIABLE), Path(own.file).parent / "celeryconfig.py"
    if "use_celeryconfig" not in keys:
        return [], _unread(variable, beside)
    value = celery.pop(keys["use_celeryconfig"])
    named = celery.pop(keys.get("celery_config_module", ""), None)
    name = variable or (named and str(named.text)) or "celeryconfig"
    told = [f"environment: {_VARIABLE} = {name} names the module that is read"] if variable else []
    try:
        return ([_read(name, beside)], told) if value.typed(BOOL) else ([], [])
    except Refused as error:
        faults.at(value.place, str(error), value=value.text, expected=BOOL.expected)
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
    values = {
        name: Value(value, Place(file, "celeryconfig", name), literal=True)
        for name, value in names.items()
        if not name.startswith("_") and _is_setting(name, value)
    }
    return Layer(file, {"celery": values})


def _is_setting(name: str, value: object) -> bool:
    # The module's own imports and functions are no settings; a slip in a name is a fault.
    if find_option(name) or name in REMOVED:
        return True
    return not isinstance(value, (ModuleType, FunctionType, type)) and bool(nearest(name, OPTIONS))


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
