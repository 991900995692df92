"""Trains a byte-level causal language model with dilated attention on text that every machine has.

The text is the source code of Python's standard library (or `--text PATH`), one file in ten held
out. The model is a small LongNet (byte_model.py). Progress is measured in bits per byte of held-out
text, beside what counts of bytes (unigram) and of pairs of bytes (bigram) reach there. Without a
GPU the defaults take about two minutes on two cores. Ctrl-C saves a checkpoint and ends the program
with status 130.

    python examples/train_bytes.py
    python examples/train_bytes.py --resume     # as if it had not been stopped; on CPUs, to the bit
    torchrun --nproc-per-node 2 -- examples/train_bytes.py      # each window over two processes
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import signal
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from byte_model import BITS, ByteModel, bits_per_byte, loss_of, sample
from sequence_shards import Shards
from torch import Tensor, nn
from tqdm import tqdm

INTERRUPTED = 130  # exit status, as of any program that Ctrl-C ends


def option(cpu: Any, gpu: Any, text: str) -> Any:
    """A field of Config: its default without and with a GPU, and what --help says."""
    return dataclasses.field(default=cpu, metadata={"gpu": gpu, "help": text})


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run depends on; stored in its checkpoint."""

    context: int = option(16384, 65536, "bytes that the model sees at once")
    batch: int = option(1, 1, "windows of `context` bytes in a step")
    width: int = option(128, 512, "features of a byte")
    layers: int = option(2, 8, "blocks of attention and feed-forward")
    heads: int = option(4, 8, "attention heads; divides width")
    segment_lengths: tuple[int, ...] = option((512, 4096, 16384), (2048, 16384, 65536), "in bytes")
    dilation_rates: tuple[int, ...] = option((1, 4, 16), (1, 4, 16), "one per segment length")
    dropout: float = option(0.0, 0.0, "in attention")
    steps: int = option(140, 500, "optimizer steps of the whole run")
    learning_rate: float = option(1.6e-2, 1e-3, "peak: linear warm-up, cosine down to a tenth")
    eval_every: int = option(20, 50, "steps between measurements and saves")
    eval_windows: int = option(4, 4, "held-out windows that a measurement reads")
    seed: int = option(0, 0, "of parameters, order of the data, and dropout")


# ---- the text


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Bytes as uint8 tensors; `digest` tells whether a checkpoint was trained on the same text."""

    train: Tensor
    held_out: Tensor
    digest: str


def load_corpus(path: Path) -> Corpus:
    """A file, its last tenth held out, or every *.py below a folder, every tenth file held out.

    Test suites and installed packages are left out of a folder: not every Python has them."""
    if path.is_file():
        text = path.read_bytes()
        parts = [text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]]
    else:
        skip = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*.py"))
        texts = [(path / name).read_bytes() for name in names if not skip & set(name.split("/"))]
        held_out = texts[9::10]
        del texts[9::10]
        parts = [b"".join(texts), b"".join(held_out)]
    digest = hashlib.sha256(parts[0] + parts[1]).hexdigest()
    train, held_out = (torch.tensor(list(part), dtype=torch.uint8) for part in parts)
    return Corpus(train, held_out, digest)


def held_out_windows(corpus: Corpus, config: Config) -> list[Tensor]:
    """Evenly spaced stretches of context + 1 bytes, the same at every measurement."""
    last = len(corpus.held_out) - config.context - 1
    starts = torch.linspace(0, last, config.eval_windows).long().tolist()
    return [corpus.held_out[s : s + config.context + 1].long() for s in starts]


def baselines(corpus: Corpus, windows: list[Tensor]) -> tuple[float, float]:
    """Bits per byte of the windows under the training text's counts, each plus one."""
    train = corpus.train.long()
    pairs = torch.bincount(train[:-1] * 256 + train[1:], minlength=65536).view(256, 256) + 1.0
    previous = torch.cat([window[:-1] for window in windows])
    following = torch.cat([window[1:] for window in windows])
    unigram = (pairs.sum(0) / pairs.sum()).log2()[following]
    bigram = (pairs / pairs.sum(1, keepdim=True)).log2()[previous, following]
    return -unigram.mean().item(), -bigram.mean().item()


# ---- the run


class Run:
    """A model in training and everything that continuing it needs."""

    def __init__(self, config: Config, corpus: Corpus, shards: Shards) -> None:
        torch.manual_seed(config.seed)
        self.config, self.corpus, self.shards, self.step = config, corpus, shards, 0
        self.device = shards.device
        self.model = self.make_model()
        if shards.group is not None:
            lengths = shards.lengths(config.context)
            sharded = self.make_model(group=shards.group, shard_lengths=lengths)
            sharded.load_state_dict(self.model.state_dict())
            self.model = sharded
        parameters = self.model.parameters()
        self.optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.1)
        self.order = torch.Generator().manual_seed(config.seed)
        self.held_out = held_out_windows(corpus, config)

    def make_model(self, **options: Any) -> ByteModel:
        """On the run's device; options: further arguments of its attention."""
        config = self.config
        return ByteModel(
            config.width,
            config.layers,
            num_heads=config.heads,
            segment_lengths=config.segment_lengths,
            dilation_rates=config.dilation_rates,
            dropout=config.dropout,
            **options,
        ).to(self.device)

    def train_step(self) -> float:
        """One step on random windows of the training text; the loss before it, in nats per byte."""
        span = self.config.context + 1
        choices = (len(self.corpus.train) - span + 1, (self.config.batch,))
        starts = torch.randint(*choices, generator=self.order).tolist()
        windows = torch.stack([self.corpus.train[s : s + span] for s in starts])
        loss = loss_of(self.model, windows.to(self.device).long(), self.shards)
        self.optimizer.zero_grad()
        loss.backward()
        self.shards.sum_gradients(self.model)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        cosine = 0.55 + 0.45 * math.cos(math.pi * self.step / self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * min(1.0, (self.step + 1) / 10) * cosine
        self.optimizer.step()
        self.step += 1
        return self.shards.sum(loss.detach()).item()

    def write(self, length: int) -> str:
        """How the model goes on after 256 bytes of held-out text; in one process."""
        model = self.make_model()
        model.load_state_dict(self.model.state_dict())
        return sample(model, self.held_out[0][:256], length, self.device)

    def save(self, path: Path) -> None:
        """Written beside `path` and renamed, so that `path` is a whole checkpoint at any time."""
        if self.shards.rank > 0:
            return
        cuda = self.device.type == "cuda"
        state = {
            "config": dataclasses.asdict(self.config),
            "text": self.corpus.digest,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.get_state(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
        }
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def agree(self, stop: bool) -> bool:
        """Whether any process is to stop; the same on all."""
        return bool(self.shards.sum(torch.tensor(float(stop), device=self.device)) > 0)

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.order.set_state(state["order"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)


class Interrupt:
    """Set by a first Ctrl-C, so that no step is cut in two; a second one ends the program."""

    requested = False

    def __enter__(self) -> Interrupt:
        signal.signal(signal.SIGINT, self.request)
        return self

    def request(self, *_: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def train(run: Run, args: argparse.Namespace) -> tuple[float, float]:
    """Until the last step or Ctrl-C. Held-out bits per byte, and bytes trained on per second."""
    seconds, first_step, held_out = 1e-9, run.step, math.nan
    bar = tqdm(
        total=run.config.steps,
        initial=run.step,
        unit="step",
        dynamic_ncols=True,
        disable=run.shards.rank > 0,
    )
    with Interrupt() as interrupt, bar:
        while run.step < run.config.steps and not run.agree(interrupt.requested):
            start = time.perf_counter()
            loss = run.train_step()
            seconds += time.perf_counter() - start
            rate = (run.step - first_step) * run.config.batch * run.config.context / seconds
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, {loss * BITS:.3f} bits/byte, {rate:,.0f} tok/s")
            record = {"step": run.step, "loss": loss}
            if run.step % run.config.eval_every == 0 or run.step == run.config.steps:
                record["held_out"] = held_out = bits_per_byte(run.model, run.held_out, run.shards)
                bar.write(f"step {run.step}: held-out {held_out:.3f} bits per byte")
                run.save(args.checkpoint)
            if args.log and run.shards.rank == 0:
                with args.log.open("a") as log:
                    log.write(json.dumps(record) + "\n")
        run.save(args.checkpoint)
    if math.isnan(held_out) and run.step == run.config.steps:  # resumed at its end
        held_out = bits_per_byte(run.model, run.held_out, run.shards)
    return held_out, (run.step - first_step) * run.config.batch * run.config.context / seconds


# ---- the command line


def make_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--text", type=Path, help="a file, or a folder of *.py (default: the standard library)")
    add("--checkpoint", type=Path, default=Path("train_bytes.pt"), help="default: %(default)s")
    add("--resume", action="store_true", help="continue the checkpoint's run as it was configured")
    add("--log", type=Path, help="append a JSON line a step: step, loss in nats, held_out in bits")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--sample", type=int, default=200, metavar="BYTES", help="to write at the end (200)")
    for field in dataclasses.fields(Config):
        several = isinstance(field.default, tuple)
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default[0] if several else field.default),
            nargs="+" if several else None,
            default=argparse.SUPPRESS,
            help=f"{field.metadata['help']} ({field.default}; GPU: {field.metadata['gpu']})",
        )
    return parser


def set_up(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Run:
    """A new run, or the checkpoint's; ends the program if the arguments allow neither."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    fields = dataclasses.fields(Config)
    corpus = load_corpus(args.text or Path(sysconfig.get_paths()["stdlib"]))
    values = {f.name: f.metadata["gpu"] if device.type == "cuda" else f.default for f in fields}
    state = None
    if args.resume:
        if not args.checkpoint.is_file():
            parser.error(f"--resume: there is no checkpoint {args.checkpoint}")
        state = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
        values = state["config"]
        if state["text"] != corpus.digest:
            parser.error(f"--resume: {args.checkpoint} was trained on another text")
    for name, value in vars(args).items():
        value = tuple(value) if isinstance(value, list) else value
        if state and name in values and value != values[name]:
            parser.error(f"--resume: {name} was {values[name]} in {args.checkpoint}, not {value}")
        values = {**values, name: value} if name in values else values
    config = Config(**values)
    if min(len(corpus.train), len(corpus.held_out)) <= config.context:
        sizes = f"{len(corpus.train)} bytes to train on and {len(corpus.held_out)} held out"
        parser.error(f"--context must be below the text's sizes, {sizes}; got {config.context}")
    run = Run(config, corpus, Shards(device))
    if state:
        run.restore(state)
    return run


def main() -> int:
    parser = make_parser()
    args = parser.parse_args()
    run = set_up(parser, args)
    try:
        return report(run, args)
    finally:
        run.shards.close()


def report(run: Run, args: argparse.Namespace) -> int:
    """Trains, and says what came of it, on the first process."""
    if run.shards.rank > 0:
        train(run, args)
        return INTERRUPTED if run.step < run.config.steps else 0
    unigram, bigram = baselines(run.corpus, run.held_out)
    size = sum(p.numel() for p in run.model.parameters())
    print(f"{size:,} parameters on {run.device}; {len(run.corpus.train):,} bytes to train on")
    print(f"held-out text: {unigram:.3f} bits per byte by bytes, {bigram:.3f} by pairs of bytes")
    held_out, rate = train(run, args)
    if run.step < run.config.steps:
        print(f"stopped at step {run.step}; --resume goes on from {args.checkpoint}")
        return INTERRUPTED
    if args.sample:
        print("---- 256 bytes of held-out text, and how the model goes on")
        print(run.write(args.sample))
        print("----")
    print(
        f"held-out {held_out:.3f} bits per byte, unigram entropy {unigram:.3f}, "
        f"bigram {bigram:.3f}, {rate:,.0f} tokens per second"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
