"""How the library was built, when it refuses to load, and when the build refuses to start."""

import importlib
import importlib.util
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dilated_attention_pytorch import _C, _load

Configure = Callable[..., str]
ROOT = Path(__file__).parent.parent


def build(with_cuda: bool) -> SimpleNamespace:
    """As _build_info would be."""
    return SimpleNamespace(torch_version="2.11.0", with_cuda=with_cuda, cuda_version="13.0.88")


@pytest.mark.parametrize(
    "with_cuda, torch_version, torch_cuda",
    [
        (False, "2.11.0", None),
        (False, "2.11.1+cpu", None),
        (False, "2.11.0+cu130", "13.0"),
        (True, "2.11.0+cu130", "13.0"),
        (True, "2.11.0a0+git1234", "13.2"),
    ],
)
def test_same_minor_release_is_accepted(
    with_cuda: bool, torch_version: str, torch_cuda: str | None
) -> None:
    assert _load.mismatch(build(with_cuda), torch_version, torch_cuda) is None


@pytest.mark.parametrize(
    "with_cuda, torch_version, torch_cuda, reason",
    [
        (False, "2.12.0", None, "was compiled against torch 2.11.0, but torch 2.12.0 runs"),
        (False, "2.1.1", None, "was compiled against torch 2.11.0, but torch 2.1.1 runs"),
        (True, "2.11.0+cpu", None, "with CUDA 13.0.88, but torch 2.11.0+cpu has no CUDA"),
        (True, "2.11.0+cu128", "12.8", "with CUDA 13.0.88, but torch has CUDA 12.8"),
    ],
)
def test_another_torch_is_refused_with_both_versions(
    with_cuda: bool, torch_version: str, torch_cuda: str | None, reason: str
) -> None:
    found = _load.mismatch(build(with_cuda), torch_version, torch_cuda)
    assert found is not None
    assert reason in found


def test_import_under_another_torch_says_what_to_do() -> None:
    program = "import torch; torch.__version__ = '1.13.1'; import dilated_attention_pytorch"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode != 0
    error = result.stderr.splitlines()[-1]
    assert error.startswith("ImportError: dilated_attention_pytorch was compiled against torch")
    assert "but torch 1.13.1 runs" in error
    assert "pip install --no-build-isolation --no-deps --force-reinstall ." in error


def test_build_information_is_one_story() -> None:
    info = _load.build_info
    assert info.torch_version == _C.torch_version_built()
    assert torch.__version__.startswith(info.torch_version.rsplit(".", 1)[0])
    assert info.with_cuda == _C.built_with_cuda()
    assert info.with_cuda == bool(info.cuda_version) == bool(info.cuda_architectures)
    assert info.with_cuda != bool(info.cuda_reason)


def test_library_has_no_python_in_it() -> None:
    library = _load.library_path.read_bytes()
    assert b"libtorch_cpu.so" in library  # the names of what it links are there as text
    assert b"libtorch_python" not in library
    assert b"libpython" not in library


def test_nothing_installed_names_a_path_of_the_build() -> None:
    torch_folder = Path(torch.__file__).parent
    names = [str(ROOT).encode(), str(torch_folder).encode(), b"pip-build-env"]
    prefix = _load.library_path.parents[1]
    found = [path for path in prefix.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert _load.library_path in found
    for path in found:
        data = path.read_bytes()
        assert [name for name in names if name in data] == [], path


def test_the_installed_package_asks_for_the_torch_of_the_build() -> None:
    minor = ".".join(_load.build_info.torch_version.split(".")[:2])
    required = metadata.requires("ring-dilated-attention")
    assert required is not None and f"torch=={minor}.*" in required


@pytest.fixture
def requirements(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "cmake"))
    return importlib.import_module("requirements")


def test_a_wheel_asks_for_the_minor_release_of_its_torch(
    requirements: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = tmp_path / "include/torch/headeronly/version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 17\n")
    monkeypatch.setenv("DILATED_TORCH_ROOT", str(tmp_path))
    assert requirements.dynamic_metadata({}, {})["dependencies"][0] == "torch==2.17.*"
    assert requirements.torch_requirement(None) == "torch>=2.11"
    assert requirements.dynamic_wheel({}) == {"dependencies": True}


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Configures the repository with some options and returns what CMake said against it."""
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")

    def run(*options: str) -> str:
        command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DDILATED_BUILD_PYTHON=OFF"]
        command += [f"-DPython_EXECUTABLE={sys.executable}", *options]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode != 0, "CMake accepted it"
        return " ".join(result.stderr.split())

    return run


def test_with_cuda_must_be_one_of_three(configure: Configure) -> None:
    said = configure("-DDILATED_WITH_CUDA=MAYBE")
    assert 'DILATED_WITH_CUDA must be AUTO, ON or OFF; it is "MAYBE"' in said


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_cuda_with_a_torch_without_it_is_refused(configure: Configure) -> None:
    said = configure("-DDILATED_WITH_CUDA=ON")
    assert "DILATED_WITH_CUDA=ON, but the CUDA kernels can't be built" in said
    assert "is a build without CUDA" in said


def test_torch_root_without_torch_is_refused(configure: Configure, tmp_path: Path) -> None:
    said = configure(f"-DDILATED_TORCH_ROOT={tmp_path}")
    assert f"{tmp_path} holds no headers of torch >= 2.11" in said


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_the_build_says_how_long_cuda_takes(tmp_path: Path) -> None:
    """Against a torch whose CUDA libraries are only names, which configuring does not open."""
    real = Path(torch.__file__).parent
    fake = tmp_path / "torch"
    (fake / "lib").mkdir(parents=True)
    (fake / "include").symlink_to(real / "include")
    (fake / "lib" / "libtorch_cuda.so").touch()
    command = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(tmp_path / "build"),
        f"-DDILATED_TORCH_ROOT={fake}",
    ]
    command += ["-DDILATED_BUILD_PYTHON=OFF", "-DDILATED_WITH_CUDA=AUTO"]
    said = " ".join(subprocess.run(command, capture_output=True, text=True).stdout.split())
    assert re.search(
        r"dilated: nvcc [\d.]+ found: CUDA kernels for \S+, about \d+ minutes on", said
    )


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_torch_cuda_arch_list_is_translated(tmp_path: Path) -> None:
    script = tmp_path / "script.cmake"
    script.write_text(
        f'include("{ROOT}/cmake/cuda_archs.cmake")\n'
        "dilated_choose_cuda_archs()\n"
        'message("${CMAKE_CUDA_ARCHITECTURES}")\n'
    )

    def choose(torch_list: str) -> str:
        command = ["cmake", "-E", "env", "--unset=CUDAARCHS", f"TORCH_CUDA_ARCH_LIST={torch_list}"]
        command += ["cmake", "-P", str(script)]
        return subprocess.run(command, capture_output=True, text=True).stderr.strip()

    assert choose("") == "80;90a-real"
    assert choose("8.6 9.0a+PTX") == "86-real;90a"
    assert choose("8.0;12.0+PTX") == "80-real;120"
    assert 'TORCH_CUDA_ARCH_LIST: "Hopper" is not of the form' in choose("Hopper")


@pytest.mark.parametrize("own, system, expected", [(1, 1, "venv"), (0, 1, "base"), (0, 0, None)])
def test_build_isolation_finds_the_torch_that_will_run(
    own: bool, system: bool, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual environment with or without a torch of its own, with or without its base's."""
    query = importlib.util.spec_from_file_location("query_torch", ROOT / "cmake/query_torch.py")
    assert query is not None and query.loader is not None
    module = importlib.util.module_from_spec(query)
    query.loader.exec_module(module)
    for prefix in ["venv", "base"] if own else ["base"]:
        folder = Path(site.getsitepackages([str(tmp_path / prefix)])[0])
        (folder / "torch" / "include" / "ATen").mkdir(parents=True)
    (tmp_path / "venv").mkdir(exist_ok=True)
    flag = "true" if system else "false"
    (tmp_path / "venv" / "pyvenv.cfg").write_text(f"include-system-site-packages = {flag}\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # as pip's isolation does
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(tmp_path / "user"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "base"))
    found = module.find_torch()
    assert (None if found is None else found.relative_to(tmp_path).parts[0]) == expected
