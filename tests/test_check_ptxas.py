"""cmake/check_ptxas.py finds spills and serialized wgmmas in ptxas's own words."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "cmake" / "check_ptxas.py"

CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z6kernelPf' for 'sm_80'
ptxas info    : Function properties for _Z6kernelPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 368 bytes cmem[0]
"""
SPILL = CLEAN.replace("sm_80", "sm_90a").replace(
    "0 bytes spill stores, 0 bytes spill loads", "16 bytes spill stores, 24 bytes spill loads"
)
SERIALIZED = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are"
    " serialized due to non wgmma instructions defining accumulator registers of a wgmma between"
    " start and end of the pipeline stage in the function '_Z6kernelPf'\n"
)


def run(log: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "log").write_text(log)
    command = [sys.executable, str(SCRIPT), str(folder / "log")]
    return subprocess.run(command, capture_output=True, text=True)


def test_clean_log_passes(tmp_path: Path) -> None:
    result = run(CLEAN, tmp_path)
    assert result.returncode == 0
    assert "1 kernels, 0 findings" in result.stdout


@pytest.mark.parametrize("code", range(7510, 7517))
def test_serialized_wgmma_fails(code: int, tmp_path: Path) -> None:
    result = run(CLEAN + SERIALIZED.replace("7510", str(code)), tmp_path)
    assert result.returncode == 1
    assert f"C{code}" in result.stdout


def test_spill_fails_and_names_the_kernel(tmp_path: Path) -> None:
    result = run(CLEAN + SPILL, tmp_path)
    assert result.returncode == 1
    assert "_Z6kernelPf for sm_90a: 16 bytes spill stores, 24 bytes spill loads" in result.stdout
    assert "2 kernels, 1 findings" in result.stdout


def test_log_without_kernels_fails(tmp_path: Path) -> None:
    result = run("ninja: no work to do.\n", tmp_path)
    assert result.returncode == 1
    assert "no kernel" in result.stdout
