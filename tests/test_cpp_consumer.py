"""A C++ program outside the repository finds, compiles against and runs the installed library."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dilated_attention_pytorch import _load

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
EXAMPLE = Path(__file__).parent.parent / "examples" / "cpp"


def run(
    *command: str | Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_example_agrees_with_its_dense_computation(tmp_path: Path) -> None:
    shown = run(sys.executable, "-m", "dilated_attention_pytorch", "--cmake-prefix-path")
    prefix = shown.stdout.strip()
    configured = run("cmake", "-S", EXAMPLE, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={prefix}")
    assert configured.returncode == 0, configured.stderr
    built = run("cmake", "--build", tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    # Without an environment: the program finds libdilated and torch by itself.
    result = run(tmp_path / "example", env={})
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("passed\n")


def test_config_refuses_another_torch(tmp_path: Path) -> None:
    header = tmp_path / "torch" / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    version = {"MAJOR": 2, "MINOR": 1, "PATCH": 3}
    header.write_text("".join(f"#define TORCH_VERSION_{k} {v}\n" for k, v in version.items()))
    prefix = f"-DCMAKE_PREFIX_PATH={_load.cmake_prefix_path}"
    root = f"-DDILATED_TORCH_ROOT={tmp_path / 'torch'}"
    result = run("cmake", "-S", EXAMPLE, "-B", tmp_path / "build", prefix, root)
    message = " ".join(result.stderr.split())
    built = torch.__version__.split("+")[0]
    assert result.returncode != 0
    assert f"was compiled against torch {built}, but the torch at" in message
    assert "is 2.1.3: reinstall ring-dilated-attention with that torch" in message
