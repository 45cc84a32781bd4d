"""How Sphinx builds the documentation: web pages with furo, manual pages with its man builder."""

from __future__ import annotations

import sys
from pathlib import Path

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parent)]

import reference_pages  # noqa: E402

import imgtool  # noqa: E402

project = "imgtool"
project_copyright = ""
today_fmt = "%Y-%m-%d"
version = release = imgtool.__version__

extensions = ["myst_parser", "reference_pages", "plain_text"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
if tags.has("package"):  # noqa: F821 - Sphinx gives it
    exclude_patterns.append("development")
nitpicky = True
smartquotes = False  # what is typed is what is shown: --help is two signs
highlight_language = "none"

html_theme = "furo"
html_title = "imgtool"
html_show_sphinx = False
html_copy_source = False

man_pages = reference_pages.man_pages()
man_make_section_directory = True
