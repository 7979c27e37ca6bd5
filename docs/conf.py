"""The pages as a site: `make docs`."""

from dflash_dist import __version__

project, author, release = "dflash_dist", "the authors of dflash_dist", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme, html_title = "furo", "dflash_dist"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_member_order, autodoc_typehints = "bysource", "description"
# Links into the code, which is no page.
suppress_warnings = ["myst.xref_missing"]
