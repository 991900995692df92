"""GigaPath's slide encoder on this library: LongNet over the tiles of a slide, and a class token.

The architecture and the names are those of GigaPath's LongNetViT, so its weights load after one
renaming (`from_gigapath`); the positions are computed where they are needed, not kept as a table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from dilated_attention_pytorch import MultiheadDilatedAttention, preset


def from_gigapath(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of GigaPath's slide encoder, for `SlideEncoder`."""
    return {name.replace(".inner_attn_ln.", ".norm."): value for name, value in state.items()}


class SlideEncoder(nn.Module):
    """Features of a slide's tiles and their places on its grid -> one vector a slide.

    Args:
        features: of a tile, 1536 in GigaPath.
        width, heads, layers: 768, 16 and 12 in GigaPath.
        segment_lengths, dilation_rates: [1024, 5792, 32768, 185363, 1048576] and [1, 2, 4, 8, 16]
            in GigaPath.
    """

    def __init__(
        self,
        features: int,
        width: int,
        heads: int,
        layers: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
    ) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(features, width)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        branches = (segment_lengths, dilation_rates)
        self.encoder = nn.ModuleDict(
            {
                "layers": nn.ModuleList(Layer(width, heads, *branches) for _ in range(layers)),
                "layer_norm": nn.LayerNorm(width),
            }
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, features: Tensor, places: Tensor) -> Tensor:
        """features [batch, tiles, features], places [batch, tiles, 2] -> [batch, width]."""
        x = self.patch_embed["proj"](features)
        x = x + positions(places, x.shape[-1]).to(x)
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1)
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.norm(self.encoder["layer_norm"](x)[:, 0])


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, lengths: Sequence[int], rates: Sequence[int]):
        super().__init__()
        self.self_attn = MultiheadDilatedAttention(
            width, heads, lengths, rates, **preset("gigapath")
        )
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.ffn = FeedForward(width, 4 * width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))[0]
        return x + self.ffn(self.final_layer_norm(x))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.ffn_layernorm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ffn_layernorm(gelu(self.fc1(x))))


def positions(places: Tensor, width: int) -> Tensor:
    """[..., 2] -> [..., width]: sines and cosines of the second coordinate, then of the first."""
    frequencies = 10000 ** -(torch.arange(width // 4, device=places.device) / (width // 4))
    angles = places.flip(-1)[..., None] * frequencies  # [..., 2, width / 4]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
