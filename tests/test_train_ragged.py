"""examples/train_ragged.py as its users run it: a program of its own, small settings, real text."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples"
SMALL = """
    --device cpu --context 256 --batch 4 --width 32 --layers 1 --heads 2 --steps 40
    --segment-lengths 32 128 --dilation-rates 1 2 --eval-every 20
"""
TEXT = Path(sysconfig.get_paths()["stdlib"], "argparse.py")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("train_ragged")


def test_held_out_bits_per_byte_fall() -> None:
    command = [sys.executable, str(FOLDER / "train_ragged.py"), "--text", str(TEXT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *SMALL.split()], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    held_out = [float(bits) for bits in re.findall(r"held-out ([\d.]+)", done.stdout)]
    assert len(held_out) == 3
    assert held_out[0] > 7.5 and held_out[-1] < held_out[1] < 6


def test_padding_has_no_part_in_the_loss(program: ModuleType) -> None:
    text, order = torch.arange(4000) % 251, torch.Generator().manual_seed(0)
    batch = program.draw(text, 5, 160, order)
    longest = int(batch.seq_lens.max())
    assert batch.windows.shape == (5, longest + 1) and 10 <= int(batch.seq_lens.min()) < longest
    torch.manual_seed(0)
    model = program.ByteModel(16, 1, num_heads=2, segment_lengths=[64], dilation_rates=[1])
    cpu = torch.device("cpu")
    loss = program.loss_of(model, batch, cpu)
    total = 0.0
    for window, n in zip(batch.windows, batch.seq_lens.tolist(), strict=True):
        alone = program.Batch(window[None, : n + 1], torch.tensor([n]))
        total += n * program.loss_of(model, alone, cpu).item()
    assert loss.item() == pytest.approx(total / int(batch.seq_lens.sum()), rel=1e-5)
    assert [*program.ahead(iter([batch, batch]), model, cpu)] == [batch, batch]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--width 30", "--width must be an even multiple of --heads, .* got 30 and 4 heads"),
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--context 15", "--context must be at least 16 .* got 15"),
        ("--context 100000000", "--context must be .* at most .* got 100000000"),
        ("--learning-rate 0", "--learning-rate must be above 0, got 0"),
        ("--segment-lengths 0 1", "segment_lengths must be positive"),
        ("--text /nowhere", "--text must be a file or folder that can be read, got /nowhere"),
    ],
)
def test_what_is_wrong_is_one_line(
    program: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    said: str,
) -> None:
    given = ["train_ragged.py", "--text", str(TEXT), "--device", "cpu", *options.split()]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit, match="2"):
        program.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line)
