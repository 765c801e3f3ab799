"""Configuration of Sphinx: ``make docs`` builds the site into build/docs."""

import importlib.util
import re

from lbgm_compress import __version__

project = "lbgm_compress"
author = "the lbgm_compress contributors"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# Where Flower or torchft cannot be installed, the reference leaves their adapters out.
if any(importlib.util.find_spec(name) is None for name in ("flwr", "torchft")):
    suppress_warnings = ["autodoc.import_object"]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 72
numpydoc_show_class_members = False
default_role = "py:obj"

html_theme = "pydata_sphinx_theme"
html_title = "lbgm_compress"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_sidebars = {"quickstart": [], "choosing": []}
html_theme_options = {
    "header_links_before_dropdown": 7,
    "navbar_persistent": ["search-button"],
    "navigation_with_keys": False,
    "show_prev_next": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}


def escape_bars(app, what, name, obj, options, lines):
    """Escape the bars of lengths such as |g|, which would be substitutions in reStructuredText."""
    for i, line in enumerate(lines):
        # Odd parts are in double backquotes.
        parts = re.split("(``.*?``)", line)
        parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
        lines[i] = "".join(parts)


def setup(app):
    app.connect("autodoc-process-docstring", escape_bars)
