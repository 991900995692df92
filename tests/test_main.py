"""`python -m dilated_attention_pytorch`: the report, the version, `plan`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

import dilated_attention_pytorch as package
from dilated_attention_pytorch import _C, __main__, _load
from dilated_attention_pytorch.pattern import Pattern, PatternSpec, make_branches
from dilated_attention_pytorch.report import report

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The program with some arguments; what it prints."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        __main__.main()
        return capsys.readouterr().out

    return call


def test_the_report_says_what_a_bug_report_needs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DILATED_SHARED_MEMORY_BYTES", "101376")
    text = run()
    assert text == report() + "\n"
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert lines["package"] == f"ring-dilated-attention {package.__version__}"
    assert lines["torch"] == f"{_C.torch_version_built()} at build time, {torch.__version__} now"
    assert _C.cpu_instruction_set() in lines["CPU"]
    assert f"{torch.get_num_threads()} threads" in lines["CPU"]
    assert "DILATED_SHARED_MEMORY_BYTES=101376" in lines["settings"]
    assert lines["library"] == str(_load.library_path)
    assert lines["GPUs"].startswith("none") != torch.cuda.is_available()


def test_the_version_is_the_one_of_the_distribution(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert package.__version__ == metadata.version("ring-dilated-attention")
    with pytest.raises(SystemExit, match="0"):
        run("--version")
    assert capsys.readouterr().out == f"{package.__version__}\n"


def test_the_instruction_set_is_one_that_the_kernels_have() -> None:
    assert _C.cpu_instruction_set() in {"baseline", "avx2", "avx512"}


def test_plan_counts_as_the_pattern_does_and_draws(run: Run) -> None:
    branches = ("--segment-lengths", "128", "1024", "--dilation-rates", "1", "4")
    text = run("plan", "--seq-len", "3000", *branches, "--heads", "4", "--causal")
    spec = PatternSpec(3000, make_branches([128, 1024], [1, 4]), "interleaved", 4, 4, True)
    numbers = Pattern.plan(spec).report()
    for name in ("distinct", "nominal", "computed", "bytes", "tiles"):
        assert f"{numbers[name]:,} " in text, name
    drawing = text.split("keys across:\n\n")[1].splitlines()
    assert len(drawing) == 32 and drawing[0].strip() and len(drawing[-1]) <= 64


def test_plan_suggests_branches(run: Run) -> None:
    assert "segments of [2048, 8192], rates [1, 4]" in run("plan", "--seq-len", "5000")


def test_plan_writes_a_picture(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, begin in (
        ("pattern.svg", b"<?xml"),
        ("pattern", b"\x89PNG"),
        ("pattern.", b"\x89PNG"),
    ):
        path = tmp_path / name
        assert f"drawn into {path}\n" in run("plan", "--seq-len", "500", "--output", str(path))
        assert path.read_bytes().startswith(begin)


@pytest.mark.parametrize("arguments", [["plan", "--seq-len", "500"], []])
def test_a_closed_pipe_ends_it_without_a_word(arguments: list[str]) -> None:
    command = [sys.executable, "-m", package.__name__, *arguments]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seq-len 0", "seq_len must be at least 1 and below 2^31 - 1, got 0"),
        ("--seq-len 9 --segment-lengths 4", "--segment-lengths and --dilation-rates must be given"),
        (
            "--seq-len 9 --segment-lengths 0 --dilation-rates 1",
            "segment_lengths must be positive and below 2^63, got 0",
        ),
        ("--seq-len 9 --heads 0", "heads"),
        ("--seq-len 9 --kv-heads 3", "kv_heads must be positive and divide heads, 8, got 3"),
        ("--seq-len 9 --head 8", "head must be at least 0 and below 8, got 8"),
        ("", "the following arguments are required: --seq-len"),
        ("--seq-len many", "argument --seq-len: invalid int value: 'many'"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(
    arguments: str, message: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("plan", *arguments.split())
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("with_cuda", "capability", "reason"),
    [
        (False, (9, 0), "this build has no CUDA kernels (nvcc was not found)"),
        (True, (7, 5), "the kernels need sm_80 or later, and it is of sm_75"),
        (True, (8, 0), None),
    ],
)
def test_why_a_gpu_can_not_be_used(
    with_cuda: bool,
    capability: tuple[int, int],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_load.build_info, "with_cuda", with_cuda)
    monkeypatch.setattr(_load.build_info, "cuda_reason", "nvcc was not found")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert package.cuda_kernels_missing() == reason
