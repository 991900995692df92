"""Typed operators: a function that declares what an operator takes becomes the operator."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar, get_args

import torch
from typing_extensions import get_type_hints

Operator = TypeVar("Operator", bound=Callable[..., object])
_EMPTY = inspect.Parameter.empty


def operator(declaration: Operator) -> Operator:
    """torch.ops.dilated's operator of the declaration's name.

    It is the operator itself, so a call passes through no Python function. Raises TypeError if the
    declared parameters differ from the schema's in name, default or, for positional ones, order.
    Defaults of `**options: Unpack[...]` are the schema's.
    """
    op = getattr(torch.ops.dilated, declaration.__name__).default
    arguments = op._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    taken = (
        [(a.name, defaults.get(a.name, _EMPTY)) for a in arguments if not a.kwarg_only],
        {a.name: defaults.get(a.name, _EMPTY) for a in arguments if a.kwarg_only},
    )
    declared = _parameters(declaration, defaults)
    if declared != taken:
        raise TypeError(
            f"{declaration.__name__} must be declared with the (positional, keyword-only) "
            f"parameters of its schema, {taken}, got {declared}"
        )
    found: Operator = op
    return found


def _parameters(
    declaration: Callable[..., object], defaults: Mapping[str, object]
) -> tuple[list[tuple[str, object]], dict[str, object]]:
    """Names and defaults of the declared parameters: positional ones, keyword-only ones."""
    parameters = inspect.signature(declaration).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for p in parameters:
        if p.kind is p.VAR_KEYWORD:
            (options,) = get_args(get_type_hints(declaration)[p.name])
            keywords |= {name: defaults.get(name, _EMPTY) for name in options.__annotations__}
    return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD], keywords
