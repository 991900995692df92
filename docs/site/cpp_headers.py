"""`.. cpp-header:: dilated/NAME.h`: what a public header declares, with its comments.

A comment of /// and the declaration behind it make an entry; a struct's or an enum's members are
shown as they stand in the header.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

INCLUDE = Path(__file__).resolve().parents[2] / "csrc" / "include"
NAMESPACE = re.compile(r"^namespace dilated \{\n(.*)^\}  // namespace dilated", re.DOTALL | re.M)
TYPE = re.compile(r"(struct|enum class) (\w+)[^{]*\{")
PREFIX = re.compile(r"^(DILATED_API |DILATED_HOST_DEVICE inline |inline )")


def split_header(text: str) -> tuple[str, list[tuple[str, str]]]:
    """What the header says of itself; of each declaration its comment and its text."""
    opening = re.match(r"(?:// ?.*\n)*", text)
    body = NAMESPACE.search(text)
    about = "" if opening is None else uncommented(opening[0])
    return about, [] if body is None else list(declarations(body[1]))


def declarations(body: str) -> Iterator[tuple[str, str]]:
    """A declaration ends with its line in which brackets are closed and a ; or } is last."""
    comment, declaration, depth = list[str](), list[str](), 0
    for line in body.splitlines():
        if not declaration and line.startswith("///"):
            comment.append(line)
        elif declaration or line.strip():
            declaration.append(line)
            code = line.split("//")[0].rstrip()
            depth += sum(code.count(c) for c in "{(") - sum(code.count(c) for c in "})")
            if depth == 0 and code.endswith((";", "}")):
                yield uncommented("\n".join(comment)), "\n".join(declaration)
                comment, declaration = [], []


def uncommented(lines: str) -> str:
    return re.sub(r"^///? ?", "", lines, flags=re.MULTILINE)


class HeaderDirective(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = INCLUDE / self.arguments[0]
        self.env.note_dependency(str(path))
        about, found = split_header(path.read_text())
        lines = [f"``#include <{self.arguments[0]}>``", "", *prose(about)]
        lines += [".. cpp:namespace:: dilated", ""]
        for comment, declaration in found:
            lines += entry(comment, declaration)
        return self.parse_text_to_nodes(StringList(lines, source=str(path)))


def entry(comment: str, declaration: str) -> list[str]:
    if declaration.startswith("static_assert"):
        return []
    what, text = "function", PREFIX.sub("", declaration)
    inside = list[str]()
    if match := TYPE.match(text):
        what, text = match[1].replace("enum class", "enum-class"), match[2]
        inside = [".. code-block:: cpp", "", *textwrap.indent(declaration, "   ").splitlines()]
    elif text.startswith("constexpr") and "(" not in text.split("=")[0]:
        what = "var"
    else:
        text = re.split(r" \{\s", text)[0]
    text = " ".join(text.split("  //")[0].rstrip(";").split())
    inner = textwrap.indent("\n".join([*prose(comment), *inside]), "   ").splitlines()
    return [f".. cpp:{what}:: {text}", "", *inner, ""]


def prose(comment: str) -> list[str]:
    """Paragraphs; those that are indented are drawings."""
    lines = list[str]()
    for paragraph in comment.split("\n\n"):
        if paragraph.startswith(" "):
            lines += ["::", "", *paragraph.splitlines(), ""]
        else:
            lines += [*paragraph.splitlines(), ""]
    return lines


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("cpp-header", HeaderDirective)
    return {"parallel_read_safe": True}
