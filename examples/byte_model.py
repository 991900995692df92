"""The byte-level language model that train_bytes.py trains: a small LongNet (arXiv 2307.02486)."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sequence_shards import Shards
from torch import Tensor, nn

from dilated_attention_pytorch import DilatedKVCache, MultiheadDilatedAttention

BITS = 1.0 / math.log(2.0)  # nats to bits
LOOK_BACK = 3  # bytes before each one that the model sees beside it


class Block(nn.Module):
    """Attention and feed-forward, each on a normalized input and added to it."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = attention
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(
        self, x: Tensor, seq_lens: Tensor | None = None, kv_cache: DilatedKVCache | None = None
    ) -> Tensor:
        options = {"seq_lens": seq_lens, "kv_cache": kv_cache}
        x = x + self.attention(self.norms[0](x), is_causal=True, **options)[0]
        return x + self.feed_forward(self.norms[1](x))


class ByteModel(nn.Module):
    """Bytes [batch, length] to the logits of each next byte [batch, length, 256].

    `attention` are the arguments of MultiheadDilatedAttention past the width. Where those have a
    group, the bytes are a stretch of the window that begins at `begin`, after those that it looks
    back to, min(begin, LOOK_BACK) of them. The same where caches, one a block, hold the text before
    `begin`, which may then be a tensor, of at least LOOK_BACK, that a CUDA graph reads anew. Where
    windows of several lengths are padded at the end, `seq_lens` [batch] has the lengths."""

    def __init__(self, width: int, layers: int, **attention: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        # Segments end at fixed places: looking back a little, no byte starts blind.
        self.look_back = nn.Conv1d(width, width, kernel_size=LOOK_BACK + 1)
        self.blocks = nn.ModuleList(
            Block(width, MultiheadDilatedAttention(width, **attention)) for _ in range(layers)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))

    def forward(
        self,
        text: Tensor,
        begin: int | Tensor = 0,
        seq_lens: Tensor | None = None,
        kv_caches: Sequence[DilatedKVCache] | None = None,
    ) -> Tensor:
        x = self.embedding(text)
        x = x + self.look_back(F.pad(x.transpose(1, 2), (LOOK_BACK, 0))).transpose(1, 2)
        x = x[:, LOOK_BACK if isinstance(begin, Tensor) else min(begin, LOOK_BACK) :]
        x = x + sinusoids(begin, x.shape[1], x.shape[2], x.device)
        for block, cache in zip(self.blocks, kv_caches or [None] * len(self.blocks), strict=True):
            x = block(x, seq_lens, cache)
        logits: Tensor = self.head(x)
        return logits


def sinusoids(begin: int | Tensor, length: int, width: int, device: torch.device) -> Tensor:
    """Codes [length, width] of positions from `begin` on, of wavelengths 2 pi to 20000 pi."""
    frequency = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(1e4) / width))
    angle = (begin + torch.arange(length, device=device))[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def loss_of(model: ByteModel, windows: Tensor, shards: Shards) -> Tensor:
    """This process's share of the mean negative log-likelihood, in nats per byte, of windows
    [batch, context + 1]: summed over processes it is the mean."""
    begin, end = shards.span(windows.shape[1] - 1)
    with torch.autocast(windows.device.type, dtype=torch.bfloat16, enabled=windows.is_cuda):
        logits = model(windows[:, begin - min(begin, LOOK_BACK) : end], begin)
    targets = windows[:, begin + 1 : end + 1].flatten()
    total = F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum")
    return total / windows[:, 1:].numel()


@torch.no_grad()
def bits_per_byte(model: ByteModel, windows: list[Tensor], shards: Shards) -> float:
    model.eval()
    batches = [window[None].to(shards.device) for window in windows]
    losses = [shards.sum(loss_of(model, batch, shards)).item() for batch in batches]
    model.train()
    return sum(losses) / len(losses) * BITS


@torch.no_grad()
def sample(model: ByteModel, prompt: Tensor, length: int, device: torch.device) -> Iterator[str]:
    """A prompt [n], and how the model goes on for `length` bytes, each as it comes.

    The model sees each byte once, with what its caches keep of the text before: as long as it goes
    on, in the same memory."""
    model.eval()
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    generator = torch.Generator().manual_seed(0)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
    dtype = torch.bfloat16 if device.type == "cuda" else None
    caches = [block.attention.make_kv_cache(1, dtype=dtype) for block in model.blocks]
    yield decoder.decode(bytes(prompt.tolist()))
    text, begin, end = prompt, 0, len(prompt)
    for _ in range(length):
        with autocast:
            logits = model(text[None].to(device), begin, kv_caches=caches)[0, -1].float().cpu()
        chances = (logits / 0.7).softmax(0)  # below 1: rather the likely bytes
        text = torch.cat([text, torch.multinomial(chances, 1, generator=generator)])
        text, begin, end = text[-LOOK_BACK - 1 :], end, end + 1
        yield decoder.decode(bytes(text[-1:].tolist()))
    yield decoder.decode(b"", final=True)
