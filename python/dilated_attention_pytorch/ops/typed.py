"""Typed operators: a function that declares what an operator takes becomes the operator."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import TypeVar, get_args

import torch
from typing_extensions import get_original_bases, get_type_hints, is_typeddict

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
    for shown in (op, getattr(torch.ops.dilated, declaration.__name__)):
        shown.__doc__ = _help(declaration)
    found: Operator = op
    return found


def _help(declaration: Callable[..., object]) -> str:
    """The declaration as help() shows it: its parameters, its text, and its options' texts."""
    signature = f"{declaration.__name__}{inspect.signature(declaration)}"
    # Annotations are text here, which repr() quotes.
    texts = [re.sub(r"(: |-> )'([^']*)'", r"\1\2", signature), declaration.__doc__]
    options = get_type_hints(declaration).get("options")
    if options is not None:
        (typed_dict,) = get_args(options)
        texts += _texts(typed_dict)
    return "\n\n".join(inspect.cleandoc(text) for text in texts if text)


def _texts(options: type) -> list[str | None]:
    """Of a TypedDict, after those of what it extends."""
    bases = [base for base in get_original_bases(options) if is_typeddict(base)]
    return [text for base in bases for text in _texts(base)] + [options.__doc__]


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
