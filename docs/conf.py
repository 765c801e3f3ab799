"""Configuration of Sphinx: ``make docs`` builds the site into build/docs."""

import importlib.util

from lbgm_compress import __version__

project = "lbgm_compress"
author = copyright = "the lbgm_compress contributors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc"]
root_doc = "index"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# Engines that are not installed are mocked, so that their adapters can be documented without them.
engines = ("flwr", "horovod", "safetensors")
autodoc_mock_imports = [name for name in engines if importlib.util.find_spec(name) is None]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
numpydoc_show_class_members = False
default_role = "py:obj"

html_theme = "pydata_sphinx_theme"
html_title = "lbgm_compress"
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "navigation_with_keys": False,
    "show_prev_next": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}
