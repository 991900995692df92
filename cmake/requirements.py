"""What an installed package depends on: the torch that it was compiled against, above all.

PyTorch keeps its C++ interface within a minor release only, so a wheel asks for that one. This is a
provider of scikit-build-core's dynamic metadata.
"""

import os
import re
from pathlib import Path

from query_torch import find_torch

OTHERS = ["typing-extensions>=4.10"]


def torch_requirement(folder: Path | None) -> str:
    """For the torch package or LibTorch in a folder; for no torch what the sources need."""
    if folder is None:
        return "torch>=2.11"
    header = (folder / "include/torch/headeronly/version.h").read_text()
    major, minor = (re.findall(rf"TORCH_VERSION_{part} +(\d+)", header)[0] for part in _PARTS)
    return f"torch=={major}.{minor}.*"


def dynamic_metadata(settings: object, project: object) -> dict[str, list[str]]:
    root = os.environ.get("DILATED_TORCH_ROOT")
    folder = Path(root) if root else find_torch()
    return {"dependencies": [torch_requirement(folder), *OTHERS]}


def dynamic_wheel(settings: object) -> dict[str, bool]:
    """What a wheel may say otherwise than the source distribution that it was built from."""
    return {"dependencies": True}


_PARTS = ("MAJOR", "MINOR")
