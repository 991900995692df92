"""torchscale's dilated attention to the row: its misplaced rows, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...functional import check_dropout, dilated_attention
from ...pattern import Scheme


class TorchscaleBranches(nn.Module):
    """Each branch by itself, mixed by weights that carry no gradient.

    A segment of w positions is padded with zero rows to the next multiple of its rate r. torchscale
    lays these longer segments side by side and cuts the sequence's length off the beginning: where
    r does not divide w, segment i comes out i (-w mod r) rows late.

    Raises:
        TypeError, ValueError: as `DilatedAttention`.
    """

    def __init__(
        self, segment_lengths: Sequence[int], dilation_rates: Sequence[int], dropout: float
    ) -> None:
        super().__init__()
        self.scheme = Scheme.make(segment_lengths, dilation_rates, "blocked", "zeros")
        self.dropout = check_dropout(dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
        """[batch, seq_len, heads, head_dim], all three -> the same shape."""
        rows = (query, key, value)
        branches = [self._branch(rows, w, r, is_causal) for w, r in self.scheme.branches]
        outs, lses = zip(*branches, strict=True)
        # A finite stand-in for "not covered", as in torchscale: such outputs are 0, and so is a row
        # that no branch covers.
        mix = torch.stack(lses).clamp(min=-1e8).softmax(0).detach()
        return torch.stack([out * m.to(out.dtype) for out, m in zip(outs, mix, strict=True)]).sum(0)

    def _branch(
        self, rows: tuple[Tensor, Tensor, Tensor], w: int, r: int, is_causal: bool
    ) -> tuple[Tensor, Tensor]:
        """One branch's out [B, N, H, D] and lse [B, N, H, 1], rows where torchscale has them."""
        batch, seq_len = rows[0].shape[:2]
        w = min(w, max(seq_len, 1))
        count, width = -(-seq_len // w), -(-w // r) * r

        def segments(x: Tensor) -> Tensor:  # [B, N, H, D] -> [B segments, width, H, D]
            whole = pad(x, (0, 0, 0, 0, 0, -seq_len % w))
            parts = whole.reshape(batch * count, w, *x.shape[2:])
            return pad(parts, (0, 0, 0, 0, 0, width - w))

        q, k, v = map(segments, rows)
        out, lse = dilated_attention(
            q,
            k,
            v,
            [width],
            [r],
            head_offsets="blocked",
            is_causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0,
            return_lse=True,
            pattern_cache=False,  # parts of a pattern, kept by the operators
        )

        def joined(x: Tensor) -> Tensor:  # [B segments, width, H, ...] -> [B, N, H, ...]
            return x.reshape(batch, count * width, *x.shape[2:])[:, :seq_len]

        return joined(out), joined(lse.transpose(1, 2)[..., None])

    def extra_repr(self) -> str:
        return self.scheme.extra_repr()
