"""Draws docs/pattern.svg: which keys each query attends to, branch by branch and in all.

    python docs/pattern_picture.py [FILE]

Nothing of the pattern is written here: it is read off the operator. With queries of zero all
scores are equal, so with one-hot values output[query, key] is the key's share, and times exp(lse),
which is then the number of keys, how many branches hold the pair.
"""

from __future__ import annotations

import pathlib
import sys

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from torch import Tensor

from dilated_attention_pytorch import dilated_attention

SEQ_LEN, HEADS, HEAD = 32, 4, 1
SEGMENT_LENGTHS, DILATION_RATES = (8, 16, 32), (1, 2, 4)
COLOURS = {1: "#9ecae1", 2: "#3182bd", 3: "#08306b"}


def multiplicity(segment_lengths: tuple[int, ...], dilation_rates: tuple[int, ...]) -> Tensor:
    """[query, key]: how many of the branches hold the pair, for head HEAD."""
    zeros = torch.zeros(1, SEQ_LEN, HEADS, SEQ_LEN)
    value = torch.eye(SEQ_LEN)[None, :, None].expand_as(zeros)
    out, lse = dilated_attention(
        zeros, zeros, value, segment_lengths, dilation_rates, return_lse=True
    )
    return (out[0, :, HEAD] * lse[0, HEAD].exp()[:, None]).round().int()


def draw(axes: Axes, pairs: Tensor, title: str) -> None:
    for branches, colour in COLOURS.items():
        corners = (pairs == branches).nonzero().flip(1).tolist()  # (key, query): x, y
        if corners:  # one path of many squares: a small file
            unit = Path.unit_rectangle().vertices * 0.92
            squares = Path.make_compound_path(*(Path(unit + corner) for corner in corners))
            axes.add_patch(PathPatch(squares, facecolor=colour, linewidth=0))
    axes.set(xlim=(0, SEQ_LEN), ylim=(SEQ_LEN, 0), aspect="equal", title=title, xlabel="key")
    axes.set_xticks(range(0, SEQ_LEN + 1, 8))
    axes.set_yticks(range(0, SEQ_LEN + 1, 8))
    axes.grid(linewidth=0.4, color="#bbbbbb")
    axes.set_axisbelow(True)


def picture() -> Figure:
    figure = Figure(figsize=(13, 3.9), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(SEGMENT_LENGTHS) + 1, sharey=True)
    for axes, w, r in zip(panels, SEGMENT_LENGTHS, DILATION_RATES, strict=False):
        draw(axes, multiplicity((w,), (r,)), f"segment length {w}, dilation rate {r}")
    draw(panels[-1], multiplicity(SEGMENT_LENGTHS, DILATION_RATES), "all branches: one softmax")
    panels[0].set_ylabel("query")
    names = {1: "1 branch", 2: "2 branches", 3: "3 branches"}
    legend = [Patch(facecolor=COLOURS[k], label=names[k]) for k in COLOURS]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False)
    return figure


def main() -> None:
    here = pathlib.Path(__file__).with_name("pattern.svg")
    path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here
    # The same picture gives the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "pattern", "svg.fonttype": "none"})
    picture().savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
