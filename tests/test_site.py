"""The site's reference has every public name, and its extensions read what they are given."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import dilated_attention_pytorch as package
from dilated_attention_pytorch import ops, pattern
from dilated_attention_pytorch.integrations import torchscale

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference"
ENTRY = re.compile(r"^\.\. (?:auto\w+|operator|py:data):: ([\w.]+)", re.MULTILINE)
HEADER = re.compile(r"^\.\. cpp-header:: (\S+)", re.MULTILINE)
# Of a module that can't be imported without transformers.
TRANSFORMERS = ["DilatedCache", "attend", "mask_of", "register"]
# The ring's other names are for the package's own modules.
RING = ["ShardLayout", "Strategy", "Traffic", "shard", "shard_positions", "traffic", "unshard"]
PUBLIC = [*package.__all__, *ops.__all__, *pattern.__all__, *torchscale.__all__]
PUBLIC += TRANSFORMERS + RING
TEXTS = {path.name: path.read_text() for path in sorted(REFERENCE.glob("*.rst"))}


def test_every_public_name_has_one_entry() -> None:
    entries = [name.split(".")[-1] for text in TEXTS.values() for name in ENTRY.findall(text)]
    names = set(PUBLIC) - {"__version__"}
    assert sorted(names - set(entries)) == []
    assert sorted(name for name in names if entries.count(name) > 1) == []


def test_every_public_header_has_an_entry() -> None:
    entries = set(HEADER.findall(TEXTS["cpp.rst"]))
    folder = ROOT / "csrc" / "include"
    headers = {path.relative_to(folder).as_posix() for path in folder.rglob("*.h")}
    assert headers - entries == {"dilated/dilated.h", "dilated/export.h"}  # nothing of their own


def test_a_header_is_split_into_declarations(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sphinx.util.docutils")
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs" / "site"), *sys.path])
    from cpp_headers import INCLUDE, split_header

    text = """// What it is.
#pragma once
namespace dilated {

/// One thing.
struct Thing {
  int32_t size = 0;  // of it; {
};
/// Two
/// lines.
DILATED_API int twice(int number,
                      int other = 1);

}  // namespace dilated
"""
    about, found = split_header(text)
    assert about == "What it is.\n"
    assert [comment for comment, _ in found] == ["One thing.", "Two\nlines."]
    assert found[0][1].startswith("struct Thing {") and found[0][1].endswith("};")
    for path in INCLUDE.rglob("*.h"):
        declared = sum(
            declaration.count("DILATED_API") for _, declaration in split_header(path.read_text())[1]
        )
        assert declared == len(re.findall(r"^DILATED_API", path.read_text(), re.MULTILINE)), path
