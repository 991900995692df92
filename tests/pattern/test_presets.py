"""Conventions by name."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import DilatedAttention, dilated_attention, preset
from tests.conftest import make_qkv
from tests.torchscale_reference import torchscale_attention


@pytest.mark.parametrize("name", ["torchscale", "gigapath", "longvit"])
def test_torchscales_convention(name: str) -> None:
    q, k, v = make_qkv(101, 8, 8)
    out = dilated_attention(q, k, v, [32, 64], [1, 4], **preset(name))
    expected, _ = torchscale_attention(q, k, v, [32, 64], [1, 4])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_the_papers_is_the_default() -> None:
    default = DilatedAttention([32, 64], [1, 4]).scheme
    assert DilatedAttention([32, 64], [1, 4], **preset("longnet")).scheme == default


def test_each_call_gives_a_dictionary_of_its_own() -> None:
    preset("gigapath")["padding"] = "masked"
    assert preset("gigapath")["padding"] == "zeros"


def test_other_names() -> None:
    with pytest.raises(ValueError, match="name must be 'longnet', .* or 'longvit', got 'bigbird'"):
        preset("bigbird")
