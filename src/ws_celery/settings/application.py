"""What an application adds to its INI file: its own section, ``celeryconfig.py``, and code."""

from __future__ import annotations

import importlib
import os
import runpy
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import plaster

from ws_celery.converters import Refused, nearest
from ws_celery.exceptions import ConfigurationError, Fault
from ws_celery.settings.faults import Faults, Place, Value
from ws_celery.settings.interpolation import expand_environment
from ws_celery.settings.keys import OUR_SETTINGS
from ws_celery.settings.kinds import BOOL
from ws_celery.settings.layers import Layer, is_app_key
from ws_celery.settings.names import REMOVED, find_option
from ws_celery.settings.options import OPTIONS

__all__ = ("celeryconfig", "code", "merge_app_settings", "our_setting")


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
