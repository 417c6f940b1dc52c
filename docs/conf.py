"""Configuration of Sphinx; the build needs no network."""

from __future__ import annotations

import sys
from pathlib import Path

from ws_celery import __version__

project = "ws_celery"
author = "The ws_celery developers"
copyright = author  # noqa: A001 - the name is Sphinx's
version = release = __version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
extensions = ["settings_tables", "sphinx.ext.autodoc"]
exclude_patterns = ["_build", "benchmarks/*", "guarantees"]
html_theme = "furo"
html_title = f"ws_celery {release}"

autodoc_typehints = "none"
autodoc_member_order = "bysource"
