"""A C++ program outside the repository finds, compiles against and runs the installed library."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dilated_attention_pytorch import MultiheadDilatedAttention, _load

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
EXAMPLE = Path(__file__).parent.parent / "examples" / "cpp"


def run(
    *command: str | Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=env)


def build(source: Path, folder: Path, *options: str) -> Path:
    """The program `example` of a CMake project, built as README.md says."""
    shown = run(sys.executable, "-m", "dilated_attention_pytorch", "--cmake-prefix-path")
    prefix = f"-DCMAKE_PREFIX_PATH={shown.stdout.strip()}"
    configured = run("cmake", "-S", source, "-B", folder, prefix, *options)
    assert configured.returncode == 0, configured.stderr
    built = run("cmake", "--build", folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "example"


def project(folder: Path, program: str) -> Path:
    """The example's project with another program in it."""
    folder.mkdir()
    shutil.copy(EXAMPLE / "CMakeLists.txt", folder)
    (folder / "main.cpp").write_text(program)
    return folder


def test_example_agrees_with_its_dense_computation(tmp_path: Path) -> None:
    # Without an environment: the program finds libdilated and torch by itself.
    result = run(build(EXAMPLE, tmp_path), env={})
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("passed\n")


def test_one_include_is_enough_for_the_block_of_the_readme(tmp_path: Path) -> None:
    readme = (EXAMPLE.parents[1] / "README.md").read_text()
    include, block = re.findall(r"^```cpp\n(#.*?)\n\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)[
        0
    ]
    assert include == "#include <dilated/dilated.h>"
    tensors = "const auto query = at::randn({1, 5000, 8, 64}), key = query, value = query;\n"
    check = "return lse.isfinite().all().item<bool>() ? 0 : 1;\n"
    program = f"{include}\nint main() {{\n{tensors}{block}{check}}}\n"
    example = build(project(tmp_path / "source", program), tmp_path / "build")
    assert run(example, env={}).returncode == 0


def test_a_program_that_only_loads_a_model_has_the_operators(tmp_path: Path) -> None:
    """It names nothing of libdilated, which linkers that keep only what is named would drop."""
    program = """#include <ATen/core/dispatch/Dispatcher.h>
int main() {
  return c10::Dispatcher::singleton().findSchema({"dilated::attention", ""}) ? 0 : 1;
}
"""
    source = project(tmp_path / "source", program)
    example = build(source, tmp_path / "build", "-DCMAKE_EXE_LINKER_FLAGS=-Wl,--as-needed")
    assert run(example, env={}).returncode == 0


# Should it die, it says in which functions, and has written what it computed before.
COMPILED = """#include <c10/util/signal_handler.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <iostream>

int main(int, char** arguments) {
  c10::FatalSignalHandler::getInstance().setPrintStackTracesOnFatalSignal(true);
  const c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  for (const int64_t seq_len : {70, 33}) {
    const auto x = torch::linspace(-1, 1, seq_len * 16).view({1, seq_len, 16});
    const auto out = model.run({x})[0].to(torch::kFloat64);
    std::cout << out.square().sum().item<double>() << std::endl;
  }
}
"""


class Causal(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = MultiheadDilatedAttention(16, 4, [16, 64], [1, 4])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x, is_causal=True)[0]
        return out


def torch_runs_what_it_compiles(package: Path) -> bool:
    """A layer of torch's, in a process without this library."""
    exported = torch.export.export(torch.nn.Linear(16, 16).eval(), (torch.zeros(1, 16),))
    torch._inductor.aoti_compile_and_package(exported, package_path=str(package))
    program = "import sys, torch; torch._inductor.aoti_load_package(sys.argv[1])"
    return run(sys.executable, "-c", program, package).returncode == 0


def test_a_program_runs_a_layer_that_aotinductor_compiled(tmp_path: Path) -> None:
    model = Causal().eval()
    length = torch.export.Dim("length", min=8, max=4096)
    exported = torch.export.export(
        model, (torch.zeros(1, 64, 16),), dynamic_shapes={"x": {1: length}}
    )
    package = tmp_path / "model.pt2"
    # Else torch assembles the weights, and the model asks for an executable stack.
    options = {"aot_inductor.use_consts_asm_build": False}
    torch._inductor.aoti_compile_and_package(
        exported, package_path=str(package), inductor_configs=options
    )
    example = build(project(tmp_path / "source", COMPILED), tmp_path / "build")
    result = run(example, package)
    if result.returncode != 0 and not torch_runs_what_it_compiles(tmp_path / "linear.pt2"):
        pytest.skip("torch alone doesn't run here what AOTInductor compiles")
    assert result.returncode == 0, result.stdout + result.stderr
    for n, given in zip((70, 33), result.stdout.split(), strict=True):
        x = torch.linspace(-1, 1, n * 16).view(1, n, 16)
        expected = model(x).double().square().sum().item()
        assert float(given) == pytest.approx(expected, rel=1e-3)


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
