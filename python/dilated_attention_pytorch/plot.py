"""Pictures of patterns: with matplotlib, and as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .pattern import HeadOffsets, Scheme
from .pattern.bounds import HEADS_END, SEQ_LEN_END, at_least
from .pattern.density import pair_density

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHADES = " .:-=+*#%@"


def plot_pattern(
    seq_len: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    heads: int = 1,
    head: int = 0,
    head_offsets: HeadOffsets = "interleaved",
    is_causal: bool = False,
    cells: int = 256,
) -> Figure:
    """Which keys a head's queries attend to, branch by branch and in all; needs matplotlib.

    A cell's shade is the number of branches that hold its pairs of query (down) and key (right),
    on average.

    Args:
        seq_len: positions.
        segment_lengths, dilation_rates, head_offsets, is_causal: as in `dilated_attention`.
        heads, head: query heads, and which of them is drawn.
        cells: at most as many in each direction; a position each where there are no more.

    Returns:
        A matplotlib Figure, which belongs to no window, for `figure.savefig("pattern.png")`.

    Raises:
        ImportError: matplotlib is not installed: pip install "ring-dilated-attention[plot]".
        TypeError, ValueError: naming the argument, what must hold and what was given.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            'plot_pattern needs matplotlib: pip install "ring-dilated-attention[plot]"'
        ) from None
    scheme = Scheme.make(segment_lengths, dilation_rates, head_offsets, "masked")
    count = len(scheme.branches)
    chosen = [[i] for i in range(count)] if count > 1 else []
    chosen.append(list(range(count)))
    figure = Figure(figsize=(3.2 * len(chosen), 3.6), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    for axes, branches in zip(panels, chosen, strict=True):
        density = _density(seq_len, scheme, heads, head, is_causal, cells, branches)
        place = (0, seq_len, seq_len, 0)  # left, right, bottom, top
        shades = {"cmap": "Blues", "vmin": 0, "vmax": count, "interpolation": "nearest"}
        axes.imshow(density.numpy(), extent=place, **shades)
        axes.set(title=_title(scheme, branches), xlabel="key")
    panels[0].set_ylabel("query")
    return figure


def draw_text(
    seq_len: int, scheme: Scheme, *, heads: int, head: int, is_causal: bool, rows: int = 32
) -> str:
    """The same of all branches, as lines of text: two characters a cell, the darker the more."""
    every = list(range(len(scheme.branches)))
    density = _density(seq_len, scheme, heads, head, is_causal, rows, every)
    top = density.max().clamp_min(1e-9)
    # The square root, so that sparse cells are seen beside dense ones.
    shades = ((density / top).sqrt() * (len(_SHADES) - 1)).ceil().int().tolist()
    return "\n".join("".join(2 * _SHADES[shade] for shade in line).rstrip() for line in shades)


def _density(
    seq_len: int,
    scheme: Scheme,
    heads: int,
    head: int,
    is_causal: bool,
    cells: int,
    branches: Sequence[int],
) -> Tensor:
    seq_len = at_least(1, seq_len, "seq_len", SEQ_LEN_END)
    cells = at_least(1, cells, "cells", 2**13)
    heads = at_least(1, heads, "heads", HEADS_END)
    head = at_least(0, head, "head", heads)
    offsets = scheme.offset_table(heads)
    return pair_density(
        seq_len,
        [scheme.branches[i] for i in branches],
        [offsets[i][head] for i in branches],
        is_causal,
        min(cells, seq_len),
    )


def _title(scheme: Scheme, branches: Sequence[int]) -> str:
    if len(branches) != 1:
        return "all branches: one softmax"
    length, rate = scheme.branches[branches[0]]
    return f"segments of {length:,}, rate {rate}"
