"""Pages that others read or that the code could leave behind."""

from __future__ import annotations

import re
from pathlib import Path

from docutils.core import publish_doctree

import ws_celery.settings

ROOT = Path(__file__).parents[2]


def test_readme_and_changes_are_valid_where_a_package_index_shows_them():
    text = "\n".join((ROOT / name).read_text() for name in ("README.rst", "CHANGES.rst"))

    publish_doctree(text, settings_overrides={"halt_level": 2, "report_level": 2})


def test_the_diagram_of_the_modules_shows_the_layers_that_are_checked():
    layers = re.search(r"(?s)\nlayers = \[\n(.*?)\n\]", (ROOT / "pyproject.toml").read_text())
    modules = re.findall(r"ws_celery\.([a-z]\w*)", layers[1])
    diagram = (ROOT / "ARCHITECTURE.rst").read_text().partition("::\n")[2]

    places = [re.search(rf"\b{module}\b", diagram) for module in modules]
    assert all(places), modules
    assert places == sorted(places, key=lambda place: place.start())


def test_the_map_of_the_settings_names_each_module():
    package = Path(ws_celery.settings.__file__).parent
    described = re.findall(r"(?m)^    (\w+(?: \w+)?)  ", ws_celery.settings.__doc__)

    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    assert set(" ".join(described).split()) == modules
