"""Pictures of patterns, with matplotlib where it is installed, and as text."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from dilated_attention_pytorch import plot_pattern
from dilated_attention_pytorch.pattern import Scheme
from dilated_attention_pytorch.plot import draw_text


def test_a_panel_for_each_branch_and_one_for_all(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = plot_pattern(1000, [256, 1000], [1, 4], heads=4, head=1, is_causal=True)
    assert [axes.get_title() for axes in figure.axes] == [
        "segments of 256, rate 1",
        "segments of 1,000, rate 4",
        "all branches: one softmax",
    ]
    one, other, all_of_them = (axes.images[0].get_array() for axes in figure.axes)
    assert all_of_them.shape == (256, 256)
    assert abs(one + other - all_of_them).max() < 1e-12
    figure.savefig(tmp_path / "pattern.png")
    assert (tmp_path / "pattern.png").stat().st_size > 1000


def test_one_branch_is_one_panel() -> None:
    pytest.importorskip("matplotlib")
    assert len(plot_pattern(10, [4], [2]).axes) == 1


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return found(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "ring-dilated-attention\[plot\]"'):
        plot_pattern(10, [4], [1])


def test_text_shows_segments_and_the_future_that_is_hidden() -> None:
    scheme = Scheme.make([4], [1], "interleaved", "masked")
    drawn = draw_text(8, scheme, heads=1, head=0, is_causal=True, rows=8)
    assert drawn.splitlines() == [
        "@@",
        "@@@@",
        "@@@@@@",
        "@@@@@@@@",
        "        @@",
        "        @@@@",
        "        @@@@@@",
        "        @@@@@@@@",
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head": 2, "heads": 2}, ValueError, "head must be at least 0 and below 2, got 2"),
        ({"cells": 0}, ValueError, "cells must be at least 1 and below 2\\^13, got 0"),
        ({"seq_len": 2.0}, TypeError, "seq_len must be an integer, got 2.0"),
        ({"heads": True}, TypeError, "heads must be an integer, got True"),
        ({"dilation_rates": [0]}, ValueError, "dilation_rates must be positive"),
        ({"head_offsets": "other"}, ValueError, "head_offsets must be"),
    ],
)
def test_wrong_arguments_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    pytest.importorskip("matplotlib")
    arguments = {"seq_len": 16, "segment_lengths": [4], "dilation_rates": [1], **options}
    with pytest.raises(error, match=message):
        plot_pattern(**arguments)
