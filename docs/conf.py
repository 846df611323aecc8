"""Sphinx configuration."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))
warnings.filterwarnings("ignore", message=".*set_application.*")  # sphinx-autodoc-typehints calls what Sphinx 10 drops

import hespotex  # noqa: E402

project = "hespotex"
author = "The hespotex developers"
copyright = f"{datetime.now(UTC):%Y}, {author}"
release = version = hespotex.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_autodoc_typehints",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
    "prose_returns",
]

# Links to other projects need their inventories from the network; off unless asked for.
if os.environ.get("HESPOTEX_DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
        "matplotlib": ("https://matplotlib.org/stable/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "pandas": ("https://pandas.pydata.org/docs/", None),
        "python": ("https://docs.python.org/3", None),
        "scipy": ("https://docs.scipy.org/doc/scipy/", None),
        "spatialdata": ("https://spatialdata.scverse.org/en/stable/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
    }

exclude_patterns = ["_build", "**.ipynb_checkpoints"]
templates_path = ["_templates"]

autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_inherit_docstrings = False
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_rtype = True
napoleon_use_ivar = True
typehints_defaults = "braces"
always_use_bars_union = True

bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_execution_excludepatterns = ["tutorials/*"]  # their outputs are stored: they need data that is not shipped
nb_merge_streams = True

nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!hespotex).*"),  # third parties, whose inventories are not loaded
    (r"py:.*", r"hespotex\.(data|image|models\.nn|(\w+\.)?_).*"),  # internals without pages of their own
    (r"py:(obj|class)", r".*\.Config"),
]

html_theme = "sphinx_book_theme"
html_title = "hespotex"
html_static_path = ["_static"]
html_css_files = ["hespotex.css"]
html_theme_options = {
    "show_navbar_depth": 1,
}

suppress_warnings = ["myst.header"]


def _copy_tutorials() -> None:
    """Sphinx reads only below its source folder; the notebooks live beside it."""
    target = HERE / "tutorials"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for notebook in sorted((HERE.parent / "tutorials").glob("*.ipynb")):
        shutil.copy(notebook, target)


_copy_tutorials()
