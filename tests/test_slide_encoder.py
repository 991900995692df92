"""examples/slide_encoder.py: its model is LongNetViT, and the program runs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integrations.longnet_vit import Arguments, LongNetViT

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def slide_model(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("slide_model")


def test_the_model_is_longnet_vit_and_takes_its_checkpoint(slide_model):
    torch.manual_seed(0)
    args = Arguments([16, 36, 200], [1, 2, 4])
    theirs = LongNetViT(args).double().eval()
    ours = slide_model.SlideEncoder(24, 32, 8, 2, args.segment_length, args.dilated_ratio).double()
    state = theirs.state_dict()
    del state["pos_embed"]  # GigaPath does not save its table
    grid = torch.cartesian_prod(torch.arange(64), torch.arange(64))
    theirs.pos_embed = slide_model.positions(grid, 32).double()
    ours.load_state_dict(slide_model.from_gigapath(state))
    features, places = torch.randn(2, 101, 24).double(), torch.randint(64, (2, 101, 2))
    torch.testing.assert_close(ours(features, places), theirs(features, places))


def test_positions_are_sines_and_cosines_of_both_coordinates(slide_model):
    found = slide_model.positions(torch.tensor([[3, 5]]), 8)[0]
    angles = torch.tensor([5, 0.05, 3, 0.03])
    expected = torch.cat([angles[:2].sin(), angles[:2].cos(), angles[2:].sin(), angles[2:].cos()])
    torch.testing.assert_close(found, expected)


def test_the_program_trains_and_draws(tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "slide.png"
    values = {"tile": 16, "size": 8, "steps": 2, "width": 16, "layers": 1, "device": "cpu"}
    settings = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "slide_encoder.py", *settings, "--picture", picture],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "64 tiles a slide; right on the other half:" in done.stdout
    assert "1,024 tiles at once; the class token attends to" in done.stdout
    assert picture.stat().st_size > 10_000
