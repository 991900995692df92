"""`.. operator:: NAME`: an operator of torch.ops.dilated, as declared in Python, and its schema."""

from __future__ import annotations

import inspect

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from dilated_attention_pytorch import ops
from dilated_attention_pytorch.ops.options import Options

OPTIONS = inspect.cleandoc(Options.__doc__ or "").split("\n")[0]


class OperatorDirective(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        operator = getattr(ops, self.arguments[0])
        signature, text = inspect.cleandoc(operator.__doc__).split("\n\n", 1)
        # Options have an entry of their own.
        text = text.split(OPTIONS)[0].strip()
        lines = [f".. py:function:: {signature}", "", "   .. code-block:: text", ""]
        lines += [f"      {operator._schema}", ""]
        lines += [f"   {line}" for line in text.splitlines()]
        return self.parse_text_to_nodes(StringList(lines, source=self.arguments[0]))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("operator", OperatorDirective)
    return {"parallel_read_safe": True}
