"""Multi-head dilated attention: projections around `DilatedAttention`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .decoding import DilatedKVCache
from .dilated_attention import DilatedAttention
from .functional import CacheArgument
from .nn_arguments import NoFusedKernel, check_weights_and_mask, padding_of, without_padding
from .pattern import HeadOffsets, Padding
from .pattern.bounds import HEADS_END, at_least
from .pattern.scalars import real
from .ragged import Mask, SeqLens, kept_rows
from .ring import Group, ShardLayout, Strategy, telling


class MultiheadDilatedAttention(nn.Module):
    """Projects, attends, normalizes, projects; called as nn.MultiheadAttention is, batch first.

    It takes that module's place as `self_attn` of nn.TransformerEncoderLayer, alone or in
    nn.TransformerEncoder, in training and evaluation.

    The LayerNorm before the output projection and the initialization are MAGNETO's (arXiv
    2210.06423), as LongNet (arXiv 2307.02486) uses them.

    Args:
        embed_dim: size of query, key, value and output; num_heads must divide it.
        num_heads: query heads.
        segment_lengths, dilation_rates, head_offsets, scale, padding, pattern_cache: as in
            `dilated_attention`.
        num_kv_heads: key and value heads, dividing num_heads; num_heads by default.
        dropout: probability of dropping an attention weight, in training mode only.
        bias: whether the four projections have one.
        layer_norm, layer_norm_eps: whether the concatenated heads pass a LayerNorm before the
            output projection, and its eps.
        gamma_init: MAGNETO's gain of the value and output projections' initialization.
        device, dtype: of the parameters.
        group, shard_lengths, strategy, shard_layout: as in `DilatedAttention`. Each rank has
            parameters of its own, whose gradients come from its rows alone: sum them over the
            group.

    Attributes:
        attention: the module between the projections. Any module with `DilatedAttention`'s call
            can take its place.

    Raises:
        TypeError, ValueError: naming the argument, what must hold and what was given.
    """

    # What nn.TransformerEncoder and its layer ask, to leave their own fused kernels aside.
    batch_first = True
    in_proj_bias = None
    in_proj_weight = NoFusedKernel()
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        *,
        num_kv_heads: int | None = None,
        head_offsets: HeadOffsets = "interleaved",
        scale: float | None = None,
        padding: Padding = "masked",
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        pattern_cache: CacheArgument = None,
        group: Group | None = None,
        shard_lengths: Sequence[int] | None = None,
        strategy: Strategy = "auto",
        shard_layout: ShardLayout = "contiguous",
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        embed_dim = at_least(1, embed_dim, "embed_dim")
        num_heads = at_least(1, num_heads, "num_heads", HEADS_END)
        num_kv_heads = at_least(1, num_kv_heads, "num_kv_heads")
        _check_heads(embed_dim, num_heads, num_kv_heads)
        gamma_init = _at_least_0(gamma_init, "gamma_init")
        layer_norm_eps = _at_least_0(layer_norm_eps, "layer_norm_eps")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = embed_dim // num_heads
        self.gamma_init = gamma_init
        self.attention: nn.Module = DilatedAttention(
            segment_lengths,
            dilation_rates,
            head_offsets=head_offsets,
            scale=scale,
            padding=padding,
            dropout=dropout,
            pattern_cache=pattern_cache,
            group=group,
            shard_lengths=shard_lengths,
            strategy=strategy,
            shard_layout=shard_layout,
        )
        self.attention.scheme.offset_table(num_heads)  # a table has one column for each head
        kv_dim = num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.k_proj = nn.Linear(embed_dim, kv_dim, bias, device, dtype)
        self.v_proj = nn.Linear(embed_dim, kv_dim, bias, device, dtype)
        self.norm = (
            nn.LayerNorm(embed_dim, layer_norm_eps, device=device, dtype=dtype)
            if layer_norm
            else None
        )
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """MAGNETO: Xavier normal weights, of gain gamma_init for v and out, 1 for q and k."""
        for projection, gain in (
            (self.q_proj, 1.0),
            (self.k_proj, 1.0),
            (self.v_proj, self.gamma_init),
            (self.out_proj, self.gamma_init),
        ):
            nn.init.xavier_normal_(projection.weight, gain)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Mask | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        seq_lens: SeqLens | None = None,
        kv_cache: DilatedKVCache | None = None,
    ) -> tuple[Tensor, None]:
        """[batch, seq_len, embed_dim] -> the same, and None for the weights, which are not kept.

        Args:
            query, key, value: key is query by default, value is key. All have the same batch and
                seq_len, or are nested tensors of layout torch.jagged and have the same lengths.
            key_padding_mask: [batch, seq_len], True (or -inf) in padding, False (or 0) elsewhere.
                What it keeps of a row is one stretch, whose positions count from its first, so
                padding may be before it or behind. For a mask on a GPU the host waits, at each
                call: give several layers seq_lens=seq_lens_of_mask(mask) instead.
            need_weights: False, or it is an error.
            attn_mask: must mask nothing, which is looked at, unless is_causal, and then it is taken
                for the causal mask, unseen, as nn.MultiheadAttention does.
            average_attn_weights: ignored, since there are no weights.
            seq_lens: as in `dilated_attention`, instead of the mask. With either, padding may hold
                anything, NaN included, and its output is 0.
            kv_cache: of the positions before these, from `make_kv_cache`; these are appended to it,
                those that are not padding. is_causal must be True.

        Raises:
            TypeError, ValueError: naming the argument, what must hold and what was given.
        """
        sharding = getattr(self.attention, "sharding", None)
        with telling(sharding):
            if key is None:
                if value is not None:
                    raise ValueError("key must be given where value is, got None")
                key = query
            value = key if value is None else value
            for tensor, name in ((query, "query"), (key, "key"), (value, "value")):
                if not isinstance(tensor, Tensor):
                    raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
                if tensor.dim() != 3 or tensor.size(2) != self.embed_dim:
                    raise ValueError(
                        f"{name} must be [batch, seq_len, embed_dim = {self.embed_dim}], "
                        f"got shape {tuple(tensor.shape)}"
                    )
            check_weights_and_mask(need_weights, attn_mask, is_causal)
            options: dict[str, Any] = {"is_causal": is_causal}
            lengths = padding_of(query, key_padding_mask, seq_lens, sharding)
            if kv_cache is not None:  # which any module that stands for `attention` can't take
                self._dilated_attention()
                options["kv_cache"] = kv_cache
            if lengths is not None:
                options["seq_lens"] = lengths
                rows = query.size(1)
                if sharding is None:
                    places = torch.arange(rows, device=query.device)
                else:
                    places = sharding.positions(rows).to(query.device)
                kept = kept_rows(lengths, places)
                query, key, value = without_padding(kept, query, key, value)
            out = self.attention(
                self._heads_of(self.q_proj(query), "q_proj", self.num_heads),
                self._heads_of(self.k_proj(key), "k_proj", self.num_kv_heads),
                self._heads_of(self.v_proj(value), "v_proj", self.num_kv_heads),
                **options,
            ).flatten(2)
        if self.norm is not None:
            out = self.norm(out)
        out = self.out_proj(out)
        return (out if lengths is None else out.where(kept, 0)), None

    def _heads_of(self, rows: Any, name: str, heads: int) -> Tensor:
        """[batch, seq_len, heads, head_dim] of what a projection gave."""
        if rows.shape[2] != heads * self.head_dim:
            raise ValueError(
                f"{name} must give {heads} heads, {heads * self.head_dim} of embed_dim (where they "
                "are split over ranks, as a DTensor: ColwiseParallel(use_local_output=False)), "
                f"got {rows.shape[2]}"
            )
        split: Tensor = rows.unflatten(2, (heads, self.head_dim))
        return split

    def make_kv_cache(
        self,
        batch_size: int,
        *,
        max_seq_len: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> DilatedKVCache:
        """An empty cache for `forward`, on the parameters' device.

        dtype: of the projected rows; the parameters' by default, under autocast the one that it
        casts to. max_seq_len: as in `DilatedKVCache`. Raises TypeError if `attention` is another
        module, ValueError if it has a group, whose ranks would hold parts of what a cache holds.
        """
        attention, weight = self._dilated_attention(), self.k_proj.weight
        if attention.sharding is not None:
            group = attention.sharding.group_name
            raise ValueError(f"attention must have no group where a cache is made, got {group}")
        return DilatedKVCache(
            batch_size,
            self.num_kv_heads,
            self.head_dim,
            attention.scheme.segment_lengths,
            attention.scheme.dilation_rates,
            num_heads=self.num_heads,
            head_offsets=attention.scheme.head_offsets,
            max_seq_len=max_seq_len,
            dtype=weight.dtype if dtype is None else dtype,
            device=weight.device,
        )

    def prefetch(
        self, seq_lens: Iterable[int], device: torch.device | str, *, is_causal: bool = False
    ) -> None:
        """As `DilatedAttention.prefetch`. Raises TypeError if `attention` is another module."""
        heads = {"heads": self.num_heads, "kv_heads": self.num_kv_heads}
        self._dilated_attention().prefetch(seq_lens, device, **heads, is_causal=is_causal)

    def prefetch_batch(
        self,
        seq_lens: SeqLens,
        device: torch.device | str,
        *,
        seq_len: int | None = None,
        is_causal: bool = False,
    ) -> None:
        """As `DilatedAttention.prefetch_batch`; likewise."""
        heads = {"heads": self.num_heads, "kv_heads": self.num_kv_heads}
        self._dilated_attention().prefetch_batch(
            seq_lens, device, **heads, seq_len=seq_len, is_causal=is_causal
        )

    def _dilated_attention(self) -> DilatedAttention:
        if not isinstance(self.attention, DilatedAttention):
            raise TypeError(f"attention must be a DilatedAttention, got {self.attention!r}")
        return self.attention

    def extra_repr(self) -> str:
        text = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"
        if self.num_kv_heads != self.num_heads:
            text += f", num_kv_heads={self.num_kv_heads}"
        return text if self.gamma_init == 1.0 else f"{text}, gamma_init={self.gamma_init}"


def _check_heads(embed_dim: int, num_heads: int, num_kv_heads: int) -> None:
    if embed_dim % num_heads != 0:
        raise ValueError(f"embed_dim must be a multiple of num_heads, {num_heads}, got {embed_dim}")
    if num_heads % num_kv_heads != 0:
        raise ValueError(f"num_kv_heads must divide num_heads, {num_heads}, got {num_kv_heads}")


def _at_least_0(value: float, name: str) -> float:
    number = real(value, name)
    if not 0 <= number <= sys.float_info.max:
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    return number
