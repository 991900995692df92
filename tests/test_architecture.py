"""The rooms of the source tree know each other in one direction only."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture import cpp_violations, python_violations, read_sources

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "python/dilated_attention_pytorch"


def test_python_imports_point_down() -> None:
    sources = read_sources(ROOT)
    assert f"{PYTHON}/functional.py" in sources
    assert python_violations(sources) == []


def test_includes_point_down() -> None:
    sources = read_sources(ROOT)
    assert {"csrc/pattern/plan.cpp", "csrc/ops/attention.cpp"} <= sources.keys()
    assert cpp_violations(sources) == []


@pytest.mark.parametrize(
    ("path", "line", "complaint"),
    [
        ("pattern/caches/entry.py", "from ...ops import attention", "pattern must not import ops"),
        (
            "pattern/caches/entry.py",
            "from ... import functional",
            "pattern must not import functional",
        ),
        ("ops/gather.py", "from ..functional import dilated_attention", "ops must not import"),
        (
            "ops/gather.py",
            "import dilated_attention_pytorch.ring.kernels",
            "ops must not import ring",
        ),
        ("ops/__init__.py", "from ..ring import plan", "ops must not import ring"),
        (
            "ring/plans/plan.py",
            "from ...functional import attend",
            "ring must not import functional",
        ),
        (
            "ring/plans/plan.py",
            "import torch.distributed as dist",
            "ring/group only",
        ),
        ("ring/plans/plan.py", "from torch import distributed", "ring/group only"),
        (
            "factory.py",
            "import torch\nx = torch.distributed.get_rank()",
            "ring/group only",
        ),
        (
            "functional.py",
            "from .dilated_attention import DilatedAttention",
            "must not import modules",
        ),
        (
            "decoding/rows.py",
            "from ..dilated_attention import DilatedAttention",
            "decoding must not import modules",
        ),
        ("ring/plans/plan.py", "from ...decoding import rows", "ring must not import decoding"),
        ("functional.py", "import torch\ny = torch.ops.dilated.attention", "ops only"),
        ("functional.py", "from torch.ops import dilated", "ops only"),
        ("dilated_attention.py", "from .factory import create", "modules must not import factory"),
        ("dilated_attention.py", "def f():\n    from . import factory", "modules must not import"),
        ("_load.py", "from .pattern.caches import entry", "foundation must not import pattern"),
    ],
)
def test_a_planted_import_is_found(path: str, line: str, complaint: str) -> None:
    names = [
        "factory",
        "functional",
        "dilated_attention",
        "_load",
        "ring/plans/plan",
        "ring/__init__",
        "decoding/__init__",
        "decoding/rows",
    ]
    names += [
        "ring/group/store",
        "ring/strategies/ring",
        "ops/gather",
        "ops/__init__",
        "pattern/caches/entry",
        "pattern/__init__",
    ]
    sources = {f"{PYTHON}/{name}.py": "import torch\n" for name in names}
    assert python_violations(sources) == []
    sources[f"{PYTHON}/{path}"] += line
    (violation,) = python_violations(sources)
    assert path in violation and complaint in violation


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("csrc/pattern/plan.cpp", "#include <torch/library.h>"),
        ("csrc/pattern/plan.cpp", "#include <cuda_runtime.h>"),
        ("csrc/pattern/plan.cpp", "#include <dilated/ops.h>"),
        ("csrc/pattern/plan.cpp", '#include "kernels/attention.h"'),
        ("csrc/pattern/plan.cpp", '#include "ops/checks.h"'),
        ("csrc/include/dilated/pattern.h", "#include <ATen/core/Tensor.h>"),
        ("csrc/include/dilated/pattern_layout.h", "#include <dilated/ops.h>"),
        ("csrc/kernels/attention.h", "#include <ATen/core/Tensor.h>"),
        ("csrc/kernels/cpu/attention.cpp", '#include "ops/attention.h"'),
        ("csrc/kernels/cpu/attention.cpp", '#include "kernels/cuda/launch.h"'),
        ("csrc/kernels/cpu/attention.cpp", '#include "../cuda/launch.h"'),
        ("csrc/kernels/cuda/portable/forward.cu", '#include "../../../ops/checks.h"'),
        ("csrc/kernels/cpu/attention.cpp", "void f(const at::Tensor&);"),
        ("csrc/kernels/cuda/portable/forward.cu", "#include <ATen/cuda/CUDAContext.h>"),
        ("csrc/kernels/cuda/portable/forward.cu", "  # include <c10/util/Half.h>"),
        ("csrc/kernels/cuda/sm90/tile.cuh", "#include <torch/all.h>"),
        ("csrc/kernels/cuda/sm90/shapes.h", "#include <cuda_runtime_api.h>"),
        ("csrc/kernels/cuda/choose.cpp", '#include "kernels/cuda/attention.h"'),
        ("csrc/bindings/module.cpp", "#include <torch/extension.h>"),
        ("csrc/bindings/module.cpp", "#include <dilated/ops.h>"),
        ("csrc/ops/attention.cpp", '#include "pattern/sieve.h"'),
        ("csrc/ops/attention.cpp", "#include <cuda_runtime.h>"),
    ],
)
def test_a_planted_include_is_found(path: str, line: str) -> None:
    sources = {path: "#include <vector>\n#include <dilated/pattern_layout.h>\n"}
    assert cpp_violations(sources) == []
    sources[path] += line
    (violation,) = cpp_violations(sources)
    assert path in violation


def test_comments_may_speak_of_tensors() -> None:
    sources = {"csrc/kernels/cpu/attention.cpp": "// no at::Tensor here\n/* at::Tensor */\n"}
    assert cpp_violations(sources) == []
