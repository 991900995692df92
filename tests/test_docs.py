"""The Python blocks of README.md and docs/ run, and their links lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str) -> Iterator[str]:
    """Each Python block, after as many empty lines as put its errors on the document's lines."""
    for match in BLOCK.finditer(text):
        yield "\n" * text.count("\n", 0, match.start(1)) + match[1]


WITH_CODE = [path for path in DOCUMENTS if BLOCK.search(path.read_text())]
NEEDS = {"docs/transformers.md": "transformers"}  # a package that the library does without


@pytest.fixture(autouse=True)
def restored_generator() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize("path", WITH_CODE, ids=name)
def test_python_blocks_run(path: Path) -> None:
    if package := NEEDS.get(name(path)):
        pytest.importorskip(package)
    namespace: dict[str, object] = {"__name__": path.stem}
    for block in blocks(path.read_text()):
        exec(compile(block, str(path), "exec"), namespace)


def test_the_documents_that_promise_code_have_some() -> None:
    assert {"README.md", "docs/design.md", "docs/migration.md", "docs/numerics.md"} <= {
        name(path) for path in WITH_CODE
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_to_files(path: Path) -> None:
    targets = {(path.parent / target).resolve() for target in LINK.findall(path.read_text())}
    # git has no empty folders: this one is there from the first committed measurement on.
    targets.discard(ROOT / "benchmarks" / "results")
    assert [str(target) for target in targets if not target.exists()] == []


def test_a_block_that_fails_names_its_line() -> None:
    text = "# Title\n\n```python\nx = 1\nassert x == 2\n```\n"
    with pytest.raises(AssertionError) as failed:
        for block in blocks(text):
            exec(compile(block, "document.md", "exec"), {})
    assert failed.traceback[-1].lineno + 1 == 5


def prose(text: str) -> str:
    """What remains without code and tables."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return "\n".join(line for line in text.splitlines() if not line.startswith("|"))


def test_the_readme_stays_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(prose(text).split()) <= 1300
    typed = re.sub(r"<!-- benchmarks -->.*<!-- /benchmarks -->", "", text, flags=re.DOTALL)
    rows = [line for line in typed.splitlines() if line.startswith("|")]
    headers = 2 * sum(set(line) <= set("| -") for line in rows)
    assert len(rows) - headers <= 25


def test_the_commands_of_the_readme_are_in_the_script() -> None:
    """What is done by hand and what the script does is the same."""
    text, script = (ROOT / "README.md").read_text(), (ROOT / "quickstart").read_text()
    for command in (
        "pip install torch==2.13.0",
        "scikit-build-core pybind11 ninja cmake",
        "pip install --verbose --no-build-isolation",
        "https://download.pytorch.org/whl/cpu",
        "python3 -m venv --system-site-packages .venv",
        "python examples/train_bytes.py",
        "python -m pytest tests",
    ):
        assert command in text and command in script, command
    assert "./quickstart train\n./quickstart test\n" in text


def test_a_release_has_one_version() -> None:
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    citation = (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert project is not None and newest is not None
    assert project[1] == newest[1]
    assert f"\nversion: {newest[1]}\ndate-released: {newest[2]}\n" in citation
