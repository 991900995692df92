"""What a type checker and a reader are told: overloads, literals, help()."""

from __future__ import annotations

import importlib.util
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dilated_attention_pytorch import dilated_attention, ops
from dilated_attention_pytorch.pattern import Pattern, PatternSpec, make_branches

PROGRAM = """
from typing_extensions import assert_type
from torch import Tensor
from dilated_attention_pytorch import (
    MultiheadDilatedAttention, create_dilated_attention, dilated_attention, dilated_attention_varlen
)

def check(q: Tensor, flag: bool) -> None:
    assert_type(dilated_attention(q, q, q, [4], [1]), Tensor)
    assert_type(dilated_attention(q, q, q, [4], [1], return_lse=False), Tensor)
    assert_type(dilated_attention(q, q, q, [4], [1], return_lse=True), tuple[Tensor, Tensor])
    assert_type(
        dilated_attention(q, q, q, [4], [1], return_lse=flag), Tensor | tuple[Tensor, Tensor]
    )
    dilated_attention(q, q, q, [4], [1], head_offsets="other")  # type: ignore[arg-type]
    dilated_attention(q, q, q, [4], [1], padding="other")  # type: ignore[call-overload]
    dilated_attention(q, q, q, [4], [1], strategy="other")  # type: ignore[call-overload]
    create_dilated_attention("other")  # type: ignore[arg-type]

def check_ragged(q: Tensor, flag: bool) -> None:
    for seq_lens in ([1, 2], [(0, 1), (1, 2)], q):
        assert_type(dilated_attention(q, q, q, [4], [1], seq_lens=seq_lens), Tensor)
    dilated_attention(q, q, q, [4], [1], seq_lens="12")  # type: ignore[arg-type]
    assert_type(dilated_attention_varlen(q, q, q, [0, 4], [4], [1]), Tensor)
    assert_type(
        dilated_attention_varlen(q, q, q, q, [4], [1], return_lse=True), tuple[Tensor, Tensor]
    )
    assert_type(
        dilated_attention_varlen(q, q, q, q, [4], [1], return_lse=flag),
        Tensor | tuple[Tensor, Tensor],
    )
    layer = MultiheadDilatedAttention(8, 2, [4], [1])
    assert_type(layer.forward(q, q, q, q, False, q, True, True), tuple[Tensor, None])
"""


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy")
def test_a_type_checker_knows_results_and_names(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    sources = Path(__file__).parents[1] / "python"
    settings = tmp_path / "mypy.ini"
    settings.write_text(f"[mypy]\nstrict = True\nmypy_path = {sources}\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(settings), "program.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ops.__all__)
def test_help_shows_an_operator_with_its_parameters(name: str) -> None:
    for shown in (getattr(ops, name), getattr(torch.ops.dilated, name)):
        text = pydoc.plain(pydoc.render_doc(shown))
        assert f"{name}(" in text and ") -> " in text
        assert "'Tensor" not in text


def test_help_shows_what_options_mean() -> None:
    text = pydoc.plain(pydoc.render_doc(ops.attention))
    assert 'padding: "masked" or "zeros".' in text and "pattern: int32 on query's device" in text


def test_help_shows_the_function_with_its_arguments() -> None:
    text = pydoc.plain(pydoc.render_doc(dilated_attention))
    assert "return_lse: bool = False" in text.replace("'", "")


def test_a_profile_names_the_operators_and_planning() -> None:
    q = torch.randn(1, 77, 2, 4, requires_grad=True)
    with torch.profiler.profile() as profile:
        dilated_attention(q, q, q, [7, 70], [1, 2]).sum().backward()
        Pattern.plan(PatternSpec(99, make_branches([9], [1]), "interleaved", 2, 2))
        ops.attention(q, q, q, [11], [1])
    names = [event.name for event in profile.events()]
    assert names.count("dilated::attention") == 2
    assert "dilated::attention_backward" in names
    assert names.count("dilated::plan") == 3
