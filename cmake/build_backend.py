"""The build backend: scikit-build-core, with torch as a requirement only where none is installed.

The library has to be compiled against the torch that will run it. Were torch simply listed in
pyproject.toml, build isolation would fetch the newest one and compile against that, whatever is
installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from query_torch import find_torch
from scikit_build_core import build as base
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, str | list[str]] | None


def missing_torch() -> list[str]:
    return [] if find_torch() else ["torch>=2.11"]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return base.get_requires_for_build_wheel(config_settings) + missing_torch()


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return base.get_requires_for_build_editable(config_settings) + missing_torch()
