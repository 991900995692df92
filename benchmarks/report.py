"""Writes the tables and pictures of speed in the documents, from the committed results.

    python -m benchmarks.bench report

Running it twice changes nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import plots
from .cache_tables import caches_sections
from .readme_tables import Line, cpu_section, readme_section
from .results import RESULTS, ROOT, Document, Row, read
from .ring_tables import ring_section
from .tables import (
    floors_section,
    measured,
    measurements_section,
    newest,
    planning_section,
    summary_section,
)

# The columns that say what a row measures, for files of which several may belong together.
_IDENTITY = {
    "ops": ("workload", "causal", "impl", "pass", "protocol"),
    "ring": ("workload", "causal", "strategy", "transport", "world_size", "pass"),
}
_STATE = ("clocks", "ceilings")  # of a device, as a run found it
_SPEED_WORKLOAD = "longnet-128k"


def load(folder: Path, name: str = "ops", device_type: str = "cuda") -> list[Document]:
    """The runs of a benchmark on one type of device, oldest first, those that belong together
    joined.

    Raises:
        ValueError: a file that is not what results.py describes.
    """
    documents = [d for d in read(folder, name) if d.get("device_type", "cuda") == device_type]
    return join(documents, _IDENTITY[name]) if name in _IDENTITY else documents


def join(documents: Sequence[Document], identity: Sequence[str]) -> list[Document]:
    """Runs of one commit on one device and day become one document, oldest first.

    A peer that could not run beside the others has a run of its own; what an earlier run measured
    stays, but for the run whose ceilings are taken, the one with the most rows, which comes first.
    identity: the columns that say what a row measures.
    """

    def identify(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in identity)

    runs: dict[tuple[Any, ...], list[Document]] = {}
    for document in documents:
        what = [document[name] for name in ("commit", "device", "driver")]
        key = (*what, document["date"][:10], document.get("threads"))
        runs.setdefault(key, []).append(document)

    def merge(run: list[Document]) -> Document:
        largest = max(run, key=lambda document: len(document["rows"]))
        rows: dict[tuple[Any, ...], Row] = {}
        first = [largest] if largest.get("ceilings") else []  # a ring's runs have none
        for document in (*first, *run):
            for row in document["rows"]:
                rows.setdefault(identify(row), row)
        state = {name: largest[name] for name in _STATE if name in largest}
        return {**run[0], **state, "rows": list(rows.values())}

    return [merge(run) for run in runs.values()]


def replace_section(text: str, name: str, body: str) -> str:
    """Puts `body` between the comments `name` and `/name`; ValueError if they are not there."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"text must hold {begin} and then {end}, once each, got {text[:200]!r}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{body}\n{end}{rest.split(end)[1]}"


def sections(results: Path) -> dict[str, dict[str, str]]:
    """What is generated: file, section, text."""
    operations, on_cpu = load(results), load(results, device_type="cpu")
    caches = load(results, "caches")
    return {
        "README.md": {"benchmarks": readme_section(operations, on_cpu)},
        "docs/performance.md": {
            "summary": summary_section(operations),
            "floors": floors_section(operations),
            "measurements": measurements_section(operations),
            "cpu": cpu_section(on_cpu),
            "planning": planning_section(read(results, "plan")),
        },
        "docs/ring.md": {"measurements": ring_section(load(results, "ring"))},
        "docs/caches.md": caches_sections(caches[-1] if caches else None),
    }


def update(path: Path, bodies: dict[str, str]) -> bool:
    """Rewrites the sections of one file; says whether anything changed."""
    text = changed = path.read_text()
    for name, body in bodies.items():
        changed = replace_section(changed, name, body)
    if changed != text:
        path.write_text(changed)
    return changed != text


def draw(results: Path, docs: Path) -> None:
    operations, caches = load(results), load(results, "caches")
    if (document := newest(operations, _SPEED_WORKLOAD)) is not None:
        plots.draw_speed(Line(document, _SPEED_WORKLOAD, False), docs / "speed.svg")
    if scaled := measured(operations, ("scale-N",)):
        plots.draw_lengths(scaled, docs / "figures")
    if caches:
        plots.draw_caches(caches[-1], docs / "figures")


def write(options: argparse.Namespace) -> None:
    main()


def main(root: Path = ROOT, say: Callable[[str], None] = print) -> None:
    results = root / RESULTS.relative_to(ROOT)
    for name, bodies in sections(results).items():
        say(f"{name}: {'changed' if update(root / name, bodies) else 'unchanged'}")
    if importlib.util.find_spec("matplotlib"):
        draw(results, root / "docs")
    else:
        say("matplotlib is not installed: the pictures stay as they are")
