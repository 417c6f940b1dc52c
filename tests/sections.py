"""Celery's settings from sections that no file has."""

from __future__ import annotations

from ws_celery.exceptions import ConfigurationError
from ws_celery.settings.reader import Faults, Layer, Place, Value
from ws_celery.settings.sections import read_sections


def celery_settings(sections, source):
    """Return the settings of section to key to text; ``source`` is the file's name in faults."""
    layer = Layer(source)
    for section, values in sections.items():
        layer.sections[section] = {
            key: Value(text.strip(), Place(source, section, key)) for key, text in values.items()
        }
    faults = Faults()
    settings = read_sections([layer], faults).settings
    if faults:
        raise ConfigurationError.of(faults)
    return settings
