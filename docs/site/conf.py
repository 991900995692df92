"""The site: README and guides as they are, and a reference from docstrings and headers.

    python -m sphinx -W -c docs/site . build/site

The root of the repository is the source folder, so that links between documents hold on GitHub and
here alike.
"""

from __future__ import annotations

import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))

from dilated_attention_pytorch import __version__

project, release, author = "Ring Dilated Attention", __version__, "the authors"
project_copyright = "the Ring Dilated Attention authors"
root_doc = "README"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "cpp_headers",
    "operators",
]
GUIDES = (
    "install",
    "guide",
    "gigapath",
    "transformers",
    "ragged",
    "decoding",
    "ring",
    "parallel",
    "caches",
)
MORE = ("numerics", "performance", "migration", "design")
CONTENTS = {
    "Guides": [f"docs/{name}" for name in (*GUIDES, *MORE)],
    "Reference": ["docs/reference/index"],
    "Project": ["CHANGELOG", "CONTRIBUTING"],
}
include_patterns = ["*.md", "docs/*.md", "docs/reference/*.rst"]
exclude_patterns = [".*", "build", "dist", "csrc", "python", "tests", "benchmarks", "examples"]

myst_heading_anchors = 3  # links to headings, as GitHub names them
default_role = "py:obj"  # `name` in docstrings: a link where it is in the reference
smartquotes = False  # "masked" is code
add_module_names = False
autodoc_typehints = "none"  # signatures are long enough; docstrings give shapes, units and errors
autodoc_member_order = "bysource"
autodoc_mock_imports = ["transformers"]  # needed at import only
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False

html_theme = "furo"
html_title = f"{project} {release}"
html_additional_pages = {"index": "index.html"}  # leads to the README
templates_path = ["."]
html_static_path = ["static"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_sphinx = False


def add_contents(app: Sphinx, document: str, source: list[str]) -> None:
    """The contents of the site, which are no part of the README on GitHub."""
    if document == root_doc:
        for caption, documents in CONTENTS.items():
            lines = "\n".join(documents)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n"


def unlink_folders(app: Sphinx, document: nodes.document) -> None:
    """Of a link to a folder of the repository, which has no page here, only the text stays."""
    folder = Path(document["source"]).parent
    for link in list(document.findall(addnodes.pending_xref)):
        if link["reftype"] == "myst" and (folder / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_contents)
    app.connect("doctree-read", unlink_folders)
