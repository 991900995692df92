"""The example's model writes the text that whole passes over longer and longer windows would."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch


@torch.no_grad()
def test_a_sample_is_what_whole_passes_would_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    byte_model = importlib.import_module("byte_model")
    torch.manual_seed(0)
    branches = {"segment_lengths": (16, 64), "dilation_rates": (1, 4)}
    model = byte_model.ByteModel(32, 2, num_heads=2, **branches).eval()
    for length in (1, 2, 40):  # the first are shorter than what a byte looks back to
        prompt = torch.arange(length) % 90 + 33
        written = "".join(byte_model.sample(model, prompt, 60, torch.device("cpu")))
        text, generator = prompt, torch.Generator().manual_seed(0)
        for _ in range(60):
            chances = (model(text[None])[0, -1] / 0.7).softmax(0)
            text = torch.cat([text, torch.multinomial(chances, 1, generator=generator)])
        assert written == bytes(text.tolist()).decode("utf-8", errors="replace")
