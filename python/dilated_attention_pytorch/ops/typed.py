"""Operators with types: a function that says what an operator takes becomes the operator itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

import torch

Operator = TypeVar("Operator", bound=Callable[..., object])


def operator(declaration: Operator) -> Operator:
    """torch.ops.dilated's operator of the declaration's name.

    Called without a Python function in between. Raises TypeError if the declaration's parameters,
    by name, kind and default, are not those of the schema.
    """
    op = getattr(torch.ops.dilated, declaration.__name__).default
    declared = [
        (p.name, p.kind is inspect.Parameter.KEYWORD_ONLY, p.default)
        for p in inspect.signature(declaration).parameters.values()
    ]
    taken = [
        (
            a.name,
            a.kwarg_only,
            a.default_value if a.has_default_value() else inspect.Parameter.empty,
        )
        for a in op._schema.arguments
    ]
    if declared != taken:
        raise TypeError(
            f"{declaration.__name__} must be declared with (name, keyword-only, default) as in its "
            f"schema, {taken}, got {declared}"
        )
    found: Operator = op
    return found
