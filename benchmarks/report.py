"""Writes the tables and pictures of speed in the documents, from the committed results.

    python -m benchmarks.bench report

Running it twice changes nothing.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import plots
from .cache_tables import CACHES_SECTIONS
from .decode import decode_section
from .faults import faults_section
from .plan import planning_section
from .readme_tables import Case, cpu_section, readme_section
from .results import RESULTS, ROOT, Document, Row
from .ring import ring_section
from .tables import (
    bounds_section,
    floors_section,
    measured,
    measurements_section,
    newest,
    summary_section,
)
from .workloads import WORKLOADS

# The columns that say what a row measures, of all benchmarks.
_IDENTITY = (
    *("workload", "causal", "impl", "strategy", "transport", "world_size", "cache"),
    *("pass", "protocol", "offsets", "where", "batch", "fault", "reads", "rank"),
)
_NOTHING = "No measurement is committed in [benchmarks/results]({up}benchmarks/results)."
_SPEED_WORKLOAD = "longnet-128k"


def load(folder: Path, name: str, device_type: str = "cuda") -> list[Document]:
    """The runs of a benchmark on one type of device, oldest first, those that belong together
    joined: of one commit, on one device and day.
    """
    paths = sorted(folder.glob(f"{name}-*.json"))
    documents = [json.loads(path.read_text()) | {"file": path.name} for path in paths]
    runs: dict[tuple[Any, ...], list[Document]] = {}
    for document in sorted(documents, key=lambda document: str(document["date"])):
        if document.get("device_type") == device_type:
            what = [document[key] for key in ("commit", "device", "driver")]
            key = (*what, document["date"][:10], document.get("threads"))
            runs.setdefault(key, []).append(document)
    return list(map(_join, runs.values()))


def _join(run: Sequence[Document]) -> Document:
    """A peer that could not run beside the others has a run of its own; what an earlier run
    measured stays, but for the run whose ceilings are taken, the one with the most rows.
    """
    largest = max(run, key=lambda document: len(document["rows"]))
    rows: dict[tuple[Any, ...], Row] = {}
    for document in (largest, *run) if largest.get("ceilings") else run:
        for row in document["rows"]:
            rows.setdefault(tuple(row.get(name) for name in _IDENTITY), row)
    return {**largest, "rows": list(rows.values())}


def replace_section(text: str, name: str, body: str) -> str:
    """Puts `body` between the comments `name` and `/name`; ValueError if they are not there."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"text must hold {begin} and then {end}, once each, got {text[:200]!r}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{body}\n{end}{rest.split(end)[1]}"


def sections(results: Path) -> dict[str, dict[str, str]]:
    """What is generated: file, section, text, which is empty where nothing was measured."""
    operations, on_cpu = load(results, "ops"), load(results, "ops", "cpu")
    caches = load(results, "caches")

    def text(make: Callable[..., str], *documents: Sequence[Document]) -> str:
        return make(*documents) if documents[0] else ""

    return {
        "README.md": {"benchmarks": text(readme_section, operations, on_cpu)},
        "docs/performance.md": {
            "summary": text(summary_section, operations),
            "bounds": text(bounds_section, operations),
            "floors": text(floors_section, operations),
            "measurements": text(measurements_section, operations),
            "cpu": text(cpu_section, on_cpu),
            "planning": text(planning_section, load(results, "plan", "cpu")),
        },
        "docs/ring.md": {
            "faults": text(
                faults_section, load(results, "faults", "cpu") + load(results, "faults")
            ),
            "measurements": text(ring_section, load(results, "ring")),
        },
        "docs/decoding.md": {"measurements": text(decode_section, load(results, "decode"))},
        "docs/caches.md": {
            name: make(caches[-1]) if caches else "" for name, make in CACHES_SECTIONS.items()
        },
    }


def draw(results: Path, docs: Path) -> None:
    operations, caches = load(results, "ops"), load(results, "caches")
    if (document := newest(operations, _SPEED_WORKLOAD)) is not None:
        case = Case(document, WORKLOADS[_SPEED_WORKLOAD], False)
        plots.draw_speed(case, docs / "speed.svg")
    if scaled := measured(operations, ("scale-N",)):
        plots.draw_lengths(scaled, docs / "figures")
    if caches:
        plots.draw_ratios(caches[-1], docs / "figures" / "caches-ratio.svg")
        plots.draw_splits(caches[-1], docs / "figures" / "caches-split.svg")


def main(root: Path = ROOT, say: Callable[[str], None] = print) -> None:
    results = root / RESULTS.relative_to(ROOT)
    for name, bodies in sections(results).items():
        before = after = (root / name).read_text()
        nothing = _NOTHING.format(up="" if name == "README.md" else "../")
        for section, body in bodies.items():
            after = replace_section(after, section, body or nothing)
        if after != before:
            (root / name).write_text(after)
        say(f"{name}: {'unchanged' if after == before else 'changed'}")
    if importlib.util.find_spec("matplotlib"):
        draw(results, root / "docs")
    else:
        say("matplotlib is not installed: the pictures stay as they are")
