"""Prints the folder of the torch package to compile against.

Nothing is imported from torch: looking for files takes milliseconds, and works where a CUDA build
of torch can't be imported.
"""

import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path


def candidates() -> Iterator[Path]:
    """Where torch may be, best first."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    # pip's build isolation hides the environment's packages from sys.path, not from sysconfig.
    yield Path(sysconfig.get_path("platlib")) / "torch"


def find_torch() -> Path | None:
    """The first candidate with C++ headers."""
    return next((path for path in candidates() if (path / "include" / "ATen").is_dir()), None)


if __name__ == "__main__":
    found = find_torch()
    if found is None:
        sys.exit(f"{sys.executable} has no torch package")
    print(found)
