"""The text that train_bytes.py trains on, and how well counts of its bytes foretell it."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import stat
from pathlib import Path

import torch
from torch import Tensor

_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Bytes as uint8 tensors; `digest` tells whether a checkpoint was trained on the same text."""

    train: Tensor
    held_out: Tensor
    digest: str


def load_corpus(path: Path) -> Corpus:
    """A file, its last tenth held out, or every *.py below a folder, every tenth file held out.

    Test suites and installed packages are left out of a folder: not every Python has them. Raises
    ValueError if the text can't be read."""
    try:
        parts = _read(path)
    except OSError as error:
        what = f"{error.filename or path}: {error.strerror}"  # a read names no file
        raise ValueError(f"--text must be a file or folder that can be read, got {what}") from None
    digest = hashlib.sha256(parts[0] + parts[1]).hexdigest()
    train, held_out = (
        torch.frombuffer(bytearray(part), dtype=torch.uint8) if part else torch.empty(0)
        for part in parts
    )
    return Corpus(train, held_out, digest)


def _read(path: Path) -> tuple[bytes, bytes]:
    if not path.is_dir():
        if not stat.S_ISREG(path.stat().st_mode):  # stat raises where nothing is
            raise OSError(errno.EINVAL, "neither a file nor a folder", str(path))
        text = path.read_bytes()
        return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    files = (file for file in path.rglob("*.py") if file.is_file())
    names = sorted(file.relative_to(path).as_posix() for file in files)
    texts = [(path / name).read_bytes() for name in names if not _SKIPPED & set(name.split("/"))]
    held_out = texts[9::10]
    del texts[9::10]
    return b"".join(texts), b"".join(held_out)


def held_out_windows(corpus: Corpus, context: int, count: int) -> list[Tensor]:
    """Evenly spaced stretches of context + 1 bytes, the same at every measurement."""
    last = len(corpus.held_out) - context - 1
    starts = torch.linspace(0, last, count).long().tolist()
    return [corpus.held_out[s : s + context + 1].long() for s in starts]


def baselines(corpus: Corpus, windows: list[Tensor]) -> tuple[float, float]:
    """Bits per byte of the windows under the training text's counts, each plus one."""
    train = corpus.train.long()
    pairs = torch.bincount(train[:-1] * 256 + train[1:], minlength=65536).view(256, 256) + 1.0
    previous = torch.cat([window[:-1] for window in windows])
    following = torch.cat([window[1:] for window in windows])
    unigram = (pairs.sum(0) / pairs.sum()).log2()[following]
    bigram = (pairs / pairs.sum(1, keepdim=True)).log2()[previous, following]
    return -unigram.mean().item(), -bigram.mean().item()
