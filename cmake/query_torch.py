"""Prints the folder of the torch package to compile against.

Nothing is imported from torch: looking for files takes milliseconds, and works where a CUDA build
of torch can't be imported.
"""

import importlib.util
import site
import sys
from collections.abc import Iterator
from pathlib import Path


def site_packages() -> list[str]:
    """The environment's package folders, in the order in which Python looks into them.

    pip's build isolation takes them out of sys.path, so sys.path can't be asked.
    """
    folders = []
    base_is_visible = True
    if sys.prefix != sys.base_prefix:  # a virtual environment
        folders += site.getsitepackages([sys.prefix])
        settings = (Path(sys.prefix) / "pyvenv.cfg").read_text().lower()
        base_is_visible = "include-system-site-packages = true" in settings
    if base_is_visible:
        folders += [site.getusersitepackages(), *site.getsitepackages([sys.base_prefix])]
    return folders


def candidates() -> Iterator[Path]:
    """Where torch may be, best first."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    for folder in site_packages():
        yield Path(folder) / "torch"


def find_torch() -> Path | None:
    """The first candidate with C++ headers."""
    return next((path for path in candidates() if (path / "include" / "ATen").is_dir()), None)


if __name__ == "__main__":
    found = find_torch()
    if found is None:
        sys.exit(f"{sys.executable} has no torch package")
    print(found)
