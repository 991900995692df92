"""Trains a byte-level causal language model with dilated attention on text that every machine has.

The text is the source code of Python's standard library (or `--text PATH`), one file in ten held
out. The model is a small LongNet (byte_model.py). Progress is measured in bits per byte of held-out
text, beside what counts of bytes (unigram) and of pairs of bytes (bigram) reach there. Without a
GPU the defaults take about two minutes on two cores.

    python examples/train_bytes.py
    python examples/train_bytes.py --resume     # as if it had not been stopped; on CPUs, to the bit
    torchrun --nproc-per-node 2 -- examples/train_bytes.py      # each window over two processes

Status 0: the run is finished. 130: Ctrl-C stopped it and saved a checkpoint. 2: an argument is
wrong, as one line says. torchrun ends with 1 wherever a process of it did not end with 0; the
checkpoint is saved, or the line said, all the same.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from byte_text import Corpus, baselines, held_out_windows, load_corpus
from run_settings import Config, check_files, choose_device, make_parser, with_options
from sequence_shards import Shards
from torch import nn
from tqdm import tqdm

INTERRUPTED = 130  # exit status, as of any program that Ctrl-C ends


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
        self.held_out = held_out_windows(corpus, config.context, config.eval_windows)

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

    def write(self, length: int) -> None:
        """Prints how the model goes on after 256 bytes of held-out text; in one process."""
        model = self.make_model()
        model.load_state_dict(self.model.state_dict())
        try:
            for text in sample(model, self.held_out[0][:256], length, self.device):
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            print(" ...", end="")
        print()

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
    """Set by a first Ctrl-C, so that no step is cut in two; a second one ends the program.

    Under torchrun, which passes on what the terminal may have sent already, only the first counts:
    torchrun ends what then takes more than half a minute."""

    requested = False

    def __enter__(self) -> Interrupt:
        signal.signal(signal.SIGINT, self.request)
        return self

    def request(self, *_: object) -> None:
        self.requested = True
        alone = "TORCHELASTIC_RUN_ID" not in os.environ
        signal.signal(signal.SIGINT, signal.default_int_handler if alone else signal.SIG_IGN)

    def __exit__(self, *_: object) -> None:
        if not self.requested:
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


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Raises ValueError if it is none of this program's."""
    if not path.is_file():
        raise ValueError(f"--checkpoint must be a file where a run is resumed, got {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        names = {*state["config"]}
    except Exception:  # whatever the reader of a foreign file stumbles over
        names = set()
    if names != {field.name for field in dataclasses.fields(Config)}:
        raise ValueError(f"--checkpoint must be one that this program wrote, got {path}")
    return dict(state)


def set_up(args: argparse.Namespace) -> Run:
    """A new run, or the checkpoint's; raises ValueError if the arguments allow neither."""
    check_files(args)
    device = choose_device(args.device)
    state = read_checkpoint(args.checkpoint) if args.resume else None
    values = Config.defaults(device) if state is None else state["config"]
    config = with_options(values, args, resumed=state is not None)
    corpus = load_corpus(args.text or Path(sysconfig.get_paths()["stdlib"]))
    if state is not None and state.get("text") != corpus.digest:
        raise ValueError(f"--text must be what {args.checkpoint} was trained on, got another")
    if min(len(corpus.train), len(corpus.held_out)) <= config.context:
        sizes = f"{len(corpus.train)} bytes to train on and {len(corpus.held_out)} held out"
        raise ValueError(f"--context must be below the text's sizes, {sizes}; got {config.context}")
    config.check_pattern()
    run = Run(config, corpus, Shards(device))
    if state is not None:
        try:
            run.restore(state)
        except (KeyError, TypeError, ValueError, RuntimeError):
            run.shards.close()
            raise ValueError(
                f"--checkpoint must fit its own settings, got {args.checkpoint}"
            ) from None
    return run


def main() -> int:
    parser = make_parser(__doc__)
    args = parser.parse_args()
    try:
        run = set_up(args)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    try:
        return report(run, args)
    except KeyboardInterrupt:
        return INTERRUPTED
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
    speed = f"{rate:,.0f} tokens per second"
    if run.device.type == "cuda":
        speed += f", {torch.cuda.max_memory_allocated(run.device) / 2**20:,.0f} MiB at most"
    if args.sample:
        print("---- 256 bytes of held-out text, and how the model goes on")
        run.write(args.sample)
        print("----")
    print(
        f"held-out {held_out:.3f} bits per byte, unigram entropy {unigram:.3f}, "
        f"bigram {bigram:.3f}, {speed}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
