"""A slide encoder of LongNet's architecture with torchscale's names, in plain PyTorch.

The attention gathers each branch's rows, attends, scatters and mixes, as torchscale does, so its
segments drift where the rate does not divide them and its mixing weights carry no gradient.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad


@dataclass
class Arguments:
    """What the layers read of torchscale's configuration."""

    segment_length: list[int]
    dilated_ratio: list[int]
    embed_dim: int = 32
    heads: int = 8
    layers: int = 2
    attention_dropout: float = 0.0
    subln: bool = True
    multiway: bool = False
    xpos_rel_pos: bool = False
    seq_parallel: bool = False
    detach: bool = True  # torchscale's; False: the gradient of the output


class Multiway(nn.Module):
    """One module for the rows before split_position, a copy for those from it on; -1: A alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.A, self.B = module, copy.deepcopy(module)
        self.B.reset_parameters()
        self.split_position = -1

    def forward(self, x: Tensor) -> Tensor:
        if self.split_position == -1:
            return self.A(x)
        at = self.split_position
        return torch.cat([self.A(x[:, :at]), self.B(x[:, at:])], dim=1)


class XPos(nn.Module):
    """xPos (arXiv 2212.10554) about the middle of the sequence, on [rows, seq_len, head_dim]."""

    def __init__(self, head_dim: int, base: float = 512) -> None:
        super().__init__()
        scale = (torch.arange(0, head_dim, 2) + 0.4 * head_dim) / (1.4 * head_dim)
        self.register_buffer("scale", scale)
        self.base = base

    def forward(self, x: Tensor, offset: int = 0, downscale: bool = False) -> Tensor:
        n, half = x.shape[1], x.shape[2] // 2
        places = torch.arange(n).to(x)
        angles = places[:, None] / 10000 ** (torch.arange(half).to(x) / half)
        size = self.scale ** ((places - (n + 1) // 2) / self.base)[:, None]
        size = 1 / size if downscale else size
        pairs = x.unflatten(2, (half, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], -1)
        cos, sin = ((f(angles) * size)[..., None] for f in (torch.cos, torch.sin))
        return (pairs * cos + turned * sin).flatten(2)


def wrapped(args: Arguments, module: nn.Module) -> nn.Module:
    return Multiway(module) if args.multiway else module


class DilatedAttention(nn.Module):
    def __init__(self, args: Arguments) -> None:
        super().__init__()
        size = args.embed_dim
        self.args, self.embed_dim, self.num_heads = args, size, args.heads
        self.head_dim, self.dropout = size // args.heads, args.attention_dropout
        self.self_attention, self.encoder_decoder_attention = True, False
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            setattr(self, name, wrapped(args, nn.Linear(size, size)))
        self.inner_attn_ln = wrapped(args, nn.LayerNorm(size)) if args.subln else None
        self.xpos = XPos(self.head_dim) if args.xpos_rel_pos else None

    def _places(self, width: int, r: int) -> Tensor:
        """int64 [slots, heads]: the rows of a segment that each head takes."""
        block = -(-self.num_heads // r)
        return torch.arange(0, width, r)[:, None] + torch.arange(self.num_heads) // block

    def dense_to_sparse(self, x: Tensor, r: int) -> Tensor:
        x = pad(x, (0, 0, 0, 0, 0, -x.shape[1] % r))
        return x[:, self._places(x.shape[1], r), torch.arange(self.num_heads)]

    def sparse_to_dense(self, x: Tensor, r: int, absent: float) -> Tensor:
        width = x.shape[1] * r
        dense = x.new_full((x.shape[0], width, *x.shape[2:]), absent)
        return dense.index_put(
            (torch.arange(len(x))[:, None, None], self._places(width, r), torch.arange(x.shape[2])),
            x,
        )

    def gathering(self, x: Tensor, r: int, w: int) -> Tensor:
        w = min(w, x.shape[1])
        x = pad(x, (0, 0, 0, 0, 0, -x.shape[1] % w))
        return self.dense_to_sparse(x.unflatten(1, (-1, w)).flatten(0, 1), r)

    def scattering(self, x: Tensor, r: int, batch: int, seq_len: int, absent: float) -> Tensor:
        dense = self.sparse_to_dense(x, r, absent)
        return dense.unflatten(0, (batch, -1)).flatten(1, 2)[:, :seq_len]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        batch, n = q.shape[:2]
        outs, lses = [], []
        for w, r in zip(self.args.segment_length, self.args.dilated_ratio, strict=True):
            qi, ki, vi = (self.gathering(x, r, w) for x in (q, k, v))
            scores = torch.einsum("bihd,bjhd->bihj", qi, ki) * self.head_dim**-0.5
            if is_causal:
                later = torch.ones(qi.shape[1], qi.shape[1], dtype=torch.bool).triu(1)
                scores = scores.masked_fill(later[:, None], -torch.inf)
            out = torch.einsum("bihj,bjhd->bihd", scores.softmax(-1), vi)
            outs.append(self.scattering(out, r, batch, n, 0.0))
            lse = scores.logsumexp(-1)[..., None]
            lses.append(self.scattering(lse, r, batch, n, -1e8))
        mix = torch.stack(lses).softmax(0)
        return (torch.stack(outs) * (mix.detach() if self.args.detach else mix)).sum(0)

    def forward(
        self, query, key, value, incremental_state=None, key_padding_mask=None, attn_mask=None,
        rel_pos=None, is_first_step=False, is_causal=False,
    ):  # fmt: skip
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        q, k, v = (x.unflatten(2, (self.num_heads, self.head_dim)) for x in (q, k, v))
        if self.xpos is not None:
            q, k = (
                self.xpos(x.transpose(1, 2).flatten(0, 1), downscale=down)
                .unflatten(0, (-1, self.num_heads))
                .transpose(1, 2)
                for x, down in ((q, False), (k, True))
            )
        out = self.attend(q, k, v, is_causal).flatten(2)
        out = out if self.inner_attn_ln is None else self.inner_attn_ln(out)
        return self.out_proj(out), None


class FeedForward(nn.Module):
    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.fc1 = nn.Linear(args.embed_dim, 4 * args.embed_dim)
        self.fc2 = nn.Linear(4 * args.embed_dim, args.embed_dim)
        self.ffn_layernorm = nn.LayerNorm(4 * args.embed_dim) if args.subln else None

    def reset_parameters(self) -> None:
        for module in filter(None, (self.fc1, self.fc2, self.ffn_layernorm)):
            module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        x = gelu(self.fc1(x))
        return self.fc2(x if self.ffn_layernorm is None else self.ffn_layernorm(x))


class EncoderLayer(nn.Module):
    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.self_attn = DilatedAttention(args)
        self.self_attn_layer_norm = wrapped(args, nn.LayerNorm(args.embed_dim))
        self.ffn = wrapped(args, FeedForward(args))
        self.final_layer_norm = wrapped(args, nn.LayerNorm(args.embed_dim))

    def forward(self, x: Tensor, encoder_padding_mask: Tensor, is_causal: bool) -> Tensor:
        rows = self.self_attn_layer_norm(x)
        attended, _ = self.self_attn(
            query=rows, key=rows, value=rows, key_padding_mask=encoder_padding_mask,
            attn_mask=None, rel_pos=None, incremental_state=None, is_causal=is_causal,
        )  # fmt: skip
        x = x + attended
        return x + self.ffn(self.final_layer_norm(x))


class Encoder(nn.Module):
    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(args) for _ in range(args.layers))
        self.layer_norm = wrapped(args, nn.LayerNorm(args.embed_dim))

    def forward(self, x: Tensor, is_causal: bool = False) -> Tensor:
        nothing = torch.zeros(x.shape[:2], dtype=torch.bool)  # as torchscale's encoder makes one
        for layer in self.layers:
            x = layer(x, encoder_padding_mask=nothing, is_causal=is_causal)
        return self.layer_norm(x)


class LongNetViT(nn.Module):
    """Features [batch, tiles, in_dim] and grid places [batch, tiles, 2] -> [batch, embed_dim]."""

    def __init__(self, args: Arguments, in_dim: int = 24, grid: int = 64) -> None:
        super().__init__()
        self.grid = grid
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(in_dim, args.embed_dim)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, args.embed_dim))
        self.register_buffer("pos_embed", torch.randn(grid * grid, args.embed_dim))
        self.encoder = Encoder(args)
        self.norm = nn.LayerNorm(args.embed_dim, eps=1e-6)

    def forward(self, features: Tensor, places: Tensor) -> Tensor:
        x = self.patch_embed["proj"](features)
        x = x + self.pos_embed[places[..., 0] * self.grid + places[..., 1]]
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], 1)
        return self.norm(self.encoder(x)[:, 0])


def make_encoder(args: Arguments, **changes) -> Encoder:
    """A random float64 encoder; the same numbers for arguments of the same shapes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Encoder(replace(args, **changes)).double().eval()
