"""examples/train_bytes.py as its users run it: a program of its own, small settings, real text."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "examples" / "train_bytes.py"
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "context": 256,
    "batch": 4,
    "width": 32,
    "layers": 1,
    "heads": 2,
    "segment-lengths": [32, 128],
    "dilation-rates": [1, 2],
    "dropout": 0.1,
    "steps": 48,
    "eval-every": 16,
    "sample": 8,
}


def as_options(settings: dict[str, Any]) -> list[str]:
    values = {name: v if isinstance(v, list) else [v] for name, v in settings.items()}
    return [word for name, v in values.items() for word in (f"--{name}", *map(str, v))]


SMALL = as_options(SETTINGS)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One module of the standard library, so that reading the text takes no time."""
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_bytes(Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_bytes())
    return path


# Tensors this small are computed faster by one thread than by threads that wait for each other.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(text: Path, folder: Path, *options: str) -> list[str]:
    files = ["--checkpoint", str(folder / "run.pt"), "--log", str(folder / "log.jsonl")]
    return [sys.executable, str(SCRIPT), "--text", str(text), *files, *options]


def run(text: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(text, folder, *options),
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
    )


def curve(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that nothing stops: its folder and its output."""
    folder = tmp_path_factory.mktemp("straight")
    done = run(text, folder, *SMALL)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def interrupt(text: Path, folder: Path, after_lines: int) -> int:
    """Starts a run, sends SIGINT (Ctrl-C) once its log has `after_lines` lines; its status."""
    with subprocess.Popen(
        command(text, folder, *SMALL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        log = folder / "log.jsonl"
        while process.poll() is None:
            if log.exists() and log.read_text().count("\n") >= after_lines:
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.001)
        process.communicate(timeout=300)
        return process.returncode


def test_held_out_bits_per_byte_fall_and_are_reported(straight: tuple[Path, str]) -> None:
    folder, output = straight
    records = curve(folder)
    assert [record["step"] for record in records] == list(range(1, SETTINGS["steps"] + 1))
    held_out = [record["held_out"] for record in records if "held_out" in record]
    assert len(held_out) == 3
    assert held_out[-1] < held_out[0] - 0.1
    assert held_out[-1] < 5.5  # bytes cost 8 bits where nothing has been learnt
    last = output.splitlines()[-1]
    assert f"held-out {held_out[-1]:.3f} bits per byte" in last
    assert "unigram entropy" in last and "tokens per second" in last


def test_interrupted_run_resumes_to_the_same_curve(
    text: Path, straight: tuple[Path, str], tmp_path: Path
) -> None:
    assert interrupt(text, tmp_path, after_lines=2) == 130
    stopped = curve(tmp_path)
    assert 2 <= len(stopped) < SETTINGS["steps"], "the run ended before the interrupt"
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert state["step"] == len(stopped)
    resumed = run(text, tmp_path, "--resume", "--device", "cpu", "--sample", "0")
    assert resumed.returncode == 0, resumed.stderr
    assert curve(tmp_path) == curve(straight[0])


def test_resume_names_the_option_that_contradicts(
    text: Path,
    straight: tuple[Path, str],
    train_bytes: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_bytes(*command(text, straight[0], "--resume", "--device", "cpu", "--width", "64")[2:])
    assert "--width must be 32 to resume" in capsys.readouterr().err


def test_resume_on_another_text_is_refused(
    straight: tuple[Path, str],
    train_bytes: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_bytes(*command(SCRIPT, straight[0], "--resume", "--device", "cpu")[2:])
    assert "was trained on, got another" in capsys.readouterr().err


def test_resume_without_a_checkpoint_is_refused(
    text: Path, tmp_path: Path, train_bytes: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_bytes(*command(text, tmp_path, "--resume")[2:])
    assert "--checkpoint must be a file where a run is resumed, got" in capsys.readouterr().err


def test_context_beyond_the_text_is_refused(
    text: Path, tmp_path: Path, train_bytes: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_bytes(*command(text, tmp_path, "--device", "cpu", "--context", "1000000000")[2:])
    assert "--context must be below" in capsys.readouterr().err
    assert not (tmp_path / "run.pt").exists()


def test_help_explains_every_option(
    train_bytes: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        train_bytes("--help")
    shown = capsys.readouterr().out
    settings = sys.modules["run_settings"]
    for field in dataclasses.fields(settings.Config):
        assert "--" + field.name.replace("_", "-") in shown
        assert field.metadata["help"].split()[0] in shown
    for option in ("--resume", "--checkpoint", "--log", "--text", "--device", "--sample"):
        assert option in shown


def test_sharded_over_processes_it_learns_the_same(text: Path, tmp_path: Path) -> None:
    """The loss curve of two processes, each with half of every window, is that of one."""
    settings = as_options({**SETTINGS, "dropout": 0.0, "steps": 12, "eval-every": 6})
    curves = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        program, *arguments = command(text, folder, *settings)
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        # Without "--" torchrun takes the program's --log for one of its own options.
        done = subprocess.run(
            [program, *launch, "--", *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            env=ENVIRONMENT,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].startswith("held-out ")
        curves.append(curve(folder))
    assert len(curves[0]) == len(curves[1]) == 12
    for one, two in zip(*curves, strict=True):
        assert one.keys() == two.keys()
        assert all(two[name] == pytest.approx(one[name], abs=2e-4) for name in one)


def test_torchrun_passes_ctrl_c_on_and_a_checkpoint_is_saved(text: Path, tmp_path: Path) -> None:
    program, *arguments = command(text, tmp_path, *as_options({**SETTINGS, "steps": 5000}))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": ENVIRONMENT}
    with subprocess.Popen([program, *launch, *arguments], **quiet) as process:
        log = tmp_path / "log.jsonl"
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 1
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert state["step"] == len(curve(tmp_path))
