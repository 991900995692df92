"""Trains train_bytes.py's model on windows of many lengths, padded into batches.

The text is that one's. A window has between a 16th of `--context` and all of it; what stands behind
a shorter one is computed in no attention, and the pattern of the next batch, whose lengths no batch
had before, is planned while the model computes. Without a GPU the defaults take about a minute.

    python examples/train_ragged.py
    python examples/train_ragged.py --context 16384 --segment-lengths 512 4096 16384 \\
        --dilation-rates 1 4 16
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from byte_model import BITS, ByteModel
from byte_text import load_corpus
from run_settings import Parser, choose_device
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dilated_attention_pytorch.pattern import make_branches


class Batch(NamedTuple):
    """Windows [batch, longest + 1], each followed by zeros, and their lengths, on the CPU."""

    windows: Tensor
    seq_lens: Tensor


def draw(text: Tensor, batch: int, context: int, order: torch.Generator) -> Batch:
    """Random windows, of as many short lengths as long ones in proportion."""
    lengths = (context * torch.rand(batch, generator=order).mul(-math.log(16)).exp()).long()
    starts = torch.randint(len(text) - context, (batch,), generator=order)
    pairs = zip(starts.tolist(), lengths.tolist(), strict=True)
    windows = [text[start : start + length + 1].long() for start, length in pairs]
    return Batch(pad_sequence(windows, batch_first=True), lengths)


def ahead(batches: Iterator[Batch], model: ByteModel, device: torch.device) -> Iterator[Batch]:
    """The batches, each after the pattern of the one that follows is announced."""
    coming = None
    for batch in batches:
        seq_len = batch.windows.shape[1] - 1
        attention = model.blocks[0].attention  # all layers have the same branches
        attention.prefetch_batch(batch.seq_lens, device, seq_len=seq_len, is_causal=True)
        if coming is not None:
            yield coming
        coming = batch
    if coming is not None:
        yield coming


def loss_of(model: ByteModel, batch: Batch, device: torch.device) -> Tensor:
    """Mean negative log-likelihood of the bytes in windows, in nats; padding has no part in it."""
    windows = batch.windows.to(device)
    behind = torch.arange(windows.shape[1] - 1) >= batch.seq_lens[:, None]
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(windows[:, :-1], seq_lens=batch.seq_lens)
    targets = windows[:, 1:].masked_fill(behind.to(device), -100)  # which cross_entropy leaves out
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def bits_per_byte(model: ByteModel, batch: Batch, device: torch.device) -> float:
    model.eval()
    loss = loss_of(model, batch, device).item()
    model.train()
    return loss * BITS


def train(model: ByteModel, text: Tensor, held_out: Batch, args: argparse.Namespace) -> None:
    device = next(model.parameters()).device
    order = torch.Generator().manual_seed(args.seed)
    batches = (draw(text, args.batch, args.context, order) for _ in range(args.steps))
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, betas=(0.9, 0.95))
    seconds, seen = 0.0, 0
    for step, batch in enumerate(ahead(batches, model, device), 1):
        began = time.perf_counter()
        loss = loss_of(model, batch, device)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds, seen = seconds + time.perf_counter() - began, seen + int(batch.seq_lens.sum())
        if step % args.eval_every == 0 or step == args.steps:
            bits = bits_per_byte(model, held_out, device)
            rate = f"{seen / seconds:,.0f} bytes per second"
            print(f"step {step}: held-out {bits:.3f} bits per byte, {rate}", flush=True)


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, help="a file, or a folder of *.py (default: the standard library)")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    for name, default, text in (
        ("--context", 2048, "bytes of the longest window"),
        ("--batch", 8, "windows in a step"),
        ("--width", 128, "features of a byte; an even multiple of heads"),
        ("--layers", 2, "blocks of attention and feed-forward"),
        ("--heads", 4, "attention heads"),
        ("--steps", 100, "optimizer steps"),
        ("--eval-every", 20, "steps between measurements"),
        ("--seed", 0, "of parameters and of the order of the data"),
    ):
        add(name, type=int, default=default, help=f"{text} (%(default)s)")
    add("--learning-rate", type=float, default=4e-3, help="%(default)s")
    add("--segment-lengths", type=int, nargs="+", default=[256, 2048], help="%(default)s")
    add("--dilation-rates", type=int, nargs="+", default=[1, 4], help="%(default)s")
    args = parser.parse_args()
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """Reads the text and finds the device; raises ValueError with the option that is wrong."""
    for name in ("batch", "width", "layers", "heads", "steps", "eval_every", "seed"):
        least = 0 if name == "seed" else 1
        if getattr(args, name) < least:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} must be at least {least}, got {getattr(args, name)}")
    if args.width % (2 * args.heads) or args.width > 256 * args.heads:
        raise ValueError(
            "--width must be an even multiple of --heads, at most 256 times as large, "
            f"got {args.width} and {args.heads} heads"
        )
    if not args.learning_rate > 0:
        raise ValueError(f"--learning-rate must be above 0, got {args.learning_rate}")
    make_branches(args.segment_lengths, args.dilation_rates)
    args.device = choose_device(args.device)
    args.corpus = load_corpus(args.text or Path(sysconfig.get_paths()["stdlib"]))
    most = min(len(args.corpus.train), len(args.corpus.held_out)) - 1
    if not 16 <= args.context <= most:
        raise ValueError(
            f"--context must be at least 16 and at most {most}, for this text, got {args.context}"
        )


def main() -> int:
    args = parse()
    torch.manual_seed(args.seed)
    model = ByteModel(
        args.width,
        args.layers,
        num_heads=args.heads,
        segment_lengths=args.segment_lengths,
        dilation_rates=args.dilation_rates,
    ).to(args.device)
    fixed = torch.Generator().manual_seed(0)
    held_out = draw(args.corpus.held_out, 4 * args.batch, args.context, fixed)
    bits = bits_per_byte(model, held_out, args.device)
    print(f"step 0: held-out {bits:.3f} bits per byte, in windows of {held_out.seq_lens.tolist()}")
    train(model, args.corpus.train, held_out, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
