"""Wrong arguments of examples/train_bytes.py: one line, status 2, before anything takes time."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

Program = Callable[..., int]
Refuse = Callable[..., str]

WRONG = {
    "--text nowhere": "--text must be a file or folder that can be read, got nowhere: No such file",
    "--text empty.txt": "--context must be below the text's sizes, 0 bytes to train on and 0 held",
    "--text pipe": "--text must be a file or folder that can be read, got pipe: neither a file",
    "--text /proc/self/mem": "--text must be a file or folder that can be read, got /proc/self/mem",
    "--text a\0b": r"--text must be a path without null bytes, got 'a\x00b'",
    "--text .": "--context must be below the text's sizes, 0 bytes to train on and 0 held out",
    "--checkpoint no/where.pt": "--checkpoint must be a file in a folder that can be written, got",
    "--checkpoint .": "--checkpoint must be a file in a folder that can be written, got .",
    "--checkpoint junk/x": "--checkpoint must be a file in a folder that can be written, got junk",
    "--checkpoint pipe": "--checkpoint must be a file in a folder that can be written, got pipe",
    "--checkpoint link": "--checkpoint must be a file in a folder that can be written, got link",
    f"--checkpoint {'n' * 250}": "--checkpoint must be a file in a folder that can be written, got",
    "--text junk --checkpoint junk": "--checkpoint must be another file than --text, got junk",
    "--text junk --log ./junk": "--log must be another file than --text, got junk",
    "--log junk --checkpoint junk": "--log must be another file than --checkpoint, got junk",
    "--log no/where.jsonl": "--log must be a file in a folder that can be written, got no/where",
    "--resume": "--checkpoint must be a file where a run is resumed, got train_bytes.pt",
    "--resume --checkpoint junk": "--checkpoint must be one that this program wrote, got junk",
    "--resume --checkpoint other": "--checkpoint must be one that this program wrote, got other",
    "--device tpu": "argument --device: invalid choice: 'tpu'",
    "--sample -1": "--sample must be at least 0, got -1",
    "--context 0": "--context must be at least 1, got 0",
    "--context 4000000000": "--context must be below 2147483647, got 4000000000",
    "--batch 0": "--batch must be at least 1, got 0",
    "--batch 1.5": "argument --batch: invalid int value: '1.5'",
    "--width 0": "--width must be at least 1, got 0",
    "--width 129": "--width must be an even multiple of --heads, at most 256 times as large",
    "--layers 0": "--layers must be at least 1, got 0",
    "--heads 0": "--heads must be at least 1, got 0",
    "--heads 3": "--width must be an even multiple of --heads, at most 256 times as large, got 128",
    "--width 4096": "--width must be an even multiple of --heads, at most 256 times as large, got",
    "--segment-lengths 0 4 8": "--segment-lengths must be at least 1, got 0",
    "--segment-lengths 4 8": "segment_lengths and dilation_rates must have the same length",
    "--dilation-rates 1 2 0": "--dilation-rates must be at least 1, got 0",
    "--dropout 1": "--dropout must be below 1, got 1.0",
    "--dropout nan": "--dropout must be at least 0, got nan",
    "--steps 0": "--steps must be at least 1, got 0",
    "--learning-rate 0": "--learning-rate must be at least 1e-09, got 0.0",
    "--learning-rate inf": "--learning-rate must be below 1000.0, got inf",
    "--eval-every 0": "--eval-every must be at least 1, got 0",
    "--eval-windows 0": "--eval-windows must be at least 1, got 0",
    "--seed -1": "--seed must be at least 0, got -1",
    "--nonsense": "unrecognized arguments: --nonsense",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "junk").write_text("no checkpoint")
    (tmp_path / "link").symlink_to("junk")
    os.mkfifo(tmp_path / "pipe")
    torch.save({"config": {"width": 3}}, tmp_path / "other")
    return tmp_path


@pytest.fixture
def refuse(train_bytes: Program, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """A call that must end with status 2; the one line that it says."""

    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            train_bytes(*arguments)
        assert ended.value.code == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1
        assert said.err.startswith("train_bytes.py: ")
        return said.err.removeprefix("train_bytes.py: ")

    return call


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_argument_is_one_line(arguments: str, folder: Path, refuse: Refuse) -> None:
    assert refuse("--device", "cpu", *arguments.split()).startswith(WRONG[arguments])
    assert {path.name for path in folder.iterdir()} == {
        "empty.txt",
        "junk",
        "link",
        "other",
        "pipe",
    }


def test_every_setting_has_a_wrong_value_above(train_bytes: Program) -> None:
    tried = " ".join(WRONG)
    for name in importlib.import_module("run_settings").Config.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in tried, name


def test_of_several_processes_the_first_speaks(
    train_bytes: Program, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        train_bytes("--batch", "0")
    assert capsys.readouterr().err == ""


def small(folder: Path) -> list[str]:
    (folder / "text").write_bytes(Path(__file__).read_bytes())
    run = "--text text --device cpu --context 64 --steps 1 --sample 9"
    model = "--width 16 --heads 2 --layers 1 --segment-lengths 16 64 --dilation-rates 1 4"
    return [*run.split(), *model.split()]


def test_a_checkpoint_that_was_tampered_with_is_refused(
    folder: Path, train_bytes: Program, refuse: Refuse, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_bytes(*small(folder)) == 0
    capsys.readouterr()
    state = torch.load("train_bytes.pt", weights_only=True)
    state["model"].popitem()
    torch.save(state, "train_bytes.pt")
    said = refuse("--resume", "--text", "text", "--device", "cpu")
    assert said == "--checkpoint must fit its own settings, got train_bytes.pt\n"


# ---- GPUs, which are made up


@pytest.fixture
def one_gpu(train_bytes: Program, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    settings = sys.modules["run_settings"]
    monkeypatch.setattr(settings, "cuda_kernels_missing", lambda device: None)
    yield settings


def test_device_cuda_without_a_gpu_is_refused(
    folder: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refuse("--device", "cuda")
    assert said == "--device must be cpu where torch sees no GPU, got cuda\n"


def test_a_gpu_without_kernels_falls_back_with_a_sentence(
    one_gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert one_gpu.choose_device(None).type == "cuda"
    assert capsys.readouterr().err == ""
    why = "this build has no CUDA kernels (nvcc was not found)"
    monkeypatch.setattr(one_gpu, "cuda_kernels_missing", lambda device: why)
    assert one_gpu.choose_device(None).type == "cpu"
    assert capsys.readouterr().err == f"there is a GPU, but {why}: this runs on the CPU\n"
    with pytest.raises(ValueError, match="--device must be cpu, as this build has no CUDA kernels"):
        one_gpu.choose_device("cuda")
    assert one_gpu.choose_device("cpu").type == "cpu"


def test_more_processes_than_gpus_are_refused(
    one_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="--device must be cpu for more processes than GPUs, 1"):
        one_gpu.choose_device(None)


# ---- the sample


def test_the_sample_comes_byte_by_byte_and_ctrl_c_ends_it(
    folder: Path,
    train_bytes: Program,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = sys.modules["train_bytes"]
    pieces: list[str] = []
    whole = program.sample

    def interrupted(*arguments: Any) -> Iterator[str]:
        for piece in whole(*arguments):
            pieces.append(piece)
            yield piece
            if len(pieces) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(program, "sample", interrupted)
    assert train_bytes(*small(folder)) == 0
    said = capsys.readouterr().out
    assert "".join(pieces) + " ...\n----\n" in said
    assert said.splitlines()[-1].startswith("held-out ")
