"""A declaration stands for its operator, and says what the schema says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from dilated_attention_pytorch import ops
from dilated_attention_pytorch.ops.typed import operator


@pytest.mark.parametrize("name", ops.__all__)
def test_names_of_the_package_are_the_operators(name: str) -> None:
    assert getattr(ops, name) is getattr(torch.ops.dilated, name).default


def missing() -> Callable[..., Tensor]:
    def gather(input: Tensor, segment_length: int, dilation_rate: int, *, start: int = 0) -> Tensor:
        raise NotImplementedError

    return gather


def positional() -> Callable[..., Tensor]:
    def gather(
        input: Tensor,
        segment_length: int,
        dilation_rate: int,
        head_offsets: Tensor | None = None,
        start: int = 0,
    ) -> Tensor:
        raise NotImplementedError

    return gather


def other_default() -> Callable[..., Tensor]:
    def gather(
        input: Tensor,
        segment_length: int,
        dilation_rate: int,
        *,
        head_offsets: Tensor | None = None,
        start: int = 1,
    ) -> Tensor:
        raise NotImplementedError

    return gather


class Offsets(TypedDict, total=False):
    head_offsets: Tensor | None


class Everything(Offsets, total=False):
    start: int
    end: int


def missing_option() -> Callable[..., Tensor]:
    def gather(
        input: Tensor, segment_length: int, dilation_rate: int, **options: Unpack[Offsets]
    ) -> Tensor:
        raise NotImplementedError

    return gather


def unknown_option() -> Callable[..., Tensor]:
    def gather(
        input: Tensor, segment_length: int, dilation_rate: int, **options: Unpack[Everything]
    ) -> Tensor:
        raise NotImplementedError

    return gather


@pytest.mark.parametrize(
    "declare", [missing, positional, other_default, missing_option, unknown_option]
)
def test_a_declaration_that_is_not_the_schema_is_refused(
    declare: Callable[[], Callable[..., Tensor]],
) -> None:
    with pytest.raises(TypeError, match="gather must be declared with"):
        operator(declare())
