"""torchscale's attention layer with this library between its projections."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .padding import PaddingCheck


class LongNetAttention(nn.Module):
    """What `convert` makes of torchscale's `DilatedAttention`: the same object, of this class.

    Projections, `inner_attn_ln` and `xpos` are torchscale's own, multiway or not, with their names.

    Attributes:
        attention: what attends, called as (query, key, value, is_causal=...) with
            [batch, seq_len, heads, head_dim]; without parameters. With compat="joint" a
            `DilatedAttention`, whose `prefetch` plans the patterns of lengths to come.
    """

    num_heads: int
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    inner_attn_ln: nn.Module | None
    xpos: nn.Module | None
    attention: nn.Module
    padding_check: PaddingCheck

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        incremental_state: Any = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        rel_pos: Tensor | None = None,
        is_first_step: bool = False,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """[batch, seq_len, embed_dim] -> the same, and None for the weights.

        Raises:
            ValueError: incremental_state, attn_mask or rel_pos is given, or key_padding_mask masks
                a position.
        """
        refused = {"incremental_state": incremental_state, "attn_mask": attn_mask}
        for name, given in (refused | {"rel_pos": rel_pos}).items():
            if given is not None:
                raise ValueError(f"{name} must be None, got {_described(given)}")
        if key_padding_mask is not None:
            self.padding_check(key_padding_mask)
        q = self._rotated(self.q_proj(query), downscale=False)
        k = self._rotated(self.k_proj(key), downscale=True)
        v = self._split(self.v_proj(value))
        out = self.attention(q, k, v, is_causal=is_causal).flatten(2)
        if self.inner_attn_ln is not None:
            out = self.inner_attn_ln(out)
        return self.out_proj(out), None

    def _split(self, rows: Tensor) -> Tensor:
        """[B, N, E] -> [B, N, H, D]."""
        return rows.reshape(*rows.shape[:2], self.num_heads, -1)

    def _rotated(self, rows: Tensor, downscale: bool) -> Tensor:
        """[B, N, E] -> [B, N, H, D], rotated where the model has xPos, which takes [B H, N, D]."""
        heads = self._split(rows)
        if self.xpos is None:
            return heads
        by_head = heads.transpose(1, 2)
        rotated: Tensor = self.xpos(by_head.flatten(0, 1), offset=0, downscale=downscale)
        return rotated.to(rows).view(by_head.shape).transpose(1, 2)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return type(value).__name__
