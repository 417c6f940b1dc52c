"""Configuration of Sphinx; the build needs no network."""

from __future__ import annotations

from ws_celery.version import __version__

project = "ws_celery"
author = "The ws_celery developers"
copyright = author  # noqa: A001 - the name is Sphinx's
version = release = __version__

extensions = ["sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"ws_celery {release}"

autodoc_typehints = "none"
autodoc_member_order = "bysource"
