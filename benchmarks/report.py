"""Writes the tables and plots of speed in the documents, from the committed results.

    python -m benchmarks.report

README.md and docs/ring.md get their tables, docs/performance.md its sections, docs/figures its
plots. Running it twice changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import schema
from .environment import RESULTS, ROOT
from .plots import draw
from .ring_tables import ring_section
from .tables import (
    Document,
    floors_section,
    measured,
    measurements_section,
    planning_section,
    readme_section,
)

# The columns that say what a row measures, for files of which several may belong together.
_IDENTITY = {
    "ops": ("workload", "causal", "impl", "pass", "protocol"),
    "ring": ("workload", "causal", "strategy", "transport", "world_size", "pass"),
}

_STATE = ("clocks", "ceilings")  # of a device, as a run found it


def load(folder: Path, prefix: str = "ops") -> list[Document]:
    """The results files of GPU runs (ops, ring) or of planning (plan), oldest first.

    Raises:
        ValueError: a file that is not what schema.py describes.
    """
    documents = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{prefix}-*.json"))]
    if prefix == "ops":
        for document in documents:
            schema.check(document)
    if prefix in _IDENTITY:
        documents = [d for d in documents if d.get("device_type", "cuda") == "cuda"]
        return join(sorted(documents, key=_date), _IDENTITY[prefix])
    return sorted(documents, key=_date)


def join(documents: Sequence[Document], identity: Sequence[str]) -> list[Document]:
    """Runs of one commit on one device and day become one document, oldest first.

    A peer that could not run beside the others has a run of its own; what an earlier run measured
    stays, but for the run whose ceilings are taken, the one with the most rows, which comes first.
    identity: the columns that say what a row measures.
    """

    def identify(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in identity)

    runs: dict[tuple[str, ...], list[Document]] = {}
    for document in documents:
        key = (document["commit"], document["device"], document["driver"], _date(document)[:10])
        runs.setdefault(key, []).append(document)

    def merge(run: list[Document]) -> Document:
        largest = max(run, key=lambda document: len(document["rows"]))
        rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        first = [largest] if largest.get("ceilings") else []  # a ring's runs have none
        for document in (*first, *run):
            for row in document["rows"]:
                rows.setdefault(identify(row), row)
        state = {name: largest[name] for name in _STATE if name in largest}
        return {**run[0], **state, "rows": list(rows.values())}

    return [merge(run) for run in runs.values()]


def _date(document: Document) -> str:
    return str(document["date"])


def replace_section(text: str, name: str, body: str) -> str:
    """Puts `body` between the comments `name` and `/name`; ValueError if they are not there."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the text must hold {begin} and then {end}, once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{body}\n{end}{rest.split(end)[1]}"


def section(text: str, name: str) -> str:
    """What stands between the comments `name` and `/name`."""
    return text.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def sections(results: Path) -> dict[str, dict[str, str]]:
    """What is generated: file, section, text."""
    operations, plans = load(results), load(results, "plan")
    return {
        "README.md": {"benchmarks": readme_section(operations)},
        "docs/performance.md": {
            "floors": floors_section(operations),
            "measurements": measurements_section(operations),
            "planning": planning_section(plans),
        },
        "docs/ring.md": {"measurements": ring_section(load(results, "ring"))},
    }


def update(path: Path, bodies: dict[str, str]) -> bool:
    """Rewrites the sections of one file; says whether anything changed."""
    text = changed = path.read_text()
    for name, body in bodies.items():
        changed = replace_section(changed, name, body)
    if changed != text:
        path.write_text(changed)
    return changed != text


def main(root: Path = ROOT, say: Callable[[str], None] = print) -> None:
    results = root / RESULTS.relative_to(ROOT)
    for name, bodies in sections(results).items():
        say(f"{name}: {'changed' if update(root / name, bodies) else 'unchanged'}")
    operations = load(results)
    scaled = measured(operations, ("scale-N",))
    if scaled:
        draw(scaled, root / "docs" / "figures")


if __name__ == "__main__":
    main()
