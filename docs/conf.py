"""Sphinx: `pip install -e '.[docs]' && sphinx-build -W docs docs/_build`."""

from nmsparse import __version__ as release  # noqa: F401

project = "nmsparse"
author = "The nmsparse authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
html_theme = "alabaster"
suppress_warnings = ["myst.xref_missing"]
