"""How Sphinx builds the pages: `sphinx-build -n -W --keep-going docs docs/_build`."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import nbnorm

project = "nbnorm"
author = "The nbnorm developers"
project_copyright = author
version = release = nbnorm.__version__

# MyST, since scripts of benchmarks/ write tables into these pages, which are also read where they lie
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc"]
# a name in single backquotes, of a docstring, is a link where it can be one
default_role = "autolink"
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
# of links to `page.md#a-heading`
myst_heading_anchors = 3

# the docstrings say the types
autodoc_typehints = "none"
numpydoc_show_class_members = False
# all but: sections that a docstring of one line does without, and how a sentence is put
numpydoc_validation_checks = {"all", "ES01", "EX01", "SA01", "RT01", "RT03", "RT04", "RT05", "PR08", "SS05", "GL01", "YD01"}
# the names of whose parameters say all
numpydoc_validation_exclude = {
    r"Norm(Result|Grads)$",
    r"Norm\.(forward|backward|__call__)$",
    # as LayerNorm's
    r"RMSNorm\.load_state_dict$",
}

html_theme = "pydata_sphinx_theme"
html_title = "nbnorm"
# pages with none below them
html_sidebars = {page: [] for page in ("index", "tutorial", "api", "limits", "contributing", "changelog")}
html_static_path = ["static"]
html_css_files = ["nbnorm.css"]
html_copy_source = html_show_sourcelink = False
html_math_renderer = "mathml"
html_theme_options = {
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "header_links_before_dropdown": 7,
    "show_toc_level": 2,
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
}


def setup(app):
    """Formulas are MathML, which browsers show by themselves: no script, and nothing fetched from elsewhere."""
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))


def inline_formula(writer, node):
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def formula(writer, node):
    writer.body.append(tex2mathml(node.astext(), as_block=True))
    raise nodes.SkipNode
