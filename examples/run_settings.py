"""What a run of train_bytes.py depends on: its settings, its options, and what must hold of them.

All of it is checked before anything takes time; what is wrong is one line and status 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

from dilated_attention_pytorch import cuda_kernels_missing
from dilated_attention_pytorch.pattern import Pattern, PatternSpec, make_branches


def option(cpu: Any, gpu: Any, text: str, least: float = 1, end: float = 2**16) -> Any:
    """A field of Config: its default without and with a GPU, what --help says, and its range."""
    metadata = {"gpu": gpu, "help": text, "least": least, "end": end}
    return dataclasses.field(default=cpu, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run depends on; stored in its checkpoint."""

    context: int = option(16384, 65536, "bytes that the model sees at once", end=2**31 - 1)
    batch: int = option(1, 1, "windows of `context` bytes in a step")
    width: int = option(128, 512, "features of a byte")
    layers: int = option(2, 8, "blocks of attention and feed-forward")
    heads: int = option(4, 8, "attention heads; divides width")
    segment_lengths: tuple[int, ...] = option(
        (512, 4096, 16384), (2048, 16384, 65536), "in bytes", end=2**63
    )
    dilation_rates: tuple[int, ...] = option(
        (1, 4, 16), (1, 4, 16), "one per segment length", end=2**31
    )
    dropout: float = option(0.0, 0.0, "in attention", least=0, end=1)
    steps: int = option(140, 500, "optimizer steps of the whole run", end=2**31)
    learning_rate: float = option(
        1.6e-2, 1e-3, "peak: linear warm-up, cosine down to a tenth", 1e-9, 1e3
    )
    eval_every: int = option(20, 50, "steps between measurements and saves", end=2**31)
    eval_windows: int = option(4, 4, "held-out windows that a measurement reads")
    seed: int = option(0, 0, "of parameters, order of the data, and dropout", 0, 2**63)

    @staticmethod
    def defaults(device: torch.device) -> dict[str, Any]:
        fields = dataclasses.fields(Config)
        gpu = device.type == "cuda"
        return {f.name: f.metadata["gpu"] if gpu else f.default for f in fields}

    def check(self) -> None:
        """Raises ValueError with the option, what must hold and what was given."""
        for field in dataclasses.fields(self):
            given, least, end = (
                getattr(self, field.name),
                *map(field.metadata.get, ("least", "end")),
            )
            name = "--" + field.name.replace("_", "-")
            for value in given if _several(field) else [given]:
                if not least <= value < end:
                    rule = f"below {end}" if value >= end else f"at least {least}"
                    raise ValueError(f"{name} must be {rule}, got {value}")
        if self.width % (2 * self.heads) or self.width > 256 * self.heads:
            raise ValueError(
                "--width must be an even multiple of --heads, at most 256 times as large, "
                f"got {self.width} and {self.heads} heads"
            )
        make_branches(self.segment_lengths, self.dilation_rates)

    def check_pattern(self) -> None:
        """Raises ValueError where the pattern can't be planned: too large, as a rule."""
        branches = make_branches(self.segment_lengths, self.dilation_rates)
        shape = (self.context, branches, "interleaved", self.heads, self.heads)
        Pattern.plan(PatternSpec(*shape, is_causal=True))


def _several(field: dataclasses.Field[Any]) -> bool:
    return isinstance(field.default, tuple)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, from the first process alone."""
        if os.environ.get("RANK", "0") == "0":
            print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def make_parser(text: str | None) -> Parser:
    parser = Parser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, help="a file, or a folder of *.py (default: the standard library)")
    add("--checkpoint", type=Path, default=Path("train_bytes.pt"), help="default: %(default)s")
    add("--resume", action="store_true", help="continue the checkpoint's run as it was configured")
    add("--log", type=Path, help="append a JSON line a step: step, loss in nats, held_out in bits")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--sample", type=int, default=200, metavar="BYTES", help="to write at the end (200)")
    for field in dataclasses.fields(Config):
        several = _several(field)
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default[0] if several else field.default),
            nargs="+" if several else None,
            default=argparse.SUPPRESS,
            help=f"{field.metadata['help']} ({field.default}; GPU: {field.metadata['gpu']})",
        )
    return parser


def check_files(args: argparse.Namespace) -> None:
    """Raises ValueError unless what the run writes can be written, over nothing but its own files;
    writes nothing.
    """
    used: dict[Path, str] = {}
    for name in ("--text", "--checkpoint", "--log"):
        path = getattr(args, name[2:])
        if path is None:
            continue
        if "\0" in str(path):
            raise ValueError(f"{name} must be a path without null bytes, got {str(path)!r}")
        if name != "--text" and not _can_be_written(path):
            raise ValueError(f"{name} must be a file in a folder that can be written, got {path}")
        other = used.setdefault(Path(path).resolve(), name)
        if other != name:
            raise ValueError(f"{name} must be another file than {other}, got {path}")
    if args.sample < 0:
        raise ValueError(f"--sample must be at least 0, got {args.sample}")


def _can_be_written(path: Path) -> bool:
    """Whether it is a regular file, or nothing yet, in a folder that takes new files."""
    folder = path.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return False
    if len(os.fsencode(path.name + ".partial")) > os.pathconf(folder, "PC_NAME_MAX"):
        return False
    return path.is_file() and not path.is_symlink() if os.path.lexists(path) else True


def choose_device(name: str | None) -> torch.device:
    """Raises ValueError if it can't be had; without a name, says why a GPU there is not used."""
    if not torch.cuda.is_available():
        if name == "cuda":
            raise ValueError("--device must be cpu where torch sees no GPU, got cuda")
        return torch.device("cpu")
    rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    lacking = cuda_kernels_missing(rank if rank < count else 0)
    if name == "cuda" and lacking:
        raise ValueError(f"--device must be cpu, as {lacking}, got cuda")
    if name != "cpu" and not lacking and rank >= count:
        raise ValueError(f"--device must be cpu for more processes than GPUs, {count}, got cuda")
    if name is None and lacking and rank == 0:
        print(f"there is a GPU, but {lacking}: this runs on the CPU", file=sys.stderr)
    return torch.device("cpu" if name == "cpu" or lacking else "cuda")


def with_options(values: dict[str, Any], args: argparse.Namespace, resumed: bool) -> Config:
    """The settings with those that were given; raises ValueError where a resumed run has others."""
    for name, value in vars(args).items():
        value = tuple(value) if isinstance(value, list) else value
        if resumed and name in values and value != values[name]:
            rule = f"{values[name]} to resume {args.checkpoint}"
            raise ValueError(f"--{name.replace('_', '-')} must be {rule}, got {value}")
        values = {**values, name: value} if name in values else values
    config = Config(**values)
    config.check()
    return config
