"""Reads imports and includes, and says which of them point the wrong way.

    factory, modules -> decoding -> functional -> ring -> ops -> [torch dispatcher] -> csrc/ops
    -> csrc/kernels

`pattern` is the floor: every room may use it and it knows none of them; `ragged` stands on it
beside `ops`. The functions take a mapping from path to source text, so that tests can also hand
them faulty files.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = "dilated_attention_pytorch"
Sources = Mapping[str, str]  # path below the repository's root -> text

# Higher rooms may import lower ones.
ROOMS = {"root": 7, "factory": 6, "integrations": 6, "modules": 5, "decoding": 4}
ROOMS |= {"functional": 3, "varlen": 3, "ring": 2, "ragged": 1, "ops": 1, "pattern": 0}
# The ring's own, likewise; its other files are above them.
RING_ROOMS = {"strategies": 1, "plans": 0, "group": 0}
# Files of the package that carry no attention: they may be imported by all and import no room.
FOUNDATION = {"_C", "_load", "_build_info"}


def read_sources(root: Path) -> dict[str, str]:
    """The package's Python files and all C++ and CUDA files."""
    patterns = [
        f"python/{PACKAGE}/**/*.py",
        *(f"csrc/**/*.{end}" for end in ("h", "cpp", "cuh", "cu")),
    ]
    paths = sorted(path for pattern in patterns for path in root.glob(pattern))
    return {path.relative_to(root).as_posix(): path.read_text() for path in paths}


def room_of(module: str) -> str:
    """The room of a module given by its dotted name within the package ("" for the package
    itself).
    """
    head = module.split(".")[0]
    if head == "":
        return "root"
    if head in FOUNDATION:
        return "foundation"
    return head if head in ROOMS else "modules"


def ring_room_of(module: str) -> tuple[str, int] | None:
    """The room of a module within ring/, and how high it is; None outside."""
    first, *rest = module.split(".")
    if first != "ring":
        return None
    room = rest[0] if rest and rest[0] in RING_ROOMS else "ring"
    return room, RING_ROOMS.get(room, 2)


def module_of(path: str) -> str:
    """python/dilated_attention_pytorch/ops/gather.py -> ops.gather; an __init__ is its package."""
    parts = Path(path).with_suffix("").parts[2:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.Module, module: str, is_package: bool) -> Iterator[str]:
    """Absolute dotted names that a module imports; `from a import b` gives a.b."""
    package = [PACKAGE, *module.split(".")] if module else [PACKAGE]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                keep = len(package) - node.level + (1 if is_package else 0)
                base = package[:keep] + base
            yield from (".".join([*base, alias.name]) for alias in node.names)


def attribute_chains(tree: ast.Module) -> Iterator[str]:
    """Dotted names in expressions, such as torch.ops.dilated."""
    for node in ast.walk(tree):
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if names and isinstance(node, ast.Name):
            yield ".".join([node.id, *reversed(names)])


def python_violations(sources: Sources) -> list[str]:
    """Imports that go up, torch.ops outside ops, torch.distributed outside ring/group."""
    found = []
    for path, text in sources.items():
        if not path.endswith(".py"):
            continue
        module = module_of(path)
        room = room_of(module)
        tree = ast.parse(text, path)
        imported = set(imported_modules(tree, module, path.endswith("__init__.py")))
        for name in sorted(imported):
            if not name.startswith(f"{PACKAGE}."):
                continue
            other = room_of(name.removeprefix(f"{PACKAGE}."))
            if other == "foundation":
                continue
            # Within the root module names such as __version__ read as modules; they are below
            # everything.
            is_module = any(
                candidate in sources for candidate in _files_of(name.removeprefix(f"{PACKAGE}."))
            )
            if not is_module:
                continue
            if room == "foundation" or ROOMS[other] > ROOMS[room]:
                found.append(f"{path}: {room} must not import {other} ({name})")
            here, there = ring_room_of(module), ring_room_of(name.removeprefix(f"{PACKAGE}."))
            if here and there and here[0] != there[0] and here[1] <= there[1]:
                found.append(f"{path}: ring's {here[0]} must not import {there[0]} ({name})")
        used = imported | set(attribute_chains(tree))
        if room not in ("ops", "foundation") and any(is_below(name, "torch.ops") for name in used):
            found.append(f"{path}: torch.ops is named in ops only")
        is_group = is_below(module, "ring.group")
        if not is_group and any(is_below(name, "torch.distributed") for name in used):
            found.append(f"{path}: torch.distributed is named in ring/group only")
    return found


def is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _files_of(module: str) -> list[str]:
    """The files that could hold a dotted name: a module, a package, or a name within either."""
    files = []
    parts = module.split(".")
    for length in (len(parts), len(parts) - 1):
        if length > 0:
            stem = "/".join(["python", PACKAGE, *parts[:length]])
            files += [f"{stem}.py", f"{stem}/__init__.py"]
    return files


def includes_of(text: str) -> Iterator[tuple[str, bool]]:
    """(header, quoted) of every #include."""
    for match in re.finditer(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', text, re.MULTILINE):
        yield match[2], match[1] == '"'


def is_standard(header: str) -> bool:
    """<vector>, <cstdint>: no directory and no suffix."""
    return "/" not in header and "." not in header


TORCH = ("torch/", "ATen/", "c10/", "caffe2/")
CUDA = ("cuda", "cub/", "thrust/", "cute/", "cutlass/", "mma.h", "nv/")
FLOOR = re.compile(r"dilated/(pattern\w*|export)\.h")
# Who chooses among the CUDA kernels is compiled and tested on machines without CUDA.
CHOICE = re.compile(r"kernels/(attention\.h|cuda/(choose\.(h|cpp)|(\w+/)?shapes\.h))")


def allowed(path: str, header: str, quoted: bool) -> bool:
    """Whether a C++ file may include a header. Quoted ones are relative to csrc or to the file's
    folder.
    """
    folder = path.removeprefix("csrc/").rsplit("/", 1)[0]
    is_relative = quoted and ("/" not in header or header.startswith("../"))
    local = posixpath.normpath(f"{folder}/{header}") if is_relative else header
    is_torch = header.startswith(TORCH)
    if path.startswith("csrc/pattern/") or FLOOR.fullmatch(path.removeprefix("csrc/include/")):
        return is_standard(header) or bool(FLOOR.fullmatch(header)) or local.startswith("pattern/")
    if CHOICE.fullmatch(path.removeprefix("csrc/")):
        ours = FLOOR.fullmatch(header) or CHOICE.fullmatch(local)
        return is_standard(header) or bool(ours)
    if path.startswith("csrc/kernels/cuda/") or path.endswith((".cu", ".cuh")):
        ours = bool(FLOOR.fullmatch(header)) or local.startswith("kernels/")
        return is_standard(header) or ours or header.startswith(CUDA)
    if path.startswith(
        "csrc/kernels/"
    ):  # at::parallel_for is all that the CPU's kernels know of torch
        ours = bool(FLOOR.fullmatch(header)) or (
            local.startswith("kernels/") and not local.startswith("kernels/cuda/")
        )
        return (
            is_standard(header)
            or header.endswith("intrin.h")
            or ours
            or header == "ATen/Parallel.h"
        )
    if path.startswith("csrc/bindings/"):
        ours = header.startswith("dilated/") and header not in (
            "dilated/ops.h",
            "dilated/dilated.h",
        )
        return is_standard(header) or ours or header.startswith("pybind11/")
    if path.startswith("csrc/include/"):
        return is_standard(header) or is_torch or header.startswith("dilated/")
    # csrc/ops
    ours = header.startswith("dilated/") or header == "dilated_build_config.h"
    ours = ours or header == "pthread.h"  # what a forked process begins with
    kernels = local.startswith(("ops/", "kernels/"))
    return is_standard(header) or is_torch or ours or (quoted and kernels)


def cpp_violations(sources: Sources) -> list[str]:
    """Includes that point the wrong way, and tensors below the ops."""
    found = []
    for path, text in sources.items():
        if not path.startswith("csrc/"):
            continue
        for header, quoted in includes_of(text):
            if not allowed(path, header, quoted):
                found.append(f"{path}: must not include {header}")
        code = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
        if not path.startswith(("csrc/ops/", "csrc/include/")) and re.search(
            r"\bat::Tensor\b", code
        ):
            found.append(f"{path}: at::Tensor is seen in csrc/ops only")
    return found
